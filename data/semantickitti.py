"""SemanticKITTI as distributed: labelled lidar scans, and the left colour camera of KITTI odometry beside them.

Format: PRBonn/semantic-kitti-api; KITTI odometry's development kit for `calib.txt`.  A sequence's folder holds
`velodyne/K.bin`, `labels/K.label`, and for views `image_2/K.png` and `calib.txt`.  The frame is the lidar's: x
forward, y left, z up.
"""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int32

from data.frames import image_size_of
from data.labels import IGNORE, LABEL_SETS
from data.scene import Scene, View

TRAIN = ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10")
VAL = ("08",)
BORDER = 5  # pixels, as OpenScene on nuScenes

# Ids of each class: its own first, then what single scans cannot tell from it, moving or not.
_IDS = {
    "car": (10, 252),
    "bicycle": (11,),
    "motorcycle": (15,),
    "truck": (18, 258),
    "other vehicle": (20, 13, 16, 256, 257, 259),
    "person": (30, 254),
    "bicyclist": (31, 253),
    "motorcyclist": (32, 255),
    "road": (40, 60),
    "parking": (44,),
    "sidewalk": (48,),
    "other ground": (49,),
    "building": (50,),
    "fence": (51,),
    "vegetation": (70,),
    "trunk": (71,),
    "terrain": (72,),
    "pole": (80,),
    "traffic sign": (81,),
}
_NO_CLASS = (0, 1, 52, 99)  # unlabeled, outlier, other structure, other object
_UNKNOWN = -1

SEMANTICKITTI_TO_19 = np.full(260, _UNKNOWN, np.int32)
"""int32 [260]: raw id to one of the 19 classes, 255 for ids outside the benchmark, -1 for numbers that are no id."""
SEMANTICKITTI_TO_19[list(_NO_CLASS)] = IGNORE
for _name, _ids in _IDS.items():
    SEMANTICKITTI_TO_19[list(_ids)] = LABEL_SETS["semantickitti19"].classes.index(_name)


def read_scan(path: str | os.PathLike) -> Scene:
    """A scan with its labels where they are there, named `<sequence>_<scan>`.

    Args:
      path: `<sequence>/velodyne/K.bin`: rows of four float32, x, y, z and remission.

    Returns:
      labels 0..18 and 255 for everything else; None for the test sequences.

    Raises:
      FileNotFoundError: there is no such scan.
      ValueError: it does not hold whole rows, or its labels are not of this scan or have unknown ids.
    """
    path = Path(path).absolute()
    sequence = path.parent.parent
    content = path.read_bytes()
    if not content or len(content) % 16:
        raise ValueError(f"{path}: truncated, {len(content)} bytes are no whole rows of four float32")
    points = np.frombuffer(content, "<f4").reshape(-1, 4)[:, :3].astype(np.float32)
    labels_path = sequence / "labels" / f"{path.stem}.label"
    labels = read_labels(labels_path) if labels_path.is_file() else None
    if labels is not None and len(labels) != len(points):
        raise ValueError(f"{labels_path}: {len(labels)} labels for the {len(points)} points of {path.name}")
    return Scene(f"{sequence.name}_{path.stem}", points, labels=labels)


def read_labels(path: str | os.PathLike) -> Int32[np.ndarray, " N"]:
    """The 19 classes, 255 = none of them, of a label file: uint32 per point, instance above the lower 16 bits.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it does not hold whole rows, or an id is not SemanticKITTI's.
    """
    content = Path(path).read_bytes()
    if len(content) % 4:
        raise ValueError(f"{path}: truncated, {len(content)} bytes are no whole uint32")
    raw = np.frombuffer(content, "<u4") & 0xFFFF
    labels = SEMANTICKITTI_TO_19[np.minimum(raw, len(SEMANTICKITTI_TO_19) - 1)]
    bad = np.flatnonzero((labels == _UNKNOWN) | (raw >= len(SEMANTICKITTI_TO_19)))
    if bad.size:
        raise ValueError(
            f"{path}: label row {bad[0]} has the id {raw[bad[0]]}, which semantic-kitti.yaml does not have; are these "
            "raw ids, not ones already mapped to the 19 classes?"
        )
    return labels


def read_views(path: str | os.PathLike) -> list[View]:
    """The left colour image of a scan as its one view, on its own pixel grid, without depth.

    Args:
      path: the scan, as for `read_scan`.

    Raises:
      FileNotFoundError: there is no image or no calib.txt.
      ValueError: the image is none, or what `read_calibration` raises.
    """
    path = Path(path).absolute()
    sequence = path.parent.parent
    image = sequence / "image_2" / f"{path.stem}.png"
    if not image.is_file():
        raise FileNotFoundError(f"{image}: missing; unpack the color images of KITTI odometry beside velodyne/")
    size = image_size_of(image)
    projection, from_lidar = read_calibration(sequence / "calib.txt")
    intrinsics = projection[:, :3]
    to_camera = from_lidar.copy()
    to_camera[:3, 3] += np.linalg.inv(intrinsics) @ projection[:, 3]  # from the left grey camera to the color one
    return [View(f"{sequence.name}/{path.stem}", np.linalg.inv(to_camera), intrinsics, size, image=image)]


def read_calibration(
    path: str | os.PathLike,
) -> tuple[Float64[np.ndarray, "3 4"], Float64[np.ndarray, "4 4"]]:
    """P2, the projection of the left colour camera, and Tr, from the lidar to the left grey one.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is missing, is no 3x4 matrix of finite numbers, or is no camera or pose.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; unpack the calibration files of KITTI odometry")
    lines = dict(line.split(":", 1) for line in path.read_text("utf-8-sig", "replace").splitlines() if ":" in line)
    matrices = []
    for name in ("P2", "Tr"):
        try:
            matrix = np.array(lines[name].split(), np.float64).reshape(3, 4)
            np.linalg.inv(matrix[:, :3])
        except (KeyError, ValueError, np.linalg.LinAlgError) as error:
            raise ValueError(f"{path}: expected a line '{name}:' with 12 numbers, a matrix ({error})") from None
        if not np.isfinite(matrix).all():
            raise ValueError(f"{path}: {name} has numbers that are not finite; unpack the calibration again")
        matrices.append(matrix)
    return matrices[0], np.vstack([matrices[1], [0, 0, 0, 1]])
