import json

from ggsd_jax.metric_log import MetricLog


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
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 0.5), (4, 0.25), (6, 0.5)]
