"""The sparse 3D U-Nets MinkUNet14/18/34, as MinkowskiEngine's examples define them and OpenScene trains them.

Five levels of voxels, tensor stride 1 to 16; two 3^3 convolutions per residual block; 2^3 convolutions of
stride 2 lead down and, transposed, up again. No convolution has a bias. Parameter names and kernel layouts
are MinkowskiEngine's, so that its checkpoints only need renaming (`openscene.py`).
"""

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from kernels.precision import matmul_precision
from kernels.sparse_conv import Epilogue, sparse_conv
from kernels.voxel_grid import KernelMap, Pyramid, build_pyramid

# Residual blocks and widths of the eight stages, from MinkowskiEngine's examples/minkunet.py
# and OpenScene's models/mink_unet.py
LAYERS = {
    "MinkUNet14": (1, 1, 1, 1, 1, 1, 1, 1),
    "MinkUNet18": (2, 2, 2, 2, 2, 2, 2, 2),
    "MinkUNet34": (2, 3, 4, 6, 2, 2, 2, 2),
}
PLANES = {
    "MinkUNet14A": (32, 64, 128, 256, 128, 128, 96, 96),
    "MinkUNet14B": (32, 64, 128, 256, 128, 128, 128, 128),
    "MinkUNet14C": (32, 64, 128, 256, 192, 192, 128, 128),
    "MinkUNet14D": (32, 64, 128, 256, 384, 384, 384, 384),
    "MinkUNet18A": (32, 64, 128, 256, 128, 128, 96, 96),
    "MinkUNet18B": (32, 64, 128, 256, 128, 128, 128, 128),
    "MinkUNet18D": (32, 64, 128, 256, 384, 384, 384, 384),
    "MinkUNet34A": (32, 64, 128, 256, 256, 128, 64, 64),
    "MinkUNet34B": (32, 64, 128, 256, 256, 128, 64, 32),
    "MinkUNet34C": (32, 64, 128, 256, 256, 128, 96, 96),
}
INIT_DIM = 32

# MinkowskiEngine's initialisation. Its "fan out" of a [K, Cin, Cout] kernel is K * Cout, but of a [Cin, Cout]
# kernel it is Cin; transposed convolutions keep the uniform default.
_CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # std sqrt(2 / (K Cout))
_POINTWISE_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # std sqrt(2 / Cin)
_TRANSPOSED_INIT = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")  # +-1 / sqrt(K Cout)


_PIVOT_ROWS = 128  # of a batch, about whose mean batch norm takes its sums


class Architecture(NamedTuple):
    """What distinguishes the networks of the family."""

    layers: tuple[int, ...]
    """Residual blocks of the eight stages."""
    planes: tuple[int, ...]
    """Widths of the eight stages."""
    init_dim: int
    """Width of the first convolution."""


def architecture(name: str) -> Architecture:
    """MinkUNet14A-D, 18A, B, D, 34A-C; ValueError with the nearest name for any other."""
    if name not in PLANES:
        by_lower = {known.lower(): known for known in PLANES}
        near = by_lower[difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.0)[0]]
        raise ValueError(f"unknown architecture {name!r}; did you mean {near!r}? Known: {', '.join(PLANES)}")
    return Architecture(LAYERS[name[:-1]], PLANES[name], INIT_DIM)


class SparseConv(nn.Module):
    """Convolution over a kernel map; kernel [K, Cin, Cout] in MinkowskiEngine's offset order."""

    features: int
    transposed: bool = False
    dtype: DTypeLike = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "N Cin"], kernel_map: KernelMap, epilogue: Epilogue | None = None
    ) -> Float[Array, "M Cout"]:
        shape = (kernel_map.kernel_volume, x.shape[-1], self.features)
        init = _TRANSPOSED_INIT if self.transposed else _CONV_INIT
        kernel = jnp.asarray(self.param("kernel", init, shape, jnp.float32), self.dtype)
        return sparse_conv(
            x.astype(self.dtype),
            kernel,
            kernel_map,
            transposed=self.transposed,
            implementation=self.implementation,
            epilogue=epilogue,
        )


def _pointwise(features: int, dtype: DTypeLike, name: str) -> nn.Dense:
    """Kernel size 1 is a matrix product; kernel [Cin, Cout]."""
    init, precision = _POINTWISE_INIT, matmul_precision()
    return nn.Dense(features, use_bias=False, dtype=dtype, precision=precision, kernel_init=init, name=name)


class MaskedBatchNorm(nn.Module):
    """Batch norm over the valid rows, of all replicas if `axis_name` is given; padding rows come out zero.

    Statistics are those of one batch made of every replica's valid rows: counts and sums are reduced, not
    averages, and squares are those about the common mean, in at least float32. As in torch, rows are
    normalised with the biased variance and the running variance takes the unbiased one (0 for a single row,
    which torch refuses).
    """

    features: int
    axis_name: str | None = None
    momentum: float = 0.1  # weight of the new statistics
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    def setup(self):
        shape = (self.features,)
        self.running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        self.running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        self.scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        self.bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)

    def __call__(self, x: Float[Array, "N C"], mask: Bool[Any, " N"], train: bool) -> Float[Array, "N C"]:
        keep = jnp.asarray(mask)[:, None]
        if train:
            axis_name = None if self.is_initializing() else self.axis_name
            y, mean, squares, count = _normalize(axis_name, self.epsilon, x, keep, self.scale, self.bias)
            if not self.is_initializing():
                unbiased = squares / jnp.maximum(count - 1, 1)
                self.running_mean.value += self.momentum * (mean - self.running_mean.value)
                self.running_var.value += self.momentum * (unbiased - self.running_var.value)
        else:
            mean, scale, bias = self.running()
            y = (_at_least_float32(x) - mean) * scale + bias
        return jnp.where(keep, y, 0).astype(self.dtype)

    def running(self) -> tuple[Float[Any, " C"], Float[Any, " C"], Float[Any, " C"]]:
        """Mean, scale and bias by the running statistics."""
        scale = jax.lax.rsqrt(self.running_var.value + self.epsilon) * self.scale
        return self.running_mean.value, scale, self.bias


def _at_least_float32(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize(axis_name, epsilon, x, keep, scale, bias):
    """Rows normalised by their own statistics; mean, summed squares about it, count. Only the rows have a gradient.

    Its gradient is written down, since autodiff keeps several arrays of the size of x where x alone is enough.
    """
    return _normalize_forward(axis_name, epsilon, x, keep, scale, bias)[0]


def _normalize_forward(axis_name, epsilon, x, keep, scale, bias):
    wide = _at_least_float32(x)
    # Sums about the mean of some rows: one pass over x gives both, and nothing cancels as it would about zero.
    some = slice(None, None, max(1, len(x) // _PIVOT_ROWS))
    sample, sampled = _at_least_float32(x[some]), keep[some]
    pivot = jnp.sum(jnp.where(sampled, sample, 0), 0) / jnp.maximum(jnp.sum(sampled, dtype=wide.dtype), 1)
    about_pivot = jnp.where(keep, wide - pivot, 0)
    own_count, own_sum = jnp.sum(keep, dtype=wide.dtype), jnp.sum(about_pivot, 0)
    own_squares = jnp.sum(jnp.square(about_pivot), 0)
    count, total = _reduce(axis_name, (own_count, own_sum + own_count * pivot))
    count = jnp.maximum(count, 1)
    mean = total / count
    off = mean - pivot  # squares about the common mean, from those about the pivot
    squares = _reduce(axis_name, own_squares - off * (2 * own_sum - own_count * off))
    inverse_std = jax.lax.rsqrt(squares / count + epsilon)
    y = (wide - mean) * (inverse_std * scale) + bias
    return (y, mean, squares, count), (x, keep, scale, mean, inverse_std, count)


def _normalize_backward(axis_name, epsilon, residuals, gradients):
    x, keep, scale, mean, inverse_std, count = residuals
    grad, wide = jnp.where(keep, gradients[0], 0), _at_least_float32(x)
    # Sums over x, not over x - mean, and so on: XLA would compute that in the forward pass, and keep it.
    of_bias = jnp.sum(grad, 0)
    of_scale = (jnp.sum(jnp.where(keep, gradients[0] * wide, 0), 0) - mean * of_bias) * inverse_std
    mean_grad, slope = _reduce(axis_name, (of_bias, of_scale * inverse_std))
    mean_grad, slope = mean_grad / count, slope / count
    grad_x = jnp.where(keep, (grad - wide * slope + (mean * slope - mean_grad)) * (inverse_std * scale), 0)
    return grad_x.astype(x.dtype), None, of_scale.astype(scale.dtype), of_bias.astype(scale.dtype)


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _reduce(axis_name, sums):
    return jax.lax.psum(sums, axis_name) if axis_name else sums


@jax.custom_vjp
def _relu(x):
    """ReLU whose gradient reads its output, which the next layer keeps anyway, and not its input."""
    return jnp.maximum(x, 0)


def _relu_forward(x):
    y = _relu(x)
    return y, y


def _relu_backward(y, grad):
    return (jnp.where(y > 0, grad, 0),)


_relu.defvjp(_relu_forward, _relu_backward)


def _conv_norm_relu(conv: SparseConv, norm: MaskedBatchNorm, x, kernel_map, mask, train: bool, shortcut=None):
    """ReLU of the normalised convolution and the shortcut, in one kernel where the statistics are known before."""
    if not train:
        return conv(x, kernel_map, Epilogue(*norm.running(), jnp.asarray(mask), shortcut))
    y = norm(conv(x, kernel_map), mask, train)
    return _relu(y if shortcut is None else y + shortcut)


class BasicBlock(nn.Module):
    """Two 3^3 convolutions and a shortcut, which is a 1x1 convolution where the width changes."""

    features: int
    dtype: DTypeLike
    axis_name: str | None
    implementation: str | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "N Cin"], kernel_map: KernelMap, mask: Bool[Any, " N"], train: bool
    ) -> Float[Array, "N Cout"]:
        conv = functools.partial(SparseConv, self.features, dtype=self.dtype, implementation=self.implementation)
        norm = functools.partial(MaskedBatchNorm, self.features, self.axis_name, dtype=self.dtype)
        y = _conv_norm_relu(conv(name="conv1"), norm(name="norm1"), x, kernel_map, mask, train)
        if x.shape[-1] != self.features:
            x = _pointwise(self.features, self.dtype, "downsample_0")(x)
            x = norm(name="downsample_1")(x, mask, train)
        return _conv_norm_relu(conv(name="conv2"), norm(name="norm2"), y, kernel_map, mask, train, x)


class MinkUNet(nn.Module):
    """Sparse U-Net from voxel features to `out_channels` raw features per voxel, not normalised.

    Args:
        layers, planes, init_dim: see `Architecture`.
        dtype: of the arithmetic; parameters and statistics keep their own. Batch norm uses at least float32.
        axis_name: replicas over which batch statistics are reduced.
        remat: how many levels, from the finest, compute what is inside their residual blocks again in the backward
            pass instead of keeping it: less memory, more time.
        implementation: of the convolutions, see `sparse_conv`.
    """

    layers: tuple[int, ...]
    planes: tuple[int, ...]
    out_channels: int
    init_dim: int = INIT_DIM
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None
    remat: int = 0
    implementation: str | None = None

    @nn.compact
    def __call__(self, feats: Float[Any, "V Cin"], pyramid: Pyramid, train: bool) -> Float[Array, "V Cout"]:
        """Features of the voxels on level 0; padding rows come out zero and reach no valid row.

        `train` normalises with the batch's statistics and updates the running ones ("batch_stats").
        """
        masks = [pyramid.mask(level) for level in range(5)]

        def conv_norm_relu(x, conv, norm, width, kernel_map, level, transposed=False):
            conv = SparseConv(width, transposed, self.dtype, self.implementation, name=conv)
            norm = MaskedBatchNorm(width, self.axis_name, dtype=self.dtype, name=norm)
            return _conv_norm_relu(conv, norm, x, kernel_map, masks[level], train)

        def stage(x, number, level):
            block_class = nn.remat(BasicBlock, static_argnums=4) if level < self.remat else BasicBlock
            for i in range(self.layers[number - 1]):
                width, name = self.planes[number - 1], f"block{number}_{i}"
                block = block_class(width, self.dtype, self.axis_name, self.implementation, name=name)
                x = block(x, pyramid.submanifold[level], masks[level], train)
            return x

        x = conv_norm_relu(jnp.asarray(feats), "conv0p1s1", "bn0", self.init_dim, pyramid.stem, 0)
        skips = [x]
        for level in range(1, 5):
            conv = f"conv{level}p{2 ** (level - 1)}s2"
            x = conv_norm_relu(x, conv, f"bn{level}", x.shape[-1], pyramid.down[level - 1], level)
            x = stage(x, level, level)
            skips.append(x)
        for level in range(3, -1, -1):
            i = 7 - level
            conv, width = f"convtr{i}p{2 ** (level + 1)}s2", self.planes[i]
            x = conv_norm_relu(x, conv, f"bntr{i}", width, pyramid.down[level], level, transposed=True)
            x = stage(jnp.concatenate([x, skips[level]], axis=-1), i + 1, level)
        return _pointwise(self.out_channels, self.dtype, "final")(x)


Path = tuple[str, ...]


def from_shapes(
    shapes: Mapping[Path, tuple[int, ...]], layers: tuple[int, ...], spell: Callable[[Path], str] = "/".join
) -> MinkUNet:
    """The network with these stages whose widths are those of its variables.

    Args:
        shapes: of every variable, by its path (collection, module..., name).
        layers: see `Architecture`.
        spell: names a variable in messages.
    Raises:
        ValueError: not that network's variables; names those that are missing, unexpected or misshapen.
    """

    def kernel_shape(*modules: str) -> tuple[int, ...]:
        path = ("params", *modules, "kernel")
        if len(shapes.get(path, ())) < 2:
            raise ValueError(f"{spell(path)} is missing or not a kernel")
        return shapes[path]

    in_channels, init_dim = kernel_shape("conv0p1s1")[-2:]
    planes = tuple(kernel_shape(f"block{i}_0", "conv1")[-1] for i in range(1, 9))
    model = MinkUNet(layers, planes, kernel_shape("final")[-1], init_dim)
    expected = _variable_shapes(model, in_channels)
    problems = [f"{spell(path)} is missing" for path in expected if path not in shapes]
    problems += [f"{spell(path)} is unexpected" for path in shapes if path not in expected]
    problems += [
        f"{spell(path)} has shape {shapes[path]}, expected {shape}"
        for path, shape in expected.items()
        if shapes.get(path, shape) != shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError("; ".join(problems[:8]) + more)
    return model


@functools.lru_cache(maxsize=8)
def _variable_shapes(model: MinkUNet, in_channels: int) -> dict[Path, tuple[int, ...]]:
    pyramid = build_pyramid(np.zeros((1, 4), np.int32))
    feats = np.zeros((pyramid.bucket, in_channels), np.float32)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), feats, pyramid)
    return {path: leaf.shape for path, leaf in flatten_dict(variables).items()}
