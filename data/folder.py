"""A folder of your own: point clouds, with posed images or without.

LAYOUT says what it holds; errors repeat the part that is missing.
"""

import dataclasses
import functools
import logging
import os
import re
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64, Shaped

from data.frames import Views, image_size_of, read_depth, read_pose
from data.labels import IGNORE
from data.pcd import read_pcd_columns
from data.projection import adjust_intrinsics
from data.scene import Scene, View, read_ply_columns, resize_nearest, same_shape, scene_of_columns
from data.virtual_camera import point_spacing, splat

log = logging.getLogger(__name__)

LAYOUT = """
  <root>/<scene>/           a folder per scene, or just the cloud file <root>/<scene>.ply (beside which images/ and
                            so on may lie, if it is the only one)
    cloud.ply               or cloud.pcd, cloud.npz (data.scene.Scene), cloud.xyz (a line per point: x y z, or
                            x y z red green blue); metres, z up; optionally with a property `label`:
                            0 = first class of data.label_set (of NYU40 its id less 1), 255 = none
    images/K.jpg            or K.png; K is any name
    poses/K.txt             16 numbers, the camera-to-world matrix; the camera looks along +z, y down; metres
    intrinsics.txt          fx fy cx cy in pixels of the images, or the 3x3 or 4x4 matrix; or intrinsics/K.txt
    depth/K.png             optional: 16 bit, 0 = no reading, of the same shape as the image"""

CLOUD_SUFFIXES = (".ply", ".pcd", ".npz", ".xyz")
UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}
_SEPARATOR = r"\s*[,;]\s*|\s+"  # of the numbers in a line
_TALLEST, _WIDEST, _SMALLEST = 100.0, 2000.0, 0.05  # metres; of a scan that is believed to be in metres
LONGEST_SIDE = 640  # pixels of the grid of 2D features
_LABELS = ("label", "scalar_label")  # the second is CloudCompare's name for it
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_FRAME_FOLDERS = ("images", "poses", "depth", "intrinsics")


def find_scenes(root: str | os.PathLike) -> dict[str, Path]:
    """The cloud file of each scene of a folder, by the scene's name, in alphabetical order; hidden files are none.

    Raises:
      ValueError: there is no scene, two have the same name, or a scene's folder holds several clouds; the
        message shows the layout.
    """
    root = Path(root)
    clouds: dict[str, Path] = {}
    for path in _visible(root):
        files = _visible(path) if path.is_dir() else [path]
        inside = [file for file in files if file.suffix.lower() in CLOUD_SUFFIXES]
        if not inside:
            continue
        if len(inside) > 1:
            names = ", ".join(file.name for file in inside)
            raise ValueError(f"{path}: holds the clouds {names}, expected one; expected:{LAYOUT}")
        name = path.name if path.is_dir() else path.stem
        if name in clouds:
            raise ValueError(f"{root}: two scenes are called {name!r}: {clouds[name]} and {inside[0]}; rename one")
        clouds[name] = inside[0]
    if not clouds:
        raise ValueError(f"{root}: no point cloud found; expected:{LAYOUT}")
    if (root / "images").is_dir() and sum(file.parent == root for file in clouds.values()) > 1:
        raise ValueError(f"{root}: images/ lies beside several clouds; give each a folder of its own:{LAYOUT}")
    return clouds


def without_cloud(root: str | os.PathLike) -> list[str]:
    """The names of the folders in `root` that would be scenes if they held a cloud."""
    folders = [path for path in _visible(Path(root)) if path.is_dir() and path.name not in _FRAME_FOLDERS]
    return [path.name for path in folders if all(file.suffix.lower() not in CLOUD_SUFFIXES for file in _visible(path))]


def _visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without hidden files such as the ._K.jpg that macOS leaves."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def read_cloud(
    path: str | os.PathLike, scale: float | None = None, *, labels: bool = True, say: str = "data.scale={scale:g}"
) -> Scene:
    """Points in metres, and where the file has them colours, normals and labels, of a cloud named after its file.

    Points without a reading, of which x, y or z is not finite, are left out, as organised clouds have them (an .npz
    must have none).

    Args:
      path: a .ply, .pcd, .npz (as `Scene.save_npz` writes it) or .xyz file.
      scale: metres per unit of the file, 0.001 where it is in millimetres; None: metres, where that is plausible.
      labels: whether the labels of a file other than .npz are read; they must be classes then.
      say: as for `check_metres`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another kind of file, a corrupt one, or one that is hardly in metres.
    """
    path = Path(path)
    if path.suffix.lower() not in CLOUD_SUFFIXES:
        raise ValueError(f"{path}: expected one of {', '.join(CLOUD_SUFFIXES)}")
    if path.suffix.lower() == ".npz":
        scene = Scene.load_npz(path)
        return dataclasses.replace(scene, points=_in_metres(path, scene.points, scale, say).astype(np.float32))
    try:
        columns = _COLUMNS[path.suffix.lower()](path)
        if columns.keys() >= {*"xyz"}:  # else `scene_of_columns` says what is missing
            if any(columns[axis].ndim > 1 for axis in "xyz"):
                raise ValueError("x, y and z have several values per point, expected one")
            points = np.stack([columns[axis] for axis in "xyz"], axis=1).astype(np.float64)
            read = np.isfinite(points).all(axis=1)
            if not read.all():
                log.warning("%s: %d of %d points have no finite x, y, z: left out", path, (~read).sum(), len(read))
                columns = {name: column[read] for name, column in columns.items()}
            columns |= zip("xyz", _in_metres(path, points[read], scale, say).T, strict=True)
        named = next((name for name in columns if name.lower() in _LABELS), None) if labels else None
        return _with_labels(scene_of_columns(path, columns), columns.get(named))
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _in_metres(path: Path, points: Float[np.ndarray, "N 3"], scale: float | None, say: str) -> Float[np.ndarray, "N 3"]:
    if scale is None:
        check_metres(path, points, say)
        return points
    return points * np.float64(scale)


def check_metres(path: Path, points: Float[np.ndarray, "N 3"], say: str) -> None:
    """Questions a cloud, z up, that is too large or too small to be in metres; one point in a hundred may lie far out.

    Args:
      say: how its unit is stated, with {unit} ("mm") or {scale} (0.001) where that goes.

    Raises:
      ValueError: it is in doubt; says its size in each unit.
    """
    if not len(points):
        return
    sides = np.ptp(np.quantile(points, [0.005, 0.995], axis=0), axis=0)
    size = {unit: " x ".join(f"{side * scale:.3g}" for side in sides) for unit, scale in UNITS.items()}
    if sides[2] > _TALLEST or max(sides[:2]) > _WIDEST:
        choices = [f"{say.format(unit=unit, scale=scale)} ({size[unit]} m)" for unit, scale in UNITS.items()]
        raise ValueError(f"{path}: {size['m']} m is large for a scan; state its unit: {' or '.join(choices)}")
    if len(points) > 100 and sides.max() < _SMALLEST:
        raise ValueError(
            f"{path}: {size['m']} m is small for a scan. Bring it to metres, e.g. with CloudCompare; or state that it "
            f"is: {say.format(unit='m', scale=1.0)}"
        )


def _with_labels(scene: Scene, labels: Shaped[np.ndarray, " N"] | None) -> Scene:
    if labels is None:
        return scene
    bad = np.flatnonzero(~((labels >= 0) & (labels <= IGNORE) & (labels == np.trunc(labels))))
    if bad.size:
        raise ValueError(f"label of point {bad[0]} is {labels[bad[0]]}, expected 0..254, or 255 = ignore")
    return dataclasses.replace(scene, labels=labels.astype(np.int32))


def _read_text(path: Path) -> dict[str, np.ndarray]:
    """The columns of a text file of 3 or 6 numbers per line, separated by blanks or commas; # begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file; is its ending right? ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        content = line.split("#")[0].strip()
        cells = re.split(_SEPARATOR, content)
        if cells == [""]:
            continue
        separators = re.findall(_SEPARATOR, content)
        if "," in separators and any(separator.strip() != "," for separator in separators):
            raise ValueError(f"{path}: line {number} is {line.strip()[:60]!r}; write a decimal point, not a comma")
        if len(cells) not in (3, 6) or (rows and len(cells) != len(rows[0])):
            raise ValueError(f"{path}: line {number} is {line.strip()[:60]!r}, expected x y z, or x y z red green blue")
        try:
            rows.append([float(cell) for cell in cells])
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is {line.strip()[:60]!r}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: holds no points; expected a line x y z for each")
    table = np.array(rows)
    columns = dict(zip("xyz", table.T[:3], strict=True))
    if table.shape[1] == 6:
        columns |= zip(("red", "green", "blue"), table.T[3:], strict=True)
    return columns


_COLUMNS = {".ply": read_ply_columns, ".pcd": read_pcd_columns, ".xyz": _read_text}


def read_views(cloud: str | os.PathLike, scene: Scene, scale: float = 1.0, depth_units: float = 1000.0) -> Views | None:
    """The posed images beside a cloud file as views; None where there is no folder images/.

    A view's pixel grid has the image's shape and at most 640 pixels in its longer side.  A view without a depth
    image sees what the cloud itself does not hide, its points drawn as squares as wide as they lie apart.
    Frames without a finite pose are left out and logged.

    Args:
      cloud: the cloud file of the scene.
      scene: what `read_cloud` gives for it.
      scale: metres per unit of the poses.
      depth_units: units of depth images in a metre.

    Raises:
      FileNotFoundError: an image has no pose, there are no intrinsics, or a frame lacks its own ones or its depth.
      ValueError: no image, two of one name, a file that is none, a pose that is no rigid motion, intrinsics that are
        not of the image, or depth of another shape (checked when it is read).
    """
    folder = Path(cloud).absolute().parent
    if not (folder / "images").is_dir():
        return None
    images = [path for path in _visible(folder / "images") if path.suffix.lower() in _IMAGE_SUFFIXES]
    if not images:
        raise ValueError(f"{folder}/images: holds no .jpg or .png; expected:{LAYOUT}")
    by_stem: dict[str, Path] = {}
    for image in images:
        if (other := by_stem.setdefault(image.stem, image)) is not image:
            raise ValueError(f"{folder}/images: {other.name} and {image.name} would share a pose; rename one")
    sizes: dict[tuple[int, int], Path] = {}
    for image in images:
        sizes.setdefault(image_size_of(image), image)
    if len(sizes) > 1 and (folder / "intrinsics.txt").is_file():
        (one, first), (other, second) = list(sizes.items())[:2]
        raise ValueError(
            f"{folder}/intrinsics.txt: is of one camera, but {first.name} has {one[0]} x {one[1]} pixels and "
            f"{second.name} {other[0]} x {other[1]}; give each its own intrinsics/K.txt"
        )
    has_depth = (folder / "depth").is_dir()
    spacing = 1.5 * point_spacing(scene.points)
    readers, lost = [], []
    for image in images:
        pose_path = folder / "poses" / f"{image.stem}.txt"
        depth = folder / "depth" / f"{image.stem}.png" if has_depth else None
        for needed in (pose_path, depth):
            if needed is not None and not needed.is_file():
                raise FileNotFoundError(f"{needed}: missing, but there is {image.name}; expected:{LAYOUT}")
        pose = read_pose(pose_path)
        if not np.isfinite(pose).all():
            lost.append(image.stem)
            continue
        pose[:3, 3] *= scale
        image_size = image_size_of(image)
        intrinsics = _read_intrinsics(folder, image.stem, image_size)
        name = f"{scene.name}/{image.stem}"
        if depth is None:
            read = functools.partial(_read_splatted, name, pose, intrinsics, image_size, image, scene.points, spacing)
        else:
            read = functools.partial(_read_measured, name, pose, intrinsics, image_size, image, depth, depth_units)
        readers.append(read)
    if not readers:
        raise ValueError(f"{folder}/poses: none of the {len(lost)} poses is finite")
    if lost:
        log.warning("%s: left out frames without a finite pose: %s (of %d)", folder, ", ".join(lost), len(images))
    return Views(readers, len(lost))


def _read_intrinsics(folder: Path, name: str, size: tuple[int, int]) -> Float64[np.ndarray, "3 3"]:
    path = folder / "intrinsics.txt"
    if not path.is_file():
        path = folder / "intrinsics" / f"{name}.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: neither intrinsics.txt nor intrinsics/{name}.txt is there; expected:{LAYOUT}"
        )
    try:
        values = np.array(path.read_text(encoding="utf-8-sig").split(), np.float64)
        side = {9: 3, 16: 4}.get(values.size)
        matrix = np.eye(3)
        if side is not None:
            matrix[:2] = values.reshape(side, side)[:2, :3]
        else:
            matrix[[0, 1, 0, 1], [0, 1, 2, 2]] = values.reshape(4)
    except ValueError as error:
        raise ValueError(f"{path}: expected fx fy cx cy, or a 3x3 or 4x4 matrix ({error})") from None
    fx, fy, cx, cy = matrix[[0, 1, 0, 1], [0, 1, 2, 2]]
    if not (fx > 0 and fy > 0 and 0 < cx < size[0] and 0 < cy < size[1]):
        raise ValueError(
            f"{path}: fx {fx:g}, fy {fy:g}, cx {cx:g}, cy {cy:g} are not of an image of {size[0]} x {size[1]} pixels; "
            "give the intrinsics of the images as they are"
        )
    return matrix


def _grid(intrinsics: Float64[np.ndarray, "3 3"], image_size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    shrink = min(1.0, LONGEST_SIDE / max(image_size))
    size = (round(image_size[0] * shrink), round(image_size[1] * shrink))
    return adjust_intrinsics(intrinsics, image_size, size), size


def _read_splatted(name, pose, intrinsics, image_size, image: Path, points, spacing: float) -> View:
    intrinsics, size = _grid(intrinsics, image_size)
    depth, _ = splat(points, pose, intrinsics, size, spacing)
    return View(name, pose, intrinsics, size, depth, image)


def _read_measured(name, pose, intrinsics, image_size, image: Path, depth_path: Path, depth_units: float) -> View:
    intrinsics, size = _grid(intrinsics, image_size)
    depth = read_depth(depth_path, depth_units)
    height, width = depth.shape
    if not same_shape((width, height), image_size):
        raise ValueError(
            f"{depth_path}: {width} x {height} pixels are not the shape of {image.name}, {image_size[0]} x "
            f"{image_size[1]}; depth has to be registered to the image"
        )
    return View(name, pose, intrinsics, size, resize_nearest(depth, size), image)
