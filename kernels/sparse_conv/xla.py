"""Portable sparse convolution: gather, multiply, scatter-add, one tile of pairs at a time.

The pairs of a kernel map are sorted by offset, so a tile is one small dense product. The loop runs over the live
tiles alone: capacity that a cloud does not use costs nothing. The gradient in the features is the same loop with
the sides of the map exchanged and the weights transposed; the gradient in the weights adds one product per tile.
"""

import jax.numpy as jnp
from jax import lax

from kernels.precision import matmul_precision
from kernels.sparse_conv.gradients import differentiable, oriented

IN_BOUNDS = "promise_in_bounds"  # kernel maps point at rows 0..n, and every array read or written here has a row n


def sparse_conv(features, weights, kernel_map, transposed):
    """See `api.sparse_conv`."""
    num_out, pairs = oriented(kernel_map, transposed)
    return _conv(num_out, features, weights, pairs)


def _accumulator_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _dot(x, y):
    return jnp.dot(x, y, precision=matmul_precision(), preferred_element_type=_accumulator_dtype(x))


def _gather_multiply_scatter(num_out, features, weights, pairs):
    source, target, offset, num_tiles = pairs
    # Rows that fill vector registers: on a CPU, 3 channels cost up to 3 times what 4 do.
    extra = -features.shape[1] % 4 if features.shape[1] > 1 else 0
    x = jnp.pad(features, ((0, 1), (0, extra)))
    w = jnp.pad(weights, ((0, 0), (0, extra), (0, 0)))

    def body(t, out):
        y = _dot(x.at[source[t]].get(mode=IN_BOUNDS), w[offset[t]])
        return out.at[target[t]].add(y, mode=IN_BOUNDS)

    out = lax.fori_loop(0, num_tiles, body, jnp.zeros((num_out + 1, weights.shape[2]), _accumulator_dtype(features)))
    return out[:-1].astype(features.dtype)


def _weight_gradient(features, grad_out, pairs, kernel_volume):
    source, target, offset, num_tiles = pairs
    x, dy = (jnp.pad(rows, ((0, 1), (0, 0))) for rows in (features, grad_out))

    def body(t, grad):
        x_t, dy_t = x.at[source[t]].get(mode=IN_BOUNDS), dy.at[target[t]].get(mode=IN_BOUNDS)
        return grad.at[offset[t]].add(_dot(x_t.T, dy_t))

    grad = jnp.zeros((kernel_volume, features.shape[1], grad_out.shape[1]), _accumulator_dtype(features))
    return lax.fori_loop(0, num_tiles, body, grad).astype(features.dtype)


_conv = differentiable(_gather_multiply_scatter, _weight_gradient)
