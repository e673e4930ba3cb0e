"""Replica as rendered for NICE-SLAM, which OpenScene starts from, or as OpenScene preprocessed it; no labels.

The root holds either `<scene>_mesh.ply`, `<scene>/traj.txt` (a camera-to-world matrix per line) and
`<scene>/results/` with `frameNNNNNN.jpg` and `depthNNNNNN.png`, or `replica_3d/<scene>.pth` and `replica_2d/<scene>/`
with `color/N.jpg`, `depth/N.png` and `pose/N.txt`.  Depth has 16 bit and 6553.5 units to the metre in both.
"""

import dataclasses
import functools
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from data import openscene
from data.frames import Views, check_pose, read_depth, read_pose
from data.projection import adjust_intrinsics
from data.scene import Scene, View, read_ply, resize_nearest

SCENES = ("office0", "office1", "office2", "office3", "office4", "room0", "room1", "room2")
IMAGE_SIZE = (1200, 680)
INTRINSICS = np.array([[600.0, 0, 599.5], [0, 600.0, 339.5], [0, 0, 1]])  # pixels of IMAGE_SIZE
FEATURE_SIZE = (640, 360)  # (w, h) on which OpenScene computes 2D features and visibility
DEPTH_UNITS = 6553.5  # to the metre
DEPTH_TOLERANCE = 0.25  # relative, as OpenScene
BORDER = 10  # pixels, as OpenScene
STEP = 10  # frames from one view to the next, as OpenScene


def is_preprocessed(root: str | os.PathLike) -> bool:
    """Whether this is OpenScene's `replica_processed`."""
    return (Path(root) / "replica_3d").is_dir()


def scenes(root: str | os.PathLike) -> list[str]:
    """The scenes whose cloud is there."""
    return [name for name in SCENES if _cloud(Path(root), name).is_file()]


def read_scene(root: str | os.PathLike, name: str) -> Scene:
    """Points and colours of a scene's mesh; z up.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: the file is corrupt.
    """
    cloud = _cloud(Path(root), name)
    if not cloud.is_file():
        raise FileNotFoundError(f"{cloud}: missing; is this the folder of Replica or of replica_processed?")
    scene = openscene.read_scene(cloud) if is_preprocessed(root) else read_ply(cloud)
    return dataclasses.replace(scene, name=name, labels=None)


def _cloud(root: Path, name: str) -> Path:
    return root / "replica_3d" / f"{name}.pth" if is_preprocessed(root) else root / f"{name}_mesh.ply"


def read_views(root: str | os.PathLike, name: str, size: tuple[int, int] = FEATURE_SIZE) -> Views:
    """Every 10th frame as views on a pixel grid of size = (w, h); depth is read when a view is asked for.

    Raises:
      FileNotFoundError: there are no poses, or a frame lacks its image or depth.
      ValueError: a pose is no rigid motion or not finite.  A depth image is checked when it is read.
    """
    root = Path(root)
    frames = _preprocessed_frames(root / "replica_2d" / name) if is_preprocessed(root) else _frames(root / name)
    image_size = FEATURE_SIZE if is_preprocessed(root) else IMAGE_SIZE
    readers = []
    for number, (pose, color, depth) in frames.items():
        for file in (color, depth):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: missing, but there is a pose for it; unpack the scene again")
        if not np.isfinite(pose).all():
            raise ValueError(f"{root}: the pose of frame {number} of {name} is not finite; unpack the scene again")
        readers.append(functools.partial(_read_view, f"{name}/{number}", pose, color, depth, image_size, size))
    return Views(readers)


def _frames(folder: Path) -> dict[int, tuple[np.ndarray, Path, Path]]:
    path = folder / "traj.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; it holds the camera poses of the scene")
    poses = _read_trajectory(path)
    results = folder / "results"
    return {
        number: (poses[number], results / f"frame{number:06d}.jpg", results / f"depth{number:06d}.png")
        for number in range(0, len(poses), STEP)
    }


def _read_trajectory(path: Path) -> Float64[np.ndarray, "F 4 4"]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        poses = np.array([line.split() for line in lines if line.strip()], np.float64).reshape(-1, 4, 4)
    except ValueError as error:
        raise ValueError(f"{path}: expected 16 numbers in each line, a 4x4 camera-to-world matrix ({error})") from None
    for frame in range(0, len(poses), STEP):
        check_pose(f"{path}, frame {frame}", poses[frame])
    return poses


def _preprocessed_frames(folder: Path) -> dict[int, tuple[np.ndarray, Path, Path]]:
    numbers = sorted(int(path.stem) for path in (folder / "pose").glob("*.txt") if path.stem.isdigit())
    if not numbers:
        raise FileNotFoundError(f"{folder}/pose: holds no poses; unpack replica_2d of replica_processed")
    return {
        number: (
            read_pose(folder / "pose" / f"{number}.txt"),
            folder / "color" / f"{number}.jpg",
            folder / "depth" / f"{number}.png",
        )
        for number in numbers
    }


def _read_view(
    name: str,
    pose: Float64[np.ndarray, "4 4"],
    color: Path,
    depth: Path,
    image_size: tuple[int, int],
    size: tuple[int, int],
) -> View:
    reading = resize_nearest(read_depth(depth, DEPTH_UNITS, image_size), size)
    return View(name, pose, adjust_intrinsics(INTRINSICS, IMAGE_SIZE, size), size, reading, color)
