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
    """Sparse convolution: `out[j]` is the sum over the map's pairs (i, j, k) of `features[i] @ weights[k]`.

    Differentiable in features and weights. Sums are taken in at least float32.

    Args:
        features: one row per input voxel of the map (per output voxel if `transposed`).
        weights: one matrix per kernel offset, in MinkowskiEngine's order.
        kernel_map: pairs of input and output rows, from `voxel_grid`.
        transposed: exchange the map's sides; a stride-2 map then leads from coarse to fine.
        implementation: "reference" (the definition, slow), "xla" (any device), or None for the fastest.
    Returns:
        One row per output voxel of the map, of the features' dtype; zeros for a voxel without a pair.
    Raises:
        ValueError: shapes or dtypes that do not fit, naming both and the axis; an unknown implementation.
    """
    side, rows = ("output", kernel_map.num_out) if transposed else ("input", kernel_map.num_in)
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
    if features.dtype != weights.dtype:
        raise ValueError(f"features are {features.dtype} and weights {weights.dtype}: cast one to the other")
    name = implementation or "xla"
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r}: expected one of {', '.join(_IMPLEMENTATIONS)}, or None")
    return _IMPLEMENTATIONS[name](features, weights, kernel_map, transposed)
