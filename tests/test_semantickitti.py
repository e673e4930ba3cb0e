"""SemanticKITTI: the real scans, and small files made to be wrong; RELLIS-3D's labels in 3D and 2D, for projection."""

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from data import semantickitti
from data.labels import IGNORE, LABEL_SETS
from data.projection import project

CALIBRATION = """P0: 700 0 600 0 0 700 180 0 0 0 1 0
P2: 700 0 600 42 0 700 180 0 0 0 1 0
Tr: 0 -1 0 0 0 0 -1 -0.1 1 0 0 -0.3
"""


@pytest.fixture
def scan(tmp_path):
    """A scan of three points before the camera, its labels, image and calibration."""
    sequence = tmp_path / "sequences/08"
    for folder in ("velodyne", "labels", "image_2"):
        (sequence / folder).mkdir(parents=True)
    points = np.array([[10.3, 0, 0, 0.5], [10.3, 1, 0, 0.5], [10.3, 0, 1, 0.5]], np.float32)
    points.tofile(sequence / "velodyne/000007.bin")
    np.array([252 | 3 << 16, 99, 72], "<u4").tofile(sequence / "labels/000007.label")
    Image.fromarray(np.zeros((370, 1226, 3), np.uint8)).save(sequence / "image_2/000007.png")
    (sequence / "calib.txt").write_text(CALIBRATION)
    return sequence / "velodyne/000007.bin"


def test_a_scan_has_its_points_and_the_classes_without_instances(scan):
    scene = semantickitti.read_scan(scan)
    assert (scene.name, scene.points.shape, scene.colors) == ("08_000007", (3, 3), None)
    names = LABEL_SETS["semantickitti19"].classes
    assert [names[label] if label != IGNORE else None for label in scene.labels] == ["car", None, "terrain"]


def test_a_scan_of_a_test_sequence_has_no_labels(scan):
    (scan.parent.parent / "labels/000007.label").unlink()
    assert semantickitti.read_scan(scan).labels is None


def test_the_color_camera_sees_what_is_before_it(scan):
    (view,) = semantickitti.read_views(scan)
    assert view.name == "08/000007" and view.size == (1226, 370) and view.pixels().shape == (370, 1226, 3)
    seen = project(semantickitti.read_scan(scan).points, view.pose, view.intrinsics, view.size)
    # 10 m ahead of the camera, which sits 6 cm to the left of the grey one: 42 / 10 pixels to the right
    assert seen.col.tolist() == [604, 534, 604] and seen.row.tolist() == [173, 173, 103] and seen.visible.all()


def test_what_does_not_fit_is_named(scan):
    labels, calibration = scan.parent.parent / "labels/000007.label", scan.parent.parent / "calib.txt"
    np.array([1, 2, 72], "<u4").tofile(labels)
    with pytest.raises(ValueError, match="000007.label: label row 1 has the id 2, which semantic-kitti.yaml"):
        semantickitti.read_scan(scan)
    np.array([1, 60000, 72], "<u4").tofile(labels)
    with pytest.raises(ValueError, match="label row 1 has the id 60000"):
        semantickitti.read_scan(scan)
    np.array([1, 10], "<u4").tofile(labels)
    with pytest.raises(ValueError, match="000007.label: 2 labels for the 3 points of 000007.bin"):
        semantickitti.read_scan(scan)
    labels.write_bytes(bytes(5))
    with pytest.raises(ValueError, match="000007.label: truncated, 5 bytes"):
        semantickitti.read_scan(scan)
    scan.write_bytes(bytes(40))
    with pytest.raises(ValueError, match="000007.bin: truncated, 40 bytes"):
        semantickitti.read_scan(scan)
    calibration.write_text(CALIBRATION.replace("Tr: 0 -1", "Tr: -1"))
    with pytest.raises(ValueError, match="calib.txt: expected a line 'Tr:' with 12 numbers"):
        semantickitti.read_views(scan)
    lines = CALIBRATION.splitlines()
    zeros = [line if not line.startswith("P2") else "P2:" + " 0" * 12 for line in lines]
    calibration.write_text("\n".join(zeros))
    with pytest.raises(ValueError, match="calib.txt: expected a line 'P2:' with 12 numbers, a matrix .*[Ss]ingular"):
        semantickitti.read_views(scan)
    calibration.write_text(CALIBRATION)
    calibration.unlink()
    with pytest.raises(FileNotFoundError, match="calib.txt: missing"):
        semantickitti.read_views(scan)
    (scan.parent.parent / "image_2/000007.png").write_bytes(b"")
    with pytest.raises(ValueError, match="000007.png: truncated or no image"):
        semantickitti.read_views(scan)
    (scan.parent.parent / "image_2/000007.png").unlink()
    with pytest.raises(FileNotFoundError, match="000007.png: missing; unpack the color images"):
        semantickitti.read_views(scan)


def test_classes_and_colors_are_those_of_the_official_table(shared):
    yaml = pytest.importorskip("yaml")
    table = yaml.safe_load((shared / "data/semantickitti/semantic-kitti.yaml").read_text())
    known = np.flatnonzero(semantickitti.SEMANTICKITTI_TO_19 >= 0)
    assert known.tolist() == sorted(table["learning_map"])
    for raw, mapped in table["learning_map"].items():
        assert semantickitti.SEMANTICKITTI_TO_19[raw] == (mapped - 1 if mapped else IGNORE)
    label_set = LABEL_SETS["semantickitti19"]
    for mapped, raw in table["learning_map_inv"].items():
        if mapped:
            assert label_set.classes[mapped - 1] == table["labels"][raw].replace("-", " ")
            assert label_set.palette[mapped - 1].tolist() == table["color_map"][raw][::-1]
    assert [f"{i:02d}" for i in table["split"]["train"]] == list(semantickitti.TRAIN)
    assert [f"{i:02d}" for i in table["split"]["valid"]] == list(semantickitti.VAL)


def test_the_real_scans_have_their_stated_points_and_classes(shared):
    folder = shared / "data/semantickitti/sequences/00/velodyne"
    scene = semantickitti.read_scan(folder / "000000.bin")
    names = LABEL_SETS["semantickitti19"].classes
    counts = {name: int((scene.labels == i).sum()) for i, name in enumerate(names)}
    assert scene.name == "00_000000" and len(scene.points) == 124_668
    assert (counts["road"], counts["car"], counts["motorcyclist"], counts["terrain"]) == (34228 + 1053, 4234, 88, 2964)
    assert (scene.labels == IGNORE).sum() == 2184 + 4 + 1471 + 1227
    np.testing.assert_allclose(
        [scene.points.min(0), scene.points.max(0)], [[-78.1, -55.7, -11.6], [78, 44.9, 2.8]], atol=0.06
    )
    assert len(semantickitti.read_scan(folder / "000002.bin").points) == 124_478


def test_labels_of_points_and_of_pixels_of_rellis3d_agree_as_stated(shared):
    """A lidar and a camera of another rig, labelled apart: 76.7 % of the points fall on a pixel of their class."""
    folder = shared / "data/rellis3d"
    points = np.fromfile(folder / "000104.bin", "<f4").reshape(-1, 4)[:, :3]
    labels = np.fromfile(folder / "000104.label", "<u4")
    with Image.open(folder / "frame000104-1581624663_149.png") as image:
        pixels = np.asarray(image)
    fx, fy, cx, cy = map(float, (folder / "camera_info.txt").read_text().split())
    words = (folder / "transforms.yaml").read_text().replace(":", " ").split()
    w, qx, qy, qz, x, y, z = (float(words[i + 1]) for i, word in enumerate(words) if word in "wxyz")
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = Rotation.from_quat([qx, qy, qz, w]).as_matrix(), (x, y, z)
    # the image without its distortion (k1, k2, p1, p2 of the README), on a grid with a margin on all sides
    margin = 150
    intrinsics = np.array([[fx, 0, cx + margin], [0, fy, cy + margin], [0, 0, 1]])
    row, col = np.indices((1200 + 2 * margin, 1920 + 2 * margin))
    u, v = (col - cx - margin) / fx, (row - cy - margin) / fy
    r2 = u * u + v * v
    radial = 1 - 0.134313 * r2 - 0.025905 * r2 * r2
    source_col = np.round(fx * (u * radial + 2 * 0.002181 * u * v + 0.00084 * (r2 + 2 * u * u)) + cx).astype(int)
    source_row = np.round(fy * (v * radial + 0.002181 * (r2 + 2 * v * v) + 2 * 0.00084 * u * v) + cy).astype(int)
    inside = (source_col >= 0) & (source_col < 1920) & (source_row >= 0) & (source_row < 1200)
    rectified = np.where(inside, pixels[np.where(inside, source_row, 0), np.where(inside, source_col, 0)], 0)

    def agreement(pose: np.ndarray) -> tuple[int, float]:
        seen = project(points, pose, intrinsics, rectified.shape[::-1])
        pixel = np.where(seen.visible, rectified[seen.row, seen.col], 0)
        labelled = (labels > 0) & (pixel > 0)
        return int(labelled.sum()), float(np.mean(pixel[labelled] == labels[labelled]))

    count, share = agreement(pose)
    assert abs(count - 7616) <= 5 and abs(share - 0.767) < 0.005  # the reference cuts pixels off, we round
    turned = pose.copy()
    turned[:3, :3] = pose[:3, :3] @ Rotation.from_euler("x", 3, degrees=True).as_matrix()
    assert agreement(turned)[1] < 0.7
