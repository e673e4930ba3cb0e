import errno
import json

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from ggsd_jax.metric_log import MetricLog, NonFiniteError, StepLog


def lines_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_log_drops_what_was_written_after_the_checkpoint_and_a_torn_line(tmp_path):
    log = MetricLog(tmp_path, 0)
    for step in (2, 4, 6):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    log = MetricLog(tmp_path, 4)
    log.write(6, {"loss": 0.5})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == [(2, 0.5), (4, 0.25), (6, 0.5)]


def test_tensorboard_finds_every_value_and_where_a_resumed_run_went_on(tmp_path):
    for step, first in ((0, 2), (4, 6)):
        log = MetricLog(tmp_path, step)
        log.write(first, {"loss": 0.5, "stage": 1})
        log.close()
        (file,) = (tmp_path / "tensorboard").iterdir()
        content, events = file.read_bytes(), []
        while content:  # length, its checksum, the event, its checksum
            size = int.from_bytes(content[:8], "little")
            events.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
        file.unlink()
        assert events[0].file_version == "brain.Event:2"
        assert events[1].session_log.status == SessionLog.START and events[1].step == step + 1
        values = [(event.step, value.tag, value.simple_value) for event in events[2:] for value in event.summary.value]
        assert values == [(first, "loss", 0.5), (first, "stage", 1.0)]


def test_a_full_disk_ends_the_run_and_does_not_hang_it(tmp_path, monkeypatch):
    log = MetricLog(tmp_path, 0)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log._events._py_recordio_writer, "write", full)
    with pytest.raises(OSError, match="No space left"):
        log.write(2, {f"value {i}": 0.0 for i in range(100)})


def step_terms(loss: float) -> dict:
    return {"loss": np.full(2, loss), "voxels": np.full(2, 300.0)}


def test_a_line_has_the_means_since_the_one_before_and_what_the_steps_cost(tmp_path):
    log = StepLog(tmp_path, 0, 4)
    for losses in ((1.0, 3.0), (5.0, 5.0)):
        for loss in losses:
            log.add("stage 1", step_terms(loss), rows=400, waited=1e-9)
        log.write(2 if losses[0] == 1 else 4, {"stage": 1})
    log.close()
    first, second = lines_of(tmp_path)
    assert (first["loss"], second["loss"]) == (2.0, 5.0)
    assert first["padding_share"] == 0.25 and 0 < first["data_wait_share"] < 1
    assert first["voxels_per_second"] > 0 and first["peak_memory_gb"] > 0.01


def test_a_term_that_is_no_number_is_named_with_its_step_and_not_logged(tmp_path):
    log = StepLog(tmp_path, 10, 20)
    for loss in (1.0, float("nan"), 1.0):
        log.add("stage 1", step_terms(loss), rows=400, waited=0.0)
    with pytest.raises(NonFiniteError, match="step 12: loss is nan"):
        log.write(13, {"stage": 1})
    assert not lines_of(tmp_path)
