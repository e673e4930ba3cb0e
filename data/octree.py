"""Occupied cells of a regular 3D grid, in the order in which PCL's octrees list them, and which of them touch.

VCCS owes its result to two such grids: the voxels it groups, and the coarser cells it draws seeds from. Where each
lies follows PCL 1.13 (`octree_pointcloud.hpp`): see `centred_origin` and `grown_origin`. Cells are listed depth
first, that is in Morton order with bit triples (x, y, z), x the most significant: by geometry, not by point order.
"""

from typing import NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Float32, Float64, Int32

AXIS_BITS = 21  # of each axis in a 63-bit Morton code
_EPSILON = float(np.finfo(np.float32).eps)  # PCL's slack on bounding boxes, in the cloud's units
_DIGIT = 12  # bits sorted per radix pass: its counters stay in the first-level cache
_BRICK = 3  # log2 of the edge of the blocks in which `adjacency` works

_compile = numba.njit(cache=True, nogil=True, error_model="numpy")


class Cells(NamedTuple):
    """Occupied cells of a grid, in Morton order, with the points in each."""

    origin: Float64[np.ndarray, "3"]
    size: float
    keys: Int32[np.ndarray, "C 3"]
    """Grid coordinates of each cell, counted from `origin`."""
    start: Int32[np.ndarray, "C+1"]
    """Points of cell c are `order[start[c]:start[c + 1]]`, in input order."""
    order: Int32[np.ndarray, "N"]
    cell: Int32[np.ndarray, "N"]
    """Cell of each point."""


def centred_origin(points: Float32[np.ndarray, "N 3"], size: float) -> Float64[np.ndarray, "3"]:
    """Lower corner of the power-of-two cube of cells in whose middle PCL puts a cloud given as a whole."""
    low, high = _bounds(points)
    cells = max(np.ceil((high - low - _EPSILON) / size).max(), 2.0)
    side = 2.0 ** np.ceil(np.log2(cells) - _EPSILON) * size
    margin = (side - (high - low)) / 2
    return np.where(margin > _EPSILON, low - margin, low)


def grown_origin(points: Float32[np.ndarray, "N 3"], size: float) -> Float64[np.ndarray, "3"]:
    """Lower corner of the cube that PCL grows, doubling it, as points arrive one by one.

    The first point is a vertex of the grid. Growing extends the cube downwards on every axis on which the point
    that did not fit is not above it. So the order of the points decides where the cube lies, and with it the order
    of its cells; where the cells lie only the first point does.
    """
    return _grow_box(points, size)


def occupied_cells(points: Float32[np.ndarray, "N 3"], origin: Float64[np.ndarray, "3"], size: float) -> Cells:
    """Bin finite points, none of them below `origin`, into cells of edge `size`.

    Raises ValueError where the grid would have more than 2**21 cells along an axis.
    """
    reach = (_bounds(points)[1] - origin).max() / size
    if reach >= 1 << AXIS_BITS:
        raise ValueError(
            f"cells of {size:g} m over this cloud would number {reach:.3g} along one axis, more than the "
            f"{1 << AXIS_BITS} allowed: use a larger resolution, or crop stray points far from the rest"
        )
    coordinates, codes = _morton_codes(points, origin, size)
    order = _argsort(codes, 3 * int(reach).bit_length())
    keys, start, cell = _runs(coordinates, codes, order)
    return Cells(origin, size, keys, start, order, cell)


# `no_type_check` keeps the import hook that checks shapes under pytest away from compiled code.


@_compile
@no_type_check
def _bounds(points):
    low = np.empty(3)
    high = np.empty(3)
    for axis in range(3):
        low[axis] = high[axis] = points[0, axis]
    for i in range(1, len(points)):
        for axis in range(3):
            low[axis] = min(low[axis], points[i, axis])
            high[axis] = max(high[axis], points[i, axis])
    return low, high


@_compile
@no_type_check
def _grow_box(points, size):
    low = points[0].astype(np.float64) - size
    high = points[0].astype(np.float64) + size
    side = 2 * size
    for i in range(1, len(points)):
        while True:
            fits = True
            for axis in range(3):
                fits &= low[axis] <= points[i, axis] < high[axis]
            if fits:
                break
            for axis in range(3):
                if points[i, axis] < high[axis]:
                    low[axis] -= side
            side *= 2
            high[:] = low + (side - _EPSILON)
    return low


@_compile
@no_type_check
def _spread(x):
    """Move bit b of a 21-bit number to bit 3 b."""
    x = (x | x << 32) & 0x1F00000000FFFF
    x = (x | x << 16) & 0x1F0000FF0000FF
    x = (x | x << 8) & 0x100F00F00F00F00F
    x = (x | x << 4) & 0x10C30C30C30C30C3
    return (x | x << 2) & 0x1249249249249249


@_compile
@no_type_check
def _morton_codes(points, origin, size):
    coordinates = np.empty(points.shape, np.int32)
    codes = np.empty(len(points), np.int64)
    for i in range(len(points)):
        x = np.int64((np.float64(points[i, 0]) - origin[0]) / size)
        y = np.int64((np.float64(points[i, 1]) - origin[1]) / size)
        z = np.int64((np.float64(points[i, 2]) - origin[2]) / size)
        coordinates[i, 0], coordinates[i, 1], coordinates[i, 2] = x, y, z
        codes[i] = _spread(x) << 2 | _spread(y) << 1 | _spread(z)
    return coordinates, codes


@_compile
@no_type_check
def _argsort(codes, bits):
    """Stable radix sort of non-negative numbers below 2**bits."""
    order = np.arange(len(codes), dtype=np.int32)
    spare = np.empty_like(order)
    for shift in range(0, bits, _DIGIT):
        position = np.zeros((1 << _DIGIT) + 1, np.int32)
        for code in codes:
            position[(code >> shift & (1 << _DIGIT) - 1) + 1] += 1
        for digit in range(1 << _DIGIT):
            position[digit + 1] += position[digit]
        for i in order:
            digit = codes[i] >> shift & (1 << _DIGIT) - 1
            spare[position[digit]] = i
            position[digit] += 1
        order, spare = spare, order
    return order


@_compile
@no_type_check
def _runs(coordinates, codes, order):
    """Cells as the runs of equal codes in sorted order."""
    n = len(order)
    start = np.empty(n + 1, np.int32)
    cell = np.empty(n, np.int32)
    count = 0
    for k in range(n):
        if k == 0 or codes[order[k]] != codes[order[k - 1]]:
            start[count] = k
            count += 1
        cell[order[k]] = count - 1
    start[count] = n
    keys = np.empty((count, 3), np.int32)
    for c in range(count):
        keys[c] = coordinates[order[start[c]]]
    return keys, start[: count + 1].copy(), cell


@_compile
@no_type_check
def _slot(x, y, z, mask):
    # Teschner et al., Optimized Spatial Hashing, VMV 2003
    mixed = np.int64(x) * 73856093 ^ np.int64(y) * 19349663 ^ np.int64(z) * 83492791
    return (mixed ^ mixed >> 15) & mask


@_compile
@no_type_check
def _hash_table(keys):
    size = 2
    while size < 2 * len(keys):
        size *= 2
    table = np.full(size, -1, np.int32)
    for row in range(len(keys)):
        slot = _slot(keys[row, 0], keys[row, 1], keys[row, 2], size - 1)
        while table[slot] >= 0:
            slot = slot + 1 & size - 1
        table[slot] = row
    return table


@_compile
@no_type_check
def _find(table, keys, x, y, z):
    """Row of `keys` that holds (x, y, z), or -1."""
    slot = _slot(x, y, z, len(table) - 1)
    while True:
        row = table[slot]
        if row < 0 or (keys[row, 0] == x and keys[row, 1] == y and keys[row, 2] == z):
            return row
        slot = slot + 1 & len(table) - 1


@_compile
@no_type_check
def adjacency(keys):
    """26-neighbourhood of distinct cells `keys` int32 [V, 3] in Morton order, each also its own neighbour.

    Returns (start int64 [V + 1], neighbor int32 [E]): the neighbours of cell v are
    `neighbor[start[v]:start[v + 1]]`.

    Cells of one 8 x 8 x 8 brick follow each other in Morton order. So the hash table is asked for bricks only, and
    the neighbours of a brick's cells are read from a small dense copy of it with a margin of one cell.
    """
    n = len(keys)
    brick_keys = np.empty((n, 3), np.int32)
    brick_start = np.empty(n + 1, np.int32)
    bricks = 0
    for v in range(n):
        x, y, z = keys[v, 0] >> _BRICK, keys[v, 1] >> _BRICK, keys[v, 2] >> _BRICK
        b = bricks - 1
        if v == 0 or x != brick_keys[b, 0] or y != brick_keys[b, 1] or z != brick_keys[b, 2]:
            brick_keys[bricks, 0], brick_keys[bricks, 1], brick_keys[bricks, 2] = x, y, z
            brick_start[bricks] = v
            bricks += 1
    brick_start[bricks] = n
    brick_keys = brick_keys[:bricks]
    table = _hash_table(brick_keys)

    width = (1 << _BRICK) + 2
    around = np.empty(27, np.int64)
    for k in range(27):
        around[k] = (k // 9 - 1) * width * width + (k // 3 % 3 - 1) * width + k % 3 - 1
    local = np.empty(width**3, np.int32)
    start = np.empty(n + 1, np.int64)
    start[0] = 0
    neighbor = np.empty(27 * n, np.int32)
    count = 0
    for b in range(bricks):
        local[:] = -1
        x0 = (brick_keys[b, 0] << _BRICK) - 1
        y0 = (brick_keys[b, 1] << _BRICK) - 1
        z0 = (brick_keys[b, 2] << _BRICK) - 1
        for k in range(27):
            other = _find(
                table,
                brick_keys,
                brick_keys[b, 0] + k // 9 - 1,
                brick_keys[b, 1] + k // 3 % 3 - 1,
                brick_keys[b, 2] + k % 3 - 1,
            )
            if other < 0:
                continue
            for v in range(brick_start[other], brick_start[other + 1]):
                x, y, z = keys[v, 0] - x0, keys[v, 1] - y0, keys[v, 2] - z0
                if 0 <= x < width and 0 <= y < width and 0 <= z < width:
                    local[(x * width + y) * width + z] = v
        for v in range(brick_start[b], brick_start[b + 1]):
            centre = ((keys[v, 0] - x0) * width + keys[v, 1] - y0) * width + keys[v, 2] - z0
            for k in range(27):
                neighbor[count] = local[centre + around[k]]
                count += neighbor[count] >= 0
            start[v + 1] = count
    return start, neighbor[:count].copy()
