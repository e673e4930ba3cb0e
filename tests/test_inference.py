import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ggsd_jax import inference
from kernels.sparse_conv import api

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(model_dir) -> inference.Model:
    return inference.load(model_dir)


@pytest.fixture(scope="module")
def corridor() -> np.ndarray:
    """60 m of floor and wall with boxes along it."""
    rng = np.random.default_rng(0)
    floor = rng.uniform(0, 1, (4000, 3)) * [60, 0.9, 0]
    wall = rng.uniform(0, 1, (2000, 3)) * [60, 0, 0.4]
    boxes = [rng.uniform(0, 1, (60, 3)) * [0.6, 0.3, 0.4] + [x, 0.2, 0] for x in rng.uniform(0, 59, 20)]
    return np.concatenate([floor, wall, *boxes]).astype(np.float32)


@pytest.fixture(scope="module")
def whole(model, corridor) -> np.ndarray:
    """Features of the corridor, seen at once."""
    return model.encode(corridor)


def room(seed: int) -> np.ndarray:
    """A patch of floor with a box on it."""
    rng = np.random.default_rng(seed)
    floor, box = rng.uniform(0, 1, (700, 3)) * [3, 2, 0], rng.uniform(0, 1, (200, 3)) * [0.6, 0.6, 0.8]
    return np.concatenate([floor, box + [1, 1, 0]]).astype(np.float32)


def test_several_clouds_in_one_batch_are_encoded_as_one_by_one(model):
    clouds = [room(0), room(1)[:5], room(2)]
    for together, points in zip(model.encode_scenes(clouds), clouds, strict=True):
        np.testing.assert_allclose(together, model.encode(points), atol=1e-5 * np.abs(together).max())


def test_with_a_halo_as_wide_as_the_network_sees_tiles_change_nothing(model, corridor, whole):
    tiled = dataclasses.replace(model, max_voxels=4000, halo=160)
    np.testing.assert_allclose(tiled.encode(corridor), whole, atol=1e-5 * np.abs(whole).max())


def test_seams_do_not_show_in_the_labels_unless_there_is_no_halo(model, corridor, whole):
    texts = model.embed(model.info["classes"])
    labels = (whole @ texts.T).argmax(axis=1)
    assert np.bincount(labels).max() < 0.9 * len(corridor)

    def changed(halo: int) -> float:
        ids, _ = dataclasses.replace(model, max_voxels=1800, halo=halo).segment(corridor)
        return (ids != labels).mean()

    assert changed(48) < 0.001 < 0.004 < changed(0)


def test_every_path_of_the_convolutions_gives_the_same_labels(model, corridor, whole, monkeypatch):
    traced = []
    monkeypatch.setattr(api, "fastest", lambda dtype: traced.append(dtype) or "xla")
    jax.clear_caches()  # they hold this device's own path: the CPU's, or the GPU's kernels
    portable = model.encode(corridor)
    jax.clear_caches()
    assert traced
    np.testing.assert_allclose(portable, whole, atol=1e-4 * np.abs(whole).max())
    texts = model.embed(model.info["classes"])
    assert ((portable @ texts.T).argmax(axis=1) == (whole @ texts.T).argmax(axis=1)).mean() > 0.999


_ON_A_CPU = """
import sys, numpy as np
from ggsd_jax import inference
model, points, out = sys.argv[1:]
np.save(out, inference.load(model).segment(np.load(points))[0])
"""


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
def test_a_gpu_gives_the_labels_of_a_cpu(model, model_dir, corridor, tmp_path):
    np.save(tmp_path / "points.npy", corridor)
    arguments = [sys.executable, "-c", _ON_A_CPU, model_dir, tmp_path / "points.npy", tmp_path / "labels.npy"]
    subprocess.run(arguments, env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=ROOT, check=True)
    labels, _ = model.segment(corridor)
    assert (np.load(tmp_path / "labels.npy") == labels).mean() > 0.999


def test_no_batch_is_larger_than_the_memory_bound(model, monkeypatch):
    shown, build = [], inference.build_pyramid
    monkeypatch.setattr(
        inference, "build_pyramid", lambda coords, **kw: shown.append(len(coords)) or build(coords, **kw)
    )
    dataclasses.replace(model, max_voxels=500, halo=4).encode_scenes([room(4), room(5)])
    assert len(shown) > 2 and max(shown) <= 500


def test_similarity_is_the_cosine_of_features_and_texts(model):
    points, embedding = room(6), model.embed(["chair", "wall"])
    cosine = inference.unit(model.encode(points)) @ embedding.T
    np.testing.assert_allclose(model.similarity(points, embedding), cosine, atol=1e-6)


def test_a_score_is_over_a_half_where_the_word_is_nearer_than_all_it_is_held_against():
    positive = np.array([[0.5, 0.2], [0.3, 0.31]], np.float32)
    contrast = np.array([[0.4, 0.1], [0.2, 0.3]], np.float32)
    scores = inference.relevancy(positive, contrast)
    np.testing.assert_array_equal(scores > 0.5, [[True, False], [False, True]])
    assert scores[0, 0] == pytest.approx(np.e / (1 + np.e))


def test_a_query_scores_the_words_that_a_feature_says(model):
    """A network whose features are texts, but for noise."""
    rng = np.random.default_rng(0)
    texts = model.embed(model.info["classes"])
    features = inference.unit(texts + 0.05 * rng.standard_normal(texts.shape).astype(np.float32))
    contrast = model.contrast()
    scores = inference.relevancy(features @ texts.T, features @ contrast.T)
    np.testing.assert_array_equal(scores.argmax(axis=0), np.arange(len(texts)))
    assert (np.diag(scores) > 0.9).all()


def test_negatives_lower_scores_and_never_raise_them(model):
    points = room(7)
    alone, held = model.query(points, ["chair", "bed"]), model.query(points, ["chair", "bed"], ["stool"])
    assert (held <= alone).all() and (held < alone).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(np.zeros((0, 3), np.float32)), "points has no rows"),
        (lambda m: dataclasses.replace(m, max_voxels=0), "max_voxels is 0: expected at least 1"),
        (lambda m: m.query(room(0), [" "]), "not empty"),
        (lambda m: m.embed("chair"), "words is the text 'chair': give a list"),
        (lambda m: m.contrast("bed"), "words is the text 'bed'"),
        (lambda m: m.without_meaning("chair"), "words is the text 'chair'"),
        (
            lambda m: m.similarity(room(0), np.ones((2, 7), np.float32)),
            r"embedding has shape \[2, 7\]: expected \[L, 32\]",
        ),
        (lambda m: m.encode_scenes([room(0), room(1)], [None]), "colors are those of 1 clouds, and there are 2"),
        (lambda model: model.segment(room(0), "chair"), "labels is the text 'chair': give a list"),
        (lambda model: model.query(room(0), "chair"), "words is the text 'chair': give a list"),
        (lambda model: model.query(room(0), ["chair"], "stool"), "negatives is the text 'stool': give a list"),
        (lambda model: model.query(room(0), []), "words is empty"),
        (lambda model: model.segment(room(0), []), "labels is empty"),
        (lambda model: model._per_point([room(0)[:, :2]], None, len), r"points has shape \[900, 2\]: expected"),
        (lambda model: model._per_point([room(0)], [np.ones((900, 3))], len), "colors is float64 .*expected uint8"),
        (lambda model: model._per_point([room(0)], [np.ones((9, 3), np.uint8)], len), r"expected uint8 \[900, 3\]"),
    ],
)
def test_what_a_model_cannot_take_is_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_model_is_shown_in_a_line_and_is_only_itself(model, model_dir):
    assert len(repr(model)) < 2000 and model != inference.load(model_dir)


def test_words_of_an_encoder_of_another_width_are_refused(model):
    other = dataclasses.replace(model, info=model.info | {"text_encoder": "stand-in:96"})
    with pytest.raises(ValueError, match="stand-in:96 has 96 channels and the network 32"):
        other.segment(room(0), ["chair"])


@pytest.mark.parametrize("field", ["arch", "voxel_size", "text_encoder", "classes"])
def test_a_model_whose_description_lacks_something_is_refused(model_dir, tmp_path, field):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    info = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(info | {field: None}))
    with pytest.raises(ValueError, match=f"model.json: the field '{field}' is missing or no"):
        inference.load(folder)


@pytest.mark.parametrize("wrong", [{"voxel_size": -0.1}, {"classes": []}, {"classes": ["wall", 3]}])
def test_a_model_whose_description_makes_no_sense_is_refused(model_dir, tmp_path, wrong):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    info = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(info | wrong))
    with pytest.raises(ValueError, match=r"model.json: voxel_size is .* and classes \["):
        inference.load(folder)


def test_a_network_that_reads_other_numbers_than_a_model_gives_is_refused(model):
    params = model.variables["params"]
    one = {"kernel": np.asarray(params["conv0p1s1"]["kernel"])[:, :1]}
    with pytest.raises(ValueError, match="the network reads 1 numbers of each voxel, expected 3"):
        dataclasses.replace(model, variables=model.variables | {"params": params | {"conv0p1s1": one}})
