import jax
import jax.numpy as jnp

from ggsd_jax import profiling


def trace(folder, steps: int) -> None:
    step_trace = profiling.StepTrace(folder)
    state = jnp.ones(3)
    for _ in range(steps):
        step_trace.before_step(state)
        state = jax.jit(jnp.cos)(state)
    step_trace.close(state)


def test_a_trace_that_tensorboard_and_perfetto_open_is_left_also_by_a_short_run(tmp_path):
    for steps in (profiling.SKIPPED + 1, profiling.SKIPPED + profiling.TRACED + 3):
        folder = tmp_path / str(steps)
        trace(folder, steps)
        (run,) = (folder / "plugins" / "profile").iterdir()
        assert list(run.glob("*.xplane.pb")) and (run / "perfetto_trace.json.gz").stat().st_size > 0


def test_a_run_too_short_for_a_trace_says_so(tmp_path, caplog):
    trace(tmp_path, profiling.SKIPPED)
    assert "only 5 steps were left, 6 are needed" in caplog.text and not list(tmp_path.iterdir())
