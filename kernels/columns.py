"""Voxels as sorted columns: 64 voxels along one axis are one word, a bit for each that is occupied.

What is asked of neighbours is then asked of whole columns: a shift by dz and an `and` tell which voxels of a column
have a neighbour in the column beside it, the number of bits set tells how many, and the number of bits below one is its
rank in the column. The 100,000 voxels of a furnished room are some 10,000 columns.

The words are sorted by (batch, x, y, z), packed into 64-bit keys. With `ALONG_Y` y and z have changed places: columns
lie along y, and what is said of z here is meant of y. NumPy and numba that release the GIL.
"""

from typing import NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Int32, Int64, UInt64
from numba.core import types
from numba.extending import intrinsic

_BITS = 18  # of each axis in a packed key; the batch index takes the 9 bits above them
_HALF = 1 << (_BITS - 1)
_MARGIN = 2  # widest kernel radius: an offset never carries from one axis of a key into the next
_COLUMN_BITS = 6  # a column holds the voxels whose keys agree but for these lowest bits
COORDINATE_LIMIT = _HALF - _MARGIN
BATCH_LIMIT = 1 << (63 - 3 * _BITS)
ALONG_Z, ALONG_Y = (1, 2, 3), (1, 3, 2)  # a row's x, y, z from the highest bits of a key to the lowest
_SAMPLED = 16  # every so many slabs of x are asked which is better

_compile = numba.njit(cache=True, nogil=True)


class Columns(NamedTuple):
    """Distinct voxels, ascending; the rank of a voxel is its place in this order."""

    keys: Int64[np.ndarray, " C"]
    """Packed (batch, x, y, z // 64)."""
    bits: UInt64[np.ndarray, " C"]
    """Which of the 64 voxels are occupied; bit 0 is the lowest z."""
    first: Int32[np.ndarray, " C"]
    """Rank of each column's lowest voxel."""


def pack(coords: Int32[np.ndarray, "N 4"], axes: tuple[int, ...] = ALONG_Z) -> Int64[np.ndarray, " N"]:
    """Keys of (batch, x, y, z) rows; their order is the lexicographic order of the rows, or that along other axes."""
    key = coords[:, 0].astype(np.int64)
    for axis in axes:
        key = (key << _BITS) + (coords[:, axis] + _HALF)
    return key


def unpack(keys: Int64[np.ndarray, " N"], axes: tuple[int, ...] = ALONG_Z) -> Int32[np.ndarray, "N 4"]:
    """The (batch, x, y, z) rows of keys."""
    coords = np.empty((len(keys), 4), np.int32)
    for axis in reversed(axes):
        coords[:, axis] = (keys & ((1 << _BITS) - 1)) - _HALF
        keys = keys >> _BITS
    coords[:, 0] = keys
    return coords


def fewest(coords: Int32[np.ndarray, "N 4"]) -> tuple[int, ...]:
    """The axes that give the fewer columns: along y where a cloud is as flat as a floor.

    Not along x: pairs of neighbours would then be far apart in the rows of a voxelised cloud, where x comes first.
    """
    slabs = coords[coords[:, 1] % _SAMPLED == 0]
    return min((ALONG_Z, ALONG_Y), key=lambda axes: len(np.unique(pack(slabs, axes) >> _COLUMN_BITS)))


@intrinsic
@no_type_check
def _bit_count(typingctx, word):
    """Number of bits set in a uint64."""
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


@intrinsic
@no_type_check
def _lowest(typingctx, word):
    """Index of the lowest bit set in a uint64, which is not 0."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], context.get_constant(types.boolean, True))

    return types.uint64(types.uint64), codegen


@_compile
@no_type_check
def _below(word, bit):
    """How many bits of `word` are set below `bit`."""
    return np.int64(_bit_count(word & ((np.uint64(1) << np.uint64(bit)) - np.uint64(1))))


@_compile
@no_type_check
def _gather(keys):
    column, bits, first = np.empty(len(keys), np.int64), np.zeros(len(keys), np.uint64), np.empty(len(keys), np.int32)
    count = 0
    for i in range(len(keys)):
        key = keys[i] >> _COLUMN_BITS
        if count == 0 or column[count - 1] != key:
            column[count] = key
            first[count] = i
            count += 1
        bits[count - 1] |= np.uint64(1) << np.uint64(keys[i] & 63)
    return column[:count].copy(), bits[:count].copy(), first[:count].copy()


def gather(keys: Int64[np.ndarray, " N"]) -> Columns:
    """Columns of ascending, distinct voxel keys."""
    return Columns(*_gather(keys))


@_compile
@no_type_check
def _voxel_keys(keys, bits, num_voxels):
    voxels = np.empty(num_voxels, np.int64)
    rank = 0
    for column in range(len(keys)):
        left = bits[column]
        while left:
            voxels[rank] = (keys[column] << _COLUMN_BITS) + np.int64(_lowest(left))
            rank += 1
            left &= left - np.uint64(1)
    return voxels


def coordinates(voxels: Columns, axes: tuple[int, ...]) -> Int32[np.ndarray, "N 4"]:
    """(batch, x, y, z) of every voxel, by rank."""
    num_voxels = int(voxels.first[-1]) + int(voxels.bits[-1]).bit_count()
    return unpack(_voxel_keys(voxels.keys, voxels.bits, num_voxels), axes)


# ----------------------------------------------------------------------------------------------- odd kernels


@_compile
@no_type_check
def _meet(own, own_first, near, near_first, shift, rows, position, in_index, out_index):
    """Pairs of the voxels t of column `own` with the voxels t + shift of column `near`, from `position` on.

    With an empty `in_index` they are only counted. Returns the position after them.
    """
    meeting = own & (near >> np.uint64(shift) if shift >= 0 else near << np.uint64(-shift))
    if in_index.size == 0:
        return position + np.int64(_bit_count(meeting))
    while meeting:
        bit = np.int64(_lowest(meeting))
        in_index[position] = rows[near_first + _below(near, bit + shift)]
        out_index[position] = rows[own_first + _below(own, bit)]
        position += 1
        meeting &= meeting - np.uint64(1)
    return position


@_compile
@no_type_check
def neighbours(keys, bits, first, rows, radius, steps, position, in_index, out_index):
    """Pairs of an odd kernel over columns: `position[k]` advances by the number of pairs of offset k.

    `steps`: how much k grows with dy and with dz.

    With an empty `in_index` it only counts; otherwise pairs of `rows` (of each rank) are written as they are met. There
    is one pass with a cursor per dx of the kernel up to the centre's: the columns (x + dx, y - radius) to (x + dx, y +
    radius) follow each other. Pairs behind the centre are the same seen from the other side.
    """
    centre = radius * (1 + steps[0] + steps[1])
    row = _BITS - _COLUMN_BITS  # a step in y is 1 << row in keys of columns
    for dx in range(-radius, 1):
        start = position.copy()
        cursor = 0
        for column in range(len(keys)):
            beside = keys[column] + (np.int64(dx) << (_BITS + row))
            lowest = beside - (np.int64(radius) << row) - 1
            highest = beside + (np.int64(radius) << row) + 1 if dx < 0 else keys[column]
            while keys[cursor] < lowest:
                cursor += 1
            near = cursor
            while near < len(keys) and keys[near] <= highest:
                dy = (keys[near] - beside + 1) >> row
                part = keys[near] - beside - (dy << row)  # the near column is below, beside or above; or farther
                if part <= 1:
                    last = 0 if near == column else radius  # the voxel itself is the last of its own column
                    for dz in range(1 if part > 0 else -radius, (-1 if part < 0 else last) + 1):
                        k = centre + dx + steps[0] * dy + steps[1] * dz
                        position[k] = _meet(
                            bits[column],
                            first[column],
                            bits[near],
                            first[near],
                            dz - 64 * part,
                            rows,
                            position[k],
                            in_index,
                            out_index,
                        )
                near += 1
        for dy in range(-radius, radius + 1 if dx < 0 else 1):
            for dz in range(-radius, 0 if dx == 0 and dy == 0 else radius + 1):
                k = centre + dx + steps[0] * dy + steps[1] * dz
                mirror = 2 * centre - k
                count = position[k] - start[k]
                if in_index.size > 0:
                    source, target = start[k], position[mirror]
                    in_index[target : target + count] = out_index[source : source + count]
                    out_index[target : target + count] = in_index[source : source + count]
                position[mirror] += count


# -------------------------------------------------------------------------------------------------- stride 2


@_compile
@no_type_check
def _parent_keys(keys):
    """Key of the column that the parents (stride 2) of every column's voxels lie in."""
    parents = np.empty(len(keys), np.int64)
    low = (1 << _BITS) - 1
    for i in range(len(keys)):
        key = keys[i] << _COLUMN_BITS
        parent = key >> (3 * _BITS)
        for axis in range(2, -1, -1):
            parent = (parent << _BITS) + ((((key >> (axis * _BITS)) & low) + _HALF) >> 1)
        parents[i] = parent >> _COLUMN_BITS
    return parents


@_compile
@no_type_check
def _halved(word, upper):
    """A bit for each pair of bits of which one is set, in the lower or upper half of the word."""
    word = (word | (word >> np.uint64(1))) & np.uint64(0x5555555555555555)
    word = (word | (word >> np.uint64(1))) & np.uint64(0x3333333333333333)
    word = (word | (word >> np.uint64(2))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    word = (word | (word >> np.uint64(4))) & np.uint64(0x00FF00FF00FF00FF)
    word = (word | (word >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
    word = (word | (word >> np.uint64(16))) & np.uint64(0x00000000FFFFFFFF)
    return word << np.uint64(32 * upper)


@_compile
@no_type_check
def _merge(keys, bits, parent_keys, order):
    """Columns of the parents, and which of them each column belongs to; `order` sorts `parent_keys`."""
    column, merged = np.empty(len(keys), np.int64), np.zeros(len(keys), np.uint64)
    parent = np.empty(len(keys), np.int32)
    count = 0
    for i in order:
        if count == 0 or column[count - 1] != parent_keys[i]:
            column[count] = parent_keys[i]
            count += 1
        merged[count - 1] |= _halved(bits[i], keys[i] & 1)
        parent[i] = count - 1
    first = np.empty(count, np.int32)
    rank = 0
    for i in range(count):
        first[i] = rank
        rank += np.int64(_bit_count(merged[i]))
    return column[:count].copy(), merged[:count].copy(), first, parent


def coarsen(voxels: Columns) -> tuple[Columns, Int32[np.ndarray, " C"]]:
    """Columns of the voxels' parents, `floor(c / 2)`, and the parents' column of each column."""
    parent_keys = _parent_keys(voxels.keys)
    *parents, parent = _merge(voxels.keys, voxels.bits, parent_keys, np.argsort(parent_keys, kind="stable"))
    return Columns(*parents), parent


@_compile
@no_type_check
def children(keys, bits, rows, parent, parent_bits, parent_first, parent_rows, steps, position, in_index, out_index):
    """Pairs of the 2^3 stride-2 map, child to parent, from `position[k]` on for child k, which advances.

    `steps` are as in `neighbours`. With an empty `in_index` it only counts.
    """
    rank = 0
    for column in range(len(keys)):
        x, y, upper = keys[column] >> (2 * _BITS - _COLUMN_BITS), keys[column] >> (_BITS - _COLUMN_BITS), keys[column]
        left = bits[column]
        while left:
            bit = np.int64(_lowest(left))
            k = (x & 1) + steps[0] * (y & 1) + steps[1] * (bit & 1)
            if in_index.size > 0:
                above = parent[column]
                in_index[position[k]] = rows[rank]
                rank_above = parent_first[above] + _below(parent_bits[above], 32 * (upper & 1) + bit // 2)
                out_index[position[k]] = parent_rows[rank_above]
            position[k] += 1
            rank += 1
            left &= left - np.uint64(1)
