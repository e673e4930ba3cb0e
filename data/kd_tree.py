"""A kd-tree whose nearest neighbour is FLANN's, also where several points are equally near.

VCCS draws seeds by asking for the voxel nearest to a cell's centre. On points that lie on a lattice, such as clouds
that were quantised before, most centres have several nearest voxels, and PCL takes the one that FLANN's search
(`KDTreeSingleIndex`, 1.9.2) meets first. Which one that is follows from where the tree splits and from the order in
which partitioning leaves the points, so both are FLANN's here, down to the single-precision arithmetic.
"""

from typing import NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Float32, Int8, Int32

_LEAF_SIZE = 15  # PCL's
_DEPTH = 1024  # bound on a path: in single precision an axis can be halved 280 times, equal points 31 times

_compile = numba.njit(cache=True, nogil=True, error_model="numpy")


class KdTree(NamedTuple):
    """Nodes in depth-first order: the left child of an inner node follows it."""

    points: Float32[np.ndarray, "N 3"]
    """In tree order, so that a node's points are neighbours in memory."""
    index: Int32[np.ndarray, "N"]
    """Row of each of them in the array the tree was built from."""
    axis: Int8[np.ndarray, "M"]
    """Axis along which a node is split, -1 = leaf."""
    gap: Float32[np.ndarray, "M 2"]
    """Largest coordinate in the left child and smallest in the right, along `axis`."""
    right: Int32[np.ndarray, "M"]
    """Right child."""
    start: Int32[np.ndarray, "M"]
    stop: Int32[np.ndarray, "M"]
    """A node's points are rows `start` to `stop`."""


def build(points: Float32[np.ndarray, "N 3"]) -> KdTree:
    """Tree over at least one finite point."""
    nodes = 2 * len(points)
    tree = KdTree(
        points=points.copy(),
        index=np.arange(len(points), dtype=np.int32),
        axis=np.empty(nodes, np.int8),
        gap=np.empty((nodes, 2), np.float32),
        right=np.empty(nodes, np.int32),
        start=np.empty(nodes, np.int32),
        stop=np.empty(nodes, np.int32),
    )
    _divide(tree, points.min(axis=0), points.max(axis=0))
    return tree


# `no_type_check` keeps the import hook that checks shapes under pytest away from compiled code. Nothing here
# recurses: numba 0.68 crashes on recursive functions that it loads from its cache.


@_compile
@no_type_check
def _divide(tree, low, high):
    """Fill an empty tree over points between `low` and `high`."""
    rows = np.empty((_DEPTH, 3), np.int32)  # of nodes to come: start, stop, the parent if it is a right child
    boxes = np.empty((_DEPTH, 2, 3), np.float32)
    rows[0, 0], rows[0, 1], rows[0, 2] = 0, len(tree.index), -1
    boxes[0, 0], boxes[0, 1] = low, high
    pending = 1
    node = 0
    while pending:
        pending -= 1
        start, stop, parent = rows[pending]
        low, high = boxes[pending].copy()
        tree.start[node], tree.stop[node] = start, stop
        if parent >= 0:
            tree.right[parent] = node
        if stop - start <= _LEAF_SIZE:
            tree.axis[node] = -1
            node += 1
            continue

        # The widest axis of the box; its points may not fill it, then another that is wider than they are.
        split = 0
        for axis in range(1, 3):
            if high[axis] - low[axis] > high[split] - low[split]:
                split = axis
        first, last = _extent(tree.points, start, stop, split)
        widest = split
        for axis in range(3):
            if axis != widest and high[axis] - low[axis] > last - first:
                other_first, other_last = _extent(tree.points, start, stop, axis)
                if other_last - other_first > last - first:
                    split, first, last = axis, other_first, other_last
        cut = (first + last) / np.float32(2)

        # Points on the cut go to the side that has fewer.
        middle = start + (stop - start) // 2
        below = _partition(tree, start, stop, split, cut)
        not_above = _partition(tree, below, stop, split, np.nextafter(cut, np.float32(np.inf)))
        middle = below if below > middle else min(not_above, middle)

        tree.axis[node] = split
        tree.gap[node, 0] = _extent(tree.points, start, middle, split)[1]
        tree.gap[node, 1] = _extent(tree.points, middle, stop, split)[0]
        # Boxes are cut, not shrunk to their points.
        rows[pending, 0], rows[pending, 1], rows[pending, 2] = middle, stop, node
        boxes[pending, 0], boxes[pending, 1] = low, high
        boxes[pending, 0, split] = cut
        pending += 1
        rows[pending, 0], rows[pending, 1], rows[pending, 2] = start, middle, -1
        boxes[pending, 0], boxes[pending, 1] = low, high
        boxes[pending, 1, split] = cut
        pending += 1
        node += 1


@_compile
@no_type_check
def _extent(points, start, stop, axis):
    low = high = points[start, axis]
    for k in range(start, stop):
        if points[k, axis] < low:
            low = points[k, axis]
        if points[k, axis] > high:
            high = points[k, axis]
    return low, high


@_compile
@no_type_check
def _partition(tree, start, stop, axis, cut):
    """Swap the points below `cut` to the front of rows `start` to `stop`; returns where they end."""
    points, index = tree.points, tree.index
    left, right = start, stop - 1
    while True:
        while left <= right and points[left, axis] < cut:
            left += 1
        while left <= right and points[right, axis] >= cut:
            right -= 1
        if left > right:
            return left
        index[left], index[right] = index[right], index[left]
        for k in range(3):
            points[left, k], points[right, k] = points[right, k], points[left, k]
        left += 1
        right -= 1


@_compile
@no_type_check
def _squared_distance(a, b):
    x, y, z = a[0] - b[0], a[1] - b[1], a[2] - b[2]
    return x * x + y * y + z * z


@_compile
@no_type_check
def nearest(tree, queries):
    """Row of the point nearest to each query (float32 [Q, 3]); of several equally near FLANN's."""
    rows = np.empty(len(queries), np.int32)
    nodes = np.empty(_DEPTH, np.int32)  # far sides, to be visited unless
    bounds = np.empty(_DEPTH, np.float32)  # the square of their distance is too large,
    sides = np.empty((_DEPTH, 3), np.float32)  # which is the sum of these, one per axis
    side = np.empty(3, np.float32)
    for q in range(len(queries)):
        query = queries[q]
        # FLANN starts from the squared distance to the cloud's box; from 0 the order of visits is the same.
        nodes[0], bounds[0] = 0, 0
        sides[0] = 0
        pending = 1
        best_distance = np.float32(np.inf)
        while pending:
            pending -= 1
            node, bound = nodes[pending], bounds[pending]
            if bound > best_distance:
                continue
            side[:] = sides[pending]
            while tree.axis[node] >= 0:
                axis = tree.axis[node]
                to_left, to_right = query[axis] - tree.gap[node, 0], query[axis] - tree.gap[node, 1]
                if to_left + to_right < 0:
                    near, far, step = node + 1, tree.right[node], to_right
                else:
                    near, far, step = tree.right[node], node + 1, to_left
                nodes[pending], bounds[pending] = far, bound + step * step - side[axis]
                sides[pending] = side
                sides[pending, axis] = step * step
                pending += 1
                node = near
            for k in range(tree.start[node], tree.stop[node]):
                distance = _squared_distance(query, tree.points[k])
                if distance < best_distance:
                    rows[q], best_distance = tree.index[k], distance
    return rows


@_compile
@no_type_check
def count_within(tree, queries, radius):
    """Number of points nearer to each query (float32 [Q, 3]) than `radius` (float32)."""
    counts = np.zeros(len(queries), np.int64)
    limit = radius * radius
    nodes = np.empty(_DEPTH, np.int32)
    for q in range(len(queries)):
        query = queries[q]
        nodes[0] = 0
        pending = 1
        while pending:
            pending -= 1
            node = nodes[pending]
            axis = tree.axis[node]
            if axis < 0:
                for k in range(tree.start[node], tree.stop[node]):
                    counts[q] += _squared_distance(query, tree.points[k]) < limit
                continue
            to_left, to_right = query[axis] - tree.gap[node, 0], query[axis] - tree.gap[node, 1]
            if to_left <= 0 or to_left * to_left < limit:
                nodes[pending] = node + 1
                pending += 1
            if to_right >= 0 or to_right * to_right < limit:
                nodes[pending] = tree.right[node]
                pending += 1
    return counts
