"""Sparse voxel grids on the host: quantise points, de-duplicate voxels, find the neighbours a convolution reads.

A voxel is a row (batch, x, y, z). Rows are packed into one sortable 64-bit key, in one place (`_pack`), and everything
else works on sorted keys: duplicates are adjacent, and so are the z-neighbours of a voxel, which makes a kernel map one
forward sweep with a cursor per (x, y) row of the kernel. All of it is NumPy and numba, releases the GIL, and runs in the
loader's workers; the results are pytrees of NumPy arrays that go to the device as they are.

Conventions are MinkowskiEngine's: kernel offsets count x fastest; odd kernels are centred, a kernel of size 2 covers
0..1; strided coordinates are `floor(c / stride) * stride`, a true floor for negatives too.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numba
import numpy as np
from jaxtyping import Bool, Float, Int32

_BITS = 18  # of each axis in a packed key; the batch index takes the 9 bits above them
_HALF = 1 << (_BITS - 1)
_REACH = 2  # widest kernel radius: keys keep this margin, so that an offset never carries into the next axis
COORDINATE_LIMIT = _HALF - _REACH
BATCH_LIMIT = 1 << (63 - 3 * _BITS)


class CapacityError(ValueError):
    """A cloud does not fit the bucket it was asked to fit."""


class Voxels(NamedTuple):
    """Occupied voxels of a point cloud, in ascending (x, y, z) order."""

    coords: Int32[np.ndarray, "V 3"]
    inverse: Int32[np.ndarray, "N"]
    """Voxel of each point."""
    first: Int32[np.ndarray, "V"]
    """Lowest point index of each voxel."""


def _pytree(meta_fields: tuple[str, ...]):
    """Frozen dataclass that jax flattens; `meta_fields` are static."""

    def register(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        data_fields = [f.name for f in dataclasses.fields(cls) if f.name not in meta_fields]
        return jax.tree_util.register_dataclass(cls, data_fields, list(meta_fields))

    return register


@_pytree(meta_fields=("num_in", "num_out", "kernel_volume"))
class KernelMap:
    """Which input row meets which output row under which kernel offset: `in[i] == stride * out[j] + offset[k]`.

    Pairs are sorted by offset and each offset is padded to whole tiles, so a tile has one weight matrix. A padding pair
    points at rows `num_in` and `num_out`, one past the end. Tiles from `num_tiles` on hold padding only.
    """

    in_index: Any  # int32 [T, tile]
    out_index: Any  # int32 [T, tile]
    offset_index: Any  # int32 [T]
    num_tiles: Any  # int32 []
    num_in: int
    num_out: int
    kernel_volume: int


@_pytree(meta_fields=())
class Pyramid:
    """Voxels of a five-level U-Net and the kernel maps on and between its levels, padded to a bucket's capacities.

    Level l has tensor stride 2**l. Valid rows come first: level 0 in the caller's order, coarser levels in ascending
    (batch, x, y, z). `down[l]` leads from level l to l + 1, and transposed from l + 1 to l.
    """

    coords: tuple[Any, ...]  # int32 [V_l, 4] per level
    num_voxels: Any  # int32 [levels]
    stem: KernelMap  # 5^3 on level 0
    submanifold: tuple[KernelMap, ...]  # 3^3 on each level
    down: tuple[KernelMap, ...]  # 2^3, stride 2

    @property
    def bucket(self) -> int:
        """Row capacity of level 0, on which every shape of the pyramid depends."""
        return self.coords[0].shape[0]

    def mask(self, level: int) -> Bool[Any, "V"]:
        """True for the valid rows of a level."""
        return np.arange(self.coords[level].shape[0]) < self.num_voxels[level]


# ---------------------------------------------------------------------------------------------------- packed keys


def _checked(coords: Int32[np.ndarray, "N 4"], tensor_stride: int = 1) -> None:
    if len(coords) == 0:
        raise ValueError("coords has no rows: an empty cloud has no kernel map")
    bad = (coords[:, 1:] < -COORDINATE_LIMIT) | (coords[:, 1:] >= COORDINATE_LIMIT)
    if bad.any():
        row = int(bad.any(1).argmax())
        raise ValueError(
            f"coords row {row} is {coords[row].tolist()}: x, y, z must lie in "
            f"[-{COORDINATE_LIMIT}, {COORDINATE_LIMIT}); centre the cloud or use larger voxels"
        )
    bad = (coords[:, 0] < 0) | (coords[:, 0] >= BATCH_LIMIT)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"coords row {row} has batch index {coords[row, 0]}: expected 0..{BATCH_LIMIT - 1}")
    if tensor_stride > 1:
        bad = (coords[:, 1:] % tensor_stride != 0).any(1)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"coords row {row} is {coords[row].tolist()}: expected multiples of tensor_stride {tensor_stride}"
            )


def _pack(coords: np.ndarray) -> np.ndarray:
    """Sortable int64 keys of (batch, x, y, z) rows; order of keys is lexicographic order of rows."""
    key = coords[:, 0].astype(np.int64)
    for axis in (1, 2, 3):
        key = (key << _BITS) + (coords[:, axis].astype(np.int64) + _HALF)
    return key


def _unpack(keys: np.ndarray) -> np.ndarray:
    coords = np.empty((len(keys), 4), np.int32)
    for axis in (3, 2, 1):
        coords[:, axis] = (keys & ((1 << _BITS) - 1)) - _HALF
        keys = keys >> _BITS
    coords[:, 0] = keys
    return coords


@numba.njit(cache=True, nogil=True)
def _unique(keys, order):
    """Distinct keys, the group of each key, and the lowest index in each group; `order` sorts `keys`."""
    n = len(keys)
    unique = np.empty(n, np.int64)
    first = np.empty(n, np.int32)
    inverse = np.empty(n, np.int32)
    count = 0
    for i in range(n):
        row = order[i]
        key = keys[row]
        if count == 0 or unique[count - 1] != key:
            unique[count] = key
            first[count] = row
            count += 1
        elif row < first[count - 1]:
            first[count - 1] = row
        inverse[row] = count - 1
    return unique[:count].copy(), inverse, first[:count].copy()


def voxelize(points: Float[np.ndarray, "N 3"], voxel_size: float) -> Voxels:
    """Voxels `floor(point / voxel_size)` that hold a point.

    Args:
        points: finite coordinates, in the unit of `voxel_size`.
        voxel_size: edge of a voxel, > 0.
    Raises:
        ValueError: no points, a coordinate that is not finite, or one outside the packable range.
    """
    if len(points) == 0:
        raise ValueError("points has no rows: cannot voxelize an empty cloud")
    if not voxel_size > 0:
        raise ValueError(f"voxel_size is {voxel_size}: expected a positive length")
    scaled = np.floor(points.astype(np.float64) / voxel_size)
    bad = ~((scaled >= -COORDINATE_LIMIT) & (scaled < COORDINATE_LIMIT)).all(1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"points row {row} is {points[row].tolist()}: expected finite coordinates whose voxels of size {voxel_size} "
            f"lie in [-{COORDINATE_LIMIT}, {COORDINATE_LIMIT}); centre the cloud or use larger voxels"
        )
    coords = np.zeros((len(points), 4), np.int32)
    coords[:, 1:] = scaled
    keys = _pack(coords)
    unique, inverse, first = _unique(keys, np.argsort(keys))
    return Voxels(_unpack(unique)[:, 1:].copy(), inverse, first)


# ---------------------------------------------------------------------------------------------------- kernel maps


@numba.njit(cache=True, nogil=True)
def _sweep(keys, rows, radius, position, in_index, out_index):
    """Pairs of an odd kernel, in sorted order of their output: `position[k]` advances by the number of pairs of offset k.

    With an empty `in_index` it only counts; otherwise pairs of offset k are written from `position[k]` on. One forward
    pass per (dx, dy) row of the kernel that precedes the centre, where the row's voxels are adjacent; the other half
    are the same pairs, seen from the other side.
    """
    size = 2 * radius + 1
    write = in_index.size > 0
    for r in range(size * size // 2 + 1):
        dx, dy = r // size - radius, r % size - radius
        own_row = dx == 0 and dy == 0
        first_dz = (np.int64(dx) << (2 * _BITS)) + (np.int64(dy) << _BITS) - radius
        last_dz = radius if own_row else 2 * radius  # the voxel itself is the end of its own row
        k0 = dx + radius + size * (dy + radius)
        start = position.copy()
        j = 0
        for i in range(len(keys)):
            lowest = keys[i] + first_dz
            while keys[j] < lowest:
                j += 1
            for neighbour in range(j, i + 1):
                dz = keys[neighbour] - lowest
                if dz > last_dz:
                    break
                k = k0 + dz * size * size
                if write:
                    in_index[position[k]] = rows[neighbour]
                    out_index[position[k]] = rows[i]
                position[k] += 1
        for dz in range(radius if own_row else size):
            k = k0 + dz * size * size
            mirror = size**3 - 1 - k
            begin, end = start[k], position[k]
            if write:
                in_index[position[mirror] : position[mirror] + end - begin] = out_index[begin:end]
                out_index[position[mirror] : position[mirror] + end - begin] = in_index[begin:end]
            position[mirror] += end - begin


@numba.njit(cache=True, nogil=True)
def _parents(keys):
    """Key of the parent (stride 2) of every voxel, and which of its eight children (kernel offset) the voxel is."""
    parent = np.empty(len(keys), np.int64)
    child = np.empty(len(keys), np.int32)
    low = np.int64((1 << _BITS) - 1)
    for i in range(len(keys)):
        x, y, z = keys[i] >> (2 * _BITS), (keys[i] >> _BITS) & low, keys[i] & low
        batch, x = x >> _BITS, x & low
        child[i] = (x & 1) + 2 * (y & 1) + 4 * (z & 1)
        key = batch
        for c in (x, y, z):
            key = (key << _BITS) + (c >> 1) + (_HALF >> 1)  # floor(c / 2) of a field that stores c + _HALF
        parent[i] = key
    return parent, child


@numba.njit(cache=True, nogil=True)
def _link(child, rows, parents, position, in_index, out_index):
    """Pairs of the 2^3 stride-2 map, written from `position[k]` on for child k."""
    for i in range(len(child)):
        k = child[i]
        in_index[position[k]] = rows[i]
        out_index[position[k]] = parents[i]
        position[k] += 1


class _Level(NamedTuple):
    """Voxels of one level in units of its tensor stride: sorted keys, and the row each of them has."""

    keys: np.ndarray
    rows: np.ndarray


class _Pairs(NamedTuple):
    """Pairs of a kernel map not yet written: how many per offset, and the function that writes them."""

    counts: np.ndarray
    write: Any  # (position, in_index, out_index) -> None


def _neighbour_pairs(level: _Level, kernel_size: int) -> _Pairs:
    def sweep(*out):
        _sweep(level.keys, level.rows, kernel_size // 2, *out)

    counts, nothing = np.zeros(kernel_size**3, np.int64), np.empty(0, np.int32)
    sweep(counts, nothing, nothing)
    return _Pairs(counts, sweep)


def _coarsen(level: _Level) -> tuple[_Level, _Pairs]:
    parent_keys, child = _parents(level.keys)
    keys, parents, _ = _unique(parent_keys, np.argsort(parent_keys))
    pairs = _Pairs(np.bincount(child, minlength=8), lambda *out: _link(child, level.rows, parents, *out))
    return _Level(keys, np.arange(len(keys), dtype=np.int32)), pairs


def _stored_pairs(kernel_map: KernelMap) -> _Pairs:
    """Pairs of a finished map, to be written again in tiles of another size."""
    offset_index = kernel_map.offset_index[: kernel_map.num_tiles]
    live = (kernel_map.in_index[: kernel_map.num_tiles] < kernel_map.num_in).sum(1)
    counts = np.bincount(offset_index, live, kernel_map.kernel_volume).astype(np.int64)
    begin = np.searchsorted(offset_index, np.arange(kernel_map.kernel_volume)) * kernel_map.in_index.shape[1]

    def copy(position, in_index, out_index):
        for k, count in enumerate(counts):
            source, target = slice(begin[k], begin[k] + count), slice(position[k], position[k] + count)
            in_index[target] = kernel_map.in_index.reshape(-1)[source]
            out_index[target] = kernel_map.out_index.reshape(-1)[source]

    return _Pairs(counts, copy)


def _kernel_map(pairs: _Pairs, shape: tuple[int, int], num_in: int, num_out: int) -> KernelMap:
    """Write pairs into tiles; `shape` is (tiles, pairs per tile)."""
    tiles_per_offset = -(-pairs.counts // shape[1])
    num_tiles = tiles_per_offset.sum(dtype=np.int32)
    in_index = np.full(shape, num_in, np.int32)
    out_index = np.full(shape, num_out, np.int32)
    offset_index = np.zeros(shape[0], np.int32)
    offset_index[:num_tiles] = np.repeat(np.arange(len(pairs.counts)), tiles_per_offset)
    begin = (np.cumsum(tiles_per_offset) - tiles_per_offset) * shape[1]
    pairs.write(begin, in_index.reshape(-1), out_index.reshape(-1))
    return KernelMap(in_index, out_index, offset_index, num_tiles, num_in, num_out, len(pairs.counts))


def _num_tiles(pairs: _Pairs, tile: int) -> int:
    return int((-(-pairs.counts // tile)).sum())


def _finest_level(coords: np.ndarray, tensor_stride: int) -> _Level:
    _checked(coords, tensor_stride)
    if tensor_stride > 1:
        coords = coords // np.array([1, tensor_stride, tensor_stride, tensor_stride], np.int32)
    keys = _pack(coords)
    rows = np.argsort(keys).astype(np.int32)
    keys = keys[rows]
    repeated = keys[1:] == keys[:-1]
    if repeated.any():
        i = int(repeated.argmax())
        raise ValueError(
            f"coords rows {rows[i]} and {rows[i + 1]} are both {coords[rows[i]].tolist()}: voxels must be distinct"
        )
    return _Level(keys, rows)


def kernel_map(
    coords: Int32[np.ndarray, "N 4"], *, kernel_size: int, stride: int = 1, tensor_stride: int = 1
) -> tuple[KernelMap, Int32[np.ndarray, "M 4"]]:
    """Kernel map of one convolution, at its exact size (tiles padded to whole tiles only).

    Args:
        coords: distinct (batch, x, y, z) rows, multiples of `tensor_stride`.
        kernel_size: 3 or 5 with stride 1, 2 with stride 2.
        tensor_stride: distance between neighbouring input voxels.
    Returns:
        The map and the output coordinates: `coords` itself for stride 1, ascending (batch, x, y, z) for stride 2.
    """
    if (kernel_size, stride) not in ((3, 1), (5, 1), (2, 2)):
        raise ValueError(
            f"kernel_size {kernel_size} with stride {stride}: expected kernel size 3 or 5 with stride 1, or 2 with stride 2"
        )
    level = _finest_level(coords, tensor_stride)
    if stride == 1:
        pairs, out_coords = _neighbour_pairs(level, kernel_size), coords
    else:
        coarse, pairs = _coarsen(level)
        out_coords = _unpack(coarse.keys)
        out_coords[:, 1:] *= 2 * tensor_stride
    tile = _tile(len(coords))
    return _kernel_map(pairs, (_num_tiles(pairs, tile), tile), len(coords), len(out_coords)), out_coords


# ---------------------------------------------------------------------------------------------------- pyramid


# Capacities per row of the bucket. Furnished rooms fill (1, .23, .05, .01, .003), ScanNet's vertices at 5 cm (1, .37,
# .1, .02, .01) and at 2 cm (1, .81, .34, .09, .02), a nuScenes sweep at 5 cm (1, .77, .55, .34, .19): a row that stays
# empty on a coarse level costs less than a row of level 0, so only the sparsest clouds move up a bucket or two.
_ROW_RATIO = (1.0, 0.65, 0.38, 0.22, 0.13)
_PAIR_RATIO = (17.0, 5.2, 3.5, 1.35, 0.8)  # of the 3^3 maps; up to 16.6 of 27 neighbours are present on level 0
_STEM_PAIR_RATIO = 60.0  # up to 58.4 of 125


def _tile(bucket: int, level: int = 0) -> int:
    """Pairs per tile: so few that padding every offset to whole tiles wastes little, enough for a dense product."""
    return max(64, (1024 if bucket > 8192 else 512) >> level)


def next_bucket(n: int) -> int:
    """Smallest bucket with at least `n` rows: 2048, then about 1.25 times the one before, in multiples of 128."""
    bucket = 2048
    while bucket < n:
        bucket = -(-bucket * 5 // (4 * 128)) * 128
    return bucket


def _pad(
    coords: list[np.ndarray], stem: _Pairs, submanifold: list[_Pairs], down: list[_Pairs], bucket: int
) -> Pyramid:
    """Put the valid rows of every level and the pairs of every map into the shapes of `bucket`."""
    rows = [-(-int(_ROW_RATIO[level] * bucket) // 128) * 128 for level in range(len(coords))]
    for level, (valid, capacity) in enumerate(zip(coords, rows, strict=True)):
        if len(valid) > capacity:
            raise CapacityError(
                f"{len(coords[0])} voxels do not fit bucket {bucket}: {len(valid)} rows on level {level}, room for "
                f"{capacity}; take a larger bucket or crop the cloud"
            )

    def fit(pairs: _Pairs, level: int, max_pairs: float, num_out: int) -> KernelMap:
        tile = _tile(bucket, level)
        capacity = int(max_pairs) // tile + len(pairs.counts)  # every offset may waste up to a tile
        if _num_tiles(pairs, tile) > capacity:
            raise CapacityError(
                f"{len(coords[0])} voxels do not fit bucket {bucket}: {pairs.counts.sum()} pairs of neighbours under "
                f"{len(pairs.counts)} offsets on level {level}, room for {int(max_pairs)}; take a larger bucket or "
                "crop the cloud"
            )
        return _kernel_map(pairs, (capacity, tile), rows[level], num_out)

    return Pyramid(
        coords=tuple(np.pad(c, ((0, n - len(c)), (0, 0))) for c, n in zip(coords, rows, strict=True)),
        num_voxels=np.array([len(c) for c in coords], np.int32),
        stem=fit(stem, 0, _STEM_PAIR_RATIO * bucket, rows[0]),
        submanifold=tuple(
            fit(pairs, level, _PAIR_RATIO[level] * bucket, rows[level]) for level, pairs in enumerate(submanifold)
        ),
        down=tuple(fit(pairs, level, rows[level], rows[level + 1]) for level, pairs in enumerate(down)),
    )


def build_pyramid(coords: Int32[np.ndarray, "N 4"], levels: int = 5, bucket: int | None = None) -> Pyramid:
    """Levels and kernel maps of a U-Net on these voxels, padded so that every shape depends on `bucket` alone.

    Args:
        coords: distinct (batch, x, y, z) rows; they keep their order on level 0.
        levels: 1 to 5.
        bucket: row capacity of level 0, one of `next_bucket`'s; None takes the smallest in which everything fits.
    Raises:
        CapacityError: the cloud does not fit the given bucket.
        ValueError: no rows, rows that repeat, or coordinates outside the packable range.
    """
    level = _finest_level(coords, 1)
    stem = _neighbour_pairs(level, 5)
    level_coords, submanifold, down = [coords], [_neighbour_pairs(level, 3)], []
    for i in range(1, levels):
        level, pairs = _coarsen(level)
        level_coords.append(_unpack(level.keys) * np.array([1, 2**i, 2**i, 2**i], np.int32))
        submanifold.append(_neighbour_pairs(level, 3))
        down.append(pairs)
    if bucket is not None:
        return _pad(level_coords, stem, submanifold, down, bucket)
    bucket = next_bucket(len(coords))
    while True:
        try:
            return _pad(level_coords, stem, submanifold, down, bucket)
        except CapacityError:
            bucket = next_bucket(bucket + 1)


def repad(pyramid: Pyramid, bucket: int) -> Pyramid:
    """The same pyramid in the shapes of another bucket; its kernel maps are copied, not computed again.

    Raises:
        CapacityError: the cloud does not fit that bucket.
    """
    return _pad(
        [c[:n] for c, n in zip(pyramid.coords, pyramid.num_voxels, strict=True)],
        _stored_pairs(pyramid.stem),
        [_stored_pairs(kernel_map) for kernel_map in pyramid.submanifold],
        [_stored_pairs(kernel_map) for kernel_map in pyramid.down],
        bucket,
    )
