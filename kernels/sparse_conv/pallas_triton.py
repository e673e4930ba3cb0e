"""Sparse convolution for NVIDIA GPUs of compute capability 8.0 and above: Pallas kernels, compiled by Triton.

An implicit GEMM, stationary in the output. Output rows are sorted by the sides on which they have neighbours, so that
the rows of a tile share most offsets; each tile visits its live offsets alone, gathers one input row per output row and
adds one dense product (the design of spconv 2 and TorchSparse++, arXiv 2311.12862). The gradient in the features is
the same kernel on the map seen from its other side. For the gradient in the weights, programs take equal shares of the
pairs, each of one offset, and a second kernel adds up what they found. Sums are float32 and nothing is atomic: the
same input gives the same bits.

The tiles are derived from the map's pairs on the device. All convolutions over a map ask for the same ones, and
under jit the compiler computes them once.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import triton as plgpu

from kernels.sparse_conv import tuning
from kernels.sparse_conv.epilogue import Epilogue
from kernels.sparse_conv.gradients import differentiable, exchanged, oriented
from kernels.sparse_conv.target import INTERPRET, default_target
from kernels.sparse_conv.tuning import Blocks

_DTYPES = ("float32", "bfloat16", "float16")
_CHANNELS = 16  # least width of a matrix product in Triton; channels are padded to multiples of it
_MOST_ELEMENTS = 2**31 - 1  # of an array: the kernels' indices are int32
_WEIGHT_PROGRAMS = 512  # programs the gradient in the weights is cut into, about: four for each of 132 processors
_ROWS, _COLUMNS = 8, 256  # of these programs' results, which are read at once to be added up


class _Plan(NamedTuple):
    """How a kernel is launched."""

    blocks: Blocks
    precision: lax.Precision
    interpret: bool


class _RowTiles(NamedTuple):
    """Output rows in T tiles of R, and the inputs they read under each of the K offsets."""

    count: jax.Array  # int32 [T]: offsets under which some row of the tile has a neighbour
    offset: jax.Array  # int32 [T, K]: those offsets; what follows is not read
    index: jax.Array  # int32 [T, K, R]: input row under the j-th offset of the tile, num_in for none
    order: jax.Array  # int32 [T * R]: output row, num_out or more past the end


def unsupported(dtype) -> str | None:
    """Why features of this dtype cannot be convolved here; None if they can."""
    target = default_target()
    if target != INTERPRET and not (target.startswith("sm_") and int(target[3:]) >= 80):
        return f"it needs an NVIDIA GPU of compute capability 8.0 or above, and the default device is {target}"
    if jnp.dtype(dtype).name not in _DTYPES:
        return f"it computes in {', '.join(_DTYPES)}, and the features are {jnp.dtype(dtype).name}"
    return None


def sparse_conv(features, weights, kernel_map, transposed, epilogue=None):
    """See `api.sparse_conv`."""
    num_out, pairs = oriented(kernel_map, transposed)
    if epilogue is None:
        return _conv(num_out, features, weights, pairs)
    return _conv_and_epilogue(num_out, features, weights, pairs, epilogue)


def _plan(kernel: str, channels_in: int, channels_out: int, volume: int, dtype) -> _Plan:
    arch, dtype = default_target(), jnp.dtype(dtype).name
    precision = lax.Precision.HIGHEST  # of float32 operands; others are taken as they are
    if dtype == "float32" and jax.config.jax_default_matmul_precision == "tensorfloat32":
        precision, dtype = lax.Precision.HIGH, "tensorfloat32"
    key = tuning.Key(kernel, channels_in, channels_out, round(volume ** (1 / 3)), dtype, arch)
    return _Plan(tuning.lookup(key), precision, arch == INTERPRET)


# ------------------------------------------------------------------------------------------------- row tiles


def _sides(kernel_volume: int) -> np.ndarray:
    """int32 [K]: on which sides of its row each offset lies, as 30 bits.

    The high bits are the half-spaces below and above in z, y and x; the others the quadrants and half-lines of the
    planes (y, x), (z, x) and (z, y). Rows on one kind of surface have these alike, whatever single offsets they have.
    """
    size = round(kernel_volume ** (1 / 3))
    place = np.stack(np.unravel_index(np.arange(kernel_volume), (size, size, size)))
    z, y, x = np.sign(2 * place - (size - 1))
    bits = [axis == side for axis in (z, y, x) for side in (-1, 1)]
    for a, b in ((y, x), (z, x), (z, y)):
        bits += [(a == u) & (b == v) for u, v in itertools.product((-1, 0, 1), repeat=2) if (u, v) != (0, 0)]
    return (np.int32(1) << np.arange(len(bits), dtype=np.int32)[::-1]) @ np.array(bits, np.int32)


@functools.partial(jax.jit, static_argnames=("kernel_volume", "num_in", "num_out", "rows"))
def _row_tiles(pairs, *, kernel_volume: int, num_in: int, num_out: int, rows: int) -> _RowTiles:
    source, target, offset, _ = pairs
    padded = tuning.MOST_ROWS * (num_out // tuning.MOST_ROWS + 1)  # for tiles of any size; more than num_out
    place = offset[:, None] * padded + target  # padding pairs (num_in, num_out) say of a row that there is not: none
    neighbour = jnp.full(kernel_volume * padded, num_in, jnp.int32).at[place].set(source, mode="drop")
    has = neighbour.reshape(kernel_volume, padded) < num_in

    key = jnp.bitwise_or.reduce(jnp.where(has, _sides(kernel_volume)[:, None], 0), axis=0)
    for shift in (1, 2, 4, 8, 16):  # to its place among Gray codes, where neighbours differ in one bit
        key ^= key >> shift
    _, order = lax.sort((~key, jnp.arange(padded, dtype=jnp.int32)), num_keys=1)  # rows that there are not are last

    tiles = padded // rows
    live = has[:, order].reshape(kernel_volume, tiles, rows).any(axis=2).T
    k = jnp.arange(kernel_volume, dtype=jnp.int32)
    slot = jnp.where(live, jnp.cumsum(live, axis=1, dtype=jnp.int32) - 1, kernel_volume)
    offset = jnp.where(slot[:, None, :] == k[None, :, None], k, 0).sum(2, dtype=jnp.int32)
    place = offset[:, :, None] * padded + order.reshape(tiles, 1, rows)
    return _RowTiles(live.sum(1, dtype=jnp.int32), offset, neighbour.at[place].get(mode="promise_in_bounds"), order)


# --------------------------------------------------------------------------------------------------- kernels


def _groups(channels: int, most: int) -> tuple[int, int]:
    """Into how many groups of which width, at most `most`, channels are split; what is over is padding."""
    groups = pl.cdiv(channels, most)
    return groups, _CHANNELS * pl.cdiv(channels, _CHANNELS * groups)


def _powers(width: int) -> list[tuple[int, int]]:
    """(start, size) of the powers of two that make up a width, as Triton's blocks must be: 96 = 64 + 32."""
    parts, start = [], 0
    while start < width:
        size = 1 << (width - start).bit_length() - 1
        parts.append((start, size))
        start += size
    return parts


def _pad_channels(x, *widths: int):
    """Pad the last axes of x to these widths."""
    kept = x.ndim - len(widths)
    return jnp.pad(x, [(0, 0)] * kept + [(0, w - c) for w, c in zip(widths, x.shape[kept:], strict=True)])


def _gather(ref, rows, first, width: int):
    """Columns `first`, ..., `first + width - 1` of some rows; zeros for a row past the end."""
    columns = first + jnp.arange(width, dtype=jnp.int32)
    return plgpu.load(ref.at[rows[:, None], columns[None, :]], mask=(rows < ref.shape[0])[:, None], other=0.0)


def _call(kernel, grid, out, plan: _Plan, name: str, *arguments):
    for array in (*arguments, out):
        if array.size > _MOST_ELEMENTS:
            raise ValueError(
                f"{name} would need an array of shape {list(array.shape)}, and the Triton kernels count elements in 32 "
                "bits: convolve fewer voxels at once, or use implementation='xla'"
            )
    params = plgpu.CompilerParams(num_warps=plan.blocks.warps, num_stages=plan.blocks.stages)
    call = pl.pallas_call(kernel, grid=grid, out_shape=out, compiler_params=params, interpret=plan.interpret, name=name)
    return call(*arguments)


def _convolve(num_out: int, features, weights, pairs, epilogue: Epilogue | None = None):
    """Sum over the pairs (i, j, k) of `features[i] @ weights[k]`, for every j; what the epilogue makes of it."""
    volume, channels_in, channels_out = weights.shape
    plan = _plan("conv", channels_in, channels_out, volume, weights.dtype)
    blocks = plan.blocks
    tiles = _row_tiles(pairs, kernel_volume=volume, num_in=features.shape[0], num_out=num_out, rows=blocks.rows)
    groups, width = _groups(channels_out, blocks.outputs)
    padded_in = _CHANNELS * pl.cdiv(channels_in, _CHANNELS)
    step = min(blocks.inputs, padded_in & -padded_in)  # a power of two that divides
    steps = padded_in // step
    parts = _powers(width)

    def kernel(count_ref, offset_ref, index_ref, order_ref, x_ref, w_ref, *more_refs):
        *epilogue_refs, out_ref = more_refs
        tile, column = pl.program_id(0), pl.program_id(1) * width

        def add_product(t, sums):
            j, channel = lax.div(t, jnp.int32(steps)), lax.rem(t, jnp.int32(steps)) * step
            k = offset_ref[tile, j]
            x = _gather(x_ref, index_ref[tile, j, :], channel, step)
            return tuple(
                s + plgpu.dot(x, w_ref[k, pl.ds(channel, step), pl.ds(column + start, size)], precision=plan.precision)
                for s, (start, size) in zip(sums, parts, strict=True)
            )

        zeros = tuple(jnp.zeros((blocks.rows, size), jnp.float32) for _, size in parts)
        sums = lax.fori_loop(0, count_ref[tile] * steps, add_product, zeros)
        rows = order_ref[pl.ds(tile * blocks.rows, blocks.rows)]
        for s, (start, size) in zip(sums, parts, strict=True):
            columns = column + start + jnp.arange(size, dtype=jnp.int32)
            if epilogue_refs:
                s = _finish(s, rows, columns, num_out, channels_out, *epilogue_refs)
            target = out_ref.at[rows[:, None], columns[None, :]]
            plgpu.store(target, s.astype(out_ref.dtype), mask=(rows < num_out)[:, None])

    x = _pad_channels(features, padded_in)
    w = _pad_channels(weights, padded_in, groups * width)
    out = jax.ShapeDtypeStruct((num_out, groups * width), features.dtype)
    grid = tiles.count.size, groups
    more = []
    if epilogue is not None:
        more = [_pad_channels(v.astype(jnp.float32), groups * width) for v in epilogue[:3]]
        more += [epilogue.keep.astype(jnp.int32)] + ([] if epilogue.residual is None else [epilogue.residual])
    return _call(kernel, grid, out, plan, "sparse_conv", *tiles, x, w, *more)[:, :channels_out]


def _finish(sums, rows, columns, num_out: int, channels: int, *refs):
    """The epilogue of some rows and columns of the sums."""
    *of_channels, keep_ref, residual_ref = refs if len(refs) == 5 else (*refs, None)
    mean, scale, bias = (plgpu.load(ref.at[columns])[None, :] for ref in of_channels)
    there = rows < num_out
    out = (sums - mean) * scale + bias
    if residual_ref is not None:
        mask = there[:, None] & (columns < channels)[None, :]
        residual = plgpu.load(residual_ref.at[rows[:, None], columns[None, :]], mask=mask, other=0.0)
        out += residual.astype(jnp.float32)
    keep = plgpu.load(keep_ref.at[rows], mask=there, other=0)
    out = jnp.where(out < 0.0, 0.0, out)  # Triton's maximum would hide a NaN
    return jnp.where((keep != 0)[:, None], out, 0.0)


def _shares(end_of_offset, programs: int):
    """Shares chunks of pairs out among programs, as equally as each keeps to one offset.

    Args:
        end_of_offset: int32 [K], one past the last chunk of an offset; those of the next follow.
        programs: more than K.
    Returns:
        begin, end: int32 [programs], the chunks of a program; none where end <= begin.
        first, last: int32 [K], the programs of an offset, `last` not among them.
    """
    begin_of_offset = jnp.pad(end_of_offset[:-1], (1, 0))
    share = jnp.maximum(pl.cdiv(end_of_offset[-1], jnp.int32(programs - end_of_offset.size)), 1)
    number = pl.cdiv(end_of_offset - begin_of_offset, share)
    last = jnp.cumsum(number, dtype=jnp.int32)
    first = last - number
    program = jnp.arange(programs, dtype=jnp.int32)
    k = jnp.minimum((last[None, :] <= program[:, None]).sum(1, dtype=jnp.int32), last.size - 1)
    begin = begin_of_offset[k] + (program - first[k]) * share
    return begin, jnp.minimum(begin + share, end_of_offset[k]), first, last


def _weight_gradient(features, grad_out, pairs, volume: int):
    """Sum over the pairs (i, j, k) of the outer product of `features[i]` and `grad_out[j]`, for every k."""
    source, target, offset, num_tiles = pairs
    channels = features.shape[1], grad_out.shape[1]
    plan = _plan("weight_gradient", *channels, volume, features.dtype)
    blocks = plan.blocks
    (groups_in, width_in), (groups_out, width_out) = map(_groups, channels, (blocks.inputs, blocks.outputs))
    parts_in, parts_out = _powers(width_in), _powers(width_out)
    chunk = min(blocks.rows, source.shape[1])
    k, tile = jnp.arange(volume, dtype=jnp.int32), jnp.arange(offset.size, dtype=jnp.int32)
    upto = (offset[None, :] <= k[:, None]) & (tile < num_tiles)[None, :]
    end_of_offset = upto.sum(1, dtype=jnp.int32) * (source.shape[1] // chunk)
    programs = max(pl.cdiv(_WEIGHT_PROGRAMS, groups_in * groups_out), 2 * volume)
    begin, end, first, last = _shares(end_of_offset, programs)

    def kernel(begin_ref, end_ref, source_ref, target_ref, x_ref, dy_ref, out_ref):
        program, i, j = pl.program_id(0), pl.program_id(1) * width_in, pl.program_id(2) * width_out

        def add_products(t, sums):
            sources, targets = source_ref[t, :], target_ref[t, :]
            x = [_gather(x_ref, sources, i + start, size) for start, size in parts_in]
            dy = [_gather(dy_ref, targets, j + start, size) for start, size in parts_out]
            return tuple(
                tuple(s + plgpu.dot(a.T, b, precision=plan.precision) for s, b in zip(row, dy, strict=True))
                for row, a in zip(sums, x, strict=True)
            )

        zeros = tuple(tuple(jnp.zeros((m, n), jnp.float32) for _, n in parts_out) for _, m in parts_in)
        sums = lax.fori_loop(begin_ref[program], end_ref[program], add_products, zeros)
        for row, (a, m) in zip(sums, parts_in, strict=True):
            for s, (b, n) in zip(row, parts_out, strict=True):
                out_ref[program, pl.ds(i + a, m), pl.ds(j + b, n)] = s

    x, dy = _pad_channels(features, groups_in * width_in), _pad_channels(grad_out, groups_out * width_out)
    out = jax.ShapeDtypeStruct((programs, x.shape[1], dy.shape[1]), jnp.float32)
    arguments = begin, end, source.reshape(-1, chunk), target.reshape(-1, chunk), x, dy
    grid = programs, groups_in, groups_out
    parts = _call(kernel, grid, out, plan, "sparse_conv_weight_gradient", *arguments)
    return _add_up(parts, first, last, plan)[:, : channels[0], : channels[1]].astype(features.dtype)


def _add_up(parts, first, last, plan: _Plan):
    """[K, Cin, Cout]: for each offset k the sum of the parts `first[k]`, ..., `last[k] - 1`."""

    def kernel(first_ref, last_ref, parts_ref, out_ref):
        k, column = pl.program_id(0), pl.program_id(1) * _COLUMNS
        first, last = first_ref[k], last_ref[k]

        def add(t, total):
            for row in (first + t * _ROWS + r for r in range(_ROWS)):  # loads that wait for none of the others
                part = parts_ref.at[row, column + jnp.arange(_COLUMNS, dtype=jnp.int32)]
                total += plgpu.load(part, mask=jnp.full(_COLUMNS, row < last), other=0.0)
            return total

        rounds = lax.div(last - first + _ROWS - 1, jnp.int32(_ROWS))
        out_ref[k, pl.ds(column, _COLUMNS)] = lax.fori_loop(0, rounds, add, jnp.zeros(_COLUMNS, jnp.float32))

    rows = parts.reshape(parts.shape[0], -1)
    out = jax.ShapeDtypeStruct((first.size, rows.shape[1]), jnp.float32)
    grid = first.size, rows.shape[1] // _COLUMNS
    sums = _call(kernel, grid, out, plan, "sparse_conv_weight_gradient_sum", first, last, rows)
    return sums.reshape(first.size, *parts.shape[1:])


# -------------------------------------------------------------------------------------------------- gradient


def _back(weights, pairs):
    """As `gradients.exchanged`; with stride 1, by the same pairs, so that the row tiles serve again.

    There, with (i, j, k) there is (j, i, K - 1 - k).
    """
    # Else XLA lays the weights out transposed, which makes this free, and copies them and the optimizer's state for it.
    weights = with_layout_constraint(weights, Layout(major_to_minor=(0, 1, 2)))
    if weights.shape[0] % 2:
        return weights[::-1].swapaxes(1, 2), pairs
    return exchanged(weights, pairs)


_conv = differentiable(_convolve, _weight_gradient, _back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv_and_epilogue(num_out, features, weights, pairs, epilogue):
    return _convolve(num_out, features, weights, pairs, epilogue)


def _in_two_passes(num_out, features, weights, pairs, epilogue):
    """The output, and the function that takes its gradient back: that needs the rows before the epilogue."""
    return jax.vjp(lambda x, w, end: end(_conv(num_out, x, w, pairs)), features, weights, epilogue)


def _take_back(num_out, back, grad_out):
    features, weights, epilogue = back(grad_out)
    return features, weights, None, epilogue


_conv_and_epilogue.defvjp(_in_two_passes, _take_back)
