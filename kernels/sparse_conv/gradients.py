"""What implementations that read a map's pairs share: which side is read, and the two gradients of a convolution."""

import functools

import jax
import jax.numpy as jnp


def oriented(kernel_map, transposed):
    """Number of output rows; rows read and written [T, tile], offset [T] of every tile, live tiles []."""
    source, target, num_out = kernel_map.in_index, kernel_map.out_index, kernel_map.num_out
    if transposed:
        source, target, num_out = target, source, kernel_map.num_in
    return num_out, tuple(jnp.asarray(x) for x in (source, target, kernel_map.offset_index, kernel_map.num_tiles))


def differentiable(multiply, weight_gradient):
    """The convolution (num_out, features, weights, pairs) -> out with its gradients.

    Args:
        multiply: the convolution itself. Its gradient in the features is the same product with the sides of the map
            exchanged and the weights transposed.
        weight_gradient: of (features, gradient of out, pairs, kernel volume).
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def conv(num_out, features, weights, pairs):
        return multiply(num_out, features, weights, pairs)

    def forward(num_out, features, weights, pairs):
        return conv(num_out, features, weights, pairs), (features, weights, pairs)

    def backward(num_out, residuals, grad_out):
        features, weights, pairs = residuals
        source, target, *tiles = pairs
        grad_in = multiply(features.shape[0], grad_out, weights.swapaxes(1, 2), (target, source, *tiles))
        return grad_in, weight_gradient(features, grad_out, pairs, weights.shape[0]), None

    conv.defvjp(forward, backward)
    return conv
