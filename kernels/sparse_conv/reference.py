"""The definition of a sparse convolution, spelled out over all pairs; gradients are left to autodiff."""

import jax
import jax.numpy as jnp


def sparse_conv(features, weights, kernel_map, transposed):
    """See `api.sparse_conv`."""
    source, target, num_out = kernel_map.in_index, kernel_map.out_index, kernel_map.num_out
    if transposed:
        source, target, num_out = target, source, kernel_map.num_in
    wide = jnp.promote_types(features.dtype, jnp.float32)
    x = jnp.pad(features.astype(wide), ((0, 1), (0, 0)))[source]  # a padding pair reads the zero row
    w = weights.astype(wide)[kernel_map.offset_index]
    y = jnp.einsum("tpi,tio->tpo", x, w, precision="highest")
    out = jax.ops.segment_sum(y.reshape(-1, y.shape[-1]), jnp.ravel(target), num_out + 1)
    return out[:-1].astype(features.dtype)  # padding pairs add to the row past the end
