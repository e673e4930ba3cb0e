"""Superpoints: Voxel Cloud Connectivity Segmentation (VCCS; Papon et al., CVPR 2013), as PCL computes it.

Points are binned into voxels; seeds are spread on a coarser grid; from the seeds, superpoints grow along the
voxels' 26-neighbourhood, each voxel going to the superpoint nearest in position, colour and normal. `vccs` runs the
stages below in order. Where the paper and `pcl::SupervoxelClustering` (1.13) differ, this is PCL: its grids, its
seeds, its label-ordered sweeps that start from all-zero centroids. Partitions are PCL's, up to rounding.

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
from data.octree import Cells, adjacency, centred_origin, grown_origin, occupied_cells
from data.scene import read_ply
from data.voxel_normals import estimate_normals

_POSITION, _COLOR, _NORMAL = slice(0, 3), slice(3, 6), slice(6, 9)  # columns of a feature row

_compile = numba.njit(cache=True, nogil=True, error_model="numpy")


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


@no_type_check  # the checks inside say more than a shape checker's
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
    """Group the points of a cloud into superpoints of about `seed_resolution` that keep to surfaces and colours.

    Args:
        points: metres, in any order: the result does not depend on it, up to the rounding of sums (which refinements
            carry on: two orders of a room of 100,000 points agree to an adjusted Rand index of 0.9998, after two
            refinements of 0.99). Work is done in float32, so centre a cloud that lies far from the origin. (Where the
            origin lies matters: normals are turned to face it, and the first sweep measures distances from it.)
        colors: None leaves colour out.
        normals: one per point, averaged per voxel; a NaN row leaves its voxel without normal. None estimates them
            from the voxels around, two rings deep.
        voxel_resolution: edge of a voxel in metres; at least 1.7 times the typical distance between neighbouring
            points, or surfaces fall to pieces. 0.05 for ScanNet, 0.2-0.3 for LiDAR.
        seed_resolution: distance between seeds in metres. 0.5 for ScanNet, 1 for LiDAR.
        color_importance, spatial_importance, normal_importance: weights in
            D = normal (1 - |n.n'|) + color |rgb - rgb'| / 255 + spatial |x - x'| / seed_resolution.
        refine_iterations: rounds of growing anew from the middle of each superpoint, with normals that are
            estimated within it.

    Returns:
        Superpoint of each point: 0, 1, .. in the order of PCL's labels and without gaps; -1 where none reached the
        point's voxel: no seed in its connected piece, or no normal (see `estimate_normals`).

    Raises:
        ValueError: empty cloud; shapes or lengths that disagree; a coordinate that is not finite; resolutions that
            are not positive, or a seed resolution below the voxel resolution; negative weights; a grid of more than
            2**21 cells along an axis.
    """
    points = _checked_points(points, colors, normals)
    _check_settings(voxel_resolution, seed_resolution, refine_iterations)
    _check_weights(color=color_importance, spatial=spatial_importance, normal=normal_importance)
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
    tree = kd_tree.build(positions)
    seeds = select_seeds(positions, tree, voxel_resolution, seed_resolution)
    if not len(seeds):
        return np.full(len(points), -1, np.int32)
    centroids = np.zeros((len(seeds), 9), np.float32)  # PCL's; the paper starts from the seeds' own features
    owner = grow(voxels, seeds, centroids, sweeps, importance)
    for _ in range(refine_iterations):
        refined = estimate_normals(positions, voxels.neighbor_start, voxels.neighbor, owner)
        voxels.features[:, _NORMAL] = np.where(owner[:, None] >= 0, refined, voxels.features[:, _NORMAL])
        owner = grow(voxels, middles(centroids, tree), centroids, sweeps, importance)
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
        single = np.ascontiguousarray(points, np.float32)
    if not np.isfinite(single).all():
        bad = ~np.isfinite(single).all(axis=1)
        row = int(bad.argmax())
        raise ValueError(
            f"points row {row} is {points[row].tolist()}: every coordinate must be a finite float32; "
            f"drop such rows first ({int(bad.sum())} in all)"
        )
    return single


def _check_settings(voxel_resolution, seed_resolution, refine_iterations):
    for name, value in (("voxel_resolution", voxel_resolution), ("seed_resolution", seed_resolution)):
        if not np.finfo(np.float32).tiny < value < np.finfo(np.float32).max:
            raise ValueError(f"{name} must be a positive length in metres, got {value}")
    if seed_resolution < voxel_resolution:
        raise ValueError(
            f"seed_resolution ({seed_resolution:g} m) must not be below voxel_resolution "
            f"({voxel_resolution:g} m); about ten times as large is usual"
        )
    if refine_iterations < 0:
        raise ValueError(f"refine_iterations must be at least 0, got {refine_iterations}")


def _check_weights(**weights):
    for name, value in weights.items():
        if not 0 <= value < np.inf:
            raise ValueError(f"{name}_importance must be a finite weight of at least 0, got {value}")


def voxelize(
    points: Float32[np.ndarray, "N 3"],
    colors: UInt8[np.ndarray, "N 3"] | None,
    normals: Float[np.ndarray, "N 3"] | None,
    resolution: float,
) -> Voxels:
    """Bin points into voxels, average their features, find neighbours and, where none are given, normals."""
    cells = occupied_cells(points, centred_origin(points, resolution), resolution)
    start, neighbor = adjacency(cells.keys)
    features = np.zeros((len(cells.keys), 9), np.float32)
    positions = features[:, _POSITION] = _mean(points, cells)
    if colors is not None:
        features[:, _COLOR] = _mean(colors, cells)
    if normals is None:
        features[:, _NORMAL] = estimate_normals(positions, start, neighbor, np.zeros(len(positions), np.int32))
    else:
        mean = _mean(normals, cells)
        length = np.sqrt((mean * mean).sum(axis=1, keepdims=True))
        features[:, _NORMAL] = mean / np.where(length == 0, np.float32(1), length)
    return Voxels(cells, features, start, neighbor)


def select_seeds(
    positions: Float32[np.ndarray, "V 3"],
    tree: kd_tree.KdTree,
    voxel_resolution: np.float32,
    seed_resolution: np.float32,
) -> Int32[np.ndarray, "K"]:
    """Voxels from which superpoints grow: in each cell of the seed grid the one nearest to its centre.

    Unless it stands alone: within half a seed resolution there must be more than a twentieth of the voxels that a
    plane would have. The nearest may lie in the next cell; a voxel nearest to several centres is listed as often.
    """
    size = float(seed_resolution)
    cells = occupied_cells(positions, grown_origin(positions, size), size)
    centres = ((cells.keys + 0.5) * size + cells.origin).astype(np.float32)
    candidates = kd_tree.nearest(tree, centres)
    radius = np.float32(0.5) * seed_resolution
    plane = radius * radius * np.float32(np.pi) / (voxel_resolution * voxel_resolution)
    return candidates[kd_tree.count_within(tree, positions[candidates], radius) > np.float32(0.05) * plane]


def middles(centroids: Float32[np.ndarray, "K 9"], tree: kd_tree.KdTree) -> Int32[np.ndarray, "K"]:
    """Voxel nearest to the mean position of each superpoint, to grow anew from; -1 for those that have died."""
    alive = ~np.isnan(centroids[:, 0])
    seeds = np.full(len(centroids), -1, np.int32)
    seeds[alive] = kd_tree.nearest(tree, centroids[alive, _POSITION])
    return seeds


def grow(
    voxels: Voxels,
    seeds: Int32[np.ndarray, "K"],
    centroids: Float32[np.ndarray, "K 9"],
    sweeps: int,
    importance: Importance,
) -> Int32[np.ndarray, "V"]:
    """Let superpoints take voxels from their seeds outwards; returns each voxel's superpoint, -1 = none.

    In each sweep superpoints have their turns in label order, in place. In its turn one offers itself to the
    neighbours of the voxels it had at the start of it, and takes those nearer to it than to their owner *when that
    took them*: the distance is stored, not measured again. After a sweep centroids are means over what is owned.

    A seed of -1 is a superpoint that has died. `centroids` (features as in `Voxels`) are those of the first sweep;
    updated in place, NaN for those that die.
    """
    owner = np.full(len(voxels.features), -1, np.int32)
    alive = np.flatnonzero(seeds >= 0)
    owner[seeds[alive]] = alive  # several on one voxel: the last
    _sweep(voxels, seeds, centroids, owner, sweeps, importance)
    return owner


# `no_type_check` keeps the import hook that checks shapes under pytest away from compiled code.


@_compile
@no_type_check
def _mean(rows, cells):
    """Mean of the rows of each cell's points, summed in input order in single precision, as PCL does."""
    means = np.empty((len(cells.keys), 3), np.float32)
    for c in range(len(cells.keys)):
        x = y = z = np.float32(0)
        for i in cells.order[cells.start[c] : cells.start[c + 1]]:
            x += np.float32(rows[i, 0])
            y += np.float32(rows[i, 1])
            z += np.float32(rows[i, 2])
        count = np.float32(cells.start[c + 1] - cells.start[c])
        means[c, 0], means[c, 1], means[c, 2] = x / count, y / count, z / count
    return means


@_compile
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


@_compile
@no_type_check
def _sweep(voxels, seeds, centroids, owner, sweeps, importance):
    features, start, neighbor = voxels.features, voxels.neighbor_start, voxels.neighbor
    distance = np.full(len(owner), np.inf, np.float32)
    claim = seeds.copy()  # of those whose seed another owns: they count it as theirs, too, and expand from it
    for h in owner:
        if h >= 0:
            claim[h] = -1
    first = np.empty(len(centroids) + 1, np.int64)
    member = np.empty(len(owner), np.int32)
    turn = np.empty(len(owner) + 1, np.int32)  # what a superpoint expands from
    offered = np.empty(len(owner), np.int32)  # the last superpoint that measured the voxel in this sweep
    changed = np.zeros(len(centroids), np.int32)  # the last sweep in which a superpoint won or lost a voxel
    for sweep in range(sweeps):
        _group_by_owner(owner, first, member)
        offered[:] = -1
        for h in range(len(centroids)):
            if changed[h] < sweep - 1:
                continue  # same voxels and centroid as at its last turn: what it could win it has won
            mine = 0
            for u in member[first[h] : first[h + 1]]:
                if owner[u] == h:  # not lost earlier in this sweep
                    turn[mine] = u
                    mine += 1
            if claim[h] >= 0:
                turn[mine] = claim[h]
                mine += 1
            for u in turn[:mine]:
                for e in range(start[u], start[u + 1]):
                    v = neighbor[e]
                    if owner[v] == h or offered[v] == h:
                        continue
                    offered[v] = h
                    d = _distance(centroids, h, features, v, importance)
                    if d < distance[v]:  # never for a voxel without normal
                        if owner[v] >= 0:
                            changed[owner[v]] = sweep
                        changed[h] = sweep
                        distance[v] = d
                        owner[v] = h
                        if claim[h] == v:
                            claim[h] = -1
        _update_centroids(features, owner, claim, changed, sweep, centroids)


@_compile
@no_type_check
def _group_by_owner(owner, first, member):
    """Counting sort: the voxels of superpoint h, ascending, become `member[first[h]:first[h + 1]]`."""
    first[:] = 0
    for h in owner:
        if h >= 0:
            first[h] += 1
    end = 0
    for h in range(len(first)):
        end += first[h]
        first[h] = end
    for v in range(len(owner) - 1, -1, -1):
        if owner[v] >= 0:
            first[owner[v]] -= 1
            member[first[owner[v]]] = v


@_compile
@no_type_check
def _update_centroids(features, owner, claim, changed, sweep, centroids):
    """Means of the features of superpoints that changed in this sweep; normals are summed and normalised."""
    count = np.zeros(len(centroids), np.int32)
    for h in range(len(centroids)):
        if changed[h] == sweep:
            centroids[h] = 0
            if claim[h] >= 0:
                centroids[h] = features[claim[h]]
                count[h] = 1
    for v in range(len(owner)):
        h = owner[v]
        if h >= 0 and changed[h] == sweep:
            count[h] += 1
            for k in range(9):
                centroids[h, k] += features[v, k]
    for h in range(len(centroids)):
        if changed[h] == sweep:
            for k in range(6):
                centroids[h, k] /= np.float32(count[h])  # NaN for one that has lost all: it has died
            length = np.sqrt(centroids[h, 6] ** 2 + centroids[h, 7] ** 2 + centroids[h, 8] ** 2)
            if length > 0:
                for k in range(6, 9):
                    centroids[h, k] /= length


def _consecutive(owner, superpoints):
    """Renumber labels 0, 1, .. in their order; -1 stays."""
    alive = np.zeros(superpoints + 1, bool)
    alive[owner] = True  # -1 marks the last element
    renumbered = np.cumsum(alive, dtype=np.int32) - np.int32(1)
    renumbered[-1] = -1
    return renumbered[owner]


def _room(points=100_000):
    """A furnished-looking room to time: floor, walls and boxes, 1 cm of noise."""
    random = np.random.default_rng(0)
    lower = np.array([(0, 0, 0), (1, 1, 0), (3, 0.5, 0), (2, 3, 0.7)])
    upper = np.array([(5, 4, 2.6), (2, 1.6, 0.75), (3.5, 1, 1.8), (3.2, 3.8, 0.74)])
    box = random.integers(0, len(lower), points)
    xyz = random.uniform(lower[box], upper[box])
    axis = random.integers(0, 3, points)
    rows = np.arange(points)
    xyz[rows, axis] = np.where(random.random(points) < 0.5, lower[box, axis], upper[box, axis])
    xyz += random.normal(0, 0.01, xyz.shape)
    return xyz.astype(np.float32), random.integers(0, 256, (len(lower), 3), dtype=np.uint8)[box]


def _golden_cloud(folder, name, source):
    """(points, colours or None) of a cloud of the reference folder, which also says where the real ones lie."""
    path = folder / f"{name}.npz" if source is None else folder.parent / source.split()[0]
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return arrays["xyz"], arrays["rgb"] if "rgb" in arrays else None
    if path.suffix == ".ply":
        scene = read_ply(path)
        return scene.points, scene.colors
    columns = 5 if "of 5 columns" in source else 4  # nuScenes and KITTI sweeps
    return np.fromfile(path, np.float32).reshape(-1, columns)[:, :3].copy(), None


def _seconds(points, colors, settings, runs=5):
    """CPU seconds of the best of several runs, after one that compiles. `vccs` uses one core."""
    vccs(points, colors, **settings)
    best = np.inf
    for _ in range(runs):
        started = time.thread_time()
        vccs(points, colors, **settings)
        best = min(best, time.thread_time() - started)
    return best


def main(argv: list[str] | None = None) -> None:
    """Command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m data.superpoints",
        description="Times VCCS superpoints on one core: best of five runs, after one that compiles.",
        epilog="Without --golden it times a generated room of 100,000 points. With it, every cloud and setting of "
        "results.json, beside the seconds PCL 1.13 took there and the ratio ours / PCL; settings whose normals were "
        "computed outside VCCS (growsp) are left out. Seconds are CPU seconds, so other load disturbs them little; "
        "compare ratios only between machines of one class.",
    )
    parser.add_argument("--bench", action="store_true", required=True, help="print the table")
    parser.add_argument("--golden", type=Path, metavar="DIR", help="folder with results.json and reference clouds")
    arguments = parser.parse_args(argv)
    print(f"{'cloud':<24} {'setting':<28} {'points':>8} {'ours s':>8} {'PCL s':>8} {'ratio':>6}")
    if arguments.golden is None:
        points, colors = _room()
        for voxel, seed in ((0.03, 0.3), (0.05, 0.5)):
            seconds = _seconds(points, colors, {"voxel_resolution": voxel, "seed_resolution": seed})
            print(f"{'generated room':<24} {f'v{voxel}_s{seed}':<28} {len(points):>8} {seconds:>8.4f}")
        return
    results = json.loads((arguments.golden / "results.json").read_text())
    for name, entries in results.items():
        points, colors = _golden_cloud(arguments.golden, name, entries.get("_input", {}).get("source"))
        for key, entry in entries.items():
            if not key.startswith("labels_v"):
                continue
            settings = {k: v for k, v in entry["params"].items() if k != "refine"}
            seconds = _seconds(points, colors, settings | {"refine_iterations": entry["params"]["refine"]})
            pcl, setting = entry["pcl_seconds"], key.removeprefix("labels_")
            row = f"{name:<24} {setting:<28} {len(points):>8} {seconds:>8.4f}"
            print(f"{row} {pcl:>8.3f} {seconds / pcl:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
