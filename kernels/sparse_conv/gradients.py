"""What the fast implementations share: which side of a map is read, and the gradients of a convolution."""

import functools

import jax
import jax.numpy as jnp


def oriented(kernel_map, transposed):
    """Number of output rows; rows read and written [T, tile], offset [T] of every tile, live tiles []."""
    source, target, num_out = kernel_map.in_index, kernel_map.out_index, kernel_map.num_out
    if transposed:
        source, target, num_out = target, source, kernel_map.num_in
    return num_out, tuple(jnp.asarray(x) for x in (source, target, kernel_map.offset_index, kernel_map.num_tiles))


def exchanged(weights, pairs):
    """Weights and pairs of the convolution that leads back: its sides exchanged, every matrix transposed."""
    source, target, *tiles = pairs
    return weights.swapaxes(1, 2), (target, source, *tiles)


def differentiable(multiply, weight_gradient, back=exchanged):
    """The convolution (num_out, features, weights, pairs) -> out with its gradients, and theirs.

    A convolution is linear in features and in weights. So its gradient in the features is a convolution, and those of
    its gradient in the weights are two more.

    Args:
        multiply: the convolution itself.
        weight_gradient: of (features, gradient of out, pairs, kernel volume).
        back: of (weights, pairs), those of the convolution that leads back.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def conv(num_out, features, weights, pairs):
        return multiply(num_out, features, weights, pairs)

    def conv_forward(num_out, features, weights, pairs):
        return conv(num_out, features, weights, pairs), (features, weights, pairs)

    def conv_backward(num_out, residuals, grad_out):
        features, weights, pairs = residuals
        grad_in = conv(features.shape[0], grad_out, *back(weights, pairs))
        return grad_in, outer(weights.shape[0], features, grad_out, pairs), None

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def outer(volume, features, grad_out, pairs):
        return weight_gradient(features, grad_out, pairs, volume)

    def outer_forward(volume, features, grad_out, pairs):
        return outer(volume, features, grad_out, pairs), (features, grad_out, pairs)

    def outer_backward(volume, residuals, grad):
        features, grad_out, pairs = residuals
        grad_features = conv(features.shape[0], grad_out, *back(grad, pairs))
        return grad_features, conv(grad_out.shape[0], features, grad, pairs), None

    conv.defvjp(conv_forward, conv_backward)
    outer.defvjp(outer_forward, outer_backward)
    return conv
