"""ScanNet's raw files: scenes, labels and frames, real ones and small ones made to be wrong."""

import logging
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data import scannet
from data.labels import LABEL_SETS, NYU40_TO_SCANNET20
from data.scene import read_ply_columns, write_ply

N = 7
NYU40 = np.array([0, 1, 39, 40, 14, 2, 13], np.uint16)
POSE = "1 0 0 0.5\n0 1 0 -2\n0 0 1 3\n0 0 0 1\n"


@pytest.fixture
def folder(tmp_path):
    """A complete small scene, three frames of which one has lost its pose."""
    folder = tmp_path / "scene0007_01"
    for kind in ("color", "depth", "pose"):
        (folder / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    points, colors = rng.random((N, 3)).astype(np.float32), rng.integers(0, 256, (N, 3)).astype(np.uint8)
    write_ply(folder / "scene0007_01_vh_clean_2.ply", points, colors)
    write_ply(folder / "scene0007_01_vh_clean_2.labels.ply", points, label=NYU40)
    for number in (0, 20, 100):
        write_depth(folder, number, np.full((480, 640), 1500))
        Image.fromarray(rng.integers(0, 256, (97, 130, 3)).astype(np.uint8)).save(folder / f"color/{number}.jpg")
        (folder / f"pose/{number}.txt").write_text(POSE if number != 20 else "-inf " * 16)
    return folder


def write_depth(folder, number: int, millimetres: np.ndarray) -> None:
    Image.fromarray(millimetres.astype(np.uint16)).save(folder / f"depth/{number}.png")


def test_a_scene_has_the_mesh_and_the_benchmark_classes(folder):
    scene = scannet.read_scene(folder)
    assert scene.name == "scene0007_01" and scene.points.shape == scene.colors.shape == (N, 3)
    assert scene.labels.tolist() == [255, 0, 19, 255, 12, 1, 255]


def test_a_scene_can_be_read_with_all_nyu40_classes(folder):
    assert scannet.read_scene(folder, "nyu40").labels.tolist() == [255, 0, 38, 39, 13, 1, 12]


def test_a_test_scene_without_label_file_has_no_labels(folder):
    (folder / "scene0007_01_vh_clean_2.labels.ply").unlink()
    assert scannet.read_scene(folder).labels is None


def test_a_missing_mesh_is_named(tmp_path):
    (tmp_path / "scene0001_00").mkdir()
    with pytest.raises(FileNotFoundError, match="scene0001_00_vh_clean_2.ply: missing; download"):
        scannet.read_scene(tmp_path / "scene0001_00")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(N) + 35, "label row 6 is 41, expected NYU40 ids 0..40; ScanNet v1 has raw category ids"),
        (NYU40.astype(int) - 1, "label row 0 is -1, expected NYU40"),
        (NYU40[:-1], "6 labels for the 7 vertices of scene0007_01_vh_clean_2.ply"),
        (None, "no property 'label'"),
    ],
)
def test_labels_that_are_not_of_this_mesh_or_not_nyu40_are_refused(folder, labels, message):
    path = folder / "scene0007_01_vh_clean_2.labels.ply"
    fields = {} if labels is None else {"label": labels}
    write_ply(path, np.zeros((N if labels is None else len(labels), 3)), **fields)
    with pytest.raises(ValueError, match=f"{path.name}: .*{message}"):
        scannet.read_scene(folder)


def test_a_truncated_mesh_is_named(folder):
    path = folder / "scene0007_01_vh_clean_2.ply"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="scene0007_01_vh_clean_2.ply: truncated, the file ends in row 6 of 7"):
        scannet.read_scene(folder)


def test_views_carry_pose_intrinsics_and_depth_on_the_asked_grid(folder):
    millimetres = np.arange(480 * 640).reshape(480, 640) % 5000
    write_depth(folder, 0, millimetres)
    view = scannet.read_views(folder)[0]
    assert view.name == "scene0007_01/0" and view.size == (320, 240) and view.depth.dtype == np.float32
    np.testing.assert_allclose(view.depth, millimetres[::2, ::2] / 1000, rtol=1e-7)
    np.testing.assert_allclose(view.intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]], [288.9353025, 288.9353025, 159.5, 119.5])
    np.testing.assert_array_equal(view.pose, np.array(POSE.split(), float).reshape(4, 4))
    assert view.pixels().shape == (240, 320, 3)
    full = scannet.read_views(folder, size=(640, 480))[0]
    np.testing.assert_allclose(full.depth, millimetres / 1000, rtol=1e-7)
    np.testing.assert_array_equal(full.intrinsics, scannet.DEPTH_INTRINSICS)


def test_frames_without_a_finite_pose_are_left_out_counted_and_logged(folder, caplog):
    with caplog.at_level(logging.WARNING):
        views = scannet.read_views(folder)
    assert [view.name for view in views] == ["scene0007_01/0", "scene0007_01/100"] and len(views) == 2
    assert "left out frames without a finite pose: 20 (of 3)" in caplog.text


def test_views_can_be_thinned_and_gone_through_twice(folder):
    views = scannet.read_views(folder, every=2)
    assert [view.name for view in views] == [view.name for view in views] == ["scene0007_01/0", "scene0007_01/100"]


def test_of_a_stream_that_was_exported_whole_every_20th_frame_is_taken(folder):
    for kind, suffix in (("color", ".jpg"), ("depth", ".png"), ("pose", ".txt")):
        (folder / kind / f"100{suffix}").unlink()
        for number in range(1, 41):
            shutil.copy(folder / kind / f"0{suffix}", folder / kind / f"{number}{suffix}")
    assert [view.name for view in scannet.read_views(folder)] == [f"scene0007_01/{n}" for n in (0, 20, 40)]


def test_frames_named_as_in_scannet_frames_25k_are_the_same_frames(folder):
    plain = [(view, view.pixels()) for view in scannet.read_views(folder)]
    for path in [*folder.glob("color/*"), *folder.glob("depth/*"), *folder.glob("pose/*")]:
        path.rename(path.with_name(f"{int(path.stem):06d}{path.suffix}"))
    for view, (other, pixels) in zip(scannet.read_views(folder), plain, strict=True):
        assert view.name == other.name
        np.testing.assert_array_equal(view.pixels(), pixels)


def test_depth_is_read_only_when_a_view_is_asked_for(folder):
    views = scannet.read_views(folder)
    (folder / "depth/100.png").write_bytes(b"not an image")
    assert views[0].depth.shape == (240, 320)
    with pytest.raises(ValueError, match="100.png: truncated or no image"):
        views[1]


def pack_stream(folder, numbers, depth_size=(640, 480), units=1000.0) -> bytes:
    """The exported frames as a .sens stream whose other frames are empty."""
    parts = [struct.pack("<IQ", 4, 4), b"name", bytes(256)]
    parts.append(struct.pack("<ii4IfQ", 2, 1, 130, 97, *depth_size, units, max(numbers) + 1))
    for number in range(max(numbers) + 1):
        color, depth, pose = b"", b"", [0.0] * 16
        if number in numbers:
            color = (folder / f"color/{number}.jpg").read_bytes()
            with Image.open(folder / f"depth/{number}.png") as image:
                depth = zlib.compress(np.asarray(image).astype("<u2").tobytes())
            pose = [float(x) for x in (folder / f"pose/{number}.txt").read_text().split()]
        parts += [struct.pack("<16f4Q", *pose, 7, 8, len(color), len(depth)), color, depth]
    return b"".join([*parts, struct.pack("<Q", 0)])  # no inertial frames


def test_a_stream_gives_the_views_of_its_exported_frames(folder):
    write_depth(folder, 0, np.arange(480 * 640).reshape(480, 640) % 5000)
    exported = [(view, view.pixels()) for view in scannet.read_views(folder)]
    content = pack_stream(folder, [0, 20, 100])
    for kind in ("color", "depth", "pose"):
        shutil.rmtree(folder / kind)
    (folder / "pose").mkdir()  # of an export that was killed at once
    (folder / "scene0007_01.sens").write_bytes(content)
    views = scannet.read_views(folder, every=5)
    assert [view.name for view in views] == ["scene0007_01/0", "scene0007_01/100"]  # every 100th of the stream
    for view, (other, pixels) in zip(views, exported, strict=True):
        np.testing.assert_array_equal(view.depth, other.depth)
        np.testing.assert_array_equal(view.pose, other.pose)
        np.testing.assert_array_equal(view.pixels(), pixels)
    assert pickle.loads(pickle.dumps(views))[1].name == "scene0007_01/100"


def test_a_stream_that_is_cut_off_or_of_another_kind_is_refused(folder):
    content, without_units = pack_stream(folder, [0]), pack_stream(folder, [0], units=0.0)
    shutil.rmtree(folder / "pose")
    path = folder / "scene0007_01.sens"
    path.write_bytes(content[:-500])
    with pytest.raises(ValueError, match="scene0007_01.sens: truncated, the file ends in frame 0 of 1"):
        scannet.read_views(folder)
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match="truncated"):
        scannet.read_views(folder)
    path.write_bytes(b"\x03" + content[1:])
    with pytest.raises(ValueError, match="not a .sens file of version 4, it starts with the number 3"):
        scannet.read_views(folder)
    compression = 4 + 8 + 4 + 256
    path.write_bytes(content[:compression] + b"\0" + content[compression + 1 :])
    with pytest.raises(ValueError, match="color compression 0 and depth compression 1, expected 2"):
        scannet.read_views(folder)
    path.write_bytes(without_units)
    with pytest.raises(ValueError, match="scene0007_01.sens: corrupt, 0 units of depth to the metre"):
        scannet.read_views(folder)
    path.write_bytes(content[:-40] + bytes(32) + content[-8:])
    with pytest.raises(ValueError, match="scene0007_01.sens: depth of frame 0 is corrupt"):
        scannet.read_views(folder)[0]


@pytest.mark.parametrize("kind", ["color/0.jpg", "depth/0.png", "pose/0.txt"])
def test_a_missing_file_of_a_frame_is_named(folder, kind):
    (folder / kind).unlink()
    with pytest.raises(FileNotFoundError, match=f"scene0007_01: missing {kind}; export the frames again"):
        scannet.read_views(folder)


def test_a_folder_without_poses_names_the_first_of_them(folder):
    shutil.rmtree(folder / "pose")
    with pytest.raises(FileNotFoundError, match="missing pose/0.txt, pose/20.txt, pose/100.txt;"):
        scannet.read_views(folder)


def test_a_pose_that_is_no_rigid_motion_is_named(folder):
    (folder / "pose/20.txt").write_text("0 " * 16)
    with pytest.raises(ValueError, match="pose/20.txt: the last row is .* expected 0 0 0 1"):
        scannet.read_views(folder)


def test_a_folder_that_is_a_link_keeps_its_own_name(folder, tmp_path):
    stored = folder.rename(tmp_path / "blob")
    folder.symlink_to(stored)
    assert scannet.read_scene(folder).name == folder.name


def test_a_folder_without_frames_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no frames; download the .sens file, or export it"):
        scannet.read_views(tmp_path)


def test_a_scene_whose_poses_are_all_lost_is_refused(folder):
    for path in (folder / "pose").iterdir():
        path.write_text("nan " * 16)
    with pytest.raises(ValueError, match="none of the 3 frames has a finite pose"):
        scannet.read_views(folder)


@pytest.mark.parametrize("text", ["", "1 0 0", POSE + "1", POSE.replace("3", "three")])
def test_a_pose_file_that_is_no_matrix_is_named(folder, text):
    (folder / "pose/0.txt").write_text(text)
    with pytest.raises(ValueError, match="pose/0.txt: expected 16 numbers, a 4x4"):
        scannet.read_views(folder)


def test_depth_that_is_cut_off_of_8_bit_or_resized_is_refused(folder):
    path = folder / "depth/0.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="0.png: truncated or no image"):
        scannet.read_views(folder)[0]
    Image.fromarray(np.zeros((480, 640), np.uint8)).save(path)
    with pytest.raises(ValueError, match="0.png: expected 16-bit depth, 1000 units to the metre, got uint8"):
        scannet.read_views(folder)[0]
    Image.fromarray(np.zeros((240, 320), np.uint16)).save(path)
    with pytest.raises(ValueError, match="0.png: 320 x 240 pixels, expected the camera's 640 x 480"):
        scannet.read_views(folder)[0]


def test_the_real_scene_has_its_published_classes(shared):
    folder = shared / "data/scannet/scene0000_00"
    scene = scannet.read_scene(folder)
    nyu40 = read_ply_columns(folder / "scene0000_00_vh_clean_2.labels.ply")["label"]
    np.testing.assert_array_equal(scene.labels, NYU40_TO_SCANNET20[nyu40])
    assert (len(scene.points), (scene.labels == 0).sum(), (scene.labels == 12).sum()) == (81369, 13899, 1897)
    np.testing.assert_allclose((scene.labels != 255).mean(), 0.731, atol=5e-4)
    all_labels = scannet.read_scene(folder, "nyu40").labels
    counts = {name: int((all_labels == i).sum()) for i, name in enumerate(LABEL_SETS["nyu40"].classes)}
    assert (counts["otherprop"], counts["ceiling"], counts["mirror"]) == (7330, 2509, 151)
    assert (all_labels == 255).sum() == 4357


def test_the_real_v1_label_file_is_refused_not_mistaken(shared, tmp_path):
    source = shared / "data/scannet/scene0000_00"
    folder = tmp_path / "scene0000_00"
    folder.mkdir()
    shutil.copy(source / "scene0000_00_vh_clean_2.ply", folder)
    shutil.copy(source / "scene0000_00_vh_clean_2.labels_v1_rawid.ply", folder / "scene0000_00_vh_clean_2.labels.ply")
    with pytest.raises(ValueError, match="labels.ply: label row .*ScanNet v1 has raw category ids"):
        scannet.read_scene(folder)


def test_stray_ids_of_three_v2_scenes_are_no_class(tmp_path):
    path = tmp_path / "a.labels.ply"
    write_ply(path, np.zeros((4, 3), np.float32), label=np.array([1, 50, 149, 2], np.uint16))
    assert scannet.read_labels(path).tolist() == [0, 255, 255, 1]
