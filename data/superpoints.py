"""Superpoints: Voxel Cloud Connectivity Segmentation (VCCS; Papon et al., CVPR 2013), as PCL computes it.

Points are binned into voxels; seeds are spread on a coarser grid; from the seeds, superpoints grow along the voxels'
26-neighbourhood, each voxel going to the superpoint nearest in position, colour and normal. `vccs` runs the stages below
in order. Where paper and `pcl::SupervoxelClustering` (1.13) differ, this is PCL: its grids, its seeds, its label-ordered
sweeps that start from all-zero centroids. Partitions agree with PCL's to an adjusted Rand index of about 0.99 and more.

`python -m data.superpoints --bench` measures speed; `--help` says what it prints.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Float, Float32, Int32, Int64, UInt8

from data import kd_tree
from data.kd_tree import KdTree
from data.octree import Cells, adjacency, centred_origin, grown_origin, occupied_cells

_POSITION, _COLOR, _NORMAL = slice(0, 3), slice(3, 6), slice(6, 9)  # columns of a feature row


class Voxels(NamedTuple):
    """The voxels of a cloud, in PCL's order: what VCCS groups."""

    cells: Cells
    features: Float32[np.ndarray, "V 9"]
    """Means over a voxel's points: position (m), colour (0..255), unit normal; NaN normal = none."""
    neighbor_start: Int64[np.ndarray, "V+1"]
    neighbor: Int32[np.ndarray, "E"]
    """Neighbours of voxel v, v among them: `neighbor[neighbor_start[v]:neighbor_start[v + 1]]`."""


class Importance(NamedTuple):
    """Weights of the distance between a superpoint and a voxel, per unit of what they multiply."""

    color: np.float32  # per grey level
    spatial: np.float32  # per metre
    normal: np.float32  # per 1 - |cos|


def vccs(
    points: Float[np.ndarray, "N 3"],
    colors: UInt8[np.ndarray, "N 3"] | None = None,
    normals: Float[np.ndarray, "N 3"] | None = None,
    *,
    voxel_resolution: float,
    seed_resolution: float,
    color_importance: float = 0.2,
    spatial_importance: float = 0.4,
    normal_importance: float = 1.0,
    refine_iterations: int = 0,
) -> Int32[np.ndarray, "N"]:
    """Group the points of a cloud into superpoints (VCCS) of roughly `seed_resolution`, none across an object boundary.

    Args:
        points: metres, in any order; the result does not depend on it. Work is done in float32, so centre clouds that
            lie far from the origin. (The origin matters: own normals are turned to face it, and the first sweep
            measures distance from it.)
        colors: None leaves colour out.
        normals: one per point, combined per voxel; a NaN row makes its voxel one without normal. None estimates them
            from the voxels around, two rings deep.
        voxel_resolution: edge of a voxel in metres; at least 1.7 times the typical distance between neighbouring
            points, or surfaces fall to pieces. 0.05 for ScanNet, 0.2-0.3 for LiDAR.
        seed_resolution: distance between seeds in metres. 0.5 for ScanNet, 1 for LiDAR.
        color_importance, spatial_importance, normal_importance: weights in
            D = normal (1 - |n.n'|) + color |rgb - rgb'| / 255 + spatial |x - x'| / seed_resolution.
        refine_iterations: rounds of growing anew from the middle of each superpoint, with normals that stay within it.

    Returns:
        Superpoint of each point: 0, 1, .. in the order of PCL's labels and without gaps; -1 where none reached its
        voxel (no seed in its connected piece, or no normal).

    Raises:
        ValueError: empty cloud, shapes or lengths that disagree, a coordinate that is not finite, resolutions that are
            not positive or a seed resolution below the voxel resolution, negative weights, a grid too large to index.
    """
    points = _checked_points(points, colors, normals)
    _check_settings(
        voxel_resolution, seed_resolution, color_importance, spatial_importance, normal_importance, refine_iterations
    )
    # PCL keeps settings in single precision, and widens them where it bins.
    voxel_resolution, seed_resolution = np.float32(voxel_resolution), np.float32(seed_resolution)
    importance = Importance(
        color=np.float32(color_importance) / np.float32(255),
        spatial=np.float32(spatial_importance) / seed_resolution,
        normal=np.float32(normal_importance),
    )
    sweeps = int(np.float32(1.8) * seed_resolution / voxel_resolution) - 1

    voxels = voxelize(points, colors, normals, float(voxel_resolution))
    positions = np.ascontiguousarray(voxels.features[:, _POSITION])
    seed_cells = occupied_cells(positions, grown_origin(positions, float(seed_resolution)), float(seed_resolution))
    tree = kd_tree.build(positions)
    seeds = select_seeds(seed_cells, tree, positions, voxel_resolution)

    centroids = np.zeros((len(seeds), 9), np.float32)  # not the seeds' own features: the paper's choice, not PCL's
    owner = grow(voxels, seeds, centroids, sweeps, importance)
    for _ in range(refine_iterations):
        refined = estimate_normals(positions, voxels.neighbor_start, voxels.neighbor, owner)
        voxels.features[:, _NORMAL] = np.where(owner[:, None] >= 0, refined, voxels.features[:, _NORMAL])
        seeds = _middles(owner, centroids, tree)
        owner = grow(voxels, seeds, centroids, sweeps, importance)
    return _consecutive(owner, len(seeds))[voxels.cells.cell]


def _checked_points(points, colors, normals):
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points must have shape [N, 3], got {list(points.shape)}")
    if not len(points):
        raise ValueError("points is empty: superpoints need at least one point")
    for name, rows in (("colors", colors), ("normals", normals)):
        if rows is not None and rows.shape != points.shape:
            raise ValueError(
                f"{name} must have one row of 3 per point, shape {list(points.shape)}, got {list(rows.shape)}"
            )
    if colors is not None and colors.dtype != np.uint8:
        raise ValueError(f"colors must be uint8, 0..255, got {colors.dtype}: scale and convert them first")
    with np.errstate(over="ignore"):
        points = np.ascontiguousarray(points, np.float32)
    if not np.isfinite(points).all():
        finite = np.isfinite(points).all(axis=1)
        row = int(finite.argmin())
        raise ValueError(
            f"points row {row} is {points[row].tolist()}: every coordinate must be a finite float32; "
            f"drop the {int((~finite).sum())} such rows first"
        )
    return points


def _check_settings(voxel_resolution, seed_resolution, color, spatial, normal, refine_iterations):
    for name, value in (("voxel_resolution", voxel_resolution), ("seed_resolution", seed_resolution)):
        if not 0 < value < np.inf:
            raise ValueError(f"{name} must be a positive length in metres, got {value}")
    if seed_resolution < voxel_resolution:
        raise ValueError(
            f"seed_resolution ({seed_resolution:g} m) must not be below voxel_resolution ({voxel_resolution:g} m); "
            "about ten times as large is usual"
        )
    weights = {"color_importance": color, "spatial_importance": spatial, "normal_importance": normal}
    for name, value in weights.items():
        if not 0 <= value < np.inf:
            raise ValueError(f"{name} must be a finite weight of at least 0, got {value}")
    if refine_iterations < 0:
        raise ValueError(f"refine_iterations must be at least 0, got {refine_iterations}")


def voxelize(
    points: Float32[np.ndarray, "N 3"],
    colors: UInt8[np.ndarray, "N 3"] | None,
    normals: Float[np.ndarray, "N 3"] | None,
    resolution: float,
) -> Voxels:
    """Bin points into voxels, average their features, find each voxel's neighbours and, if need be, normals."""
    cells = occupied_cells(points, centred_origin(points, resolution), resolution)
    start, neighbor = adjacency(cells.keys)
    features = np.zeros((len(cells.keys), 9), np.float32)
    features[:, _POSITION] = _mean(points, cells)
    if colors is not None:
        features[:, _COLOR] = _mean(colors, cells)
    if normals is None:
        positions = np.ascontiguousarray(features[:, _POSITION])
        features[:, _NORMAL] = estimate_normals(positions, start, neighbor, np.zeros(len(cells.keys), np.int32))
    else:
        total = _mean(np.asarray(normals, np.float32), cells)
        length = np.sqrt((total * total).sum(axis=1, keepdims=True))
        features[:, _NORMAL] = total / np.where(length > 0, length, 1)  # NaN stays NaN
    return Voxels(cells, features, start, neighbor)


def select_seeds(
    seed_cells: Cells, tree: KdTree, positions: Float32[np.ndarray, "V 3"], voxel_resolution: np.float32
) -> Int32[np.ndarray, "K"]:
    """Voxels from which superpoints grow: in each seed cell the one nearest to its centre, unless it stands alone.

    A candidate stays if more than a twentieth of the voxels that a plane would have are within half a seed resolution.
    A voxel may be nearest to two centres and is then listed twice.
    """
    resolution = np.float32(seed_cells.size)
    radius = np.float32(0.5) * resolution
    area = radius * radius * np.float32(np.pi)
    minimum = np.float32(0.05) * area / (voxel_resolution * voxel_resolution)
    centres = ((seed_cells.keys + 0.5) * seed_cells.size + seed_cells.origin).astype(np.float32)
    candidates = kd_tree.nearest(tree, centres)
    return candidates[kd_tree.count_within(tree, positions[candidates], radius) > minimum]


def grow(
    voxels: Voxels,
    seeds: Int32[np.ndarray, "K"],
    centroids: Float32[np.ndarray, "K 9"],
    sweeps: int,
    importance: Importance,
) -> Int32[np.ndarray, "V"]:
    """Let superpoints take voxels from seeds outwards, in `sweeps` rounds. Returns each voxel's superpoint, -1 = none.

    In a round superpoints have their turns in label order, in place. One offers itself to the neighbours of the voxels
    it owns at the start of its turn; a neighbour goes over if it is nearer than it was to its owner *when that took it*:
    that distance is stored, and not measured again. After a round centroids become means over what is owned.

    A seed of -1 is a superpoint that has died. `centroids` (features as in `Voxels`) are those of the first round, and
    are updated in place.
    """
    owner = np.full(len(voxels.features), -1, np.int32)
    distance = np.full(len(voxels.features), np.inf, np.float32)
    _plant(voxels.features, seeds, centroids, owner, distance, importance)
    _sweep(voxels, centroids, owner, distance, sweeps, importance)
    return owner


@numba.njit(cache=True, nogil=True)
@no_type_check
def _mean(rows, cells):
    """Mean of the rows of each cell's points, summed in input order in single precision, as PCL does."""
    means = np.empty((len(cells.keys), 3), np.float32)
    for c in range(len(cells.keys)):
        x = y = z = np.float32(0)
        for k in range(cells.start[c], cells.start[c + 1]):
            i = cells.order[k]
            x += np.float32(rows[i, 0])
            y += np.float32(rows[i, 1])
            z += np.float32(rows[i, 2])
        count = np.float32(cells.start[c + 1] - cells.start[c])
        means[c, 0], means[c, 1], means[c, 2] = x / count, y / count, z / count
    return means


@numba.njit(cache=True, nogil=True)
@no_type_check
def estimate_normals(positions, start, neighbor, region):
    """Unit normals float32 [V, 3] of voxels, turned towards the origin, from the neighbours within their own region.

    The covariance runs over the voxel itself, its neighbours and their neighbours, each as often as it is met: weights
    I + A + A A for the adjacency A, which has self loops. So two rounds of summing over neighbours give all moments. A
    voxel without neighbours has no normal (NaN); one in a line of voxels gets some perpendicular of the line.

    `positions` float32 [V, 3]; `start`, `neighbor` as in `Voxels`; `region` int32 [V]: voxels of another region than its
    own do not count for a voxel.
    """
    n = len(positions)
    own = np.empty((n, 10))  # 1, x, y, z, xx, xy, xz, yy, yz, zz
    for v in range(n):
        own[v, 0] = 1
        k = 4
        for a in range(3):
            # About the first voxel: squares of large coordinates would swallow the covariance.
            own[v, 1 + a] = np.float64(positions[v, a]) - positions[0, a]
        for a in range(3):
            for b in range(a, 3):
                own[v, k] = own[v, 1 + a] * own[v, 1 + b]
                k += 1
    ring = np.zeros((n, 10))
    for v in range(n):
        _add_neighbors(ring[v], own, start, neighbor, region, v)
    normals = np.empty((n, 3), np.float32)
    for v in range(n):
        moments = own[v]
        moments += ring[v]
        _add_neighbors(moments, ring, start, neighbor, region, v)
        _smallest_eigenvector(moments, normals[v])
        if ring[v, 0] == 1:
            normals[v] = np.nan
        elif _dot(normals[v], positions[v]) > 0:
            normals[v] = -normals[v]
    return normals


@numba.njit(cache=True, nogil=True)
@no_type_check
def _add_neighbors(total, rows, start, neighbor, region, v):
    for e in range(start[v], start[v + 1]):
        u = neighbor[e]
        if region[u] == region[v]:
            for k in range(10):
                total[k] += rows[u, k]


@numba.njit(cache=True, nogil=True)
@no_type_check
def _smallest_eigenvector(moments, vector):
    """Direction of least variance, by the closed form for symmetric 3 x 3 matrices (as pcl::eigen33)."""
    x, y, z = moments[1] / moments[0], moments[2] / moments[0], moments[3] / moments[0]
    xx, xy, xz = moments[4] / moments[0] - x * x, moments[5] / moments[0] - x * y, moments[6] / moments[0] - x * z
    yy, yz, zz = moments[7] / moments[0] - y * y, moments[8] / moments[0] - y * z, moments[9] / moments[0] - z * z
    scale = max(xx + yy + zz, 1e-300)
    xx, xy, xz, yy, yz, zz = xx / scale, xy / scale, xz / scale, yy / scale, yz / scale, zz / scale

    mean = (xx + yy + zz) / 3
    a, b, c = xx - mean, yy - mean, zz - mean
    spread = np.sqrt((a * a + b * b + c * c + 2 * (xy * xy + xz * xz + yz * yz)) / 6)
    determinant = a * (b * c - yz * yz) - xy * (xy * c - yz * xz) + xz * (xy * yz - b * xz)
    cosine = determinant / max(2 * spread**3, 1e-300)
    smallest = mean + 2 * spread * np.cos((np.arccos(min(max(cosine, -1.0), 1.0)) + 2 * np.pi) / 3)

    # The wanted direction is perpendicular to the rows of (covariance - smallest I).
    rows = ((xx - smallest, xy, xz), (xy, yy - smallest, yz), (xz, yz, zz - smallest))
    longest, squared = (0.0, 0.0, 0.0), 1e-14
    for k in range(3):
        product = _cross(rows[k], rows[(k + 1) % 3])
        if _dot(product, product) > squared:
            longest, squared = product, _dot(product, product)
    if squared == 1e-14:  # parallel rows: a line, or equal variance all around one; any perpendicular serves
        long_row = rows[0]
        for k in range(1, 3):
            if _dot(rows[k], rows[k]) > _dot(long_row, long_row):
                long_row = rows[k]
        for axis in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)):
            product = _cross(long_row, axis)
            if _dot(product, product) > squared:
                longest, squared = product, _dot(product, product)
    if squared == 1e-14:  # equal variance everywhere
        longest, squared = (0.0, 0.0, 1.0), 1.0
    for k in range(3):
        vector[k] = longest[k] / np.sqrt(squared)


@numba.njit(cache=True, nogil=True)
@no_type_check
def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@numba.njit(cache=True, nogil=True)
@no_type_check
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@numba.njit(cache=True, nogil=True)
@no_type_check
def _distance(centroids, h, features, v, importance):
    x = features[v, 0] - centroids[h, 0]
    y = features[v, 1] - centroids[h, 1]
    z = features[v, 2] - centroids[h, 2]
    r = features[v, 3] - centroids[h, 3]
    g = features[v, 4] - centroids[h, 4]
    b = features[v, 5] - centroids[h, 5]
    cosine = features[v, 6] * centroids[h, 6] + features[v, 7] * centroids[h, 7] + features[v, 8] * centroids[h, 8]
    return (
        importance.normal * (np.float32(1) - abs(cosine))
        + importance.color * np.sqrt(r * r + g * g + b * b)
        + importance.spatial * np.sqrt(x * x + y * y + z * z)
    )


@numba.njit(cache=True, nogil=True)
@no_type_check
def _plant(features, seeds, centroids, owner, distance, importance):
    """Give seed voxels to their superpoints; of several on one voxel the first label takes it, at its distance."""
    for h in range(len(seeds)):
        v = seeds[h]
        if v < 0:
            continue
        if owner[v] < 0:
            owner[v] = h
        else:
            distance[v] = _distance(centroids, owner[v], features, v, importance)


@numba.njit(cache=True, nogil=True)
@no_type_check
def _sweep(voxels, centroids, owner, distance, sweeps, importance):
    features, start, neighbor = voxels.features, voxels.neighbor_start, voxels.neighbor
    n, superpoints = len(owner), len(centroids)
    member = np.empty(n, np.int32)
    first = np.empty(superpoints + 1, np.int64)
    offered = np.empty(n, np.int32)  # the last superpoint that made the voxel an offer in this sweep
    changed = np.zeros(superpoints, np.int32)  # sweep in which a superpoint last won or lost a voxel
    for sweep in range(sweeps):
        _group_by_owner(owner, first, member)
        offered[:] = -1
        for h in range(superpoints):
            if changed[h] < sweep - 1:
                continue  # same voxels and centroid as at its last turn: all it could win it has won
            mine = 0
            for k in range(first[h], first[h + 1]):
                if owner[member[k]] == h:  # not lost earlier in this sweep
                    member[first[h] + mine] = member[k]
                    mine += 1
            for u in member[first[h] : first[h] + mine]:
                for e in range(start[u], start[u + 1]):
                    v = neighbor[e]
                    if owner[v] == h or offered[v] == h:
                        continue
                    offered[v] = h
                    d = _distance(centroids, h, features, v, importance)
                    if d < distance[v]:  # never, for a voxel without normal
                        if owner[v] >= 0:
                            changed[owner[v]] = sweep
                        changed[h] = sweep
                        distance[v] = d
                        owner[v] = h
        _update_centroids(features, owner, changed, sweep, centroids)


@numba.njit(cache=True, nogil=True)
@no_type_check
def _group_by_owner(owner, first, member):
    """Counting sort: voxels of superpoint h, ascending, become `member[first[h]:first[h + 1]]`."""
    first[:] = 0
    for h in owner:
        if h >= 0:
            first[h] += 1
    end = 0
    for h in range(len(first)):
        count = first[h]
        first[h] = end
        end += count
    for v in range(len(owner)):
        h = owner[v]
        if h >= 0:
            member[first[h]] = v
            first[h] += 1
    for h in range(len(first) - 1, 0, -1):
        first[h] = first[h - 1]
    first[0] = 0


@numba.njit(cache=True, nogil=True)
@no_type_check
def _update_centroids(features, owner, changed, sweep, centroids):
    """Means of the features of superpoints that changed in this sweep; normals are summed and normalised."""
    count = np.zeros(len(centroids), np.int32)
    for v in range(len(owner)):
        h = owner[v]
        if h < 0 or changed[h] != sweep:
            continue
        if count[h] == 0:
            centroids[h] = 0
        count[h] += 1
        for k in range(9):
            centroids[h, k] += features[v, k]
    for h in range(len(centroids)):
        if count[h] == 0:
            continue
        for k in range(6):
            centroids[h, k] /= np.float32(count[h])
        length = np.sqrt(_dot(centroids[h, 6:], centroids[h, 6:]))
        if length > 0:
            for k in range(6, 9):
                centroids[h, k] /= length


def _middles(owner, centroids, tree):
    """Voxel nearest to the mean position of each superpoint, -1 for those that own nothing."""
    alive = np.zeros(len(centroids), bool)
    alive[owner[owner >= 0]] = True
    seeds = np.full(len(centroids), -1, np.int32)
    seeds[alive] = kd_tree.nearest(tree, centroids[alive, _POSITION])
    return seeds


def _consecutive(owner, superpoints):
    """Renumber labels 0, 1, .. in their order; -1 stays."""
    alive = np.zeros(superpoints + 1, bool)
    alive[owner] = True
    alive[-1] = False  # -1 indexes the last element
    renumbered = np.cumsum(alive, dtype=np.int32) - np.int32(1)
    renumbered[-1] = -1
    return renumbered[owner]
