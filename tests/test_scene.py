"""The Scene record: what it accepts, what it says when it does not, and that files give it back."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from data.scene import Scene, View, check_labels, resize_nearest

N = 6
RNG = np.random.default_rng(0)
FULL = {
    "name": "room",
    "points": RNG.normal(size=(N, 3)).astype(np.float32),
    "colors": RNG.integers(0, 256, (N, 3)).astype(np.uint8),
    "normals": RNG.normal(size=(N, 3)).astype(np.float32),
    "labels": np.array([0, 1, 255, 254, 3, 3], np.int32),
    "superpoints": np.array([-1, 0, 0, 1, 5, -1], np.int32),
    "features": RNG.normal(size=(2, 4)).astype(np.float16),
    "feature_index": np.array([1, 5], np.int32),
}


def assert_same(a: Scene, b: Scene) -> None:
    for field in dataclasses.fields(Scene):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert type(x) is type(y), field.name
        np.testing.assert_array_equal(x, y, err_msg=field.name)
        assert x is None or isinstance(x, str) or x.dtype == y.dtype


def changed(field: str, row: int, value) -> np.ndarray:
    array = FULL[field].copy()
    array[row] = value
    return array


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"points": np.zeros((0, 3), np.float32)}, "points is empty; a scene needs at least one point"),
        (
            {"points": FULL["points"].astype(np.float64)},
            r"points must be float32 .*got float64; .*astype\(np.float32",
        ),
        ({"points": FULL["points"][:, :2]}, r"points must be float32 \[any, 3\], got shape \[6, 2\]"),
        ({"points": FULL["points"].tolist()}, "points must be float32 .*got list; use np.asarray"),
        ({"points": None}, "points must be .*got NoneType"),
        (
            {"points": changed("points", 4, np.nan)},
            r"points row 4 is \[nan.*expected finite coordinates; drop",
        ),
        ({"points": changed("points", 0, np.inf)}, "points row 0"),
        ({"colors": FULL["colors"] / np.float32(255)}, "colors must be uint8 .*got float32"),
        (
            {"colors": FULL["colors"][:5]},
            r"colors must be uint8 \[6, 3\], got shape \[5, 3\]; give one row per",
        ),
        ({"normals": changed("normals", 2, np.nan)}, "normals row 2 .*expected finite; set unknown normals"),
        ({"labels": FULL["labels"].astype(np.int64)}, "labels must be int32"),
        ({"labels": changed("labels", 3, 256)}, "labels row 3 is 256, expected 0..254, or 255 = ignore; map"),
        ({"labels": changed("labels", 1, -100)}, "labels row 1 is -100"),
        ({"superpoints": changed("superpoints", 5, -2)}, "superpoints row 5 is -2, expected >= -1; use -1"),
        ({"features": None}, "features and feature_index must be given together"),
        ({"feature_index": None}, "features and feature_index must be given together"),
        ({"feature_index": np.array([1], np.int32)}, "features has 2 rows, feature_index 1"),
        (
            {"feature_index": np.array([1, N], np.int32)},
            r"feature_index row 1 is 6, expected a point in 0\.\.5",
        ),
        ({"feature_index": np.array([-1, 2], np.int32)}, "feature_index row 0 is -1"),
        (
            {"feature_index": np.array([3, 3], np.int32)},
            "feature_index row 1 is 3, expected strictly increasing",
        ),
        ({"features": changed("features", 1, np.inf)}, "features row 1 is \\[?inf.*expected finite float16"),
    ],
)
def test_a_wrong_field_is_named_with_its_row_what_was_expected_and_the_fix(wrong, message):
    with pytest.raises(ValueError, match=f"scene 'room': {message}"):
        Scene(**(FULL | wrong))


def test_labels_outside_the_label_set_are_refused_and_ignored_points_are_not():
    scene = Scene(**(FULL | {"labels": np.array([0, 1, 255, 3, 3, 19], np.int32)}))
    check_labels(scene, 20)
    with pytest.raises(ValueError, match=r"'room': labels row 5 is 19, expected 0\.\.18 or 255"):
        check_labels(scene, 19)
    with pytest.raises(ValueError, match="labels is missing"):
        check_labels(Scene("bare", FULL["points"]), 20)


@pytest.mark.parametrize("fields", [set(FULL), {"name", "points"}, {"name", "points", "labels"}])
def test_a_scene_is_the_same_after_save_and_load(tmp_path, fields):
    scene = Scene(**{k: v for k, v in FULL.items() if k in fields})
    scene.save_npz(tmp_path / "scene.npz")
    assert_same(scene, Scene.load_npz(tmp_path / "scene.npz"))
    assert [p.name for p in tmp_path.iterdir()] == ["scene.npz"]


def test_an_npz_of_plain_arrays_is_a_scene_named_after_the_file(tmp_path):
    np.savez(tmp_path / "kitchen.npz", points=FULL["points"])
    assert Scene.load_npz(tmp_path / "kitchen.npz").name == "kitchen"


def test_a_bad_npz_is_named(tmp_path):
    path = tmp_path / "scene.npz"
    Scene(**FULL).save_npz(path)
    content = path.read_bytes()
    for size in (0, 3, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="scene.npz: truncated, or not an .npz"):
            Scene.load_npz(path)
    np.savez(path, points=FULL["points"], colours=FULL["colors"])
    with pytest.raises(ValueError, match=r"scene.npz: expected .* unknown here: \['colours'\]"):
        Scene.load_npz(path)
    np.savez(path, points=FULL["points"] * np.nan)
    with pytest.raises(ValueError, match="scene.npz: scene 'scene': points row 0"):
        Scene.load_npz(path)
    with pytest.raises(FileNotFoundError, match="absent.npz"):
        Scene.load_npz(tmp_path / "absent.npz")


def view(**fields) -> View:
    return View(**({"name": "7", "pose": np.eye(4), "intrinsics": np.eye(3), "size": (4, 3)} | fields))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pose": np.full((4, 4), -np.inf)}, "pose has values that are not finite; leave the frame out"),
        ({"pose": np.eye(3)}, r"pose must be float64 \[4, 4\], got float64 \[3, 3\]"),
        ({"intrinsics": np.eye(3, dtype=np.float32)}, "intrinsics must be float64"),
        ({"depth": np.zeros((4, 3), np.float32)}, r"depth must be float32 \[3, 4\], got float32 \[4, 3\]"),
        ({"depth": np.full((3, 4), np.nan, np.float32)}, "depth has values that are not finite; write 0"),
    ],
)
def test_a_wrong_view_is_named(wrong, message):
    with pytest.raises(ValueError, match=f"view '7': {message}"):
        view(**wrong)


@pytest.mark.parametrize("name", ["../../escaped", "house/kitchen", "", None])
def test_a_name_that_leads_to_another_folder_is_refused(name):
    with pytest.raises(ValueError, match=f"scene '{name}': expected a name that can begin a file's"):
        Scene(name, np.zeros((1, 3), np.float32))


def test_the_pixels_of_a_view_lie_on_its_own_grid_and_have_8_bits(tmp_path):
    image = RNG.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    np.testing.assert_array_equal(view(image=image).pixels(), image[::2, ::2])
    Image.fromarray(np.full((3, 4), 40_000, np.uint16)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match="grey.png: its pixels are of mode I.*, expected 8 bits"):
        view(image=tmp_path / "grey.png").pixels()
    with pytest.raises(ValueError, match="view '7' has no image"):
        view().pixels()


def test_resizing_to_the_same_size_changes_nothing():
    image = RNG.random((5, 7))
    np.testing.assert_array_equal(resize_nearest(image, (7, 5)), image)
