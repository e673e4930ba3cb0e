"""One line of JSON per logged step, and the same numbers as TensorBoard events."""

import json
import os
import time
from pathlib import Path

from tensorboardX import SummaryWriter


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
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the values of one step under their names."""
        self._file.write(json.dumps({"step": step, "time": time.time()} | values) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()
