"""Text embeddings: the stand-in's geometry, and files of real ones."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.labels import LABEL_SETS
from data.synthetic import SYNTHETIC
from ggsd_jax.vision_language.clip import TextEncoder
from ggsd_jax.vision_language.text import check_space, embed, space, without_meaning


def cosines(labels, **kwargs):
    rows = embed(labels, **kwargs)
    return rows @ rows.T


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("abc xyz_-é", min_size=1).filter(lambda s: s.replace("_", " ").strip()), min_size=1))
def test_rows_of_any_names_are_unit_float32(labels):
    rows = embed(labels)
    assert rows.dtype == np.float32 and rows.shape == (len(labels), 64)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_a_name_has_one_row_whatever_else_is_asked():
    alone = embed(["cabinet"])
    np.testing.assert_array_equal(alone[0], embed(["bed", "cabinet"])[1])
    np.testing.assert_array_equal(alone, embed(["Cabinet"], prompt="{} in the rain"))


def test_case_underscores_and_blanks_do_not_matter():
    rows = embed(["night stand", "Night_Stand", " night  stand "])
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])


@pytest.mark.parametrize(
    "group",
    [
        ("chair", "sofa", "stool"),
        ("table", "desk"),
        ("cabinet", "bookshelf"),
        ("sink", "bathtub", "toilet"),
        ("floor", "wall", "ceiling"),
        ("door", "window"),
        ("car", "truck", "bus"),
    ],
)
def test_related_names_are_nearer_each_other_than_unrelated_ones(group):
    near = cosines(group)[np.triu_indices(len(group), 1)]
    assert near.min() > 0.3 and near.max() < 0.8
    others = [name for name in ("person", "lamp", "monitor", "bicycle") if name not in group]
    far = embed(group) @ embed(others).T
    assert far.max() < 0.3 < near.min()


def test_unrelated_names_stay_far_apart_in_every_label_set():
    for label_set in (SYNTHETIC, LABEL_SETS["scannet20"], LABEL_SETS["nuscenes16"]):
        all_cosines = cosines(label_set.classes)
        between = all_cosines[~np.eye(len(all_cosines), dtype=bool)]
        assert np.median(np.abs(between)) < 0.2 and between.max() < 0.8


def test_a_compound_is_nearest_to_the_word_it_is_made_of():
    for compound, word, related in (("office chair", "chair", "sofa"), ("coffee table", "table", "desk")):
        to_word, to_related, to_other = embed([compound])[0] @ embed([word, related, "lamp"]).T
        assert to_word > to_related > to_other


def test_the_width_is_part_of_the_name():
    assert embed(["chair"], encoder="stand-in:128").shape == (1, 128)
    for width in ("31", "wide", "-64"):
        with pytest.raises(ValueError, match="whole number of at least 32"):
            embed(["chair"], encoder=f"stand-in:{width}")


def test_labels_and_encoders_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="one or more names"):
        embed([])
    with pytest.raises(ValueError, match="not empty"):
        embed(["chair", " "])
    with pytest.raises(ValueError, match="'clip-b32' is unknown"):
        embed(["chair"], encoder="clip-b32")


def test_a_file_gives_its_own_rows_at_unit_length(tmp_path):
    rows = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float16)
    path = tmp_path / "text.npz"
    np.savez(path, embedding=rows, names=["Trash_Can", "car_(automobile)", "refrigerator", "other"])
    found = embed(["other", "trash can", "car", "otherfurniture", "refridgerator"], encoder=path)
    expected = rows.astype(np.float32) / np.linalg.norm(rows.astype(np.float32), axis=1, keepdims=True)
    np.testing.assert_array_equal(found, expected[[3, 0, 1, 3, 2]])


def test_a_name_the_file_lacks_is_answered_with_the_nearest(tmp_path):
    np.savez(tmp_path / "t.npz", embedding=np.eye(3, dtype=np.float32), names=["chair", "sofa", "lamp"])
    with pytest.raises(ValueError, match=r"t\.npz: no embedding of 'chairs'; the nearest names there are chair"):
        embed(["sofa", "chairs"], encoder=tmp_path / "t.npz")


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.npz"):
        embed(["chair"], encoder=tmp_path / "gone.npz")
    path = tmp_path / "bad.npz"
    for arrays, message in (
        (dict(embedding=np.eye(2)), "bad.npz.*no array names"),
        (dict(embedding=np.eye(2), names=["a"]), r"names \[n\]"),
        (dict(embedding=np.ones(2), names=["a", "b"]), r"embedding must be floating point \[n, C\]"),
        (dict(embedding=np.zeros((1, 4)), names=["a"]), r"row 0 \(a\) is zero"),
        (dict(embedding=np.full((1, 4), np.nan), names=["a"]), "not finite"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            embed(["a"], encoder=path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="bad.npz: not a file of text embeddings"):
        embed(["a"], encoder=path)


@pytest.mark.parametrize("space", ["vitb32_512", "vitl14-336_768"])
def test_the_real_clip_rows_are_found_by_the_names_of_the_benchmarks(shared, space):
    for name in ("scannet20", "matterport21"):
        path = shared / f"data/text_embeddings/clip_{name}_{space}.npz"
        raw = np.load(path)["embedding"].astype(np.float32)
        rows = embed(LABEL_SETS[name].classes, encoder=str(path))
        np.testing.assert_allclose(rows, raw / np.linalg.norm(raw, axis=1, keepdims=True), rtol=0, atol=1e-7)


def test_lvis_names_are_found_without_their_underscores_and_brackets(shared):
    path = shared / "data/text_embeddings/lvis1203_vitb32_512.npz"
    raw = dict(zip(np.load(path)["names"], np.load(path)["embedding"].astype(np.float32), strict=True))
    wanted = {"trash can": "trash_can", "car": "car_(automobile)", "Sofa": "sofa"}
    rows = embed(list(wanted), encoder=path)
    for row, name in itertools.zip_longest(rows, wanted.values()):
        np.testing.assert_allclose(row, raw[name] / np.linalg.norm(raw[name]), atol=1e-6)


# ------------------------------------------------------------------------------------------------------ CLIP itself


def test_clip_embeds_the_prompted_name(clip_snapshot):
    folder = clip_snapshot()
    encode = TextEncoder(folder)
    rows = embed(["Night_Stand", "otherfurniture", "other"], encoder=folder, prompt="a {} here")
    np.testing.assert_allclose(rows, encode(["a night stand here", "other", "other"]), atol=1e-6)
    rows[:] = 0  # what is handed out is a copy
    assert embed(["other"], encoder=folder).any()


def test_a_prompt_without_a_place_for_the_name_is_refused(clip_snapshot):
    with pytest.raises(ValueError, match="prompt is 'a chair': it needs {} where the name goes"):
        embed(["chair"], encoder=clip_snapshot(), prompt="a chair")


def test_features_and_words_of_two_models_of_the_same_width_are_told_apart(clip_snapshot, tmp_path):
    coarse, fine, other = clip_snapshot("b32", patch=16), clip_snapshot("b16"), clip_snapshot("tuned", seed=1)
    assert embed(["x"], encoder=coarse).shape == embed(["x"], encoder=fine).shape
    check_space(space(fine), fine)
    for features in (coarse, other):
        with pytest.raises(ValueError, match="text.encoder .*b16.* their cosines mean nothing. Use the text tower of"):
            check_space(space(features), fine)


def test_a_file_of_embeddings_is_known_by_the_name_of_its_model(tmp_path):
    path = tmp_path / "text.npz"
    np.savez(path, embedding=np.eye(2), names=["a", "b"])
    with pytest.raises(ValueError, match=r"text\.npz: does not say whose embeddings.*model='ViT-B/32'"):
        space(path)
    np.savez(path, embedding=np.eye(2), names=["a", "b"], model="ViT-B/32")
    check_space("ViT-B/32#0123abcd", path)
    with pytest.raises(ValueError, match="in the space of ViT-B/32, the 2D features are in that of ViT-B/16#0123abcd"):
        check_space("ViT-B/16#0123abcd", path)
    assert space("stand-in") == space("stand-in:64") != space("stand-in:128")


@pytest.mark.parametrize("name", ["scannet20", "matterport21"])
def test_real_weights_give_the_real_embeddings(shared, name):
    folder = os.environ.get("GGSD_CLIP")
    if not folder:
        pytest.skip("no CLIP weights: set GGSD_CLIP to a snapshot folder of ViT-B/32 or ViT-L/14@336px")
    model = space(folder).partition("#")[0]
    files = [
        path
        for path in (shared / "data/text_embeddings").glob(f"clip_{name}_*.npz")
        if str(np.load(path)["model"]) == model
    ]
    if not files:
        pytest.skip(f"GGSD_CLIP holds {model}, of which there are no reference embeddings")
    classes = LABEL_SETS[name].classes
    real = embed(classes, encoder=files[0])
    cosines = np.sum(embed(classes, encoder=folder, prompt="{}") * real, axis=1)
    assert cosines.min() > 0.9999  # the files hold half precision


def test_the_stand_in_says_which_words_mean_nothing_to_it(tmp_path):
    assert without_meaning(["Chairs", "coffee_table", "somewhere soft", "piano", "xyz zyx"]) == ["piano", "xyz zyx"]
    assert without_meaning(SYNTHETIC.classes) == []
    np.savez(tmp_path / "a.npz", embedding=np.eye(2), names=["piano", "wall"])
    assert without_meaning(["piano"], tmp_path / "a.npz") == []
