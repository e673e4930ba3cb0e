"""Matterport3D: a miniature building written here from the format's description, and the real category table."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import matterport
from data.labels import IGNORE, LABEL_SETS
from data.projection import fuse, project
from experiments import configs
from ggsd_jax import datasets, prepare

TABLE = """index\tnyu40id\tnyuClass
1\t1\twall
2\t8\tdoor
3\t22\tceiling
4\t2\tfloor
5\t40\tunknown
6\t\t
"""
CLASSES = np.array([255, 0, 7, 20, 1, 255, 255], np.int32)
QUAD = np.array([[0, 0, 0], [4, 0, 0], [4, 4, 0], [0, 4, 0], [9, 9, 3]], np.float32)  # the last vertex has no face


def write_region(path: Path, vertices: np.ndarray, faces: list[tuple[tuple[int, int, int], int]]) -> None:
    """A region's mesh as distributed: vertices with normals and colours, faces with three ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vertex = np.dtype([(n, "<f4") for n in ("x", "y", "z", "nx", "ny", "nz", "tx", "ty")] + [(c, "u1") for c in "rgb"])
    rows = np.zeros(len(vertices), vertex)
    rows["x"], rows["y"], rows["z"] = vertices.T
    rows["nz"], rows["r"] = 1, 200
    face = np.dtype([("n", "u1"), ("v", "<i4", 3), ("m", "<i4"), ("s", "<i4"), ("c", "<i4")])
    table = np.array([(3, v, 0, 0, c) for v, c in faces], face)
    properties = [f"property float {name}" for name in ("x", "y", "z", "nx", "ny", "nz", "tx", "ty")]
    properties += [f"property uchar {name}" for name in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}", *properties]
    header += [f"element face {len(table)}", "property list uchar int vertex_indices"]
    header += [f"property int {name}" for name in ("material_id", "segment_id", "category_id")]
    path.write_bytes("\n".join([*header, "end_header", ""]).encode() + rows.tobytes() + table.tobytes())


def write_building(folder: Path, eyes: list[tuple[float, float, float]]) -> None:
    """Cameras 2 m above the floor z = 0 that look straight down on it, and what they see."""
    lines = [
        "dataset matterport",
        f"n_images {len(eyes)}",
        "depth_directory undistorted_depth_images",
        "color_directory undistorted_color_images",
        "intrinsics_matrix 1000 0 639.5  0 1000 511.5  0 0 1",
        "",
    ]
    for kind in ("color", "depth"):
        (folder / f"undistorted_{kind}_images").mkdir(parents=True)
    for i, (x, y, z) in enumerate(eyes):
        # looks along its own -z, which is down in the world as well
        lines.append(f"scan p{i}_d1_0.png p{i}_i1_0.jpg 1 0 0 {x} 0 1 0 {y} 0 0 1 {z} 0 0 0 1")
        Image.fromarray(np.zeros((1024, 1280, 3), np.uint8)).save(folder / f"undistorted_color_images/p{i}_i1_0.jpg")
        depth = np.full((1024, 1280), round(z * 4000), np.uint16)
        Image.fromarray(depth).save(folder / f"undistorted_depth_images/p{i}_d1_0.png")
    conf = folder / "undistorted_camera_parameters" / f"{folder.name}.conf"
    conf.parent.mkdir()
    conf.write_text("\n".join(lines))


def floor(seed: int, count: int = 400) -> tuple[np.ndarray, list]:
    """Vertices on and over a square floor, with a face of floor (id 4) or wall (id 1) per three of them."""
    rng = np.random.default_rng(seed)
    vertices = rng.uniform([0, 0, 0], [2, 2, 0.01], (count, 3))
    vertices[-1, 2] = 3  # so that the cameras stand in the box
    faces = [(tuple(range(i, i + 3)), 4 if i % 2 else 1) for i in range(0, count - 2, 3)]
    return vertices.astype(np.float32), faces


# ------------------------------------------------------------------------------------------------- categories


def test_categories_map_to_the_21_classes_by_their_nyu40_ids(tmp_path):
    (tmp_path / "t.tsv").write_text(TABLE)
    classes = matterport.read_categories(tmp_path / "t.tsv", "matterport21")
    np.testing.assert_array_equal(classes, CLASSES)
    assert LABEL_SETS["matterport21"].classes[20] == "ceiling"


@pytest.mark.parametrize("label_set", matterport.LABEL_SET_NAMES)
def test_the_real_table_gives_every_class_of_each_label_set(shared, label_set):
    path = shared / "data/matterport_meta/category_mapping.tsv"
    classes = matterport.read_categories(path, label_set)
    names = LABEL_SETS[label_set].classes
    assert len(classes) == 1660 and classes[0] == IGNORE
    assert set(classes) == {*range(len(names)), IGNORE}
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    nyu_class = rows[0].index("nyuClass" if label_set != "matterport21" else "nyu40class")
    spelled = {"refridgerator": "refrigerator", "otherfurniture": "other"} if label_set == "matterport21" else {}
    for label, row in zip(classes[1:], rows[1:], strict=True):
        name = spelled.get(row[nyu_class], row[nyu_class])
        assert label == (names.index(name) if name in names else IGNORE), row


@pytest.mark.parametrize(
    ("old", "new", "label_set", "message"),
    [
        ("index", "number", "matterport21", "expected a table with the columns"),
        ("3\t22", "9\t22", "matterport21", "row 3 has the index '9'; is it sorted"),
        ("3\t22", "3\t41", "matterport21", "row 3 has the nyu40id '41', expected 0..40"),
        ("2\t8\tdoor", "2\t8\tgate", "matterport40", "number 2 of the nyuClass names is 'gate', expected 'door'"),
    ],
)
def test_a_table_with_unknown_categories_is_refused(tmp_path, old, new, label_set, message):
    (tmp_path / "t.tsv").write_text(TABLE.replace(old, new))
    with pytest.raises(ValueError, match=f"t.tsv: .*{message}"):
        matterport.read_categories(tmp_path / "t.tsv", label_set)
    with pytest.raises(FileNotFoundError, match="no.tsv: missing; it comes with"):
        matterport.read_categories(tmp_path / "no.tsv", label_set)


# ---------------------------------------------------------------------------------------------------- regions


def test_a_vertex_has_the_class_of_most_faces_at_it_and_ties_go_to_none_then_to_the_smaller(tmp_path):
    path = tmp_path / "b1/region_segmentations/region7.ply"
    faces = [((0, 1, 2), 1), ((0, 2, 3), 2), ((0, 1, 3), 2), ((1, 2, 3), 5), ((1, 2, 3), -1)]
    write_region(path, QUAD, faces)
    scene = matterport.read_region(path, CLASSES)
    # vertex 0: wall, door, door; 1: wall, door, none, none; 2: wall, door, none, none; 3: door, door, none, none
    assert scene.name == "b1_region7" and scene.labels.tolist() == [7, IGNORE, IGNORE, IGNORE, IGNORE]
    assert scene.colors[0].tolist() == [200, 0, 0] and scene.normals[0].tolist() == [0, 0, 1]
    write_region(path, QUAD, faces[:2])
    assert matterport.read_region(path, CLASSES).labels.tolist() == [0, 0, 0, 7, IGNORE]


@pytest.mark.parametrize(
    ("faces", "message"),
    [
        ([((0, 1, 2), 7)], "category_id of face 0 is 7, the table has 1..6"),
        ([((0, 1, 2), 1), ((0, 1, 5), 1)], r"a face names a vertex outside 0\.\.4"),
    ],
)
def test_a_region_that_does_not_fit_is_named(tmp_path, faces, message):
    path = tmp_path / "b1/region_segmentations/region0.ply"
    write_region(path, QUAD, faces)
    with pytest.raises(ValueError, match=f"region0.ply: .*{message}"):
        matterport.read_region(path, CLASSES)


# ---------------------------------------------------------------------------------------------------- cameras


def test_cameras_are_turned_to_look_forward_and_see_the_floor_below_them(tmp_path):
    write_building(tmp_path / "b1", [(1.0, 1.0, 2.0)])
    (view,) = matterport.read_views(matterport.read_cameras(tmp_path / "b1"))
    assert view.name == "b1/p0_i1_0" and view.size == (640, 512) and view.depth[0, 0] == 2
    points = np.array([[1, 1, 0], [1.502, 1, 0], [1, 1.3, 0], [1, 1, 0.5], [1, 1, 2.5]], np.float32)
    seen = project(points, view.pose, view.intrinsics, view.size, view.depth, matterport.DEPTH_TOLERANCE)
    assert seen.visible.tolist() == [True, True, True, False, False]
    # the camera's up is the world's y, so a point at greater y lies higher in the image
    assert seen.col.tolist()[:3] == [320, 445, 320] and seen.row[2] < seen.row[0] == 256


def test_cameras_inside_the_box_are_taken_else_the_nearest_if_any_may(tmp_path):
    write_building(tmp_path / "b1", [(1, 1, 1), (9, 1, 1), (0, 1, 1), (1.5, 1, 1)])
    cameras = matterport.read_cameras(tmp_path / "b1")
    box = np.array([[0, 0, 0], [2, 2, 2]], np.float32)
    chosen = matterport.cameras_of_region(cameras, box)
    assert [camera.color.name[:2] for camera in chosen] == ["p0", "p3"]  # p2 stands on the wall of the box
    assert matterport.cameras_of_region(cameras, box + 5) == []
    nearest = matterport.cameras_of_region(cameras, box + np.array([7, 0, 5], np.float32), nearest=2)
    assert [camera.color.name[:2] for camera in nearest] == ["p1", "p3"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("scan p0", "scam p0", "line 7 is 'scam p0.*no command of the format"),
        (" 0 0 0 1\nscan", " 0 0 0\nscan", "line 7 is .*cannot reshape"),
        ("scan p1_d1_0.png p1_i1_0.jpg 1", "scan p1_d1_0.png p1_i1_0.jpg nan", "line 8 is .*not finite"),
        ("intrinsics_matrix", "#intrinsics", "line 5 is '#intrinsics"),
        ("n_images 2", "n_images 3", "truncated, it has 2 of 3 images"),
    ],
)
def test_a_bad_line_of_the_camera_file_is_named(tmp_path, old, new, message):
    write_building(tmp_path / "b1", [(1, 1, 1), (2, 1, 1)])
    path = tmp_path / "b1/undistorted_camera_parameters/b1.conf"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=f"b1.conf: {message}"):
        matterport.read_cameras(tmp_path / "b1")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="b1.conf: missing; download and unpack"):
        matterport.read_cameras(tmp_path / "b1")


def test_a_missing_frame_and_depth_of_another_size_or_scale_are_named(tmp_path):
    write_building(tmp_path / "b1", [(1, 1, 2)])
    cameras = matterport.read_cameras(tmp_path / "b1")
    points, _ = floor(0, 3000)
    depth = tmp_path / "b1/undistorted_depth_images/p0_d1_0.png"
    Image.fromarray(np.full((1024, 1280), 2000, np.uint16)).save(depth)  # in millimetres
    with pytest.raises(ValueError, match="almost nothing is visible: .* readings are 0.25. times as far"):
        fuse(points, matterport.read_views(cameras), lambda view: np.ones((512, 640, 1), np.float32), tolerance=0.02)
    Image.fromarray(np.zeros((512, 640), np.uint16)).save(depth)
    with pytest.raises(ValueError, match="p0_d1_0.png: 640 x 512 pixels, expected the camera's 1280 x 1024"):
        matterport.read_views(cameras)[0]
    depth.unlink()
    with pytest.raises(FileNotFoundError, match="p0_d1_0.png: missing; .* --type undistorted_depth_images"):
        matterport.read_views(cameras)


# ---------------------------------------------------------------------------------------------------- prepare


def test_buildings_are_prepared_and_regions_without_camera_left_out_of_training_only(tmp_path):
    root, lists = tmp_path / "scans", tmp_path / "lists"
    lists.mkdir()
    (lists / "category_mapping.tsv").write_text(TABLE)
    (lists / "scenes_train.txt").write_text("b1\nb9\n")
    (lists / "scenes_test.txt").write_text("b2\n")
    for building in ("b1", "b2"):
        vertices, faces = floor(1)
        write_region(root / building / "region_segmentations/region0.ply", vertices, faces)
        shift = np.array([0.5, 0.5, 5], np.float32) if building == "b1" else np.array([0.5, 0, -1.9], np.float32)
        write_region(root / building / "region_segmentations/region1.ply", vertices * [1, 1, 0.3] + shift, faces)
        write_building(root / building, [(1.0, 1.0, 2.0)])
    config = configs.load("matterport")
    overrides = {"data.root": str(root), "data.lists": str(lists), "text.encoder": "stand-in:64"}
    overrides |= {"teacher.name": "simulated", "data.chunks": 1, "data.prepare_workers": 0}
    config.update_from_flattened_dict(overrides)
    prepare.prepare(config, tmp_path / "out")
    (train,) = prepare.load_split(tmp_path / "out", "train")
    assert train.name == "b1_region0" and set(train.labels) <= {0, 1, IGNORE}
    assert 0.3 < len(train.feature_index) / len(train.points) < 1
    val = prepare.load_split(tmp_path / "out", "val")
    assert [scene.name for scene in val] == ["b2_region0", "b2_region1"]
    left_out = prepare.load_report(tmp_path / "out")["train"]["left_out"]
    assert left_out.pop("b1 region1") == "no camera stands in it"
    assert list(left_out) == ["b9"] and "not there (" in left_out["b9"]
    for images in root.glob("*/undistorted_*"):  # images and cameras: nobody looks for labels alone
        images.rename(images.with_name(f"not_{images.name}"))
    config.update(mode="supervised")
    config.teacher.name = "none"
    prepare.prepare(config, tmp_path / "labels_alone")
    assert [len(prepare.load_split(tmp_path / "labels_alone", split)) for split in ("train", "val")] == [2, 2]
    for cameras in root.glob("*/not_undistorted_camera_parameters"):
        cameras.rename(cameras.with_name("undistorted_camera_parameters"))
    config.teacher.name = "simulated"
    with pytest.raises(FileNotFoundError, match="p0_i1_0.jpg: missing"):
        prepare.prepare(config, tmp_path / "again")
    (lists / "scenes_train.txt").unlink()  # nor for the training split where the other is tested on
    assert [scene.name for scene in datasets.RawScenes(config, "val")] == ["b2_region0", "b2_region1"]
