"""The public sparse convolution: checks what it is given and hands it to an implementation."""

from jaxtyping import Array, Float

from kernels.sparse_conv import reference, xla
from kernels.voxel_grid import KernelMap

_IMPLEMENTATIONS = {"reference": reference.sparse_conv, "xla": xla.sparse_conv}


def sparse_conv(
    features: Float[Array, "N Cin"],
    weights: Float[Array, "K _Cin Cout"],
    kernel_map: KernelMap,
    *,
    transposed: bool = False,
    implementation: str | None = None,
) -> Float[Array, "M Cout"]:
    """Sparse convolution `out[j] = sum over pairs (i, j, k) of features[i] @ weights[k]`, differentiable in both.

    Args:
        features: one row per input voxel of the map (per output voxel if `transposed`).
        weights: one matrix per kernel offset, in MinkowskiEngine's order.
        kernel_map: pairs of input and output rows, from `voxel_grid`.
        transposed: swap the map's inputs and outputs, from coarse to fine for a stride-2 map.
        implementation: "reference" (slow, the definition), "xla" (any device), or None for the fastest.
    Returns:
        One row per output voxel of the map; voxels without a pair are zero. The dtype is that of `features`.
    Raises:
        ValueError: shapes or dtypes that do not fit, naming both and the axis; an unknown implementation.
    """
    side, num_in = ("output", kernel_map.num_out) if transposed else ("input", kernel_map.num_in)
    if features.shape[0] != num_in:
        raise ValueError(
            f"features {features.shape} and kernel_map with {num_in} {side} rows disagree on the number of voxels "
            f"(axis 0 of features): {features.shape[0]} != {num_in}"
        )
    if weights.shape[0] != kernel_map.kernel_volume:
        raise ValueError(
            f"weights {weights.shape} and kernel_map with {kernel_map.kernel_volume} offsets disagree on the kernel "
            f"volume (axis 0 of weights): {weights.shape[0]} != {kernel_map.kernel_volume}"
        )
    if features.shape[1] != weights.shape[1]:
        raise ValueError(
            f"features {features.shape} and weights {weights.shape} disagree on the input channels "
            f"(axis 1 of both): {features.shape[1]} != {weights.shape[1]}"
        )
    if features.dtype != weights.dtype:
        raise ValueError(f"features are {features.dtype} but weights are {weights.dtype}: cast one of them")
    name = implementation or "xla"
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r}: expected one of {sorted(_IMPLEMENTATIONS)} or None")
    return _IMPLEMENTATIONS[name](features, weights, kernel_map, transposed)
