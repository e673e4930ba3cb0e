"""Several processes as one run: joining them, dividing work among them, and what they tell each other.

Every process does the same things in the same order, each on its share. Gradients and statistics travel between
the devices inside the step; small values between the processes go through JAX's coordination service, which
process 0 hosts. The work directory must be on a file system that all of them see; process 0 alone writes there.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

# The key-value store of the coordination service has no public name. What has (jax.experimental.multihost_utils) sends
# values between devices: gloo ends such a wait after half a minute, and another process may prepare data for hours.
from jax._src import distributed

LOST_AFTER = 60  # seconds without a sign of life, then a process counts as dead and JAX ends the others

_ADVICE = "Started again with the same --workdir, they go on from the last checkpoint"
_POLL = 5_000  # milliseconds; a process that waits stays open to Ctrl-C
_calls = itertools.count()


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the processes of a run; alone where nothing is given and SLURM has started no others.

    Must come before anything touches a device. Waits up to five minutes for the others.

    Args:
        coordinator: `host:port` of process 0, the same everywhere.
        num_processes: how many there are.
        process_id: which one this is, from 0.
    Raises:
        ValueError: some of the three are given and some not, or they make no sense.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < 3:
        raise ValueError(f"--{', --'.join(missing)} missing: give all of --{', --'.join(given)}, or none of them")
    if missing and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    if not missing and not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id is {process_id}: expected 0 to {num_processes - 1}, as --num_processes says")
    if not missing and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"--coordinator is {coordinator!r}: expected host:port, such as node1:12345")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        cluster_detection_method="slurm" if missing else "deactivate",
        heartbeat_timeout_seconds=LOST_AFTER,
        shutdown_timeout_seconds=LOST_AFTER,
    )
    logging.info("process %d of %d. If one is lost, all end within %d s. %s", index(), count(), LOST_AFTER, _ADVICE)


def index() -> int:
    """Which process this is, from 0."""
    return distributed.global_state.process_id or 0


def count() -> int:
    """How many processes the run has."""
    return distributed.global_state.num_processes or 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return index() == 0


def gather(value: Any) -> list:
    """The values of all processes, in their order; they travel as JSON.

    Every process calls this equally often. Waits for the slowest, however long it takes.
    """
    if count() == 1:
        return [value]
    client, call = distributed.global_state.client, next(_calls)
    client.key_value_set(f"ggsd/{call}/{index()}", json.dumps(value))
    values = [json.loads(_wait_for(f"ggsd/{call}/{process}")) for process in range(count())]
    if call:  # everyone has come here, so everyone has read what was said before
        client.key_value_delete(f"ggsd/{call - 1}/{index()}")
    return values


def wait() -> None:
    """Waits until every process is here."""
    gather(None)


def _wait_for(key: str) -> str:
    while True:
        try:
            return distributed.global_state.client.blocking_key_value_get(key, _POLL)
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("DEADLINE_EXCEEDED"):
                raise


def share(total: int) -> range:
    """This process's part of the numbers 0..total-1: consecutive ones, the parts differ by one at most."""
    bounds = [total * process // count() for process in (index(), index() + 1)]
    return range(*bounds)


def replicas() -> tuple[int, range]:
    """The number of devices of all processes, and which of them are this one's.

    Raises:
        ValueError: the processes have different numbers of devices.
    """
    devices = gather(jax.local_device_count())
    if len(set(devices)) > 1:
        raise ValueError(f"the processes have {devices} devices: give each of them as many as the others")
    return sum(devices), share(sum(devices))


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Where a run has several processes, one that fails ends at once, and the others learn of it.

    Without this it would wait for them at its exit, and they for its gradients.
    """
    try:
        yield
    except BaseException as error:
        if count() == 1:
            raise
        if isinstance(error, SystemExit):
            print(error, file=sys.stderr)
        else:
            traceback.print_exc()
        print(
            f"process {index()} of {count()} ends. If it was not the first to, look at the others: one that was killed "
            f"or could not be reached takes all with it. {_ADVICE}",
            file=sys.stderr,
            flush=True,
        )
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)
