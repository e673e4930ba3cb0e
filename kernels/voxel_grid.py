"""Sparse voxel grids, on the host: quantise points, drop duplicates, find the neighbours a convolution reads.

A voxel is a row (batch, x, y, z). Rows are packed into one sortable 64-bit key, so that duplicates are adjacent, and
neighbours are found among sorted columns of voxels (`columns.py`). It is NumPy and numba that release the GIL and run
in the loader's workers; what comes out are pytrees of NumPy arrays that go to the device as they are.

Conventions are MinkowskiEngine's: kernel offsets count x fastest; odd kernels are centred, a kernel of size 2
covers 0 and 1; strided coordinates are `floor(c / stride) * stride`, a true floor for negatives too.
"""

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, no_type_check

import jax
import numba
import numpy as np
from jaxtyping import Bool, Float, Int32

from kernels import columns
from kernels.columns import BATCH_LIMIT, COORDINATE_LIMIT


class CapacityError(ValueError):
    """A cloud does not fit the bucket it was asked to fit."""


class Voxels(NamedTuple):
    """Occupied voxels of a point cloud, in ascending (x, y, z) order."""

    coords: Int32[np.ndarray, "V 3"]
    inverse: Int32[np.ndarray, " N"]
    """Voxel of each point."""
    first: Int32[np.ndarray, " V"]
    """Lowest point index of each voxel."""


def _pytree(*static_fields: str):
    """Frozen dataclass that jax flattens into all but its static fields."""

    def register(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        data_fields = [f.name for f in dataclasses.fields(cls) if f.name not in static_fields]
        return jax.tree_util.register_dataclass(cls, data_fields, list(static_fields))

    return register


@_pytree("num_in", "num_out", "kernel_volume")
class KernelMap:
    """Which input row meets which output row under which offset: `in[i] == stride * out[j] + offset[k]`.

    Pairs are sorted by offset and each offset is padded to whole tiles, so a tile has one weight matrix. A
    padding pair points at rows `num_in` and `num_out`, one past the end. Tiles from `num_tiles` on are padding.
    """

    in_index: Any  # int32 [T, tile]
    out_index: Any  # int32 [T, tile]
    offset_index: Any  # int32 [T]
    num_tiles: Any  # int32 []
    num_in: int
    num_out: int
    kernel_volume: int


@_pytree()
class Pyramid:
    """Voxels of a U-Net's levels and the kernel maps on and between them, padded to a bucket's capacities.

    Level l has tensor stride 2**l. Valid rows come first: level 0 in the caller's order, coarser levels in
    ascending (batch, x, y, z). `down[l]` leads from level l to l + 1 and, transposed, back.
    """

    coords: tuple[Any, ...]  # int32 [V_l, 4] per level; padding rows are zero
    num_voxels: Any  # int32 [levels]
    stem: KernelMap  # 5^3 on level 0
    submanifold: tuple[KernelMap, ...]  # 3^3 on each level
    down: tuple[KernelMap, ...]  # 2^3, stride 2

    @property
    def bucket(self) -> int:
        """Row capacity of level 0. With `spread` it determines every shape, also those behind an axis of replicas."""
        return self.coords[0].shape[-2]

    @property
    def spread(self) -> int:
        """Room for coarse rows and pairs: of closed surfaces (0), open ones (1), points far apart (2), or several."""
        rows, stem = [c.shape[-2] for c in self.coords], self.stem.in_index.shape[-2:]
        for spread in range(len(_ROOMS)):
            if (_rows(self.bucket, spread, len(rows)), _stem_shape(self.bucket, spread)) == (rows, stem):
                return spread
        raise ValueError(f"no spread has levels of {rows} rows and a stem of shape {stem}")

    def mask(self, level: int) -> Bool[Any, " V"]:
        """True for the valid rows of a level."""
        return np.arange(self.coords[level].shape[0]) < self.num_voxels[level]


# ----------------------------------------------------------------------------------------------------- voxels


@numba.njit(cache=True, nogil=True)
@no_type_check
def _unique(keys, order):
    """Distinct keys, the group of each key, and the lowest index in each group; `order` sorts `keys`."""
    unique = np.empty(len(keys), np.int64)
    inverse = np.empty(len(keys), np.int32)
    first = np.empty(len(keys), np.int32)
    count = 0
    for row in order:
        if count == 0 or unique[count - 1] != keys[row]:
            unique[count] = keys[row]
            first[count] = row
            count += 1
        inverse[row] = count - 1
        first[count - 1] = min(first[count - 1], row)
    return unique[:count].copy(), inverse, first[:count].copy()


def voxelize(points: Float[np.ndarray, "N 3"] | Float[jax.Array, "N 3"], voxel_size: float) -> Voxels:
    """Voxels `floor(point / voxel_size)` that hold a point; the quotient is taken in float64.

    Args:
        points: finite coordinates, in the unit of `voxel_size`.
        voxel_size: edge of a voxel, > 0.
    Raises:
        ValueError: no points, or not [N, 3]; a coordinate that is not finite; a voxel outside the packable range.
    """
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points has shape {list(points.shape)}: expected [N, 3], columns x, y, z")
    if len(points) == 0:
        raise ValueError("points has no rows: cannot voxelize an empty cloud")
    if not 0 < voxel_size < np.inf:
        raise ValueError(f"voxel_size is {voxel_size}: expected a positive length")
    voxels = np.floor(points / np.float64(voxel_size))
    bad = ~((voxels >= -COORDINATE_LIMIT) & (voxels < COORDINATE_LIMIT)).all(1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"points row {row} is {points[row].tolist()}: expected finite coordinates whose voxels of size "
            f"{voxel_size} lie in [{-COORDINATE_LIMIT}, {COORDINATE_LIMIT}); centre the cloud or take larger voxels"
        )
    coords = np.zeros((len(points), 4), np.int32)
    coords[:, 1:] = voxels
    keys = columns.pack(coords)
    unique, inverse, first = _unique(keys, np.argsort(keys))
    return Voxels(columns.unpack(unique)[:, 1:].copy(), inverse, first)


# ------------------------------------------------------------------------------------------------ kernel maps


class _Level(NamedTuple):
    """Voxels of one level in units of its tensor stride: by row, and as columns with the row of each rank."""

    coords: np.ndarray
    voxels: columns.Columns
    rows: np.ndarray
    axes: tuple[int, ...]

    def steps(self, kernel_size: int) -> tuple[int, int]:
        """Of the kernel's offsets, which count x fastest, for the last two of `axes`."""
        middle, last = (kernel_size ** (axis - 1) for axis in self.axes[1:])
        return middle, last

    def scaled(self, tensor_stride: int) -> np.ndarray:
        """The coordinates in units of level 0."""
        return self.coords * np.array([1, *3 * [tensor_stride]], np.int32)


class _Pairs(NamedTuple):
    """Pairs of a kernel map before they are laid out in tiles."""

    counts: np.ndarray  # per offset
    write: Callable[[np.ndarray, np.ndarray, np.ndarray], None]
    """write(position, in_index, out_index) puts the pairs of offset k at position[k], which moves to their end."""


def _sorted_level(coords: np.ndarray, tensor_stride: int) -> _Level:
    """Check the caller's voxels and sort them."""
    coords = np.asarray(coords)
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype.kind not in "iu":
        raise ValueError(
            f"coords is {coords.dtype} {list(coords.shape)}: expected int32 [N, 4], columns batch, x, y, z"
        )
    if len(coords) == 0:
        raise ValueError("coords has no rows: an empty cloud has no kernel map")

    def refuse(bad: np.ndarray, expected: str) -> None:
        if bad.any():
            row = int(bad.reshape(len(coords), -1).any(1).argmax())
            raise ValueError(f"coords row {row} is {coords[row].tolist()}: expected {expected}")

    if coords.dtype.itemsize < 4:
        coords = coords.astype(np.int32)
    batch, xyz, limit = coords[:, 0], coords[:, 1:], tensor_stride * COORDINATE_LIMIT
    refuse((batch < 0) | (batch >= BATCH_LIMIT), f"a batch index in 0..{BATCH_LIMIT - 1}")
    refuse((xyz < -limit) | (xyz >= limit), f"x, y, z in [{-limit}, {limit}); centre the cloud or take larger voxels")
    if tensor_stride > 1:
        refuse(xyz % tensor_stride != 0, f"x, y, z to be multiples of tensor_stride {tensor_stride}")
        coords = np.column_stack([batch, xyz // tensor_stride])
    coords = coords.astype(np.int32, copy=False)
    axes = columns.fewest(coords)
    keys = columns.pack(coords, axes)
    rows = np.argsort(keys, kind="stable").astype(np.int32)  # they are often in order
    keys = keys[rows]
    repeated = keys[1:] == keys[:-1]
    if repeated.any():
        i = int(repeated.argmax())
        raise ValueError(f"coords rows {rows[i]} and {rows[i + 1]} are the same voxel: expected distinct rows")
    return _Level(coords, columns.gather(keys), rows, axes)


def _pairs(kernel_volume: int, write: Callable[[np.ndarray, np.ndarray, np.ndarray], None]) -> _Pairs:
    """What `write` writes, counted by having it write nowhere."""
    counts, nowhere = np.zeros(kernel_volume, np.int64), np.empty(0, np.int32)
    write(counts, nowhere, nowhere)
    return _Pairs(counts, write)


def _neighbours(level: _Level, kernel_size: int) -> _Pairs:
    def write(position, in_index, out_index):
        steps = level.steps(kernel_size)
        columns.neighbours(*level.voxels, level.rows, kernel_size // 2, steps, position, in_index, out_index)

    return _pairs(kernel_size**3, write)


def _coarsen(level: _Level) -> tuple[_Level, _Pairs]:
    parents, parent = columns.coarsen(level.voxels)
    coords = columns.coordinates(parents, level.axes)
    ascending = np.argsort(columns.pack(coords), kind="stable")
    rows = np.empty(len(coords), np.int32)
    rows[ascending] = np.arange(len(coords), dtype=np.int32)

    def write(position, in_index, out_index):
        keys, bits, _ = level.voxels
        above = parent, parents.bits, parents.first, rows
        columns.children(keys, bits, level.rows, *above, level.steps(2), position, in_index, out_index)

    return _Level(coords[ascending], parents, rows, level.axes), _pairs(8, write)


def _counts(kernel_map: KernelMap) -> np.ndarray:
    """Pairs per offset."""
    offset_index = kernel_map.offset_index[: kernel_map.num_tiles]
    per_tile = (kernel_map.in_index[: kernel_map.num_tiles] < kernel_map.num_in).sum(1)
    return np.bincount(offset_index, per_tile, kernel_map.kernel_volume).astype(np.int64)


def _stored(kernel_map: KernelMap, counts: np.ndarray, offsets: np.ndarray) -> _Pairs:
    """Pairs of some offsets of a finished map, whose `counts` are known, to be laid out again."""
    start = np.searchsorted(kernel_map.offset_index[: kernel_map.num_tiles], offsets) * kernel_map.in_index.shape[1]
    counts = counts[offsets]

    def copy(position, in_index, out_index):
        for k, count in enumerate(counts):
            source, target = slice(start[k], start[k] + count), slice(position[k], position[k] + count)
            in_index[target] = kernel_map.in_index.reshape(-1)[source]
            out_index[target] = kernel_map.out_index.reshape(-1)[source]
        position += counts

    return _Pairs(counts, copy)


def _tiles(counts: np.ndarray, tile: int) -> np.ndarray:
    """Tiles of each offset that has so many pairs."""
    return -(-counts // tile)


def _lay_out(pairs: _Pairs, shape: tuple[int, int], num_in: int, num_out: int) -> KernelMap:
    """Kernel map of `shape` (tiles, pairs per tile)."""
    tiles = _tiles(pairs.counts, shape[1])
    num_tiles = tiles.sum(dtype=np.int32)
    offset_index = np.zeros(shape[0], np.int32)
    offset_index[:num_tiles] = np.repeat(np.arange(len(tiles)), tiles)
    in_index, out_index = np.empty(shape, np.int32), np.empty(shape, np.int32)
    ends = np.cumsum(tiles) * shape[1]
    position = ends - tiles * shape[1]
    pairs.write(position, in_index.reshape(-1), out_index.reshape(-1))
    for index, padding in ((in_index, num_in), (out_index, num_out)):
        for written, end in zip(position, [*ends[:-1], index.size], strict=True):
            index.reshape(-1)[written:end] = padding
    return KernelMap(in_index, out_index, offset_index, num_tiles, num_in, num_out, len(tiles))


def _tile(rows: int, level: int = 0) -> int:
    """Pairs per tile: enough for a dense product, few enough that offsets padded to whole tiles waste little."""
    return max(64, (1024 if rows > 8192 else 512) >> level)


def kernel_map(
    coords: Int32[np.ndarray, "N 4"], *, kernel_size: int, stride: int = 1, tensor_stride: int = 1
) -> tuple[KernelMap, Int32[np.ndarray, "M 4"]]:
    """Kernel map of one convolution and its output coordinates, at exact sizes.

    Args:
        coords: distinct (batch, x, y, z) rows, multiples of `tensor_stride`.
        kernel_size: 3 or 5 with stride 1, 2 with stride 2.
        tensor_stride: spacing of the input voxels.
    Returns:
        The map, and `coords` itself for stride 1, parents in ascending (batch, x, y, z) order for stride 2.
    Raises:
        ValueError: coords empty, repeated, out of range or off the grid; an unsupported kernel or tensor stride.
    """
    if (kernel_size, stride) not in ((3, 1), (5, 1), (2, 2)):
        raise ValueError(
            f"kernel_size {kernel_size} with stride {stride}: expected size 3 or 5 with stride 1, or 2 with stride 2"
        )
    tensor_stride = operator.index(tensor_stride)
    if not 1 <= tensor_stride <= 2**14:
        raise ValueError(f"tensor_stride is {tensor_stride}: expected 1 to {2**14}")
    level = _sorted_level(coords, tensor_stride)
    if stride == 1:
        pairs, out_coords = _neighbours(level, kernel_size), coords
    else:
        parents, pairs = _coarsen(level)
        out_coords = parents.scaled(2 * tensor_stride)
    tile = _tile(len(coords))
    shape = (int(_tiles(pairs.counts, tile).sum()), tile)
    return _lay_out(pairs, shape, len(coords), len(out_coords)), out_coords


# ---------------------------------------------------------------------------------------------------- pyramid


class _Room(NamedTuple):
    """What a pyramid has room for, per row of the bucket."""

    rows: tuple[float, ...]  # on each level
    stem: float  # pairs of the 5^3 map
    submanifold: tuple[float, ...]  # pairs of the 3^3 map of each level


# By spread. One for all would hold coarse rows that closed surfaces never use and pairs that points far apart do not
# have, or move such points up to larger buckets. Most measured over augmented views is in brackets:
_CLOSED = _Room((1.0, 0.40, 0.13, 0.05, 0.025), 60.0, (17.0, 8.0, 5.0, 3.0, 2.0))
_OPEN = _Room((1.0, 0.86, 0.42, 0.14, 0.05), 24.0, (9.0, 8.0, 5.0, 3.0, 2.0))
_APART = _OPEN._replace(rows=(1.0, 0.86, 0.60, 0.38, 0.22))
_ROOMS = (
    _CLOSED,  # furnished rooms at 11 cm (rows .30, .08; pairs 58.4, 16.6), ScanNet's vertices at 5 cm (.36; 35, 12)
    _OPEN,  # ScanNet's vertices at 2 to 4 cm (.84, .38, .11, .03; 20.9, 7.0)
    _APART,  # nuScenes sweeps at 5 cm, one (.78, .54, .35, .20; 4.8, 2.6) or several (12.2, 4.3)
    _CLOSED._replace(rows=_OPEN.rows),  # the first two together
    _CLOSED._replace(rows=_APART.rows),  # all together
)
_WIDEST = len(_ROOMS) - 1
_INNER = np.arange(125).reshape(5, 5, 5)[1:4, 1:4, 1:4].reshape(-1)  # the 3^3 offsets among the 5^3


def next_bucket(n: int) -> int:
    """Smallest bucket of at least `n` rows: 2048, then about 1.25 times the one before, multiples of 128."""
    bucket = 2048
    while bucket < n:
        bucket = -(-bucket * 5 // (4 * 128)) * 128
    return bucket


def common_spread(spreads: Iterable[int]) -> int:
    """The first spread that holds, in the same bucket, whatever these hold."""
    rooms = np.array([[*room.rows, room.stem, *room.submanifold] for room in _ROOMS])
    return int((rooms >= rooms[list(spreads)].max(axis=0)).all(axis=1).argmax())


def _rows(bucket: int, spread: int, levels: int) -> list[int]:
    """Row capacities of the levels."""
    return [-(-int(ratio * bucket) // 128) * 128 for ratio in _ROOMS[spread].rows[:levels]]


def _shape(bucket: int, level: int, max_pairs: float | int, kernel_volume: int) -> tuple[int, int]:
    """Tiles of a kernel map and pairs per tile; every offset may leave a tile unfinished."""
    tile = _tile(bucket, level)
    return int(max_pairs) // tile + kernel_volume, tile


def _stem_shape(bucket: int, spread: int) -> tuple[int, int]:
    return _shape(bucket, 0, _ROOMS[spread].stem * bucket, 125)


def _pad(
    coords: list[np.ndarray], stem: _Pairs, submanifold: list[_Pairs], down: list[_Pairs], bucket: int, spread: int
) -> Pyramid:
    """Valid rows of every level and pairs of every map, in the shapes of `bucket` and `spread`.

    The 3^3 map of level 0 is part of its 5^3 map: `submanifold` has those of the levels above.
    """
    rows, room = _rows(bucket, spread, len(coords)), _ROOMS[spread]

    def refuse(level: int, found: str, capacity: int) -> None:
        raise CapacityError(
            f"{len(coords[0])} voxels do not fit bucket {bucket}: level {level} has {found} and room for {capacity}; "
            "take a larger bucket or crop the cloud"
        )

    def check(level: int, counts: np.ndarray, shape: tuple[int, int]) -> tuple[int, int]:
        if _tiles(counts, shape[1]).sum() > shape[0]:
            refuse(level, f"{counts.sum()} pairs of neighbours", (shape[0] - len(counts)) * shape[1])
        return shape

    for level, (valid, capacity) in enumerate(zip(coords, rows, strict=True)):
        if len(valid) > capacity:
            refuse(level, str(len(valid)), capacity)
    stem_shape = check(0, stem.counts, _stem_shape(bucket, spread))
    shapes = [
        check(level, counts, _shape(bucket, level, room.submanifold[level] * bucket, 27))
        for level, counts in enumerate([stem.counts[_INNER], *(pairs.counts for pairs in submanifold)])
    ]
    stem_map = _lay_out(stem, stem_shape, rows[0], rows[0])
    submanifold = [_stored(stem_map, stem.counts, _INNER), *submanifold]
    return Pyramid(
        coords=tuple(np.pad(c, ((0, n - len(c)), (0, 0))) for c, n in zip(coords, rows, strict=True)),
        num_voxels=np.array([len(c) for c in coords], np.int32),
        stem=stem_map,
        submanifold=tuple(_lay_out(pairs, s, n, n) for pairs, s, n in zip(submanifold, shapes, rows, strict=True)),
        down=tuple(
            _lay_out(pairs, _shape(bucket, level, rows[level], 8), rows[level], rows[level + 1])
            for level, pairs in enumerate(down)
        ),
    )


def _check_shapes(bucket: int, spread: int) -> None:
    if bucket <= 0 or bucket % 128 or not 0 <= spread <= _WIDEST:
        raise ValueError(
            f"bucket is {bucket} and spread {spread}: expected a positive multiple of 128, and 0 to {_WIDEST}"
        )


def build_pyramid(
    coords: Int32[np.ndarray, "N 4"], levels: int = 5, bucket: int | None = None, spread: int = _WIDEST
) -> Pyramid:
    """Levels and kernel maps of a U-Net on these voxels; every array shape depends on `bucket` and `spread` alone.

    Args:
        coords: distinct (batch, x, y, z) rows, which keep their order on level 0.
        levels: 1 to 5.
        bucket: row capacity of level 0, a multiple of 128; None takes the smallest in which all fits, and its smallest
            spread.
        spread: of a given bucket, see `Pyramid.spread`.
    Raises:
        CapacityError: the cloud does not fit the given bucket.
        ValueError: coords empty, repeated or out of range; levels, bucket or spread other than these.
    """
    if not 1 <= levels <= 5:
        raise ValueError(f"levels is {levels}: expected 1 to 5")
    if bucket is not None:
        _check_shapes(bucket, spread)
    level = _sorted_level(coords, 1)
    stem = _neighbours(level, 5)
    level_coords, submanifold, down = [level.coords], [], []
    for i in range(1, levels):
        level, pairs = _coarsen(level)
        level_coords.append(level.scaled(2**i))
        submanifold.append(_neighbours(level, 3))
        down.append(pairs)
    if bucket is not None:
        return _pad(level_coords, stem, submanifold, down, bucket, spread)
    bucket = next_bucket(len(coords))
    while True:
        for spread in range(len(_ROOMS)):
            with contextlib.suppress(CapacityError):
                return _pad(level_coords, stem, submanifold, down, bucket, spread)
        bucket = next_bucket(bucket + 1)


def repad(pyramid: Pyramid, bucket: int, spread: int = _WIDEST) -> Pyramid:
    """The same pyramid in other shapes; its kernel maps are copied, not computed again.

    Raises:
        CapacityError: the cloud does not fit them.
        ValueError: as `build_pyramid`.
    """
    _check_shapes(bucket, spread)

    def stored(kernel_map: KernelMap) -> _Pairs:
        return _stored(kernel_map, _counts(kernel_map), np.arange(kernel_map.kernel_volume))

    return _pad(
        [c[:n] for c, n in zip(pyramid.coords, pyramid.num_voxels, strict=True)],
        stored(pyramid.stem),
        [stored(kernel_map) for kernel_map in pyramid.submanifold[1:]],
        [stored(kernel_map) for kernel_map in pyramid.down],
        bucket,
        spread,
    )
