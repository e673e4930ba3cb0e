"""Virtual pinhole cameras: ray-traced depth of analytic solids, z-buffered depth of clouds, camera poses.

Cameras are OpenCV's (x right, y down, z forward); pixel (row, col) looks through u = col, v = row exactly, as
`data.projection` rounds; depth is the distance along z in metres.
"""

from typing import NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int8, Int32

from data.furniture import BOX, ELLIPSOID
from data.scene import View

FOCAL = 0.67  # focal length over image width: 73 degrees horizontally, a phone or a Kinect held upright


class Solids(NamedTuple):
    """Solids ready to trace: solid i is the unit shape in the coordinates to_unit[i] @ (x, y, z, 1).

    to_unit float64 [S,3,4]; kind int8 [S]; taper float64 [S]; group int32 [S], ascending: solids of one group
    share a bounding sphere (sphere float64 [G,4]: centre, radius), the first test of every ray.
    """

    to_unit: Float64[np.ndarray, "S 3 4"]
    kind: Int8[np.ndarray, " S"]
    taper: Float64[np.ndarray, " S"]
    group: Int32[np.ndarray, " S"]
    sphere: Float64[np.ndarray, "G 4"]


def look_at(eye: Float[np.ndarray, "3"], target: Float[np.ndarray, "3"]) -> Float64[np.ndarray, "4 4"]:
    """Camera-to-world pose of a camera at `eye` that looks at `target` with the horizon level (z is up)."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(forward, right), forward, eye], axis=1)
    return pose


def intrinsics_of(size: tuple[int, int]) -> Float64[np.ndarray, "3 3"]:
    """Pinhole matrix of a width x height image with the principal point in its middle."""
    width, height = size
    focal = FOCAL * width
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])


def pixel_rays(intrinsics: Float64[np.ndarray, "3 3"], size: tuple[int, int]) -> Float64[np.ndarray, "h w 3"]:
    """Camera-frame direction with z = 1 of every pixel: times its depth it is the point the pixel sees."""
    col, row = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    (fx, _, cx), (_, fy, cy) = intrinsics[:2]
    return np.stack([(col - cx) / fx, (row - cy) / fy, np.ones(col.shape)], axis=-1)


def trace(
    solids: Solids,
    pose: Float64[np.ndarray, "4 4"],
    intrinsics: Float64[np.ndarray, "3 3"],
    size: tuple[int, int],
) -> tuple[Float64[np.ndarray, "h w"], Int32[np.ndarray, "h w"], Float64[np.ndarray, "h w 3"]]:
    """First hit of every pixel's ray: depth in metres (inf: none), index of the solid (-1: none), unit
    normal.

    A camera inside a solid does not see that solid.
    """
    width, height = size
    return _trace(*solids, pose, intrinsics, height, width)


@numba.njit(cache=True)
@no_type_check
def _trace(to_unit, kind, taper, group, sphere, pose, intrinsics, height, width):
    depth = np.full((height, width), np.inf)
    solid = np.full((height, width), -1, np.int32)
    normal = np.zeros((height, width, 3))
    origin = pose[:3, 3]
    count = len(kind)
    start = np.empty((count, 3))
    for s in range(count):
        for a in range(3):
            start[s, a] = to_unit[s, a, 3]
            for b in range(3):
                start[s, a] += to_unit[s, a, b] * origin[b]
    d, u, n, best_n = np.empty(3), np.empty(3), np.zeros(3), np.zeros(3)
    for row in range(height):
        y = (row - intrinsics[1, 2]) / intrinsics[1, 1]
        for col in range(width):
            x = (col - intrinsics[0, 2]) / intrinsics[0, 0]
            for a in range(3):
                d[a] = pose[a, 0] * x + pose[a, 1] * y + pose[a, 2]
            length2 = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
            best, hit, last_group, met = np.inf, -1, -1, False
            for s in range(count):
                g = group[s]
                if g != last_group:
                    last_group = g
                    along, across = 0.0, 0.0
                    for a in range(3):
                        to = sphere[g, a] - origin[a]
                        along += to * d[a]
                        across += to * to
                    middle, reach = along / length2, sphere[g, 3] / np.sqrt(length2)
                    met = across - along * middle <= sphere[g, 3] ** 2 and -reach < middle < best + reach
                if not met:
                    continue
                for a in range(3):
                    u[a] = to_unit[s, a, 0] * d[0] + to_unit[s, a, 1] * d[1] + to_unit[s, a, 2] * d[2]
                if kind[s] == BOX:
                    t = _hit_box(start[s], u, n)
                elif kind[s] == ELLIPSOID:
                    t = _hit_sphere(start[s], u, n)
                else:
                    t = _hit_frustum(start[s], u, taper[s], n)
                if t < best:
                    best, hit = t, s
                    best_n[:] = n
            if hit >= 0:
                depth[row, col], solid[row, col] = best, hit
                norm2 = 0.0
                for a in range(3):
                    value = 0.0
                    for b in range(3):
                        value += to_unit[hit, b, a] * best_n[b]
                    normal[row, col, a] = value
                    norm2 += value * value
                normal[row, col] /= np.sqrt(norm2)
    return depth, solid, normal


@numba.njit(cache=True, inline="always")
@no_type_check
def _hit_box(o, d, n):
    near, far, axis = -np.inf, np.inf, 0
    for a in range(3):
        if abs(d[a]) < 1e-12:
            if abs(o[a]) > 1.0:
                return np.inf
            continue
        enter = (-np.sign(d[a]) - o[a]) / d[a]
        leave = (np.sign(d[a]) - o[a]) / d[a]
        if enter > near:
            near, axis = enter, a
        far = min(far, leave)
    if near > far or near <= 0.0:
        return np.inf
    n[:] = 0.0
    n[axis] = -np.sign(d[axis])
    return near


@numba.njit(cache=True, inline="always")
@no_type_check
def _hit_sphere(o, d, n):
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + o[2] * d[2]
    c = o[0] * o[0] + o[1] * o[1] + o[2] * o[2] - 1.0
    root = b * b - a * c
    if root < 0.0:
        return np.inf
    t = (-b - np.sqrt(root)) / a
    if t <= 0.0:
        return np.inf
    for k in range(3):
        n[k] = o[k] + t * d[k]
    return t


@numba.njit(cache=True, inline="always")
@no_type_check
def _hit_frustum(o, d, taper, n):
    """Radius 1 at z = -1, `taper` at z = 1, closed at both ends."""
    middle, slope = (1.0 + taper) / 2.0, (taper - 1.0) / 2.0
    best = np.inf
    radius = middle + slope * o[2]
    a = d[0] * d[0] + d[1] * d[1] - slope * slope * d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] - slope * d[2] * radius
    c = o[0] * o[0] + o[1] * o[1] - radius * radius
    root = b * b - a * c
    if root >= 0.0 and abs(a) > 1e-12:
        for sign in (-1.0, 1.0):
            t = (-b + sign * np.sqrt(root)) / a
            z = o[2] + t * d[2]
            if 0.0 < t < best and abs(z) <= 1.0:
                best = t
                n[0], n[1], n[2] = o[0] + t * d[0], o[1] + t * d[1], -slope * (middle + slope * z)
    if abs(d[2]) > 1e-12:
        for end in (-1.0, 1.0):
            t = (end - o[2]) / d[2]
            x, y, r = o[0] + t * d[0], o[1] + t * d[1], middle + slope * end
            if 0.0 < t < best and x * x + y * y <= r * r:
                best = t
                n[0], n[1], n[2] = 0.0, 0.0, end
    return best


def point_spacing(points: Float32[np.ndarray, "N 3"]) -> float:
    """Rough distance between neighbouring points of a surface cloud, in metres."""
    cell = 0.2
    cells = np.floor(points / cell).astype(np.int64)
    cells -= cells.min(axis=0)
    extent = cells.max(axis=0) + 1
    occupied = np.unique((cells[:, 0] * extent[1] + cells[:, 1]) * extent[2] + cells[:, 2]).size
    return cell * float(np.sqrt(occupied / len(points)))


def splat(
    points: Float32[np.ndarray, "N 3"],
    pose: Float64[np.ndarray, "4 4"],
    intrinsics: Float64[np.ndarray, "3 3"],
    size: tuple[int, int],
    spacing: float,
    depth: Float32[np.ndarray, "h w"] | None = None,
) -> tuple[Float32[np.ndarray, "h w"], Int32[np.ndarray, "h w"]]:
    """Which point each pixel sees, each point being drawn as a square of `spacing` metres.

    Where `depth` has a reading, that is the drawn point nearest in space to what the pixel saw; elsewhere the
    foremost one. Returns its depth (0: none) and its index (-1: none).
    """
    width, height = size
    if depth is None:
        depth = np.zeros((height, width), np.float32)
    return _splat(points, np.linalg.inv(pose), intrinsics, depth, spacing)


@numba.njit(cache=True)
@no_type_check
def _splat(points, to_camera, intrinsics, reading, spacing):
    height, width = reading.shape
    depth = np.zeros((height, width), np.float32)
    index = np.full((height, width), -1, np.int32)
    cost = np.full((height, width), np.inf)
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    m = to_camera
    for i in range(len(points)):
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        z_i = m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + m[2, 3]
        if z_i < 0.1:
            continue
        x_i = m[0, 0] * x + m[0, 1] * y + m[0, 2] * z + m[0, 3]
        y_i = m[1, 0] * x + m[1, 1] * y + m[1, 2] * z + m[1, 3]
        u, v = fx * x_i / z_i + cx, fy * y_i / z_i + cy
        # half a pixel at least, so that a point always marks the pixel it projects to
        half_u, half_v = max(0.5, fx * spacing / (2 * z_i)), max(0.5, fy * spacing / (2 * z_i))
        if not (-half_u <= u < width + half_u and -half_v <= v < height + half_v):
            continue
        for row in range(max(0, int(np.ceil(v - half_v))), min(height - 1, int(np.floor(v + half_v))) + 1):
            for col in range(max(0, int(np.ceil(u - half_u))), min(width - 1, int(np.floor(u + half_u))) + 1):
                seen = reading[row, col]
                if seen > 0:
                    aside_x, aside_y = seen * (col - cx) / fx - x_i, seen * (row - cy) / fy - y_i
                    price = aside_x * aside_x + aside_y * aside_y + (seen - z_i) ** 2
                else:
                    price = z_i
                if price < cost[row, col]:
                    cost[row, col], depth[row, col], index[row, col] = price, z_i, i
    return depth, index


def look_around_views(
    points: Float32[np.ndarray, "N 3"],
    *,
    count: int = 12,
    size: tuple[int, int] = (160, 120),
    holes: float = 0.03,
    seed: int = 0,
) -> list[View]:
    """Views from inside a cloud that came without frames (metres, z up), with its own z-buffered depth.

    Cameras stand 1.2-1.7 m above the floor where nothing is within 0.3 m and look at random points of the
    cloud.
    holes: share of blocks of 8 x 8 pixels whose depth is missing (0), so that not everything is seen.
    Raises ValueError if the cloud is so cramped that no camera fits.
    """
    rng = np.random.default_rng(seed)
    floor = np.percentile(points[:, 2], 2)
    cell = 0.1
    xy = np.floor(points[:, :2] / cell).astype(np.int64)
    low = xy.min(axis=0)
    ground = np.zeros(xy.max(axis=0) - low + 1, bool)
    tall = ground.copy()
    at_head = (points[:, 2] > floor + 0.9) & (points[:, 2] < floor + 1.9)
    ground[tuple((xy - low).T)] = True
    tall[tuple((xy[at_head] - low).T)] = True
    free = np.argwhere(ground & ~_dilate(tall, 3))
    if len(free) == 0:
        raise ValueError("look_around_views: no place in this cloud is 0.3 m clear of everything at head height")
    spacing, intrinsics = point_spacing(points), intrinsics_of(size)
    views = []
    for i in range(count):
        eye = np.append((free[rng.integers(len(free))] + low + rng.random(2)) * cell, floor + rng.uniform(1.2, 1.7))
        aims = points[rng.integers(len(points), size=8)]
        distance = np.linalg.norm(aims[:, :2] - eye[:2], axis=1)
        pose = look_at(eye, aims[np.argmax(distance > 1.0) if (distance > 1.0).any() else np.argmax(distance)])
        depth, _ = splat(points, pose, intrinsics, size, 1.5 * spacing)
        depth[missing_blocks(rng, depth.shape, holes)] = 0
        views.append(View(f"look{i:02d}", pose, intrinsics, size, depth, None))
    return views


def _dilate(mask, cells):
    padded = np.pad(mask, cells)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * cells + 1, 2 * cells + 1))
    return windows.any(axis=(2, 3))


def missing_blocks(rng: np.random.Generator, shape: tuple[int, int], share: float) -> Bool[np.ndarray, "h w"]:
    """Blocks of 8 x 8 pixels, about `share` of an image of shape (h, w), for readings to be lost in."""
    height, width = shape
    coarse = rng.random((-(-height // 8), -(-width // 8))) < share
    return coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
