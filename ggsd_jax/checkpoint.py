"""Orbax checkpoints: the whole training state to go on from, and parameters only to ship.

Of several processes the first writes, and each reads for itself: none waits for another in here.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from ggsd_jax import hosts

MODEL_FILE = "model.json"


def manager(directory: Path, keep: int) -> ocp.CheckpointManager:
    """Manager of the training states in `directory`: the newest two, and the one of step `keep` for good.

    A state is written under a temporary name and renamed when whole, so a killed run leaves only good ones.
    """
    directory.mkdir(parents=True, exist_ok=True)
    policies = [checkpoint_managers.LatestN(2), checkpoint_managers.CustomSteps([keep])]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=hosts.is_first(),
        read_only=not hosts.is_first(),
        enable_async_checkpointing=False,
        create=False,
        multiprocessing_options=_alone(),
    )
    return ocp.CheckpointManager(directory.resolve(), options=options)


def save(mngr: ocp.CheckpointManager, step: int, state: PyTree) -> None:
    """Writes the state reached after `step` steps; a state of that step which is there already stays.

    Raises:
        OSError: it cannot be written.
    """
    if hosts.is_first() and step not in mngr.all_steps():
        with _written(Path(mngr.directory) / str(step)):
            mngr.save(step, args=ocp.args.StandardSave(state))


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """Turns whatever Orbax and TensorStore raise where a disk is full, or gone, into an OSError that names the file."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{path} could not be written; is the disk full? ({_summary(error)})") from error


def _summary(error: Exception) -> str:
    """The first line of what an exception says."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def restore(mngr: ocp.CheckpointManager, step: int, like: PyTree) -> PyTree:
    """The state saved at `step`, as host arrays in the structure of `like`.

    Raises:
        ValueError: the saved state has other shapes or names than `like` (another network or optimizer), or its files
            are incomplete or damaged.
    """
    folder = mngr.directory / str(step)
    try:
        state = mngr.restore(step, args=ocp.args.StandardRestore(jax.tree.map(jnp.asarray, like)))
    except ValueError as error:
        raise ValueError(
            f"{folder} does not hold a state of this configuration; use another --workdir. Or it is damaged: delete it "
            f"to go on from the one before. {error}"
        ) from error
    except Exception as error:  # Orbax and TensorStore have many ways to meet half a copy
        raise ValueError(f"{folder} is damaged: delete it to go on from the one before ({_summary(error)})") from error
    return jax.tree.map(np.asarray, state)


def restore_end_of_stage1(directory: Path, step: int, like: PyTree) -> PyTree:
    """The state that another run's checkpoint folder keeps of the end of its stage 1, which must be at `step`.

    Raises:
        FileNotFoundError: there is none of that step.
    """
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=_alone())
    with ocp.CheckpointManager(directory.resolve(), options=options) as mngr:
        if step not in mngr.all_steps():
            raise FileNotFoundError(
                f"{directory} has no state of step {step}, the end of stage 1 of this configuration; it has "
                f"{sorted(mngr.all_steps())}. `stage1_from` must name a run with the same stage 1"
            )
        return restore(mngr, step, like)


def save_model(directory: Path, variables: PyTree, info: dict) -> None:
    """Writes `variables` (parameters and batch-norm statistics) and `info` as a folder that can be shipped.

    Raises:
        OSError: they cannot be written.
    """
    if not hosts.is_first():
        return
    temporary = directory.with_name(directory.name + ".tmp").resolve()
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _written(directory), ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
            checkpointer.save(temporary / "variables", jax.tree.map(np.asarray, variables))
        (temporary / MODEL_FILE).write_text(json.dumps(info | {"files": _checksums(temporary / "variables")}, indent=1))
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_model(directory: Path) -> tuple[PyTree, dict]:
    """Reads what `save_model` wrote: `(variables, info)`, the variables as NumPy arrays.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: files of it are missing or damaged.
    """
    path = directory / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no model ({MODEL_FILE} is missing); name a run's work directory or its model/ folder"
        )
    try:
        info = json.loads(path.read_text())
        checksums = dict(info.pop("files", {}))  # none: whoever made the folder left it out
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); copy or export the model again") from error
    saved = (directory / "variables").resolve()
    for name, checksum in checksums.items():
        if not (saved / name).is_file() or zlib.crc32((saved / name).read_bytes()) != checksum:
            raise ValueError(
                f"{saved}: the weights are incomplete or damaged, {name} is not as it was written; copy or export the "
                "model again"
            )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_alone()) as checkpointer:
        try:
            tree = checkpointer.metadata(saved).item_metadata.tree
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return checkpointer.restore(saved, restore_args=kinds), info
        except Exception as error:  # Orbax and TensorStore have many ways to meet half a copy
            raise ValueError(
                f"{saved}: the weights are incomplete or damaged; copy or export the model again ({error})"
            ) from error


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of every file in a folder, by its path from there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): zlib.crc32(file.read_bytes()) for file in files}


def _alone() -> ocp.options.MultiprocessingOptions:
    return ocp.options.MultiprocessingOptions(primary_host=hosts.index(), active_processes={hosts.index()})
