"""ScanNet v2 as distributed: the annotated mesh of a scene, and its RGB-D frames.

A scene's folder holds `<scene>_vh_clean_2.ply`, for training and validation scenes
`<scene>_vh_clean_2.labels.ply`, and the frames: in `<scene>.sens` as distributed, or exported from it (e.g. by
ScanNet's SensReader) as `color/K.jpg`, `depth/K.png` (16 bit, millimetres, 0 = no reading) and `pose/K.txt`
(camera to world, 4x4).
"""

import functools
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from data import sens
from data.frames import Views, read_depth, read_pose
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
STREAM_STEP = 20  # frames of a .sens stream from one view to the next, as OpenScene

_STRAY_IDS = (50, 149)  # of scene0270_00, scene0270_02 and scene0384_00
LABEL_TABLES = {
    "scannet20": NYU40_TO_SCANNET20,
    "nyu40": np.array([IGNORE, *range(40)], np.int32),
    "nyu37": np.array([IGNORE, *range(37), *[IGNORE] * 3], np.int32),
}
"""int32 [41] by label set: NYU40 id 0..40, 0 = not annotated, to the class of the set."""


def read_scene(folder: str | os.PathLike, label_set: str = "scannet20") -> Scene:
    """Points and colours of a scene's mesh and, where its label file is there, the classes of its vertices.

    Args:
      folder: the scene's folder, named like the scene.
      label_set: "scannet20", the benchmark, "nyu40", or "nyu37" without the three "other..." classes.

    Returns:
      points in the frame of the mesh (z up, not axis-aligned); labels of the label set and 255 for everything
      else, or None for the test scenes, which come without a label file.

    Raises:
      FileNotFoundError: there is no mesh.
      ValueError: a file is corrupt, or the labels are not NYU40 ids or not of this mesh.
    """
    folder = Path(os.path.abspath(folder))  # of a link its own name
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
    other classes; it is told by ids above 40. Three scenes of v2 have a few vertices of the ids 50 and 149, which are
    no class either (ScanNet's issues 20 and 86).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is corrupt, or has no labels or others than NYU40 ids.
    """
    columns = read_ply_columns(path)
    if "label" not in columns:
        raise ValueError(f"{path}: the vertices have no property 'label'; expected a ScanNet v2 .labels.ply file")
    nyu40 = np.where(np.isin(columns["label"], _STRAY_IDS), 0, columns["label"])
    bad = np.flatnonzero((nyu40 < 0) | (nyu40 >= len(NYU40_TO_SCANNET20)))
    if bad.size:
        raise ValueError(
            f"{path}: label row {bad[0]} is {nyu40[bad[0]]}, expected NYU40 ids 0..40; ScanNet v1 has raw "
            "category ids here: download the v2 file"
        )
    return LABEL_TABLES[label_set][nyu40.astype(np.int64)]


def read_views(folder: str | os.PathLike, size: tuple[int, int] = FEATURE_SIZE, every: int = 1) -> Views:
    """The exported frames of a scene, or without any those of its .sens, as views on a grid of size = (w, h).

    Of a stream, exported whole or not at all, every 20th frame is taken, as OpenScene does.
    Depth is resized by nearest neighbour, as OpenScene does.  Frames without a finite pose (tracking was lost)
    are left out and logged.

    Args:
      folder: the scene's folder with color/, depth/ and pose/, or with `<scene>.sens`.
      size: (320, 240) as OpenScene, or (640, 480) for every depth pixel.
      every: takes each every-th of these frames.

    Raises:
      FileNotFoundError: there are no frames, or one lacks its pose, depth or image.
      ValueError: a pose file is no rigid motion, no pose is finite, or the stream is truncated or of another
        size; depth and colour are checked when they are read.
    """
    folder = Path(os.path.abspath(folder))  # of a link its own name
    intrinsics = adjust_intrinsics(DEPTH_INTRINSICS, DEPTH_SIZE, size)
    stream_path = folder / f"{folder.name}.sens"
    kinds = {"color": ".jpg", "depth": ".png", "pose": ".txt"}
    found = {kind: _numbered(folder / kind, suffix) for kind, suffix in kinds.items()}
    if stream_path.is_file() and not found["pose"]:
        stream, frames = sens.read_stream(stream_path, STREAM_STEP * every)
        if stream.depth_size != DEPTH_SIZE:
            raise ValueError(f"{stream_path}: depth of {stream.depth_size} pixels, expected ScanNet's {DEPTH_SIZE}")
        readers = {
            frame.number: (frame.pose, functools.partial(_stream_view, folder.name, stream, frame, intrinsics, size))
            for frame in frames
        }
        return _with_finite_poses(folder, readers)
    numbers = sorted(set().union(*found.values()))
    if numbers == list(range(len(numbers))):  # the whole stream
        log.info("%s: every %dth of its %d exported frames is used", folder, STREAM_STEP, len(numbers))
        numbers = numbers[::STREAM_STEP]
    numbers = numbers[::every]
    if not numbers:
        raise FileNotFoundError(
            f"{folder}: no frames; download the .sens file, or export it to color/, depth/ and pose/"
        )
    missing = [
        f"{kind}/{number}{suffix}" for number in numbers for kind, suffix in kinds.items() if number not in found[kind]
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(f"{folder}: missing {', '.join(missing[:3])}{more}; export the frames again")
    readers = {}
    for number in numbers:
        pose, files = read_pose(found["pose"][number]), (found["depth"][number], found["color"][number])
        name = f"{folder.name}/{number}"
        readers[number] = (pose, functools.partial(_exported_view, name, *files, pose, intrinsics, size))
    return _with_finite_poses(folder, readers)


def _with_finite_poses(folder: Path, readers: dict) -> Views:
    """Views of (pose, reader) by frame number."""
    lost = [number for number, (pose, _) in readers.items() if not np.isfinite(pose).all()]
    if len(lost) == len(readers):
        raise ValueError(f"{folder}: none of the {len(readers)} frames has a finite pose; export them again")
    if lost:
        numbers = ", ".join(map(str, lost))
        log.warning("%s: left out frames without a finite pose: %s (of %d)", folder, numbers, len(readers))
    return Views([reader for number, (_, reader) in readers.items() if number not in lost], len(lost))


def _exported_view(name: str, depth: Path, image: Path, pose, intrinsics, size: tuple[int, int]) -> View:
    return View(name, pose, intrinsics, size, resize_nearest(read_depth(depth, 1000.0, DEPTH_SIZE), size), image)


def _stream_view(scene: str, stream: sens.Stream, frame: sens.Frame, intrinsics, size: tuple[int, int]) -> View:
    depth = resize_nearest(sens.read_depth(stream, frame), size)
    image = sens.read_color(stream, frame)
    return View(f"{scene}/{frame.number}", frame.pose, intrinsics, size, depth, image)


def _numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """Files by frame; `scannet_frames_25k` writes 000100.jpg where an export of the stream writes 100.jpg."""
    return {int(path.stem): path for path in folder.glob(f"*{suffix}") if path.stem.isdigit()}
