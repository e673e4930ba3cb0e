"""Normals of voxels from the voxels around them, as PCL's VCCS estimates them (`pcl::computePointNormal`)."""

import math
from typing import no_type_check

import numba
import numpy as np

_compile = numba.njit(cache=True, nogil=True, error_model="numpy")

# `no_type_check` keeps the import hook that checks shapes under pytest away from compiled code.


@_compile
@no_type_check
def estimate_normals(positions, start, neighbor, region):
    """Unit normals float32 [V, 3], turned towards the origin, from the neighbours within a voxel's own region.

    The covariance runs over the voxel itself, its neighbours and their neighbours, each as often as it is met:
    weights I + A + A A for the adjacency A, which has self loops. So two rounds of summing over neighbours give
    all moments. A voxel without neighbours has no normal (NaN); one in a straight line of voxels gets some
    perpendicular, or none where the line runs exactly along an axis.

    `positions` float32 [V, 3]; the neighbours of voxel v, v among them, are `neighbor[start[v]:start[v + 1]]`;
    `region` int32 [V]: voxels of another region than its own do not count for a voxel.
    """
    n = len(positions)
    own = np.empty((n, 10))  # 1, x, y, z, xx, xy, xz, yy, yz, zz
    for v in range(n):
        own[v, 0] = 1
        for a in range(3):
            # About the first voxel: squares of large coordinates would swallow the covariance.
            own[v, 1 + a] = np.float64(positions[v, a]) - positions[0, a]
        k = 4
        for a in range(3):
            for b in range(a, 3):
                own[v, k] = own[v, 1 + a] * own[v, 1 + b]
                k += 1
    ring = np.zeros((n, 10))
    for v in range(n):
        _add_neighbors(ring[v], own, start, neighbor, region, v)
    normals = np.empty((n, 3), np.float32)
    for v in range(n):
        if ring[v, 0] == 1:
            normals[v] = np.nan
            continue
        moments = own[v]
        moments += ring[v]
        _add_neighbors(moments, ring, start, neighbor, region, v)
        if not _smallest_eigenvector(_covariance(moments), normals[v]) > 1e-6:
            # A line of voxels leaves the direction open, and rounding picks one: let it be the one PCL gets.
            _smallest_eigenvector(_listed_covariance(positions, start, neighbor, region, v), normals[v])
        if _dot(normals[v], positions[v]) > 0:
            normals[v] = -normals[v]
    return normals


@_compile
@no_type_check
def _add_neighbors(total, rows, start, neighbor, region, v):
    for e in range(start[v], start[v + 1]):
        u = neighbor[e]
        if region[u] == region[v]:
            for k in range(10):
                total[k] += rows[u, k]


@_compile
@no_type_check
def _covariance(moments):
    n = moments[0]
    x, y, z = moments[1] / n, moments[2] / n, moments[3] / n
    return (
        np.float32(moments[4] / n - x * x),
        np.float32(moments[5] / n - x * y),
        np.float32(moments[6] / n - x * z),
        np.float32(moments[7] / n - y * y),
        np.float32(moments[8] / n - y * z),
        np.float32(moments[9] / n - z * z),
    )


@_compile
@no_type_check
def _listed_covariance(positions, start, neighbor, region, v):
    """The same covariance, summed in PCL's order and precision."""
    x = y = z = xx = xy = xz = yy = yz = zz = np.float32(0)
    n = np.float32(1)  # the voxel itself, in which the coordinates are centred
    for e in range(start[v], start[v + 1]):
        u = neighbor[e]
        if region[u] != region[v]:
            continue
        for f in range(start[u] - 1, start[u + 1]):
            w = u if f < start[u] else neighbor[f]  # the neighbour, then its neighbours
            if region[w] != region[v]:
                continue
            dx = positions[w, 0] - positions[v, 0]
            dy = positions[w, 1] - positions[v, 1]
            dz = positions[w, 2] - positions[v, 2]
            x += dx
            y += dy
            z += dz
            xx += dx * dx
            xy += dx * dy
            xz += dx * dz
            yy += dy * dy
            yz += dy * dz
            zz += dz * dz
            n += np.float32(1)
    x, y, z = x / n, y / n, z / n
    return xx / n - x * x, xy / n - x * y, xz / n - x * z, yy / n - y * y, yz / n - y * z, zz / n - z * z


@_compile
@no_type_check
def _smallest_eigenvector(covariance, vector):
    """Unit eigenvector of the smallest eigenvalue of (xx, xy, xz, yy, yz, zz), as pcl::eigen33 computes it.

    Returns how well it is defined: about the square of the ratio of the second eigenvalue to the largest.
    """
    scale = np.float32(0)
    for value in covariance:
        scale = max(scale, abs(value))
    xx, xy, xz, yy, yz, zz = covariance
    xx, xy, xz, yy, yz, zz = xx / scale, xy / scale, xz / scale, yy / scale, yz / scale, zz / scale
    root = _smallest_root(xx, xy, xz, yy, yz, zz)
    rows = ((xx - root, xy, xz), (xy, yy - root, yz), (xz, yz, zz - root))
    longest = _cross(rows[0], rows[1])  # perpendicular to the rows; the longest product is the most accurate
    squared = _dot(longest, longest)
    for row in rows[:2]:
        product = _cross(row, rows[2])
        if _dot(product, product) > squared:
            longest, squared = product, _dot(product, product)
    length = np.sqrt(squared)
    vector[0], vector[1], vector[2] = longest[0] / length, longest[1] / length, longest[2] / length
    return squared


@_compile
@no_type_check
def _smallest_root(xx, xy, xz, yy, yz, zz):
    """Smallest root of the characteristic polynomial x^3 - c2 x^2 + c1 x - c0, in single precision."""
    zero, two = np.float32(0), np.float32(2)
    c0 = xx * yy * zz + two * xy * xz * yz - xx * yz * yz - yy * xz * xz - zz * xy * xy
    c1 = xx * yy - xy * xy + xx * zz - xz * xz + yy * zz - yz * yz
    c2 = xx + yy + zz
    if abs(c0) < np.finfo(np.float32).eps:
        return zero
    third = np.float32(1 / 3)
    mean = c2 * third
    a = min((c1 - c2 * mean) * third, zero)
    half_b = np.float32(0.5) * (c0 + mean * (two * mean * mean - c1))
    discriminant = min(half_b * half_b + a * a * a, zero)
    radius = np.sqrt(-a)
    angle = np.float32(math.atan2(np.sqrt(-discriminant), half_b)) * third
    cosine, sine = np.float32(math.cos(angle)), np.sqrt(np.float32(3)) * np.float32(math.sin(angle))
    smallest = min(mean + two * radius * cosine, mean - radius * (cosine + sine), mean - radius * (cosine - sine))
    return max(smallest, zero)


@_compile
@no_type_check
def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@_compile
@no_type_check
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
