"""A run from raw data to results: what is missing in the work directory is done, in order."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
from absl import logging

from data.ply import replacing
from ggsd_jax import evaluate, hosts, inference, limits, prepare, train
from ggsd_jax.lock import alone

MODES = ["all", "prepare", "train", "eval"]

# how the work is done, which leaves what is learned as it is
_OPERATIONAL = {"log_every", "checkpoint_every", "model.remat", "data.workers", "data.prepare_workers"}
# what may differ between runs that share a stage 1, beside eval.*
_NOT_STAGE_1 = _OPERATIONAL | {"stage1_from", "data.prepared", "cpu_devices"}
_NOT_STAGE_1 |= {"loss.self_weight", "loss.temperature", "loss.label_source", "loss.voting"}


def run(config: ml_collections.ConfigDict, workdir: Path, mode: str = "all", *, profile: bool = False) -> dict | None:
    """Prepares, trains and evaluates as `mode` says; returns the content of `results.json` where there is one.

    With `profile` the training leaves a trace of some steps (`profiling.StepTrace`).

    Raises:
        ValueError: a value that no run can have; `workdir` or the prepared data belongs to another configuration;
            another process is at work in `workdir`; `eval.words` are not known or have no embedding.
    """
    limits.check(config)
    inference.keep_compiled_programs()
    if mode != "prepare":
        evaluate.check(config)
    with _claimed(workdir):
        return _run(config, workdir, mode, profile)


def _run(config: ml_collections.ConfigDict, workdir: Path, mode: str, profile: bool) -> dict | None:
    _claim(workdir, config)
    results_file = workdir / "results.json"
    complete, *_ = hosts.gather(results_file.exists())
    if mode == "all" and complete:
        results = _read_json(results_file)
        if hosts.is_first():
            print(f"{workdir} is complete:\n\n{evaluate.table(results)}")
        return results
    trained, *_ = hosts.gather((workdir / "model").exists())
    if mode in ("all", "train"):
        _check_stage1_from(config)
    data_dir = Path(config.data.prepared or workdir / "data")
    if mode in ("all", "prepare"):
        with _timed(workdir, "prepare"):
            if hosts.is_first():
                prepare.prepare(config, data_dir)
    prepare.is_prepared(config, data_dir)  # and fits the configuration; without it, training says what to do
    if mode in ("all", "train") and trained:
        logging.info("%s is trained: model/ is there", workdir)
    elif mode in ("all", "train"):
        with _timed(workdir, "train"):
            train.train(config, workdir, data_dir, profile=profile)
    if mode == "all" and "val" not in prepare.load_report(data_dir):
        if hosts.is_first():
            print(
                f"\ntrained: {workdir}; there was no labelled scene to score when {data_dir} was prepared "
                "(delete it if there is one now)"
            )
    elif mode in ("all", "eval"):
        with _timed(workdir, "eval"):
            results = evaluate.evaluate(config, workdir, data_dir)
        results["seconds"] = _read_json(workdir / "seconds.json")
        if hosts.is_first():
            write_json(results_file, results)
            print(f"\n{evaluate.table(results)}\n\nwritten: {results_file}")
        return results
    return None


def use_cpu_devices(config: ml_collections.ConfigDict) -> None:
    """Makes `config.cpu_devices` replicas of a machine without an accelerator, if jax has not been used yet."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", config.cpu_devices)
        except RuntimeError:
            logging.warning("jax has started with %d devices: cpu_devices is not heeded", jax.local_device_count())


def write_json(path: Path, value: object) -> None:
    """Writes whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged ({error}); delete it") from error


@contextlib.contextmanager
def _claimed(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of a work directory."""
    with contextlib.ExitStack() as stack:
        if hosts.is_first():
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(alone(workdir, wait=False))
            except BlockingIOError:
                raise ValueError(f"{workdir}: another process is at work here; give another --workdir") from None
            except OSError:  # what is complete can be looked at where nothing can be written
                pass
        yield


def _claim(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes `config.json`, or makes sure that the one there says the same once training has begun under it.

    Until then a mistyped field can be mended; prepared data watches over its own settings. How the work is done and how
    the network is evaluated may change at any time, the most voxels of a scene too once it is trained; results of other
    settings are removed.
    """
    path = workdir / "config.json"
    mine = json.loads(config.to_json_best_effort())
    if any(other != mine for other in hosts.gather(mine)):
        raise ValueError("the processes of this run have different configurations: start all with the same command")
    states = [state for state in (workdir / "checkpoints").glob("*") if state.name.isdigit()]
    begun = path.exists() and (states or any((workdir / name).exists() for name in ("stage1", "model", "results.json")))
    if hosts.is_first() and not begun:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(path, mine)
        except OSError as error:
            raise type(error)(f"{workdir}: cannot be written to ({error}); give another --workdir") from error
    hosts.wait()
    changed = differences(_read_json(path), mine)
    trained = (workdir / "model").exists()
    for field, values in changed.items():
        if not (field.startswith("eval.") or field in _OPERATIONAL or (trained and field == "data.max_voxels")):
            raise ValueError(
                f"{path}: {field} is {values[0]!r} there and {values[1]!r} here. A work directory belongs to one "
                "configuration: give another --workdir, or the old value"
            )
    hosts.wait()  # until all have read it
    if changed and hosts.is_first():
        if changed.keys() - _OPERATIONAL:
            (workdir / "results.json").unlink(missing_ok=True)
        write_json(path, mine)
    hosts.wait()


def _check_stage1_from(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError where `stage1_from` names no run, or one with another stage 1, told from its `config.json`."""
    if not config.stage1_from:
        return
    path = Path(config.stage1_from) / "config.json"
    if not path.is_file():
        raise ValueError(f"stage1_from: {path.parent} is no work directory of a run: it has no config.json")
    for field, values in differences(_read_json(path), json.loads(config.to_json_best_effort())).items():
        if not field.startswith("eval.") and field not in _NOT_STAGE_1:
            raise ValueError(
                f"stage1_from: {path} has {field} {values[0]!r}, here it is {values[1]!r}: another stage 1. Name a run "
                "with the same, or leave stage1_from empty"
            )


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple]:
    """Dotted names of the fields in which two nested dicts differ, with both values (None = absent)."""
    found = {}
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found


def field_error(error: Exception) -> str:
    """What to say where a configuration does not take a field or its value.

    At the bottom of what ml_collections raises is a text that knows the nearest field.
    """
    text = error
    while isinstance(text, Exception) and text.args:
        text = text.args[0]
    text = str(text).replace("\n", ". ")
    return text if isinstance(error, TypeError) else f"the configuration has no field {text}"


class _timed:
    """Adds the seconds spent in a part of the run to `seconds.json`; a killed sitting leaves none.

    An evaluation always starts anew, so that only the last one counts. Processes leave together: the next part may
    read what the first wrote.
    """

    def __init__(self, workdir: Path, part: str):
        self.path, self.part = workdir / "seconds.json", part

    def __enter__(self):
        logging.info("%s: start", self.part)
        self.start = time.monotonic()

    def __exit__(self, *failure):
        failed = any(failure)
        if hosts.is_first():
            seconds = _read_json(self.path) if self.path.exists() else {}
            before = 0.0 if self.part == "eval" else seconds.get(self.part, 0.0)
            seconds[self.part] = round(before + time.monotonic() - self.start, 1)
            try:
                write_json(self.path, seconds)
            except OSError:
                if not failed:  # it would hide the failure
                    raise
        if not failed:
            hosts.wait()
