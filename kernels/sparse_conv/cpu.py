"""Sparse convolution on CPUs: custom calls compiled by numba (`cpu_kernels.py`), and their gradients.

Reads the same pairs as `xla.py`. Each of the three products of a convolution and its gradients is one call, on as many
threads as there are cores for every device of this process.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np

from kernels.sparse_conv.cpu_kernels import COLUMNS, CONVOLUTION, ROWS, WEIGHT_GRADIENT
from kernels.sparse_conv.gradients import differentiable, oriented
from kernels.sparse_conv.target import default_target

_ROWS_IN_CACHE = 4096  # of the output: all offsets add to these before the next, so that what they read stays near


def unsupported(dtype) -> str | None:
    """Why features of this dtype cannot be convolved here; None if they can."""
    if default_target() != "cpu":
        return f"it needs a CPU, and the default device is {default_target()}"
    if jnp.dtype(dtype) != jnp.float32:
        return f"it computes in float32, and the features are {jnp.dtype(dtype).name}"
    return None


def sparse_conv(features, weights, kernel_map, transposed):
    """See `api.sparse_conv`."""
    num_out, pairs = oriented(kernel_map, transposed)
    return _conv(num_out, features, weights, pairs)


def _threads() -> int:
    return max(1, (os.cpu_count() or 1) // jax.local_device_count())


def _multiply(num_out, features, weights, pairs):
    volume, depth, width = weights.shape
    panels = jnp.pad(weights, ((0, 0), (0, 0), (0, -width % COLUMNS)))
    panels = panels.reshape(volume, depth, -1, COLUMNS).swapaxes(1, 2)
    out = jax.ShapeDtypeStruct((num_out, panels.shape[1] * COLUMNS), jnp.float32)
    target = pairs[1]
    lowest, highest = target.min(1), jnp.where(target < num_out, target, -1).max(1)  # once for all layers of a map
    threads = _threads()
    chunks = np.int64(max(4 * threads if threads > 1 else 1, num_out // _ROWS_IN_CACHE))
    call = jax.ffi.ffi_call(CONVOLUTION, out, vmap_method="sequential")
    return call(features, panels, *pairs, lowest, highest, chunks=chunks)[:, :width]


def _weight_gradient(features, grad_out, pairs, volume):
    depth, width = features.shape[1], grad_out.shape[1]
    out = jax.ShapeDtypeStruct((volume, depth + -depth % ROWS, width + -width % COLUMNS), jnp.float32)
    chunks = np.int64(volume if _threads() > 1 else 1)
    call = jax.ffi.ffi_call(WEIGHT_GRADIENT, out, vmap_method="sequential")
    return call(features, grad_out, *pairs, chunks=chunks)[:, :depth, :width]


_conv = differentiable(_multiply, _weight_gradient)
