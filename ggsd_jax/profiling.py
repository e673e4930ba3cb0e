"""A trace of some training steps, for TensorBoard's profile plugin or https://ui.perfetto.dev."""

from pathlib import Path
from typing import Any

import jax
from absl import logging

SKIPPED = 5  # the first steps compile
TRACED = 5


class StepTrace:
    """Traces `TRACED` steps of a sitting, after `SKIPPED` ones, into `folder`; does nothing where that is None.

    The trace is `folder`/plugins/profile/<time>/: `*.xplane.pb` for TensorBoard, `perfetto_trace.json.gz`.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._steps = 0  # begun

    def before_step(self, state: Any) -> None:
        """To be called before each step with what the one before returned, which may still be being computed."""
        if self._folder is None:
            return
        if self._steps == SKIPPED:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
        elif self._steps == SKIPPED + TRACED:
            self._stop(state)
        self._steps += 1

    def close(self, state: Any) -> None:
        """Ends a trace that still runs; says so where none was begun."""
        if self._folder is None:
            return
        if self._steps <= SKIPPED:
            logging.warning("no profile: only %d steps were left, %d are needed", self._steps, SKIPPED + 1)
        elif self._steps <= SKIPPED + TRACED:
            self._stop(state)

    def _stop(self, state: Any) -> None:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        logging.info("trace of %d steps written to %s", self._steps - SKIPPED, self._folder)
