"""Points in, per-point features out; words in, scores out: what a trained model is for."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float, Float32, Int32, UInt8

from ggsd_jax import checkpoint
from ggsd_jax.losses import MIN_NORM
from ggsd_jax.minkunet import MinkUNet, architecture, from_shapes
from ggsd_jax.vision_language import text
from kernels.voxel_grid import Voxels, build_pyramid, voxelize


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


def input_features(
    voxels: Voxels, colors: UInt8[np.ndarray, "N 3"] | None, input_color: bool
) -> Float32[np.ndarray, "V 3"]:
    """What the network is told about a voxel: ones, or the colour of its first point in [-1, 1] (as OpenScene).

    Raises:
        ValueError: the network wants colours and there are none.
    """
    if not input_color:
        return np.ones((len(voxels.first), 3), np.float32)
    if colors is None:
        raise ValueError("this network reads colours (data.input_color), and the cloud has none")
    return colors[voxels.first].astype(np.float32) / 127.5 - 1.0


@dataclass(frozen=True)
class Model:
    """A trained network with all it takes to use it; made by `load`."""

    variables: Mapping[str, Any]
    info: dict
    """What `model.json` says: arch, voxel_size, input_color, text_encoder, prompt, classes, what it learned from."""

    def encode(
        self, points: Float[np.ndarray, "N 3"], colors: UInt8[np.ndarray, "N 3"] | None = None
    ) -> Float32[np.ndarray, "N C"]:
        """Feature of each point: that of its voxel, in the space of the text embeddings, not normalised.

        Args:
            points: metres, z up; finite.
            colors: RGB; needed only by a network that was trained with `data.input_color`.
        """
        voxels = voxelize(points, self.info["voxel_size"])
        coords = np.pad(voxels.coords, ((0, 0), (1, 0)))
        feats = input_features(voxels, colors, self.info["input_color"])
        return encode_voxels(self.variables, coords, feats, arch=self.info["arch"])[voxels.inverse]

    def segment(
        self,
        points: Float[np.ndarray, "N 3"],
        labels: Sequence[str] | None = None,
        colors: UInt8[np.ndarray, "N 3"] | None = None,
    ) -> tuple[Int32[np.ndarray, "N"], Float32[np.ndarray, "N L"]]:
        """Labels every point with the nearest of some words.

        Args:
            points, colors: as for `encode`.
            labels: any words; the classes of training where None.

        Returns:
            Index of the best label of each point, and the cosine similarity of each point to each label.
        """
        labels = list(self.info["classes"] if labels is None else labels)
        if not labels:
            raise ValueError("labels is empty: name at least one thing to look for")
        embedding = text.embed(labels, encoder=self.info["text_encoder"], prompt=self.info["prompt"])
        features = self.encode(points, colors)
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), MIN_NORM)
        scores = features @ embedding.T
        return scores.argmax(axis=1).astype(np.int32), scores


def load(path: str | Path) -> Model:
    """The model in a run's work directory, or in its `model/` folder.

    Raises:
        FileNotFoundError: there is no model.
    """
    path = Path(path)
    return Model(*checkpoint.load_model(path / "model" if (path / "model").is_dir() else path))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(model: MinkUNet, train: bool, variables: Any, feats: Any, pyramid: Any) -> jax.Array:
    if train:
        return model.apply(variables, feats, pyramid, train=True, mutable=["batch_stats"])[0]
    return model.apply(variables, feats, pyramid, train=False)
