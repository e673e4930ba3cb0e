"""The public sparse convolution: checks what it is given and hands it to an implementation."""

import functools

import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels.sparse_conv import cpu, pallas_triton, reference, xla
from kernels.sparse_conv.epilogue import Epilogue
from kernels.voxel_grid import KernelMap

_IMPLEMENTATIONS = {
    "reference": reference.sparse_conv,
    "xla": xla.sparse_conv,
    "cpu": cpu.sparse_conv,
    "pallas_triton": pallas_triton.sparse_conv,
}
_OBSTACLES = {"pallas_triton": pallas_triton.unsupported, "cpu": cpu.unsupported}  # of those that do not run anywhere


def sparse_conv(
    features: Float[Array | np.ndarray, "N Cin"],
    weights: Float[Array | np.ndarray, "K _Cin Cout"],
    kernel_map: KernelMap,
    *,
    transposed: bool = False,
    implementation: str | None = None,
    epilogue: Epilogue | None = None,
) -> Float[Array, "M Cout"]:
    """Sparse convolution: `out[j]` is the sum over the map's pairs (i, j, k) of `features[i] @ weights[k]`.

    Differentiable in features and weights by reverse mode, any number of times. Sums are taken in at least float32. On
    a GPU float32 operands are multiplied in full; `jax.default_matmul_precision("tensorfloat32")` trades that for
    speed.

    Args:
        features: one row per input voxel of the map (per output voxel if `transposed`).
        weights: one matrix per kernel offset, in MinkowskiEngine's order.
        kernel_map: pairs of input and output rows, from `voxel_grid`.
        transposed: exchange the map's sides; a stride-2 map then leads from coarse to fine.
        implementation: "reference" (the definition, slow), "xla" (any device), "cpu" (float32 on CPUs), "pallas_triton"
            (NVIDIA GPUs of compute capability 8.0 and above), or None for the fastest that the default device supports.
        epilogue: what becomes of the rows. The Triton kernels end with it, which saves a pass over the output; when its
            gradient is taken, and on other implementations, it is a pass of its own.
    Returns:
        One row per output voxel of the map, of the features' dtype; zeros for a voxel without a pair.
    Raises:
        ValueError: shapes or dtypes that do not fit, naming both and the axis; an unknown implementation.
        NotImplementedError: the implementation asked for does not run on this device, or not in this dtype.
    """
    features, weights = jnp.asarray(features), jnp.asarray(weights)
    _check_map(kernel_map)
    side, rows = ("output", kernel_map.num_out) if transposed else ("input", kernel_map.num_in)
    if features.ndim != 2 or weights.ndim != 3:
        raise ValueError(f"features {features.shape} and weights {weights.shape}: expected [N, Cin] and [K, Cin, Cout]")
    if features.shape[0] != rows:
        raise ValueError(
            f"features {features.shape} and kernel_map with {rows} {side} rows disagree on the voxels "
            f"(axis 0 of features): {features.shape[0]} != {rows}"
        )
    if weights.shape[0] != kernel_map.kernel_volume:
        raise ValueError(
            f"weights {weights.shape} and kernel_map with {kernel_map.kernel_volume} offsets disagree on the "
            f"kernel volume (axis 0 of weights): {weights.shape[0]} != {kernel_map.kernel_volume}"
        )
    if features.shape[1] != weights.shape[1]:
        raise ValueError(
            f"features {features.shape} and weights {weights.shape} disagree on the input channels "
            f"(axis 1 of both): {features.shape[1]} != {weights.shape[1]}"
        )
    if 0 in weights.shape:
        raise ValueError(f"weights {weights.shape} have no channels (axes 1 and 2: input and output channels)")
    if not (jnp.issubdtype(features.dtype, jnp.floating) and features.dtype.itemsize >= 2):
        raise ValueError(f"features are {features.dtype}: expected floats of 16 bits or more")
    if features.dtype != weights.dtype:
        raise ValueError(f"features are {features.dtype} and weights {weights.dtype}: cast one to the other")
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r}: expected one of {', '.join(_IMPLEMENTATIONS)}, or None")
    if implementation is None:
        implementation = fastest(features.dtype)
    elif implementation in _OBSTACLES and (obstacle := _OBSTACLES[implementation](features.dtype)):
        raise NotImplementedError(f"{implementation} does not run here: {obstacle}; implementation=None picks another")
    if epilogue is None:
        return _IMPLEMENTATIONS[implementation](features, weights, kernel_map, transposed)
    _check(epilogue, kernel_map.num_in if transposed else kernel_map.num_out, weights.shape[2])
    if implementation == "pallas_triton":
        return pallas_triton.sparse_conv(features, weights, kernel_map, transposed, epilogue)
    return epilogue(_IMPLEMENTATIONS[implementation](features, weights, kernel_map, transposed))


def _check_map(kernel_map: object) -> None:
    """A map with an axis too many would be read as another map by the compiled loops, which trust it."""
    if not isinstance(kernel_map, KernelMap):
        hint = "; voxel_grid.kernel_map() returns (map, coords)" if isinstance(kernel_map, tuple) else ""
        raise ValueError(f"kernel_map is a {type(kernel_map).__name__}: expected a KernelMap{hint}")
    arrays = kernel_map.in_index, kernel_map.out_index, kernel_map.offset_index, kernel_map.num_tiles
    tiles = np.shape(kernel_map.in_index)
    if len(tiles) != 2 or [np.shape(a) for a in arrays[1:]] != [tiles, tiles[:1], ()]:
        raise ValueError(
            f"kernel_map has arrays of shape {', '.join(str(np.shape(a)) for a in arrays)}: expected (T, tile), "
            "(T, tile), (T,) and (); where maps are stacked over devices, take this one's"
        )
    dtypes = [jnp.result_type(a) for a in arrays]
    if any(dtype != np.int32 for dtype in dtypes):
        raise ValueError(f"kernel_map has arrays of {', '.join(map(str, dtypes))}: expected int32")


def _check(epilogue: Epilogue, rows: int, channels: int) -> None:
    expected = Epilogue((channels,), (channels,), (channels,), (rows,), (rows, channels))
    for name, value, shape in zip(Epilogue._fields, epilogue, expected, strict=True):
        if (value is not None or name != "residual") and np.shape(value) != shape:
            raise ValueError(f"epilogue.{name} has shape {np.shape(value)}: expected {shape}, as of the output")


def fastest(dtype: DTypeLike) -> str:
    """The implementation that `sparse_conv` picks for operands of this dtype on the default device."""
    obstacles = []
    for name, unsupported in _OBSTACLES.items():
        if (obstacle := unsupported(dtype)) is None:
            _announce(name, "the fastest on the default device")
            return name
        obstacles.append(f"{name} is not used: {obstacle}")
    _announce("xla", "; ".join(obstacles))
    return "xla"


@functools.cache
def _announce(implementation: str, reason: str) -> None:
    """Say once per process and reason which implementation was picked."""
    logging.info("sparse_conv runs on %s: %s", implementation, reason)
