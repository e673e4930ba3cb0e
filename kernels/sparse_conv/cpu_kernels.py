"""The loops of the sparse convolution on a CPU, and the register tile under them.

Both custom calls are sums of products of a few rows by a few columns, `ROWS` x `COLUMNS` of them kept in registers
while the depth runs by. The convolution takes its rows straight from the features and adds them straight to the
output: nothing is gathered or scattered in between. Its chunks are shares of the output, those of the weight gradient
are kernel offsets, so no two threads write the same number, and the order of every sum is fixed: the same input gives
the same bits on any number of threads.
"""

from typing import no_type_check

import llvmlite.ir
import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

from kernels.sparse_conv import custom_call
from kernels.sparse_conv.custom_call import argument, array_at, result

ROWS, COLUMNS = 6, 16  # as many sums as the 16 vector registers of AVX2 hold, beside what is added to them
# What is used again for every panel of columns, in float32 numbers: half of a second-level cache of 256 kB.
_BLOCK_NUMBERS = 1 << 15
_ROWS_PER_CHUNK = 512  # fewer cost more in reading the weights again than they win

_compile = numba.njit(cache=True)
_compile_chunk = numba.cfunc("void(intp, int64, int64)", cache=True)


@intrinsic
@no_type_check
def _add_products(typingctx, sources, stride, weights, depth, targets, shift):
    """target[r][c] += sum over d of source[r][d] * weights[d, c], for ROWS rows and COLUMNS columns of float32.

    `sources` and `targets` are addresses of ROWS addresses; a source's numbers lie `stride` bytes apart; `shift` bytes
    are added to every target's address; `weights` is the address of [depth, COLUMNS].
    """

    def codegen(context, builder, signature, args):
        sources, stride, weights, depth, targets, shift = args
        i64, f32 = llvmlite.ir.IntType(64), llvmlite.ir.FloatType()
        vector = llvmlite.ir.VectorType(f32, COLUMNS)
        lanes = llvmlite.ir.Constant(llvmlite.ir.VectorType(llvmlite.ir.IntType(32), COLUMNS), [0] * COLUMNS)
        undefined = llvmlite.ir.Constant(vector, llvmlite.ir.Undefined)

        multiply_add = cgutils.get_or_insert_function(
            builder.module,
            llvmlite.ir.FunctionType(vector, [vector] * 3),
            f"llvm.fmuladd.v{COLUMNS}f32",
        )

        def load(kind, address):
            loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
            loaded.align = 4
            return loaded

        def rows_at(table):
            table = builder.inttoptr(table, i64.as_pointer())
            return [builder.load(builder.gep(table, [i64(r)])) for r in range(ROWS)]

        rows = rows_at(sources)
        byte = llvmlite.ir.IntType(8).as_pointer()
        i32 = llvmlite.ir.IntType(32)
        prefetch = cgutils.get_or_insert_function(
            builder.module,
            llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), [byte, i32, i32, i32]),
            "llvm.prefetch.p0i8",
        )
        out_rows = [builder.add(target, shift) for target in rows_at(targets)]
        for address in out_rows:
            builder.call(prefetch, [builder.inttoptr(address, byte), i32(1), i32(3), i32(1)])
        before = builder.block
        body, after = builder.append_basic_block("depth"), builder.append_basic_block("write")
        builder.branch(body)
        builder.position_at_end(body)
        step, offset = builder.phi(i64), builder.phi(i64)
        sums = [builder.phi(vector) for _ in range(ROWS)]
        line = load(vector, builder.add(weights, builder.mul(step, i64(4 * COLUMNS))))
        added = []
        for row, total in zip(rows, sums, strict=True):
            number = load(f32, builder.add(row, offset))
            number = builder.shuffle_vector(builder.insert_element(undefined, number, i64(0)), undefined, lanes)
            added.append(builder.call(multiply_add, [number, line, total]))
        next_step, next_offset = builder.add(step, i64(1)), builder.add(offset, stride)
        for phi, first, later in (
            (step, i64(0), next_step),
            (offset, i64(0), next_offset),
            *((total, llvmlite.ir.Constant(vector, None), new) for total, new in zip(sums, added, strict=True)),
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(later, body)
        builder.cbranch(builder.icmp_signed("<", next_step, depth), body, after)
        builder.position_at_end(after)
        for address, total in zip(out_rows, added, strict=True):
            stored = builder.store(
                builder.fadd(load(vector, address), total), builder.inttoptr(address, vector.as_pointer())
            )
            stored.align = 4
        return context.get_dummy_value()

    return types.void(types.intp, types.int64, types.intp, types.int64, types.intp, types.int64), codegen


@_compile
@no_type_check
def _pairs(frame):
    """Arguments 2 to 5 of both calls: the pairs of a kernel map."""
    source_at, shape = argument(frame, 2)
    tiles = shape[0], shape[1]
    source, target = array_at(source_at, tiles, np.int32), array_at(argument(frame, 3)[0], tiles, np.int32)
    offset = array_at(argument(frame, 4)[0], (tiles[0],), np.int32)
    return source, target, offset, array_at(argument(frame, 5)[0], (1,), np.int32)[0]


@_compile
@no_type_check
def _copy(source, target):
    for i in range(len(source)):
        target[i] = source[i]


@_compile_chunk
@no_type_check
def _convolve(frame, chunk, chunks):
    """out[target] = sum of features[source] @ weights[offset], for the chunk's share of the output.

    Arguments: features [N, Cin], weights [K, Cout / COLUMNS, Cin, COLUMNS], source and target [T, tile], offset [T],
    num_tiles [], and the lowest and highest target [T] of every tile, padding left out. Result: out [M, Cout].
    """
    features, depth = argument(frame, 0)[0], argument(frame, 0)[1][1]
    weights = argument(frame, 1)[0]
    source, target, offset, num_tiles = _pairs(frame)
    lowest = array_at(argument(frame, 6)[0], (len(offset),), np.int32)
    highest = array_at(argument(frame, 7)[0], (len(offset),), np.int32)
    out_at, out_shape = result(frame, 0)
    num_out, width = out_shape[0], out_shape[1]

    # Chunks share the rows that have a pair; where these are few, and reading weights is what takes time, the columns.
    rows = max(0, highest[:num_tiles].max() + 1) if num_tiles else 0
    row_shares = min(chunks, max(1, rows // _ROWS_PER_CHUNK))
    column_shares = min(chunks // row_shares, width // COLUMNS)
    if chunk >= row_shares * column_shares:
        return
    share, column_share = chunk % row_shares, chunk // row_shares
    begin = share * rows // row_shares
    end = (share + 1) * rows // row_shares if share < row_shares - 1 else num_out
    panels = width // COLUMNS
    columns = range(
        column_share * panels // column_shares * COLUMNS,
        (column_share + 1) * panels // column_shares * COLUMNS,
        COLUMNS,
    )
    array_at(out_at, (num_out, width), np.float32)[begin:end, columns.start : columns.stop] = 0

    tile = source.shape[1]
    rows_in, rows_out = np.empty(tile + ROWS, np.int64), np.empty(tile + ROWS, np.int64)
    nowhere = np.zeros(width, np.float32)
    block = max(1, _BLOCK_NUMBERS // (ROWS * depth)) * ROWS
    for t in range(num_tiles):
        if lowest[t] >= end or highest[t] < begin:
            continue
        count = 0
        for p in range(tile):
            row = target[t, p]
            rows_in[count] = features + 4 * depth * source[t, p]
            rows_out[count] = out_at + 4 * width * row
            count += begin <= row and row < min(end, rows)
        for spare in range(count, count + ROWS - 1):  # the last group of rows may lack some
            rows_in[spare], rows_out[spare] = features, nowhere.ctypes.data
        of_offset = weights + 4 * offset[t] * depth * width
        for first in range(0, count, block):
            for column in columns:
                for p in range(first, min(first + block, count), ROWS):
                    _add_products(
                        rows_in.ctypes.data + 8 * p,
                        4,
                        of_offset + 4 * column * depth,
                        depth,
                        rows_out.ctypes.data + 8 * p,
                        4 * column,
                    )


@_compile_chunk
@no_type_check
def _weight_gradient(frame, chunk, chunks):
    """out[offset] = sum of outer(features[source], grad_out[target]), for the chunk's share of the offsets.

    Arguments: features [N, Cin], grad_out [M, Cout], source and target [T, tile], offset [T], num_tiles []. Result: out
    [K, Cin, Cout], channels rounded up to multiples of ROWS and COLUMNS.
    """
    features_at, features_shape = argument(frame, 0)
    features = array_at(features_at, (features_shape[0], features_shape[1]), np.float32)
    grad_at, grad_shape = argument(frame, 1)
    grad_out = array_at(grad_at, (grad_shape[0], grad_shape[1]), np.float32)
    source, target, offset, num_tiles = _pairs(frame)
    out_at, out_shape = result(frame, 0)
    volume, height, width = out_shape[0], out_shape[1], out_shape[2]
    out = array_at(out_at, (volume, height, width), np.float32)
    begin, end = chunk * volume // chunks, (chunk + 1) * volume // chunks
    out[begin:end] = 0

    block = max(1, _BLOCK_NUMBERS // (height + width))
    x = np.zeros((block, height + COLUMNS), np.float32)  # wider than needed: powers of two share few cache lines
    dy = np.zeros((width // COLUMNS, block, COLUMNS), np.float32)
    rows_in, rows_out = np.empty(ROWS, np.int64), np.empty(ROWS, np.int64)
    for t in range(num_tiles):
        if not begin <= offset[t] < end:
            continue
        for first in range(0, source.shape[1], block):
            depth = 0
            for p in range(first, min(first + block, source.shape[1])):
                if target[t, p] >= len(grad_out):  # padding
                    continue
                _copy(features[source[t, p]], x[depth])
                for panel in range(width // COLUMNS):
                    _copy(grad_out[target[t, p], panel * COLUMNS : (panel + 1) * COLUMNS], dy[panel, depth])
                depth += 1
            if depth == 0:
                continue
            for row in range(0, height, ROWS):
                for r in range(ROWS):
                    rows_in[r] = x.ctypes.data + 4 * (row + r)
                    rows_out[r] = out_at + 4 * width * (offset[t] * height + row + r)
                for column in range(0, width, COLUMNS):
                    _add_products(
                        rows_in.ctypes.data,
                        x.strides[0],
                        dy.ctypes.data + 4 * column * block,
                        depth,
                        rows_out.ctypes.data,
                        4 * column,
                    )


CONVOLUTION, WEIGHT_GRADIENT = "ggsd_jax.sparse_conv", "ggsd_jax.sparse_conv_weight_gradient"
custom_call.register(CONVOLUTION, _convolve)
custom_call.register(WEIGHT_GRADIENT, _weight_gradient)
