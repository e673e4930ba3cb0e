"""ScanNet v2 as distributed: the annotated mesh of a scene, and its exported RGB-D frames.

A scene's folder holds `<scene>_vh_clean_2.ply`, for training and validation scenes
`<scene>_vh_clean_2.labels.ply`, and the frames of the .sens stream (exported e.g. by ScanNet's SensReader) as
`color/K.jpg`, `depth/K.png` (16 bit, millimetres, 0 = no reading) and `pose/K.txt` (camera to world, 4x4).
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from data.frames import read_depth, read_pose
from data.labels import IGNORE, NYU40_TO_SCANNET20
from data.projection import adjust_intrinsics
from data.scene import Scene, View, read_ply, read_ply_columns, resize_nearest

log = logging.getLogger(__name__)

DEPTH_SIZE = (640, 480)
DEPTH_INTRINSICS = np.array([[577.870605, 0, 319.5], [0, 577.870605, 239.5], [0, 0, 1]])
"""float64 [3, 3], pixels of DEPTH_SIZE: one camera for all scenes, as OpenScene does."""
FEATURE_SIZE = (320, 240)  # (w, h) on which OpenScene computes 2D features and visibility
DEPTH_TOLERANCE = 0.25  # relative, as OpenScene
BORDER = 10  # pixels, as OpenScene

LABEL_TABLES = {"scannet20": NYU40_TO_SCANNET20, "nyu40": np.array([IGNORE, *range(40)], np.int32)}
"""int32 [41] by label set: NYU40 id 0..40, 0 = not annotated, to the class of the set."""


def read_scene(folder: str | os.PathLike, label_set: str = "scannet20") -> Scene:
    """Points and colours of a scene's mesh and, where its label file is there, the classes of its vertices.

    Args:
      folder: the scene's folder, named like the scene.
      label_set: "scannet20", the benchmark, or "nyu40".

    Returns:
      points in the frame of the mesh (z up, not axis-aligned); labels of the label set and 255 for everything
      else, or None for the test scenes, which come without a label file.

    Raises:
      FileNotFoundError: there is no mesh.
      ValueError: a file is corrupt, or the labels are not NYU40 ids or not of this mesh.
    """
    folder = Path(folder).resolve()
    mesh = folder / f"{folder.name}_vh_clean_2.ply"
    if not mesh.is_file():
        raise FileNotFoundError(f"{mesh}: missing; download the scene with --type _vh_clean_2.ply")
    scene = replace(read_ply(mesh), name=folder.name)
    labels_path = folder / f"{folder.name}_vh_clean_2.labels.ply"
    if not labels_path.is_file():
        return scene
    labels = read_labels(labels_path, label_set)
    if len(labels) != len(scene.points):
        raise ValueError(
            f"{labels_path}: {len(labels)} labels for the {len(scene.points)} vertices of {mesh.name}; "
            "download both files of this scene again"
        )
    return replace(scene, labels=labels)


def read_labels(path: str | os.PathLike, label_set: str = "scannet20") -> Int32[np.ndarray, " N"]:
    """The classes of a label set, 255 = none of them, of the vertices of a `.labels.ply` file of ScanNet v2.

    The file of the same name in ScanNet v1 holds ids of raw categories, not of NYU40, and would be read as
    other classes; it is told by ids above 40.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is corrupt, or has no labels or others than NYU40 ids.
    """
    columns = read_ply_columns(path)
    if "label" not in columns:
        raise ValueError(f"{path}: the vertices have no property 'label'; expected a ScanNet v2 .labels.ply file")
    nyu40 = columns["label"]
    bad = np.flatnonzero((nyu40 < 0) | (nyu40 >= len(NYU40_TO_SCANNET20)))
    if bad.size:
        raise ValueError(
            f"{path}: label row {bad[0]} is {nyu40[bad[0]]}, expected NYU40 ids 0..40; ScanNet v1 has raw "
            "category ids here: download the v2 file"
        )
    return LABEL_TABLES[label_set][nyu40.astype(np.int64)]


class Frames(Sequence):
    """The posed views of a scene, in frame order; depth is read from disk each time a view is asked for.

    Attributes:
      skipped: numbers of the frames left out because their pose is not finite (tracking was lost).
    """

    def __init__(self, folder: Path, size: tuple[int, int], numbers: list[int]):
        self._folder, self._size = folder, size
        self._intrinsics = adjust_intrinsics(DEPTH_INTRINSICS, DEPTH_SIZE, size)
        poses = {number: read_pose(folder / "pose" / f"{number}.txt") for number in numbers}
        self._poses = {number: pose for number, pose in poses.items() if np.isfinite(pose).all()}
        self._numbers = list(self._poses)
        self.skipped = tuple(number for number in numbers if number not in self._poses)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> View:
        number = self._numbers[index]
        return View(
            name=f"{self._folder.name}/{number}",
            pose=self._poses[number],
            intrinsics=self._intrinsics,
            size=self._size,
            depth=resize_nearest(read_depth(self._folder / "depth" / f"{number}.png", 1000.0, DEPTH_SIZE), self._size),
            image=self._folder / "color" / f"{number}.jpg",
        )


def read_views(folder: str | os.PathLike, size: tuple[int, int] = FEATURE_SIZE, every: int = 1) -> Frames:
    """The exported frames of a scene as views on a pixel grid of the given size = (w, h).

    Depth is resized by nearest neighbour, as OpenScene does.  Frames without a finite pose are left out,
    listed in `skipped` and logged.

    Args:
      folder: the scene's folder with color/, depth/ and pose/.
      size: (320, 240) as OpenScene, or (640, 480) for every depth pixel.
      every: takes each every-th exported frame (OpenScene: every 20th of the stream).

    Raises:
      FileNotFoundError: there are no frames, or one lacks its pose, depth or image.
      ValueError: a pose file is no 4x4 matrix, or no pose is finite; a depth file is checked when it is read.
    """
    folder = Path(folder).resolve()
    kinds = {"color": ".jpg", "depth": ".png", "pose": ".txt"}
    found = {kind: _numbers(folder / kind, suffix) for kind, suffix in kinds.items()}
    numbers = sorted(set.union(*found.values()))[::every]
    if not numbers:
        raise FileNotFoundError(f"{folder}: no frames; export the .sens file to color/, depth/ and pose/")
    missing = [
        f"{kind}/{number}{suffix}" for number in numbers for kind, suffix in kinds.items() if number not in found[kind]
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(f"{folder}: missing {', '.join(missing[:3])}{more}; export the frames again")
    frames = Frames(folder, size, numbers)
    if not frames:
        raise ValueError(f"{folder}: none of the {len(numbers)} frames has a finite pose; export them again")
    if frames.skipped:
        lost = ", ".join(map(str, frames.skipped))
        log.warning("%s: left out frames without a finite pose: %s (of %d)", folder, lost, len(numbers))
    return frames


def _numbers(folder: Path, suffix: str) -> set[int]:
    return {int(path.stem) for path in folder.glob(f"*{suffix}") if path.stem.isdigit()}
