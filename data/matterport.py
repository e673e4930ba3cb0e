"""Matterport3D as distributed: annotated region meshes, undistorted images and depth, and their cameras.

Format: niessner/Matterport, data_organization.md.  A building's folder holds `region_segmentations/regionN.ply`,
`undistorted_color_images/`, `undistorted_depth_images/` (16 bit, 0.25 mm) and
`undistorted_camera_parameters/<building>.conf`.  A scene in the sense of `Scene` is a region, as in OpenScene.
"""

import csv
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int32

from data.frames import Views, read_depth
from data.labels import IGNORE, LABEL_SETS, NYU40_TO_SCANNET20
from data.projection import adjust_intrinsics
from data.scene import Scene, View, read_ply, read_ply_columns, resize_nearest

IMAGE_SIZE = (1280, 1024)
FEATURE_SIZE = (640, 512)  # (w, h) on which OpenScene computes 2D features and visibility
DEPTH_UNITS = 4000.0  # to the metre
DEPTH_TOLERANCE = 0.02  # relative, as OpenScene
BORDER = 10  # pixels, as OpenScene
NEAREST = 100  # cameras that stand in for a region without any, as OpenScene

NYU40_TO_MATTERPORT21 = NYU40_TO_SCANNET20.copy()
"""int32 [41]: NYU40 id 0..40 to Matterport class 0..20: the classes of ScanNet, and the ceiling."""
NYU40_TO_MATTERPORT21[22] = LABEL_SETS["matterport21"].classes.index("ceiling")

LABEL_SET_NAMES = ("matterport21", "matterport40", "matterport80", "matterport160")


def read_categories(path: str | os.PathLike, label_set: str) -> Int32[np.ndarray, " C"]:
    """The class of each category id, 255 = none, from `category_mapping.tsv`; id 0 is "not annotated".

    The 21 classes go by the column nyu40id, the 40, 80 and 160 by the most frequent names of nyuClass.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a column is missing, the rows are not numbered 1, 2, ..., a nyu40id is none, or the most
        frequent names are not those of the label set.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; it comes with the code of Matterport3D (metadata/)")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    columns = {"index", "nyu40id", "nyuClass"}
    if not rows or not columns <= rows[0].keys():
        raise ValueError(f"{path}: expected a table with the columns {sorted(columns)} separated by tabs")
    for number, row in enumerate(rows, start=1):
        if row["index"] != str(number):
            raise ValueError(f"{path}: row {number} has the index {row['index']!r}; is it sorted by count?")
    if label_set == "matterport21":
        return np.array([IGNORE, *(_class_of_nyu40(path, row) for row in rows)], np.int32)
    names = list(dict.fromkeys(row["nyuClass"] for row in rows if row["nyuClass"] not in ("", "void", "unknown")))
    expected = LABEL_SETS[label_set].classes
    for place, (name, class_name) in enumerate(zip(names, expected, strict=False)):
        if name != class_name:
            raise ValueError(
                f"{path}: number {place + 1} of the nyuClass names is {name!r}, expected {class_name!r} of "
                f"{label_set}; is it the table of another data set?"
            )
    class_of = {name: i for i, name in enumerate(expected)}
    return np.array([IGNORE, *(class_of.get(row["nyuClass"], IGNORE) for row in rows)], np.int32)


def _class_of_nyu40(path: Path, row: dict) -> int:
    text = row["nyu40id"] or "0"
    if not text.isdigit() or int(text) > 40:
        raise ValueError(f"{path}: row {row['index']} has the nyu40id {text!r}, expected 0..40")
    return int(NYU40_TO_MATTERPORT21[int(text)])


def read_region(path: str | os.PathLike, class_of_category: Int32[np.ndarray, " C"]) -> Scene:
    """The vertices of a region's mesh with the classes of its faces, named `<building>_regionN`.

    A vertex gets the class that most corners of faces at it have; "no class" competes too and, as in
    OpenScene, wins ties, then the smaller class does.

    Args:
      path: `<building>/region_segmentations/regionN.ply`.
      class_of_category: what `read_categories` gives.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is corrupt, its faces are no triangles of its vertices or have no category_id, or one that
        the table does not have.
    """
    path = Path(path).absolute()
    scene = read_ply(path)
    faces = read_ply_columns(path, "face", lists=["vertex_indices"])
    if "category_id" not in faces:
        raise ValueError(f"{path}: the faces have no property 'category_id'; is it of region_segmentations?")
    triangles, category = faces["vertex_indices"], faces["category_id"].astype(np.int64)
    bad = np.flatnonzero((category < -1) | (category >= len(class_of_category)))
    if bad.size:
        raise ValueError(
            f"{path}: category_id of face {bad[0]} is {category[bad[0]]}, the table has 1..{len(class_of_category) - 1}"
            " (0 and -1: none); is category_mapping.tsv of this release?"
        )
    if triangles.size and not 0 <= triangles.min() <= triangles.max() < len(scene.points):
        raise ValueError(f"{path}: corrupt, a face names a vertex outside 0..{len(scene.points) - 1}")
    labels = _labels_of_vertices(len(scene.points), triangles, class_of_category[np.maximum(category, 0)])
    return Scene(f"{path.parent.parent.name}_{path.stem}", scene.points, scene.colors, scene.normals, labels)


def _labels_of_vertices(count: int, triangles: np.ndarray, classes: Int32[np.ndarray, " F"]) -> Int32[np.ndarray, " N"]:
    rank = np.where(classes == IGNORE, 0, classes.astype(np.int64) + 1)  # no class comes first
    ranks = int(rank.max(initial=0)) + 1
    votes = np.bincount((triangles.astype(np.int64) * ranks + rank[:, None]).ravel(), minlength=count * ranks).reshape(
        count, ranks
    )
    winner = votes.argmax(axis=1)
    return np.where(winner == 0, IGNORE, winner - 1).astype(np.int32)


class Camera(NamedTuple):
    """One image: file names, camera-to-world pose (along +z, y down), intrinsics in pixels of IMAGE_SIZE."""

    color: Path
    depth: Path
    pose: Float64[np.ndarray, "4 4"]
    intrinsics: Float64[np.ndarray, "3 3"]


def read_cameras(building: str | os.PathLike) -> list[Camera]:
    """All cameras of a building, as its `.conf` file lists them.

    The file has cameras that look along -z with y up; here y and z are turned round.  The principal point is
    taken as it stands there, as OpenScene does.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is no command of the format or has numbers that are not finite; it is named.  Or there are
        fewer images than the file says.
    """
    building = Path(os.path.abspath(building))  # of a link its own name
    path = building / "undistorted_camera_parameters" / f"{building.name}.conf"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; download and unpack --type undistorted_camera_parameters")
    folders, intrinsics, cameras, promised = {}, None, [], 0
    for number, line in enumerate(path.read_text("utf-8-sig", "replace").splitlines(), start=1):
        try:
            match line.split():
                case ["dataset", _] | []:
                    pass
                case ["n_images", count]:
                    promised = int(count)
                case [("depth_directory" | "color_directory") as kind, folder]:
                    folders[kind] = building / folder
                case ["intrinsics_matrix", *values]:
                    intrinsics = _matrix(values, 3)
                case ["scan", depth, color, *values] if intrinsics is not None:
                    pose = _matrix(values, 4)
                    pose[:3, 1:3] *= -1
                    files = folders["color_directory"] / color, folders["depth_directory"] / depth
                    cameras.append(Camera(*files, pose, intrinsics))
                case _:
                    raise ValueError("no command of the format")
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: line {number} is {line.strip()[:60]!r}: {error}; unpack it again") from None
    if len(cameras) < promised:
        raise ValueError(f"{path}: truncated, it has {len(cameras)} of {promised} images; unpack it again")
    return cameras


def _matrix(values: Sequence[str], size: int) -> Float64[np.ndarray, "n n"]:
    matrix = np.array(values, np.float64).reshape(size, size)
    if not np.isfinite(matrix).all():
        raise ValueError("has numbers that are not finite")
    return matrix


def cameras_of_region(cameras: Sequence[Camera], points: Float[np.ndarray, "N 3"], nearest: int = 0) -> list[Camera]:
    """The cameras that stand inside the bounding box of a region's points.

    nearest: how many, by their distance to the middle of the box, to take where none stands inside
    (OpenScene: 0 in training, NEAREST in the test buildings).
    """
    places = np.array([camera.pose[:3, 3] for camera in cameras]).reshape(-1, 3)
    low, high = points.min(axis=0), points.max(axis=0)
    chosen = np.flatnonzero(((places > low) & (places < high)).all(axis=1))
    if not chosen.size:
        chosen = np.argsort(np.linalg.norm(places - (low + high) / 2, axis=1), kind="stable")[:nearest]
    return [cameras[i] for i in chosen]


def read_views(cameras: Sequence[Camera], size: tuple[int, int] = FEATURE_SIZE) -> Views:
    """Cameras as views on a pixel grid of the given size = (w, h); depth is read when a view is asked for.

    Raises:
      FileNotFoundError: an image or a depth image is missing.  A depth image is checked when it is read.
    """
    for camera in cameras:
        for file in (camera.color, camera.depth):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: missing; download and unpack --type {file.parent.name}")
    return Views([functools.partial(_read_view, camera, size) for camera in cameras])


def _read_view(camera: Camera, size: tuple[int, int]) -> View:
    return View(
        name=f"{camera.color.parent.parent.name}/{camera.color.stem}",
        pose=camera.pose,
        intrinsics=adjust_intrinsics(camera.intrinsics, IMAGE_SIZE, size),
        size=size,
        depth=resize_nearest(read_depth(camera.depth, DEPTH_UNITS, IMAGE_SIZE), size),
        image=camera.color,
    )
