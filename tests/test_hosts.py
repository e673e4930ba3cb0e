"""A run on two processes over loopback: one is killed, both go on, and the outcome is that of one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import ROOT, command

from ggsd_jax import checkpoint, hosts

SHORT = ["--config.stage1_epochs=10", "--config.stage2_epochs=0", "--config.eval.repeats=1"]  # twenty steps
LOST_AFTER = 20  # seconds, as hosts.LOST_AFTER but shorter
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}


def start(workdir: Path, *extra: str, devices: int) -> subprocess.Popen:
    python, _, _, *flags = command(workdir, *SHORT, f"--config.cpu_devices={devices}", *extra)
    impatient = f"from ggsd_jax import hosts, main; hosts.LOST_AFTER = {LOST_AFTER}; main.app.run(main.main)"
    return subprocess.Popen(
        [python, "-c", impatient, *flags], env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_two(workdir: Path, *extra: str) -> list[subprocess.Popen]:
    group = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    return [start(workdir, *extra, *group, f"--process_id={i}", devices=1) for i in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Work directory of one process with two devices."""
    workdir = tmp_path_factory.mktemp("alone")
    process = start(workdir, devices=2)
    error = process.communicate()[1]
    assert process.returncode == 0, error[-3000:]
    return workdir


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory) -> tuple[Path, str, float]:
    """Work directory of two processes with one device each, of which one was killed and both were started again.

    Also what the other said when it lost the first, and after how many seconds it ended.
    """
    workdir = tmp_path_factory.mktemp("together")
    data = f"--config.data.prepared={alone / 'data'}"
    survivor, victim = start_two(workdir, data)
    while not list((workdir / "checkpoints").glob("[0-9]*")):
        assert survivor.poll() is None, survivor.stderr.read()[-3000:]
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    message = survivor.communicate()[1]
    seconds = time.monotonic() - killed
    victim.communicate()
    assert not (workdir / "results.json").exists()
    for process in start_two(workdir, data):
        error = process.communicate()[1]
        assert process.returncode == 0, error[-3000:]
    return workdir, message, seconds


def test_the_survivor_of_a_killed_process_ends_in_time_and_says_what_to_do(together):
    _, message, seconds = together
    assert seconds < LOST_AFTER + 30
    assert "process 0 of 2 ends" in message or "another task died" in message  # ours from a step, JAX's from a wait
    assert "Started again with the same --workdir, they go on from the last checkpoint" in message


def test_two_processes_train_the_network_of_one_with_as_many_devices(alone, together):
    theirs, _ = checkpoint.load_model(together[0] / "model")
    ours, _ = checkpoint.load_model(alone / "model")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), theirs, ours)


def test_scenes_evaluated_by_two_processes_count_as_by_one(alone, together):
    one, two = (json.loads((workdir / "results.json").read_text()) for workdir in (alone, together[0]))
    assert two["protocol"] == one["protocol"]
    assert two["rows"]["fusion_2d"] == one["rows"]["fusion_2d"]
    for row in one["rows"]:
        assert abs(two["rows"][row]["miou"] - one["rows"][row]["miou"]) < 1e-3


def test_every_step_is_logged_once(alone, together):
    for workdir in (alone, together[0]):
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(2, 21, 2))


SLURM = """
import json
from ggsd_jax import hosts
hosts.join()
print(json.dumps([hosts.index(), hosts.gather({"from": hosts.index()}), hosts.gather(None), list(hosts.share(5))]))
"""


def test_tasks_of_a_slurm_step_find_and_hear_each_other():
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    job |= ENVIRONMENT | {"JAX_COORDINATOR_PORT": str(free_port())}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", SLURM], env=job | {"SLURM_PROCID": i, "SLURM_LOCALID": i}, stdout=subprocess.PIPE
        )
        for i in "01"
    ]
    said = [json.loads(task.communicate()[0]) for task in tasks]
    everything = [{"from": 0}, {"from": 1}], [None, None]
    assert said == [[0, *everything, [0, 1]], [1, *everything, [2, 3, 4]]]


def test_half_given_processes_are_refused_by_name():
    with pytest.raises(ValueError, match="--coordinator, --process_id missing: give all of"):
        hosts.join(num_processes=2)
    with pytest.raises(ValueError, match="--process_id is 2: expected 0 to 1"):
        hosts.join("node:1", 2, 2)
    with pytest.raises(ValueError, match="--coordinator is 'node': expected host:port"):
        hosts.join("node", 2, 0)
