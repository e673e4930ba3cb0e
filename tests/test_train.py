"""A miniature run: trained, killed, resumed, evaluated, used; and one step on one device against four."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.synthetic import generate_room
from experiments import configs
from ggsd_jax import checkpoint, inference, input_pipeline, prepare, run
from ggsd_jax.metric_log import NonFiniteError
from ggsd_jax.train import AXIS, initial_state, learning_rate_schedule, make_model, make_optimizer, train, train_step
from ggsd_jax.vision_language import text
from kernels.voxel_grid import next_bucket

ROOT = Path(__file__).parents[1]
MINIATURE = {
    "stage1_epochs": 4,
    "stage2_epochs": 3,
    "log_every": 2,
    "checkpoint_every": 2,
    "data.train_rooms": 4,
    "data.val_rooms": 2,
    "data.voxel_size": 0.15,
    "model.arch": "MinkUNet14A",
    "model.width": 0.125,
    "eval.repeats": 2,
}


def miniature(**changes):
    config = configs.load("synthetic")
    config.update_from_flattened_dict(MINIATURE | changes)
    return config


def command(workdir, *extra):
    flags = [f"--config.{name}={value}" for name, value in MINIATURE.items()]
    return [sys.executable, "-m", "ggsd_jax.main", f"--config={ROOT}/configs/synthetic.py", f"--workdir={workdir}",
            *flags, *extra]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Work directory of a run that was killed in the middle of stage 2 and started again."""
    workdir = tmp_path_factory.mktemp("killed")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command(workdir), env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = workdir / "metrics.jsonl"
    while not (log.exists() and '"stage": 2' in log.read_text()):
        assert process.poll() is None, f"the run ended before it could be killed:\n{process.stderr.read()[-3000:]}"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workdir / "model").exists()
    done = subprocess.run(command(workdir), env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


def test_a_killed_and_resumed_run_ends_with_the_bits_of_one_never_killed(finished, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    extra = f"--config.data.prepared={finished / 'data'}"
    for mode in ("prepare", "train"):
        subprocess.run(command(tmp_path, extra, f"--mode={mode}"), env=environment, cwd=ROOT, check=True)
    resumed, _ = checkpoint.load_model(finished / "model")
    straight, _ = checkpoint.load_model(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


def test_data_that_was_prepared_otherwise_is_not_trained_on(finished, tmp_path):
    changes = {"data.prepared": str(finished / "data"), "superpoints.seed_resolution": 0.3}
    for mode in ("train", "eval"):
        with pytest.raises(ValueError, match="was prepared with superpoints.seed_resolution="):
            run.run(miniature(**changes), tmp_path, mode)


def test_the_model_knows_how_many_scenes_it_learned_from(finished):
    assert json.loads((finished / "model" / "model.json").read_text())["trained_on"]["scenes"] == 4


def test_the_log_of_a_resumed_run_has_every_step_once_and_every_term(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == 14
    terms = {"L_p", "L_sp", "loss", "gradient_norm", "learning_rate", "voxels_per_second", "padding_share",
             "data_wait_share", "compilations"}  # fmt: skip
    assert all(terms <= line.keys() for line in lines)
    stage2 = {"L_sd", "agreement_before_vote", "agreement_after_vote", "changed_by_vote"}
    assert all(stage2 <= line.keys() for line in lines if line["stage"] == 2)
    assert list((finished / "tensorboard").iterdir())


def test_results_name_their_protocol_and_every_row(finished):
    results = json.loads((finished / "results.json").read_text())
    assert set(results["rows"]) == {"fusion_2d", "stage1", "stage2", "ensemble"}
    types = {"fusion_2d": "fusion", "stage1": "distill", "stage2": "distill", "ensemble": "ensemble"}
    assert results["protocol"]["feature_types"] == types
    assert any("repeats are added" in quirk for quirk in results["protocol"]["openscene_quirks"])
    assert sum(results["protocol"]["points_of_class"].values()) <= results["protocol"]["points"]
    for row in results["rows"].values():
        assert 0 <= row["miou"] <= 1 and 0 <= row["macc"] <= 1 and len(row["iou"]) > 10
    assert results["protocol"]["teacher"] == "simulated" and results["protocol"]["repeats"] == 2
    assert {"prepare", "train", "eval"} <= results["seconds"].keys()
    names = {path.name.split("_", 2)[-1] for path in (finished / "pictures").glob("*.ply")}
    assert len(names) >= 4 and list((finished / "pictures").glob("*.png"))


def test_a_complete_run_says_so_and_keeps_its_files(finished, capsys):
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    run.run(miniature(), finished)
    assert "is complete" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_work_directory_of_another_config_is_refused_with_the_field_and_both_values(finished):
    with pytest.raises(ValueError, match=r"loss\.temperature is 0\.01 there and 0\.5 here"):
        run.run(miniature(**{"loss.temperature": 0.5}), finished)


@pytest.mark.parametrize(
    "arguments, answer",
    [
        (["--config.loss.superpoint_wieght=0"], "no field 'superpoint_wieght'. Did you mean \"superpoint_weight\""),
        (["--config.los.superpoint_weight=0"], "no field 'los'"),
        (["--config=configs/sinthetic.py"], "configs/sinthetic.py: no such configuration; the nearest there is"),
    ],
)
def test_a_mistyped_configuration_or_field_is_answered_in_one_line(tmp_path, arguments, answer):
    process = subprocess.run(command(tmp_path, *arguments), cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1 and answer in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    "content, answer",
    [
        ("seed = 0\n", "config.py: it has no function get_config()"),
        ("def get_config():\n    return dict().seed\n", 'config.py", line 2'),
    ],
)
def test_a_mistake_in_a_configuration_file_is_told_with_its_place(tmp_path, content, answer):
    (tmp_path / "config.py").write_text(content)
    arguments = [sys.executable, "-m", "ggsd_jax.main", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}"]
    process = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1 and answer in process.stderr


def test_the_model_labels_a_cloud_it_has_never_seen(finished):
    room = generate_room(987_654).scene
    model = inference.load(finished)
    ids, scores = model.segment(room.points, labels=["floor", "wall", "chair"])
    assert ids.shape == (len(room.points),) and scores.shape == (len(room.points), 3)
    np.testing.assert_array_equal(ids, scores.argmax(1))
    assert np.abs(scores).max() <= 1 + 1e-5
    order = np.random.default_rng(0).permutation(len(room.points))
    np.testing.assert_allclose(model.encode(room.points[order]), model.encode(room.points)[order], atol=1e-4)


@pytest.fixture(scope="module")
def batches(finished):
    """One global batch of four scenes as one replica holds it, and as four replicas do."""
    source = prepare.load_split(finished / "data", "train")
    config = miniature(batch_size=4)
    return config, {n: next(input_pipeline.train_iterator(source, config, num_replicas=n)) for n in (1, 4)}


def test_four_devices_take_the_step_of_one_on_the_same_scenes(batches):
    """Losses, gradients and statistics, in float64 to rounding; in float32 a ReLU may flip."""
    config, by_replicas = batches
    class_text = np.asarray(text.embed(prepare.label_set(config).classes, encoder=config.text.encoder))
    model = make_model(config, class_text.shape[1], axis_name=AXIS).clone(dtype="float64")
    optimizer = optax.sgd(1.0)  # a step of SGD is the gradient
    results = {}
    with jax.enable_x64(True):
        state = initial_state(model, optimizer, jax.tree.map(lambda x: x[0], by_replicas[1]), seed=0)
        state = jax.tree.map(lambda x: np.asarray(x, "float64" if x.dtype == np.float32 else x.dtype), state)
        for replicas, batch in by_replicas.items():
            step = functools.partial(train_step, model=model, optimizer=optimizer, loss=config.loss, stage=2)
            devices = jax.local_devices()[:replicas]
            step = jax.pmap(step, axis_name=AXIS, in_axes=(0, 0, None), devices=devices)
            after, terms = step(flax.jax_utils.replicate(state, devices), batch, class_text)
            after, terms = jax.device_get(jax.tree.map(lambda x: x[0], (after, terms)))
            gradient = jax.tree.map(lambda a, b: a - b, state.params, after.params)
            results[replicas] = gradient, after.batch_stats, terms
    counts = by_replicas[4].pyramid.num_voxels[:, 0]
    assert len(set(counts.tolist())) > 1, "replicas of unequal size are the point of this test"
    (gradient, *others), (gradient4, *others4) = results[1], results[4]
    assert all(others[1][name].dtype == np.float64 for name in ("loss", "L_p", "L_sp", "L_sd"))
    for a, b in zip(jax.tree.leaves(others4), jax.tree.leaves(others), strict=True):
        rounding = 1e-9 if a.dtype == np.float64 else 1e-6  # shares of labels are float32
        np.testing.assert_allclose(a, b, rtol=rounding, atol=1e-12)
    largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(gradient))
    for a, b in zip(jax.tree.leaves(gradient4), jax.tree.leaves(gradient), strict=True):
        assert a.dtype == np.float64 and np.linalg.norm(a - b) < 1e-9 * np.linalg.norm(b) + 1e-12 * largest


def test_a_run_compiles_one_program_per_bucket(finished, tmp_path, monkeypatch, caplog):
    config = miniature(**{"batch_size": 4, "stage1_epochs": 5, "stage2_epochs": 0, "log_every": 1})
    plain = input_pipeline.train_iterator

    def every_other_larger(*args, **kwargs):
        for step, batch in enumerate(plain(*args, **kwargs)):
            if step % 2:
                parts = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(4)]
                bucket, spread = next_bucket(batch.bucket + 1), batch.pyramid.spread
                batch = input_pipeline._stacked(parts, bucket, spread, 1, config.data.chunk_points)
            yield batch

    monkeypatch.setattr(input_pipeline, "train_iterator", every_other_larger)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        jax.pmap(functools.partial(jnp.add, 1))(np.zeros(4))
        probe = re.search(r"Finished XLA compilation of (\S+)", caplog.text)[1]  # what JAX calls a pmapped partial
        caplog.clear()
        train(config, tmp_path, finished / "data")
    compiled = sum(f"Finished XLA compilation of {probe} " in record.getMessage() for record in caplog.records)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert compiled == 2 and [line["compilations"] for line in lines] == [1, 2, 2, 2, 2]


def test_bfloat16_arithmetic_leaves_parameters_statistics_and_losses_in_float32(batches):
    config, by_replicas = batches
    class_text = np.asarray(text.embed(prepare.label_set(config).classes, encoder=config.text.encoder))
    optimizer = optax.adam(1e-3)
    results = []
    for dtype in ("float32", "bfloat16"):
        config.model.dtype = dtype
        model = make_model(config, class_text.shape[1], axis_name=AXIS)
        batch = by_replicas[1]
        state = initial_state(model, optimizer, jax.tree.map(lambda x: x[0], batch), seed=0)
        step = functools.partial(train_step, model=model, optimizer=optimizer, loss=config.loss, stage=2)
        devices = jax.local_devices()[:1]
        step = jax.pmap(step, axis_name=AXIS, in_axes=(0, 0, None), devices=devices)
        results.append(step(flax.jax_utils.replicate(state, devices), batch, class_text))
    (after, terms), (after16, terms16) = results
    for leaf in jax.tree.leaves((after16, terms16)):
        assert leaf.dtype in (jnp.float32, jnp.int32) and np.isfinite(leaf).all()
    for name in ("L_p", "L_sp", "L_sd"):
        assert 0 < abs(terms16[name][0] / terms[name][0] - 1) < 0.02, name  # equal: nothing was computed in bfloat16
    for a, b in zip(jax.tree.leaves(after16.batch_stats), jax.tree.leaves(after.batch_stats), strict=True):
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


def test_a_nan_stops_the_run_names_step_and_term_and_keeps_the_last_good_state(finished, tmp_path):
    changes = {"optimizer.learning_rate": 1e30, "log_every": 1, "checkpoint_every": 1}
    config = miniature(**changes, **{"batch_size": 4, "data.prepared": str(finished / "data")})
    run.run(config, tmp_path, "prepare")
    with pytest.raises(NonFiniteError, match=r"step \d+: \w+ is (nan|inf)") as stopped:
        run.run(config, tmp_path, "train")
    manager = checkpoint.manager(tmp_path / "checkpoints", keep=0)
    assert not (tmp_path / "model").exists()
    assert f"step {manager.latest_step() + 1}:" in str(stopped.value)
    raw = manager.restore(manager.latest_step())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(raw["params"]))


def test_learning_rates_are_those_openscene_really_used(shared):
    golden = np.load(shared / "golden" / "extras_pipeline.npz")["poly_used_at_step"]
    config = miniature(**{"optimizer.learning_rate": 1e-4, "optimizer.openscene_lr_quirk": True})
    schedule = learning_rate_schedule(config, len(golden))
    np.testing.assert_allclose([schedule(jnp.float32(i)) for i in range(len(golden))], golden, rtol=2e-5)


def test_the_schedule_without_the_quirk_is_the_one_openscene_logs(shared):
    golden = np.load(shared / "golden" / "extras_pipeline.npz")["poly_logged"]  # after each step, for the next
    schedule = learning_rate_schedule(miniature(**{"optimizer.learning_rate": 1e-4}), len(golden))
    rates = [schedule(jnp.float32(i + 1)) for i in range(len(golden))]
    np.testing.assert_allclose(rates, golden, rtol=2e-5, atol=1e-12)


def test_a_supervised_run_learns_from_labels_alone_and_scores_its_logits(finished, tmp_path):
    changes = {"mode": "supervised", "stage1_epochs": 20, "stage2_epochs": 0, "eval.repeats": 1, "eval.pictures": 1}
    changes |= {"batch_size": 4, "supervised.learning_rate": 0.1}
    config = miniature(**changes, **{"data.prepared": str(finished / "data")})
    results = run.run(config, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["L_ce"] < 0.9 * log[0]["L_ce"] and "L_p" not in log[0] and log[0]["stage"] == 0
    assert set(results["rows"]) == {"supervised"} and results["protocol"]["text_encoder"] == "none"
    assert 0 < results["rows"]["supervised"]["miou"] < 1
    variables, info = checkpoint.load_model(tmp_path / "model")
    assert variables["params"]["final"]["kernel"].shape[-1] == len(info["classes"]) == 15
    with pytest.raises(ValueError, match="trained with labels"):
        inference.load(tmp_path)


def test_supervised_training_takes_the_steps_of_torchs_sgd():
    """torch: d = g + wd * p; b = momentum * b + d; p -= lr * b."""
    config = miniature(mode="supervised")
    optimizer = make_optimizer(config, lambda step: 0.01)
    parameter, momentum, state = jnp.ones(3), np.zeros(3), optimizer.init(jnp.ones(3))
    expected = np.ones(3)
    for step in range(4):
        gradient = np.array([0.5, -1.0, step])
        updates, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, parameter)
        parameter = optax.apply_updates(parameter, updates)
        momentum = 0.9 * momentum + gradient + 1e-4 * expected
        expected = expected - 0.01 * momentum
    np.testing.assert_allclose(parameter, expected, rtol=1e-6)


def test_an_unknown_mode_is_refused(finished, tmp_path):
    config = miniature(mode="supervized", **{"data.prepared": str(finished / "data")})
    with pytest.raises(ValueError, match="mode is 'supervized': expected one of 'ggsd', 'supervised'"):
        run.run(config, tmp_path, "train")
