"""Worker processes end with the process they work for, and what it means when they end before."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
from test_input_pipeline import Scenes, make_config
from test_prepare import wait_until

from data.scene import Scene
from ggsd_jax import datasets, input_pipeline


def _sleep(pid_file: Path):
    pid_file.write_text(str(os.getpid()))
    time.sleep(600)


def _cut_superpoints(pid_file: Path):
    list(datasets.in_order(_sleep, [pid_file], 1))


class _ScenesOfAWorker(Scenes):
    """Tell who reads them."""

    def __init__(self, pid_file: Path):
        super().__init__(8)
        self.pid_file, self.reader = pid_file, os.getpid()

    def __getitem__(self, record: int) -> Scene:
        if os.getpid() != self.reader and not self.pid_file.exists():
            self.pid_file.write_text(str(os.getpid()))
        return super().__getitem__(record)


def _load_batches(pid_file: Path):
    next(input_pipeline.train_iterator(_ScenesOfAWorker(pid_file), make_config(**{"data.workers": 1}), num_replicas=1))
    time.sleep(600)


@pytest.mark.parametrize("work", [_cut_superpoints, _load_batches])
def test_workers_end_with_a_process_that_is_killed(tmp_path, work):
    pid_file = tmp_path / "pid"
    process = multiprocessing.get_context("spawn").Process(target=work, args=(pid_file,))
    process.start()
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    process.kill()
    wait_until(lambda: not Path("/proc", pid_file.read_text(), "cmdline").exists())


def test_of_a_loaders_worker_that_died_it_is_said_what_may_have_been_too_little():
    def batches():
        yield "batch"
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -7.")

    found = input_pipeline._with_reason(batches())
    assert next(found) == "batch"
    with pytest.raises(OSError, match="shared memory .*is full. Take fewer, or give more; .*--shm-size.*exit code -7"):
        next(found)
