"""Voxels in, features out: runs a trained network on one cloud of any size."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from ggsd_jax.minkunet import MinkUNet, architecture, from_shapes
from kernels.voxel_grid import build_pyramid


def encode_voxels(
    variables: Mapping[str, Any],
    coords: Any,
    feats: Any,
    *,
    arch: str = "MinkUNet18A",
    train: bool = False,
    dtype: str = "float32",
) -> Float[np.ndarray, "N C"]:
    """Features of voxels under a network.

    Args:
        variables: {"params", "batch_stats"} of a network with the stages of `arch`, of any widths.
        coords: int32 [N, 4] distinct (batch, x, y, z), in any order, negative ones too.
        feats: [N, Cin] finite numbers; OpenScene's networks take ones [N, 3].
        train: normalise with the statistics of these voxels, not the running ones (which stay as they are).
        dtype: "float32", "float64" or "bfloat16", of arithmetic and result.
    Returns:
        Row i is the feature of `coords[i]`, not normalised.
    Raises:
        ValueError: bad coords or feats (says which row), unknown `arch` or `dtype`, or variables of another
            architecture (says which tensors).

    Compiles once per bucket of voxel counts (`kernels.voxel_grid.next_bucket`).
    """
    variables = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    shapes = {path: np.shape(leaf) for path, leaf in flatten_dict(variables).items()}
    layers = architecture(arch).layers
    try:
        model = from_shapes(shapes, layers)
    except ValueError as error:
        raise ValueError(f"variables are not those of a {arch}: {error}") from error
    if dtype not in ("float32", "float64", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}: expected 'float32', 'float64' or 'bfloat16'")
    in_channels = shapes["params", "conv0p1s1", "kernel"][-2]
    coords, feats = np.asarray(coords), np.asarray(feats)
    if coords.dtype != np.int32 or coords.ndim != 2 or coords.shape[1] != 4:
        raise ValueError(
            f"coords is {coords.dtype} {list(coords.shape)}: expected int32 [N, 4], columns batch, x, y, z"
        )
    if feats.shape != (len(coords), in_channels):
        raise ValueError(
            f"feats has shape {list(feats.shape)}: expected [{len(coords)}, {in_channels}], "
            f"one row per row of coords and the network's {in_channels} input channels"
        )
    finite = np.isfinite(feats).all(axis=1)
    if not finite.all():
        row = int(finite.argmin())
        raise ValueError(f"feats row {row} is {feats[row].tolist()}: expected finite numbers")

    pyramid = build_pyramid(coords)  # checks that coords are distinct, in range, and not empty
    stored = "float64" if dtype == "float64" else "float32"
    padded = np.zeros((pyramid.bucket, in_channels), stored)
    padded[: len(feats)] = feats
    with jax.enable_x64(dtype == "float64"):
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, stored), variables)
        return np.asarray(_apply(model.clone(dtype=dtype), train, variables, padded, pyramid))[: len(coords)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(model: MinkUNet, train: bool, variables: Any, feats: Any, pyramid: Any) -> jax.Array:
    if train:
        return model.apply(variables, feats, pyramid, train=True, mutable=["batch_stats"])[0]
    return model.apply(variables, feats, pyramid, train=False)
