"""What a run tells of its steps: a progress bar, a line of JSON every so many, the same as TensorBoard events."""

import json
import math
import os
import resource
import time
from pathlib import Path

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from ggsd_jax import hosts


class NonFiniteError(RuntimeError):
    """A loss or a gradient stopped being a number."""


class StepLog:
    """Collects what the steps yield and writes the means; of several processes, the first writes for all.

    Args:
        workdir: where `MetricLog` writes.
        start, total: the step a run goes on from, and its last.
    """

    def __init__(self, workdir: Path, start: int, total: int):
        first = hosts.is_first()
        self._log = MetricLog(workdir, start) if first else None
        self._bar = tqdm(
            total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=1.0, disable=not first
        )
        self._begin()

    def _begin(self) -> None:
        self._clock, self._waited, self._rows, self._pending = time.monotonic(), 0.0, 0, []

    def add(self, stage: str, terms: dict, rows: int, waited: float) -> None:
        """Takes note of a step, which may still be running.

        Args:
            stage: what the step belongs to, for the progress bar.
            terms: arrays [R], equal on all replicas; "voxels" is their number in the whole batch.
            rows: what the whole batch has room for.
            waited: seconds that the batch made the step wait.
        """
        self._pending.append(terms)
        self._rows += rows
        self._waited += waited
        self._bar.set_description(stage, refresh=False)
        self._bar.update()

    def write(self, step: int, values: dict[str, int | float]) -> None:
        """Logs, under the number of the last step, `values` and the means since the last call.

        Raises:
            NonFiniteError: a term is not a number; names it and the step.
        """
        steps = [{name: float(value[0]) for name, value in terms.items()} for terms in jax.device_get(self._pending)]
        for offset, terms in enumerate(steps):
            for name, value in terms.items():
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"step {step - len(steps) + offset + 1}: {name} is {value}; training stopped, every checkpoint "
                        "is from before it. Try a lower optimizer.learning_rate, or look at the step's features"
                    )
        seconds = max(time.monotonic() - self._clock, 1e-9)
        means = {name: float(np.mean([terms[name] for terms in steps])) for name in steps[0]}
        voxels = means.pop("voxels") * len(steps)
        speed = {
            "voxels_per_second": voxels / seconds,
            "data_wait_share": self._waited / seconds,
            "padding_share": 1.0 - voxels / self._rows,
            "peak_memory_gb": peak_memory() / 1e9,
        }
        if self._log:
            self._log.write(step, means | speed | values)
        self._bar.set_postfix_str(
            f"loss {means['loss']:.3f}, {speed['voxels_per_second']:.3g} voxels/s, "
            f"data wait {speed['data_wait_share']:.0%}, memory {speed['peak_memory_gb']:.2f} GB"
        )
        self._begin()

    def close(self) -> None:
        self._bar.close()
        if self._log:
            self._log.close()


def peak_memory() -> int:
    """Most bytes that any device of this process has held; the process itself where devices do not tell (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(s["peak_bytes_in_use"] for s in stats)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class MetricLog:
    """Appends to `workdir/metrics.jsonl`; what a killed run logged beyond `step` is dropped first."""

    def __init__(self, workdir: Path, step: int):
        path = workdir / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written
                    break
                if entry["step"] <= step:
                    kept.append(line + "\n")
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self._file = path.open("a")
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))  # in this thread: SummaryWriter's hangs on a full disk
        self._events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, int | float]) -> None:
        """Logs the values of one step under their names."""
        now = time.time()
        self._file.write(json.dumps({"step": step, "time": now} | values) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.write_event(Event(wall_time=now, step=step, summary=scalar(name, value)))
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()
