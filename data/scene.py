"""The record every reader makes and everything else takes: a point cloud with what is known of its points.

The neutral file format is an .npz with one array per field of `Scene` (absent fields are left out), made by
`Scene.save_npz` or by `np.savez(path, name=..., points=..., ...)`; any data set converted to it can be used.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import no_type_check

import numpy as np
from jaxtyping import Float16, Float32, Float64, Int32, Shaped, UInt8
from PIL import Image

from data.labels import IGNORE
from data.ply import read_ply_columns, replacing, write_ply

__all__ = ["Scene", "View", "check_labels", "read_ply", "read_ply_columns", "resize_nearest", "write_ply"]


@no_type_check  # it validates itself, with errors that say more than a type checker's
@dataclass(frozen=True, eq=False)
class Scene:
    """A point cloud of N points, M of which have a fused 2D feature of C channels.

    Attributes:
      name: how errors, tables and file names call it.
      points: metres, finite; any frame with z up.
      colors: red, green, blue, 0..255.
      normals: unit vectors or zero where unknown.
      labels: class ids 0..254, 255 = ignore.  GGSD is scored by them and never sees them; `mode=supervised` and the
        simulated 2D network do.
      superpoints: superpoint ids, -1 = in none.
      features: fused 2D features, one row per entry of feature_index.
      feature_index: the points that have a feature, strictly increasing.

    Raises:
      ValueError: a field has another shape, dtype or range; the message names scene, field, row and the fix.
    """

    name: str
    points: Float32[np.ndarray, "N 3"]
    colors: UInt8[np.ndarray, "N 3"] | None = None
    normals: Float32[np.ndarray, "N 3"] | None = None
    labels: Int32[np.ndarray, " N"] | None = None
    superpoints: Int32[np.ndarray, " N"] | None = None
    features: Float16[np.ndarray, "M C"] | None = None
    feature_index: Int32[np.ndarray, " M"] | None = None

    def __post_init__(self):
        where = f"scene '{self.name}'"
        if not isinstance(self.name, str) or not self.name or {"/", "\0"} & set(self.name):
            raise ValueError(f"{where}: expected a name that can begin a file's, without /")
        self._check_array("points", np.float32, (None, 3))
        n = len(self.points)
        if n == 0:
            raise ValueError(f"{where}: points is empty; a scene needs at least one point")
        self._check_array("colors", np.uint8, (n, 3))
        self._check_array("normals", np.float32, (n, 3))
        self._check_array("labels", np.int32, (n,))
        self._check_array("superpoints", np.int32, (n,))
        self._check_array("features", np.float16, (None, None))
        self._check_array("feature_index", np.int32, (None,))
        self._check_rows("points", np.isfinite, "finite coordinates", "drop the row")
        self._check_rows("normals", np.isfinite, "finite", "set unknown normals to zero")
        self._check_rows("features", np.isfinite, "finite float16", "rescale the features or drop the row")
        self._check_rows(
            "labels", lambda x: (x >= 0) & (x <= IGNORE), "0..254, or 255 = ignore", "map other ids to 255"
        )
        self._check_rows("superpoints", lambda x: x >= -1, ">= -1", "use -1 for points in no superpoint")
        if (self.features is None) != (self.feature_index is None):
            raise ValueError(f"{where}: features and feature_index must be given together")
        if self.features is not None and len(self.features) != len(self.feature_index):
            raise ValueError(
                f"{where}: features has {len(self.features)} rows, feature_index {len(self.feature_index)}; "
                "expected one feature per index"
            )
        self._check_rows(
            "feature_index", lambda x: (x >= 0) & (x < n), f"a point in 0..{n - 1}", "is it of this scene?"
        )
        self._check_rows(
            "feature_index", lambda x: np.diff(x, prepend=-1) > 0, "strictly increasing", "sort, drop repeats"
        )

    def _check_array(self, field: str, dtype: type, shape: tuple[int | None, ...]) -> None:
        value = getattr(self, field)
        if value is None and field != "points":
            return
        axes = ", ".join("any" if size is None else str(size) for size in shape)
        expected = f"scene '{self.name}': {field} must be {np.dtype(dtype)} [{axes}]"
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{expected}, got {type(value).__name__}; use np.asarray")
        if value.dtype != dtype:
            raise ValueError(f"{expected}, got {value.dtype}; convert it with .astype(np.{np.dtype(dtype)})")
        if len(value.shape) != len(shape) or any(s not in (None, t) for s, t in zip(shape, value.shape, strict=True)):
            raise ValueError(f"{expected}, got shape {list(value.shape)}; give one row per point")

    def _check_rows(self, field: str, is_valid, expected: str, fix: str) -> None:
        value = getattr(self, field)
        if value is None:
            return
        bad = ~is_valid(value)
        if bad.any():
            index = np.argwhere(bad)[0]
            found = value[index[0]] if value[index[0]].size <= 3 else value[tuple(index)]
            raise ValueError(f"scene '{self.name}': {field} row {index[0]} is {found}, expected {expected}; {fix}")

    def save_npz(self, path: str | os.PathLike) -> None:
        """Writes the scene to an .npz file, whole or not at all."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        with replacing(path) as file:
            np.savez(file, **{k: v for k, v in fields.items() if v is not None})

    @classmethod
    def load_npz(cls, path: str | os.PathLike) -> "Scene":
        """Reads a scene from an .npz file; a file without `name` is called after itself.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is truncated or no .npz, lacks `points`, has arrays Scene does not know, or a
            field is not as `Scene` wants it.
        """
        path = Path(path)
        known = [f.name for f in dataclasses.fields(cls)]
        with path.open("rb") as file:
            try:
                archive = np.load(file, allow_pickle=False)
                fields = {key: archive[key] for key in archive.files}
            except Exception as error:  # damaged bytes can make zipfile fail in many ways
                raise ValueError(f"{path}: truncated, or not an .npz scene file ({error})") from error
        unknown = sorted(set(fields) - set(known))
        if unknown or "points" not in fields:
            raise ValueError(f"{path}: expected the array points, and optionally of {known}; unknown here: {unknown}")
        fields["name"] = str(fields.get("name", path.stem))
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@no_type_check  # as Scene
@dataclass(frozen=True, eq=False)
class View:
    """One posed image of a scene; w, h is the pixel grid of its depth and of the 2D features made from it.

    Attributes:
      name: how errors call it, e.g. the frame number.
      pose: camera to world; the camera looks along +z, x right, y down.
      intrinsics: fx, fy, cx, cy in pixels of the w x h grid, in their usual places.
      size: (w, h).
      depth: metres along z, 0 = no reading; None where the sensor gives none.
      image: RGB pixels, or the file that holds them (of any resolution).

    Raises:
      ValueError: a field has another shape or dtype, or is not finite (ScanNet's lost poses are -inf).
    """

    name: str
    pose: Float64[np.ndarray, "4 4"]
    intrinsics: Float64[np.ndarray, "3 3"]
    size: tuple[int, int]
    depth: Float32[np.ndarray, "h w"] | None = None
    image: UInt8[np.ndarray, "H W 3"] | Path | None = None

    def __post_init__(self):
        width, height = self.size
        for field, dtype, shape in (
            ("pose", np.float64, (4, 4)),
            ("intrinsics", np.float64, (3, 3)),
            ("depth", np.float32, (height, width)),
        ):
            value = getattr(self, field)
            if value is None:
                continue
            if value.dtype != dtype or value.shape != shape:
                raise ValueError(
                    f"view '{self.name}': {field} must be {np.dtype(dtype)} {list(shape)}, "
                    f"got {value.dtype} {list(value.shape)}"
                )
            if not np.isfinite(value).all():
                fix = "write 0 where there is no reading" if field == "depth" else "leave the frame out"
                raise ValueError(f"view '{self.name}': {field} has values that are not finite; {fix}")

    def pixels(self) -> UInt8[np.ndarray, "h w 3"]:
        """The image on the view's own pixel grid, resized by nearest neighbour as OpenScene does.

        Raises what `full_pixels` raises.
        """
        return resize_nearest(self.full_pixels(), self.size)

    def full_pixels(self) -> UInt8[np.ndarray, "H W 3"]:
        """The image at its own resolution.

        Raises:
          ValueError: the view has no image, its file is damaged, or the image is not of the shape of the grid
            (`same_shape`): it is another camera's, or the size of the camera is wrong.
          FileNotFoundError: its file is gone.
        """
        if self.image is None:
            raise ValueError(f"view '{self.name}' has no image; read the scene with its colour frames")
        image = self.image if isinstance(self.image, np.ndarray) else self._read_image()
        (width, height), (image_height, image_width) = self.size, image.shape[:2]
        if not same_shape((image_width, image_height), self.size):
            file = f" ({self.image})" if isinstance(self.image, Path) else ""
            raise ValueError(
                f"view '{self.name}': its image{file} has {image_width} x {image_height} pixels, the shape of the "
                f"camera is {width} x {height}; is it the image of this camera?"
            )
        return image

    def _read_image(self) -> UInt8[np.ndarray, "H W 3"]:
        with opened_image(self.image) as file:
            mode, pixels = file.mode, np.asarray(file.convert("RGB"))
        if mode.startswith(("I", "F")):  # PIL has cut them off at 255
            raise ValueError(f"{self.image}: its pixels are of mode {mode}, expected 8 bits; export it again")
        return pixels


@contextlib.contextmanager
def opened_image(path: str | os.PathLike) -> Iterator[Image.Image]:
    """An image file, of which only the head is read before its pixels are asked for.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is empty, truncated or no image, which may show only with its pixels.
    """
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: truncated or no image ({error}); export it again") from error


def same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) have the same sides to each other, up to 2 percent, as cameras crop."""
    return abs(size[0] * other[1] / (size[1] * other[0]) - 1) <= 0.02


def resize_nearest(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """image [H, W, ...] on a w x h grid: pixel (row, col) is the image's (row * H // h, col * W // w)."""
    (width, height), (old_height, old_width) = size, image.shape[:2]
    rows, cols = np.arange(height) * old_height // height, np.arange(width) * old_width // width
    return image[rows[:, None], cols]


def check_labels(scene: Scene, num_classes: int) -> None:
    """Raises ValueError where a label of the scene is neither in 0..num_classes-1 nor 255."""
    if scene.labels is None:
        raise ValueError(f"scene '{scene.name}': labels is missing, to be scored by or simulated from")
    bad = np.flatnonzero((scene.labels >= num_classes) & (scene.labels != IGNORE))
    if bad.size:
        raise ValueError(
            f"scene '{scene.name}': labels row {bad[0]} is {scene.labels[bad[0]]}, expected "
            f"0..{num_classes - 1} or {IGNORE} = ignore; is this the label set of the config?"
        )


def read_ply(path: str | os.PathLike) -> Scene:
    """Reads the vertices of a PLY file as a scene, as `scene_of_columns` does.

    Other properties stay in the file: `read_ply_columns` gives them.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is corrupt or truncated, has no vertices or no x, y, z, or a field is out of range.
    """
    return scene_of_columns(Path(path), read_ply_columns(path))


def scene_of_columns(path: Path, columns: dict[str, np.ndarray]) -> Scene:
    """The scene that the columns of a file make, named after the file.

    x, y, z become `points`; red, green, blue (0..255, or floats 0..1) `colors`; nx, ny, nz `normals`, 0 where one is
    not finite, and none where all are 0.

    Raises:
      ValueError: there is no x, y or z, or a field is out of range.
    """
    missing = [axis for axis in "xyz" if axis not in columns]
    if missing:
        raise ValueError(f"{path}: the points have no property {', '.join(missing)}; found: {', '.join(columns)}")

    def stacked(*names: str) -> np.ndarray | None:
        return np.stack([columns[n] for n in names], axis=1) if all(n in columns for n in names) else None

    points = _in_float32(path, stacked("x", "y", "z"))
    normals = stacked("nx", "ny", "nz")
    if normals is not None:
        normals = np.where(np.isfinite(normals).all(axis=1, keepdims=True), normals, 0).astype(np.float32)
    try:
        return Scene(
            name=path.stem,
            points=points,
            colors=_colors_to_uint8(stacked("red", "green", "blue")),
            normals=normals if normals is not None and normals.any() else None,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _in_float32(path: Path, points: Shaped[np.ndarray, "N 3"]) -> Float32[np.ndarray, "N 3"]:
    """The points of a file in single precision; ValueError where that would move one by over a millimetre."""
    with np.errstate(invalid="ignore", over="ignore"):  # Scene refuses values that are not finite
        rounded = points.astype(np.float32)
        rounding = np.abs(points - rounded.astype(np.float64))
    if (rounding > 1e-3).any():
        raise ValueError(
            f"{path}: x, y, z lie so far out that float32 moves points by up to {rounding.max():.2g} m; "
            "subtract a local origin first"
        )
    return rounded


def _colors_to_uint8(colors: np.ndarray | None) -> UInt8[np.ndarray, "N 3"] | None:
    if colors is None or colors.dtype == np.uint8 or not colors.size:
        return None if colors is None else colors.astype(np.uint8)
    off = 1e-3  # averaged colours overshoot by rounding
    limit = 1 if colors.dtype.kind == "f" and colors.max() <= 1 + off else 255
    bad = ~((colors >= -off) & (colors <= limit + off)).all(axis=1)
    if bad.any():
        row = np.flatnonzero(bad)[0]
        raise ValueError(f"colors row {row} is {colors[row]}, expected 0..{limit} as {colors.dtype}; rescale them")
    return np.round(np.clip(colors, 0, limit) * (255 / limit)).astype(np.uint8)
