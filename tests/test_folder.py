"""A folder of the user's own: every kind of cloud, posed images, and what the errors teach."""

import dataclasses
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import folder
from data.projection import project
from data.scene import Scene, write_ply
from experiments import configs
from ggsd_jax import datasets, prepare
from ggsd_jax.vision_language.simulated import SimulatedTeacher

RNG = np.random.default_rng(0)
POINTS = np.round(RNG.uniform([0, 0, 0], [4, 3, 0.02], (2000, 3)), 3).astype(np.float32)  # a floor
COLORS = RNG.integers(0, 256, (2000, 3)).astype(np.uint8)
LABELS = (POINTS[:, 0] > 2).astype(np.int32)
DOWN = np.array([[1, 0, 0, 2], [0, -1, 0, 1.5], [0, 0, -1, 3], [0, 0, 0, 1.0]])  # from 3 m above the middle


def write_pcd(path: Path) -> None:
    rgb = (COLORS.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)).astype(np.uint32)
    rows = "\n".join(f"{x} {y} {z} {c} {label}" for (x, y, z), c, label in zip(POINTS, rgb, LABELS, strict=True))
    path.write_text(
        "VERSION 0.7\nFIELDS x y z rgb label\nSIZE 4 4 4 4 4\nTYPE F F F U U\nCOUNT 1 1 1 1 1\nWIDTH 2000\nHEIGHT 1\n"
        f"POINTS 2000\nDATA ascii\n{rows}\n"
    )


def write_xyz(path: Path) -> None:
    rows = [f"{x}, {y} {z}\t{r} {g} {b}" for (x, y, z), (r, g, b) in zip(POINTS, COLORS, strict=True)]
    path.write_text("\n".join(["# x y z red green blue", "", *rows]))


WRITERS = {
    ".ply": lambda path: write_ply(path, POINTS, COLORS, label=LABELS),
    ".npz": Scene("kitchen", POINTS, COLORS, labels=LABELS).save_npz,
    ".pcd": write_pcd,
    ".xyz": write_xyz,
}


@pytest.fixture
def scene_folder(tmp_path) -> Path:
    """A cloud with two images, of which the second has lost its pose."""
    root = tmp_path / "kitchen"
    for kind in ("images", "poses"):
        (root / kind).mkdir(parents=True)
    WRITERS[".ply"](root / "scan.ply")
    for name in ("a", "b"):
        Image.fromarray(np.zeros((960, 1280, 3), np.uint8)).save(root / f"images/{name}.png")
    np.savetxt(root / "poses/a.txt", DOWN)
    (root / "poses/b.txt").write_text("nan " * 16)
    (root / "intrinsics.txt").write_text("1000 1000 639.5 479.5")
    return root


def views_of(root: Path, **settings) -> folder.Views:
    return folder.read_views(root / "scan.ply", folder.read_cloud(root / "scan.ply"), **settings)


@pytest.mark.parametrize("suffix", sorted(WRITERS))
def test_the_same_cloud_is_read_from_every_kind_of_file(tmp_path, suffix):
    WRITERS[suffix](tmp_path / f"kitchen{suffix}")
    scene = folder.read_cloud(tmp_path / f"kitchen{suffix}")
    assert scene.name == "kitchen"
    np.testing.assert_array_equal(scene.points, POINTS)
    np.testing.assert_array_equal(scene.colors, COLORS)
    assert (scene.labels is None) == (suffix == ".xyz")
    assert suffix == ".xyz" or (scene.labels == LABELS).all()


def test_normals_of_pcl_that_are_unknown_are_zero(tmp_path):
    (tmp_path / "a.pcd").write_text(
        "VERSION 0.7\nFIELDS x y z normal_x normal_y normal_z\nSIZE 4 4 4 4 4 4\nTYPE F F F F F F\n"
        "COUNT 1 1 1 1 1 1\nWIDTH 2\nHEIGHT 1\nPOINTS 2\nDATA ascii\n1 2 3 0 0 1\n4 5 6 nan nan nan\n"
    )
    assert folder.read_cloud(tmp_path / "a.pcd").normals.tolist() == [[0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3\n1 2\n", "line 2 is '1 2', expected x y z, or x y z red green blue"),
        ("1 2 3\n1 2 3 4 5 6\n", "line 2 is '1 2 3 4 5 6', expected"),
        ("x y z\n", "line 1 is 'x y z': could not convert"),
        ("# nothing\n", "holds no points"),
        ("1,5 2,5 0,25\n", "line 1 is '1,5 2,5 0,25'; write a decimal point, not a comma"),
        ("1,5;2,5;0,25\n", "write a decimal point"),
        ("1 2 3 4 5 256\n", "colors row 0 is .*expected 0..255"),
        ("451234.5678 5412345.678 210.5\n", "float32 moves points by up to .* subtract a local origin"),
    ],
)
def test_a_text_cloud_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / "a.xyz").write_text(text)
    with pytest.raises(ValueError, match=f"a.xyz: .*{message}"):
        folder.read_cloud(tmp_path / "a.xyz")


@pytest.mark.parametrize("one", ["1", "1.0000001"])
def test_colors_of_a_text_cloud_may_be_shares_of_one(tmp_path, one):
    (tmp_path / "a.xyz").write_text(f"0 0 0 {one} 0.5 0\n")
    assert folder.read_cloud(tmp_path / "a.xyz").colors.tolist() == [[255, 128, 0]]


def test_points_without_a_reading_and_normals_that_are_none_are_left_out(tmp_path, caplog):
    points, normals = POINTS.copy(), np.ones_like(POINTS)
    points[[0, 2], 2] = np.nan, np.inf
    normals[4] = np.nan
    write_ply(tmp_path / "a.ply", POINTS, **dict(zip(("nx", "ny", "nz"), normals.T, strict=True)))
    content = (tmp_path / "a.ply").read_bytes()
    for row in (0, 2):
        content = content.replace(POINTS[row].tobytes(), points[row].tobytes())
    (tmp_path / "a.ply").write_bytes(content)
    scene = folder.read_cloud(tmp_path / "a.ply")
    np.testing.assert_array_equal(scene.points, np.delete(POINTS, [0, 2], axis=0))
    assert scene.normals[[1, 2]].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert "a.ply: 2 of 2000 points have no finite x, y, z" in caplog.text


def test_a_long_corridor_in_millimetres_is_questioned_and_converted_in_double_precision(tmp_path):
    corridor = np.random.default_rng(0).uniform(0, 1, (500, 3)) * [40_000, 3000, 2500] + 0.123
    np.savetxt(tmp_path / "a.xyz", corridor)
    with pytest.raises(ValueError, match="large for a scan"):
        folder.read_cloud(tmp_path / "a.xyz")
    np.testing.assert_allclose(folder.read_cloud(tmp_path / "a.xyz", 0.001).points, corridor / 1000, atol=1e-5)


@pytest.mark.parametrize("factor", [1000, 100, 0.001])
def test_a_scan_that_is_not_in_metres_is_questioned_unless_its_scale_is_stated(tmp_path, factor):
    room = np.concatenate([POINTS, POINTS + np.array([0, 0, 2.5], np.float32)])
    write_ply(tmp_path / "a.ply", room * factor)
    with pytest.raises(ValueError, match="a.ply: .* m is (large|small) for a scan.* data.scale=1"):
        folder.read_cloud(tmp_path / "a.ply")
    np.testing.assert_allclose(folder.read_cloud(tmp_path / "a.ply", scale=1 / factor).points, room, atol=1e-6)
    assert np.ptp(folder.read_cloud(tmp_path / "a.ply", scale=1.0).points) == pytest.approx(4 * factor, rel=0.01)


def test_the_question_shows_the_scan_in_every_unit(tmp_path):
    corners = np.array([[0, 0, 0], [4000, 3000, 2400]], np.float32).repeat(100, axis=0)
    with pytest.raises(ValueError, match=re.escape("data.scale=0.001 (4 x 3 x 2.4 m)")):
        folder.check_metres(tmp_path, corners, "data.scale={scale:g}")
    with pytest.raises(ValueError, match=re.escape("--unit=cm (40 x 30 x 24 m)")):
        folder.check_metres(tmp_path, corners, "--unit={unit}")


def test_a_large_place_with_stray_points_is_believed_to_be_in_metres(tmp_path):
    points = np.random.default_rng(0).uniform(0, 1, (2000, 3)).astype(np.float32) * np.float32([500, 500, 30])
    points[7] = 90_000
    folder.check_metres(tmp_path, points, "")


def test_labels_that_are_no_ids_are_refused(tmp_path):
    write_ply(tmp_path / "a.ply", POINTS, label=np.full(2000, 256))
    with pytest.raises(ValueError, match="a.ply: label of point 0 is 256, expected 0..254"):
        folder.read_cloud(tmp_path / "a.ply")


def test_labels_may_have_the_name_that_cloudcompare_gives_them(tmp_path):
    write_ply(tmp_path / "a.ply", POINTS, scalar_Label=LABELS.astype(np.float32))
    np.testing.assert_array_equal(folder.read_cloud(tmp_path / "a.ply").labels, LABELS)


# ------------------------------------------------------------------------------------------------------ views


def test_images_without_depth_see_the_cloud_that_nothing_of_it_hides(scene_folder, caplog):
    with caplog.at_level(logging.WARNING):
        views = views_of(scene_folder)
    assert "left out frames without a finite pose: b (of 2)" in caplog.text
    (view,) = views
    assert view.name == "scan/a" and view.size == (640, 480) and view.pixels().shape == (480, 640, 3)
    under = POINTS - np.array([0, 0, 1], np.float32)
    seen, hidden = (project(p, view.pose, view.intrinsics, view.size, view.depth) for p in (POINTS, under))
    inside = np.abs((POINTS - DOWN[:3, 3])[:, :2]).max(axis=1) < 1.3
    assert seen.visible[inside].mean() > 0.99 and hidden.visible.sum() == 0


def test_depth_is_in_its_own_units_and_registered_to_the_image(scene_folder):
    (scene_folder / "depth").mkdir()
    with pytest.raises(FileNotFoundError, match="depth/a.png: missing, but there is a.png"):
        views_of(scene_folder)
    for name in "ab":
        Image.fromarray(np.full((480, 640), 12000, np.uint16)).save(scene_folder / f"depth/{name}.png")
    (view,) = views_of(scene_folder, depth_units=4000.0)
    assert view.size == (640, 480) and (view.depth == 3).all()
    Image.fromarray(np.zeros((480, 480), np.uint16)).save(scene_folder / "depth/a.png")
    with pytest.raises(ValueError, match="a.png: 480 x 480 pixels are not the shape of a.png, 1280 x 960"):
        views_of(scene_folder)[0]


def test_poses_have_the_unit_of_the_cloud(scene_folder):
    np.savetxt(scene_folder / "poses/a.txt", DOWN * np.array([[1, 1, 1, 1000]] * 3 + [[1, 1, 1, 1]]))
    scene = folder.read_cloud(scene_folder / "scan.ply")
    np.testing.assert_allclose(folder.read_views(scene_folder / "scan.ply", scene, 0.001)[0].pose, DOWN)


@pytest.mark.parametrize("text", ["1000 1000 639.5 479.5", "1000 0 639.5 0 1000 479.5 0 0 1", None])
def test_intrinsics_are_numbers_or_matrices_for_all_images_or_for_each(scene_folder, text):
    if text is None:
        (scene_folder / "intrinsics.txt").unlink()
        (scene_folder / "intrinsics").mkdir()
        matrix = np.eye(4)
        matrix[[0, 1, 0, 1], [0, 1, 2, 2]] = 1000, 1000, 639.5, 479.5
        np.savetxt(scene_folder / "intrinsics/a.txt", matrix)
    else:
        (scene_folder / "intrinsics.txt").write_text(text)
    intrinsics = views_of(scene_folder)[0].intrinsics
    np.testing.assert_allclose(intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]], [500, 500, 319.5, 239.5], rtol=1e-3)


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("intrinsics.txt", "1000 1000 639.5", ValueError, "intrinsics.txt: expected fx fy cx cy, or a 3x3"),
        ("intrinsics.txt", "500", ValueError, "intrinsics.txt: expected fx fy cx cy, or a 3x3"),
        ("intrinsics.txt", "9 9 1500 700", ValueError, "cx 1500, cy 700 are not of an image of 1280 x 960"),
        (
            "intrinsics.txt",
            None,
            FileNotFoundError,
            r"neither intrinsics.txt nor intrinsics/a.txt is there; expected:\n  <root>",
        ),
        ("poses/a.txt", None, FileNotFoundError, r"poses/a.txt: missing, but there is a.png; expected:\n  <root>"),
        ("poses/a.txt", "1 0 0", ValueError, "poses/a.txt: expected 16 numbers"),
        ("poses/a.txt", DOWN.T, ValueError, "poses/a.txt: the last row is .*; it is transposed, write it row by row"),
        ("poses/a.txt", DOWN * 2, ValueError, "poses/a.txt: the last row is"),
        (
            "poses/a.txt",
            DOWN @ np.diag([1, 1, -1, 1]),
            ValueError,
            "poses/a.txt: its left upper 3x3 part is no rotation",
        ),
        ("poses/a.txt", "nan " * 16, ValueError, "poses: none of the 2 poses is finite"),
        ("images/a.png", "", ValueError, "images/a.png: truncated or no image"),
        ("images/a.jpg", "", ValueError, "images: a.jpg and a.png would share a pose; rename one"),
    ],
)
def test_errors_teach_the_layout(scene_folder, file, content, error, message):
    path = scene_folder / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content if isinstance(content, str) else " ".join(map(str, content.ravel())))
    with pytest.raises(error, match=message):
        views_of(scene_folder)


def test_images_of_two_sizes_need_intrinsics_each(scene_folder):
    Image.fromarray(np.zeros((480, 640, 3), np.uint8)).save(scene_folder / "images/c.png")
    shutil.copy(scene_folder / "poses/a.txt", scene_folder / "poses/c.txt")
    with pytest.raises(ValueError, match="intrinsics.txt: is of one camera, but a.png has 1280 x 960 pixels and c.png"):
        views_of(scene_folder)


# ----------------------------------------------------------------------------------------------- whole folders


def test_scenes_are_folders_with_a_cloud_or_bare_clouds(tmp_path, scene_folder):
    WRITERS[".xyz"](tmp_path / "hall.xyz")
    (tmp_path / "notes").mkdir()
    assert folder.find_scenes(tmp_path) == {"hall": tmp_path / "hall.xyz", "kitchen": scene_folder / "scan.ply"}
    for place in (tmp_path, scene_folder, scene_folder / "images"):  # macOS leaves such files
        for name in ("._hall.xyz", "._a.png"):
            (place / name).write_bytes(b"\0\5\x16\7")
    assert folder.find_scenes(tmp_path) == {"hall": tmp_path / "hall.xyz", "kitchen": scene_folder / "scan.ply"}
    assert len(views_of(scene_folder)) == 1
    (scene_folder / "more.xyz").write_text("")
    with pytest.raises(ValueError, match="kitchen: holds the clouds more.xyz, scan.ply, expected one"):
        folder.find_scenes(tmp_path)
    with pytest.raises(ValueError, match=r"notes: no point cloud found; expected:\n  <root>/<scene>/ "):
        folder.find_scenes(tmp_path / "notes")
    (tmp_path / "hall").mkdir()
    (tmp_path / "hall/a.xyz").write_text("")
    (scene_folder / "more.xyz").unlink()
    with pytest.raises(ValueError, match="two scenes are called 'hall'"):
        folder.find_scenes(tmp_path)
    with pytest.raises(ValueError, match="images/ lies beside several clouds"):
        WRITERS[".xyz"](scene_folder / "more.xyz")
        folder.find_scenes(scene_folder)


def test_a_folder_is_prepared_with_its_images_and_without(tmp_path, scene_folder):
    room = np.concatenate([POINTS, POINTS[:, [0, 2, 1]] * [1, 1, 0.8]]).astype(np.float32)
    labelled = Scene("hall", room, labels=np.r_[LABELS, LABELS])
    labelled.save_npz(tmp_path / "hall.npz")
    dataclasses.replace(labelled, labels=None).save_npz(tmp_path / "attic.npz")
    (tmp_path / "cellar").mkdir()
    (tmp_path / "cellar/cloud.las").touch()
    (tmp_path / "val.txt").write_text("\ufeffhall\n\n", encoding="utf-8")
    config = configs.load("folder")
    config.teacher.name = "simulated"
    config.update_from_flattened_dict(
        {"data.root": str(tmp_path), "data.chunks": 1, "data.prepare_workers": 0, "text.encoder": "stand-in:64"}
    )
    prepare.prepare(config, tmp_path / "out")
    (train,) = prepare.load_split(tmp_path / "out", "train")
    (val,) = prepare.load_split(tmp_path / "out", "val")
    assert (train.name, val.name) == ("kitchen", "hall")
    assert len(train.feature_index) > 500 and len(val.feature_index) > 500
    report = prepare.load_report(tmp_path / "out")
    left_out = report["train"]["left_out"]
    assert "neither images nor labels" in left_out["attic"]
    assert "holds no .ply, .pcd, .npz, .xyz" in left_out["cellar"]
    assert (report["train"]["frames_lost"], report["val"]["frames_lost"]) == (1, 0)
    config.data.chunk_points = 10
    (tmp_path / "val.txt").write_text("cellar\n")
    with pytest.raises(ValueError, match="val.txt lists 'cellar', which is not in .*; there: attic, hall, kitchen"):
        prepare.prepare(config, tmp_path / "other")


def test_a_labelled_cloud_without_images_is_scored_though_a_real_network_cannot_see_it(tmp_path, scene_folder):
    Scene("hall", POINTS, labels=LABELS).save_npz(tmp_path / "hall.npz")
    Scene("attic", POINTS, labels=LABELS).save_npz(tmp_path / "attic.npz")
    (tmp_path / "val.txt").write_text("hall")
    config = configs.load("folder")
    config.data.root, config.teacher.name = str(tmp_path), "maskclip"
    splits = datasets.folder_scenes(config)
    (hall,), (attic, kitchen) = ([read() for read in splits[split]().values()] for split in ("val", "train"))
    assert hall.views == attic.views == () and len(kitchen.views) == 1
    unable = prepare.add_features(hall, SimulatedTeacher(np.eye(3, 8, dtype=np.float32)))
    assert unable.features.shape == (0, 8) and len(unable.labels) == 2000
    (tmp_path / "val.txt").write_text("hall\nattic\nkitchen")
    with pytest.raises(ValueError, match="val.txt lists every scene of .*: none is left to train on"):
        datasets.folder_scenes(config)


def test_the_layout_in_the_config_is_the_one_the_errors_show():
    text = (Path(__file__).parents[1] / "configs/folder.py").read_text()
    assert folder.LAYOUT.strip("\n") in text


def test_a_split_of_which_nothing_is_left_says_why(tmp_path):
    Scene("attic", POINTS).save_npz(tmp_path / "attic.npz")
    config = configs.load("folder")
    config.update_from_flattened_dict(
        {"data.root": str(tmp_path), "data.prepare_workers": 0, "teacher.name": "simulated", "text.encoder": "stand-in"}
    )
    with pytest.raises(ValueError, match="split 'train' has no scene left, all 1 are left out: it has neither images"):
        prepare.prepare(config, tmp_path / "out")
