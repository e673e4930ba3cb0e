"""One process at a time in a folder."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from absl import logging


@contextlib.contextmanager
def alone(folder: Path, *, wait: bool) -> Iterator[None]:
    """Keeps other processes out of a folder; one that is killed lets go.

    Args:
        wait: until a process that is there has left.
    Raises:
        BlockingIOError: one is there, and not to be waited for.
        OSError: nothing can be written to the folder.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            logging.info("waiting for another process that is at work in %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logging.warning("%s has no locks (%s): let no other process work there meanwhile", folder, error)
        yield
