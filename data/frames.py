"""Frames on disk: depth images, pose files, and views that are read each time they are asked for."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64

from data.scene import View, opened_image


class Views(Sequence):
    """Views that are read when they are asked for, so that one depth image at a time is in memory.

    Args:
      readers: for each view the function that reads it; functools.partial of one keeps them fit for another
        process.
      lost: how many frames were left out, since their pose is not finite.
    """

    def __init__(self, readers: Sequence[Callable[[], View]], lost: int = 0):
        self._readers, self.lost = list(readers), lost

    def __len__(self) -> int:
        return len(self._readers)

    def __getitem__(self, index: int) -> View:
        return self._readers[index]()


def read_depth(
    path: str | os.PathLike, units_per_metre: float, size: tuple[int, int] | None = None
) -> Float32[np.ndarray, "h w"]:
    """The depth image in metres, 0 = no reading; of the given size = (w, h), where the camera has one.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is truncated, no image, not of 16 bit in one channel, or of another size.
    """
    with opened_image(path) as image:
        units = np.asarray(image)
    if units.ndim != 2 or units.dtype.itemsize < 2:
        raise ValueError(
            f"{path}: expected 16-bit depth, {units_per_metre:g} units to the metre, got {units.dtype} {units.shape}"
        )
    if size is not None and units.shape != size[::-1]:
        raise ValueError(
            f"{path}: {units.shape[1]} x {units.shape[0]} pixels, expected the camera's {size[0]} x {size[1]}; "
            "is the depth of this camera, not resized?"
        )
    return (units / units_per_metre).astype(np.float32)


def image_size_of(path: str | os.PathLike) -> tuple[int, int]:
    """(w, h) of an image file, of which only the head is read.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is empty, truncated or no image.
    """
    with opened_image(path) as image:
        return image.size


def read_pose(path: str | os.PathLike) -> Float64[np.ndarray, "4 4"]:
    """The camera-to-world matrix in a text file of 16 numbers; it may hold -inf or nan, as of lost frames.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: there are not 16 numbers in it, or finite ones that are no rigid motion.
    """
    try:
        pose = np.array(Path(path).read_text(encoding="utf-8-sig").split(), dtype=np.float64).reshape(4, 4)
    except ValueError as error:
        raise ValueError(f"{path}: expected 16 numbers, a 4x4 camera-to-world matrix ({error})") from None
    check_pose(path, pose)
    return pose


def check_pose(path: str | os.PathLike, pose: Float64[np.ndarray, "4 4"]) -> None:
    """Raises ValueError, which names `path`, where a finite matrix is no rigid motion."""
    if not np.isfinite(pose).all():
        return
    if not np.allclose(pose[3], [0, 0, 0, 1], atol=1e-6):
        hint = "; it is transposed, write it row by row" if np.allclose(pose[:, 3], [0, 0, 0, 1], atol=1e-6) else ""
        raise ValueError(f"{path}: the last row is {pose[3]}, expected 0 0 0 1{hint}")
    rotation = pose[:3, :3]
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-2) or np.linalg.det(rotation) < 0:
        raise ValueError(
            f"{path}: its left upper 3x3 part is no rotation; expected a camera-to-world matrix without scaling or "
            "mirroring, the camera looking along +z with y down"
        )
