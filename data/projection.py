"""Pinhole cameras, which points a view sees, and the fusion of per-pixel features of many views onto points.

The rules are OpenScene's (scripts/feature_fusion/fusion_util.py), restated in float64.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float16, Float32, Float64, Int32, Real

from data.scene import View


class Projection(NamedTuple):
    """The pixel each of N points falls on; row and col are 0 where visible is False."""

    row: Int32[np.ndarray, " N"]
    col: Int32[np.ndarray, " N"]
    visible: Bool[np.ndarray, " N"]


def adjust_intrinsics(
    intrinsics: Float64[np.ndarray, "3 3"], old_size: tuple[int, int], new_size: tuple[int, int]
) -> Float64[np.ndarray, "3 3"]:
    """Intrinsics of images of old_size = (w, h) for the same images resized to new_size.

    The height sets the scale: a width that does not follow it is taken as cropped, not squeezed.  The
    principal point scales between the centres of the corner pixels.
    """
    (old_width, old_height), (width, height) = old_size, new_size
    resized_width = height * old_width // old_height
    adjusted = intrinsics.copy()
    adjusted[0, 0] *= resized_width / old_width
    adjusted[1, 1] *= height / old_height
    adjusted[0, 2] *= (width - 1) / (old_width - 1)
    adjusted[1, 2] *= (height - 1) / (old_height - 1)
    return adjusted


def project(
    points: Float[np.ndarray, "N 3"],
    pose: Float64[np.ndarray, "4 4"],
    intrinsics: Float64[np.ndarray, "3 3"],
    size: tuple[int, int],
    depth: Float32[np.ndarray, "h w"] | None = None,
    tolerance: float = 0.25,
    border: int = 0,
) -> Projection:
    """Projects points into a camera and tells which of them it sees.

    A point falls on the pixel nearest to its projection (halves to the even one).  It is visible if it lies
    before the camera, inside the image by at least `border` pixels, and, where there is depth, if the reading
    of its pixel differs from its own depth z by at most `tolerance` times the reading; a pixel without
    reading (0) sees nothing.

    Args:
      points: metres, world frame.
      pose: camera to world, the camera looking along +z.
      intrinsics: in pixels of the w x h grid.
      size: (w, h).
      depth: metres along z, 0 = no reading.  None: nothing hides a point.
      tolerance: relative; OpenScene: 0.25 for ScanNet and Replica, 0.02 for Matterport3D.
      border: pixels at the rim that see nothing; OpenScene: 10, nuScenes 5.

    Raises:
      ValueError: pose or intrinsics are not finite, or depth has another size.
    """
    if not (np.isfinite(pose).all() and np.isfinite(intrinsics).all()):
        raise ValueError("cannot project with a pose or intrinsics that are not finite; leave this frame out")
    width, height = size
    if depth is not None and depth.shape != (height, width):
        raise ValueError(f"depth must have shape [{height}, {width}] (h, w), got {list(depth.shape)}")
    world_to_camera = np.linalg.inv(pose)
    x, y, z = world_to_camera[:3, :3] @ points.T.astype(np.float64) + world_to_camera[:3, 3:]
    before = z > 0
    z_or_one = np.where(before, z, 1.0)
    u = np.round(intrinsics[0, 0] * x / z_or_one + intrinsics[0, 2])
    v = np.round(intrinsics[1, 1] * y / z_or_one + intrinsics[1, 2])
    visible = before & (u >= border) & (u < width - border) & (v >= border) & (v < height - border)
    col, row = (np.where(visible, axis, 0).astype(np.int32) for axis in (u, v))
    if depth is not None:
        reading = depth[row, col].astype(np.float64)
        visible &= (reading > 0) & (np.abs(reading - z) <= tolerance * reading)
        row[~visible], col[~visible] = 0, 0
    return Projection(row, col, visible)


def _depth_ratio(points: Float[np.ndarray, "N 3"], view: View, border: int) -> Float64[np.ndarray, " M"]:
    """Reading over distance of the points that fall on a depth reading of the view, hidden ones too."""
    inside = project(points, view.pose, view.intrinsics, view.size, border=border)
    reading = view.depth[inside.row, inside.col].astype(np.float64)
    met = inside.visible & (reading > 0)
    to_camera = np.linalg.inv(view.pose)
    return reading[met] / (points[met].astype(np.float64) @ to_camera[2, :3] + to_camera[2, 3])


def _check_depth_scale(ratio: Float64[np.ndarray, " M"], met: int, agreeing: int, tolerance: float) -> None:
    """Raises ValueError where next to no reading agrees with the points, but many would by one common factor.

    Args:
      ratio: `_depth_ratio` of some of the `met` points that fall on a reading, `agreeing` of which lie there.
    """
    if met < 1000 or agreeing >= 0.01 * met:
        return
    factor = float(np.median(ratio))
    if np.mean(np.abs(ratio / factor - 1) <= max(tolerance, 0.1)) > 0.3:
        raise ValueError(
            f"almost nothing is visible: {agreeing} of {met} points that fall on a depth reading lie there, "
            f"and most readings are {factor:.3g} times as far as their points; is the depth scale of another data set, "
            "or are the poses not camera to world, in metres?"
        )


def fuse(
    points: Float[np.ndarray, "N 3"],
    views: Iterable[View],
    features_of: Callable[[View], Real[np.ndarray, "h w C"]],
    *,
    tolerance: float = 0.25,
    border: int = 0,
) -> tuple[Float16[np.ndarray, "M C"], Int32[np.ndarray, " M"]]:
    """Mean, over the views that see a point, of the feature of the pixel it falls on.

    The features enter as they are and the mean is not normalised again.  Views are taken one by one, so that
    one feature map is in memory at a time beside the float32 sums [N, C].

    Args:
      points, tolerance, border: as in `project`.
      views: posed views; each is read once.
      features_of: the per-pixel features of a view, [h, w, C] for a view of size (w, h).

    Returns:
      features and feature_index as `Scene` holds them: the M points seen at least once, in order.

    Raises:
      ValueError: there is no view; a feature map has another size than its view, or other channels than the
        first, or features that are not finite (the message names the view); or the depth of all views is in
        another unit than the points.
    """
    sums = np.zeros((len(points), 0), np.float32)
    counts = np.zeros(len(points), np.int32)
    agreeing, met, ratios = 0, 0, [np.empty(0)]
    for number, view in enumerate(views):
        seen = project(points, view.pose, view.intrinsics, view.size, view.depth, tolerance, border)
        feature_map = features_of(view)
        if number == 0:
            sums = np.zeros((len(points), feature_map.shape[-1]), np.float32)
        expected = (view.size[1], view.size[0], sums.shape[1])
        if feature_map.shape != expected:
            got = list(feature_map.shape)
            raise ValueError(f"view '{view.name}': features must be {list(expected)} (h, w, C), got {got}")
        features = feature_map[seen.row[seen.visible], seen.col[seen.visible]].astype(np.float32)
        if not np.isfinite(features).all():
            raise ValueError(f"view '{view.name}': features are not finite; does the 2D network overflow?")
        sums[seen.visible] += features
        counts += seen.visible
        if view.depth is not None:
            ratio = _depth_ratio(points, view, border)
            ratios.append(ratio[:: 1 + len(ratio) // 1000].copy())  # all of 300 views would pile up
            met += len(ratio)
            agreeing += int(seen.visible.sum())
    _check_depth_scale(np.concatenate(ratios), met, agreeing, tolerance)
    if not sums.shape[1]:
        raise ValueError("no views to fuse; give at least one view with features")
    feature_index = np.flatnonzero(counts).astype(np.int32)
    features = sums[feature_index] / counts[feature_index, None].astype(np.float32)
    return features.astype(np.float16), feature_index
