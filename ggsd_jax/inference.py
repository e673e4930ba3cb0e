"""Points in, per-point features out; words in, scores out: what a trained model is for."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict
from jaxtyping import Float, Float32, Int32, UInt8
from tqdm import tqdm

from ggsd_jax import checkpoint
from ggsd_jax.losses import MIN_NORM
from ggsd_jax.minkunet import MinkUNet, architecture, from_shapes
from ggsd_jax.tiles import tiles
from ggsd_jax.vision_language import text
from kernels.voxel_grid import BATCH_LIMIT, CapacityError, Pyramid, Voxels, build_pyramid, voxelize

RELEVANCY_TEMPERATURE = 0.1
_FIELDS = {  # of model.json
    "arch": str,
    "voxel_size": float,
    "input_color": bool,
    "text_encoder": str,
    "prompt": str,
    "label_set": str,
    "classes": list,
    "trained_on": dict,
}


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
    model = network(variables, arch)
    if dtype not in ("float32", "float64", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}: expected 'float32', 'float64' or 'bfloat16'")
    in_channels = variables["params"]["conv0p1s1"]["kernel"].shape[-2]
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

    return _forward(model, variables, feats, build_pyramid(coords), train=train, dtype=dtype)


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


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained network with all it takes to use it; made by `load`.

    A cloud is N points (metres, z up, finite) of any size. At most `max_voxels` voxels are shown to the network at
    once: small clouds share a batch, a larger one is cut into tiles that overlap by `halo` voxels. Besides its points
    and its result a call takes up to 20 kB per voxel shown with MinkUNet18A and 768 channels: 4 GB for 200,000.
    """

    variables: Mapping[str, Any] = dataclasses.field(repr=False)
    info: dict
    """What `model.json` says: arch, voxel_size, input_color, text_encoder, prompt, classes, what it learned from."""
    max_voxels: int = 200_000
    halo: int = 48

    def __post_init__(self):
        in_channels = np.shape(self.variables["params"]["conv0p1s1"]["kernel"])[1]
        if in_channels != 3:
            raise ValueError(f"the network reads {in_channels} numbers of each voxel, expected 3: ones, or a colour")
        if self.max_voxels < 1:
            raise ValueError(f"max_voxels is {self.max_voxels}: expected at least 1")

    def encode(
        self, points: Float[np.ndarray, "N 3"], colors: UInt8[np.ndarray, "N 3"] | None = None
    ) -> Float32[np.ndarray, "N C"]:
        """Feature of each point: that of its voxel, in the space of the text embeddings, not normalised.

        Args:
            points: metres, z up; finite.
            colors: RGB; needed only by a network that was trained with `data.input_color`.
        Raises:
            ValueError: no points, one that is not finite or too far out, or colours are needed and missing or are not
                uint8 [N, 3].
        """
        return self.encode_scenes([points], [colors])[0]

    def encode_scenes(
        self,
        clouds: Sequence[Float[np.ndarray, "_ 3"]],
        colors: Sequence[UInt8[np.ndarray, "_ 3"] | None] | None = None,
    ) -> list[Float32[np.ndarray, "_ C"]]:
        """`encode` of several clouds, as few batches: row i of the k-th result is the feature of `clouds[k][i]`."""
        return self._per_point(clouds, colors, lambda features: features)

    def similarity(
        self,
        points: Float[np.ndarray, "N 3"],
        embedding: Float32[np.ndarray, "L C"],
        colors: UInt8[np.ndarray, "N 3"] | None = None,
    ) -> Float32[np.ndarray, "N L"]:
        """Cosine similarity of each point to each unit row of `embedding`; the features are not kept.

        A cloud of millions of points has gigabytes of features; what they say about a few words is small.
        """
        embedding = np.asarray(embedding, np.float32)
        if embedding.ndim != 2 or embedding.shape[1] != self._channels:
            raise ValueError(f"embedding has shape {list(embedding.shape)}: expected [L, {self._channels}]")
        return self._per_point([points], [colors], lambda features: unit(features) @ embedding.T)[0]

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
        labels = self.info["classes"] if labels is None else _listed("labels", labels)
        scores = self.similarity(points, self.embed(labels), colors)
        return scores.argmax(axis=1).astype(np.int32), scores

    def query(
        self,
        points: Float[np.ndarray, "N 3"],
        words: Sequence[str],
        negatives: Sequence[str] = (),
        colors: UInt8[np.ndarray, "N 3"] | None = None,
    ) -> Float32[np.ndarray, "N Q"]:
        """How much each point is what some words say, each word on its own (see `relevancy`).

        Args:
            points, colors: as for `encode`.
            words: Q of them.
            negatives: what is not meant; a point nearer to one of these than to the word scores below 1/2.
        """
        words = _listed("words", words)
        negatives = _listed("negatives", negatives) if len(negatives) else ()
        embedding = np.concatenate([self.embed(words), self.contrast(negatives)])
        similarity = self.similarity(points, embedding, colors)
        return relevancy(similarity[:, : len(words)], similarity[:, len(words) :])

    def embed(self, words: Sequence[str]) -> Float32[np.ndarray, "L C"]:
        """Unit rows of words under the text encoder the network learned to agree with.

        Raises:
            ValueError: the encoder's rows are of another width than the network's features.
        """
        encoder = self.info["text_encoder"]
        rows = text.embed(_listed("words", words), encoder=encoder, prompt=self.info["prompt"])
        if rows.shape[1] != self._channels:
            raise ValueError(
                f"the text encoder {encoder} has {rows.shape[1]} channels and the network {self._channels}: "
                "set text_encoder in model.json to the one it learned from"
            )
        return rows

    def without_meaning(self, words: Sequence[str]) -> list[str]:
        """Those of some words that the text encoder knows nothing of; the demo's is a short table of concepts."""
        return text.without_meaning(_listed("words", words), self.info["text_encoder"])

    def contrast(self, negatives: Sequence[str] = ()) -> Float32[np.ndarray, "_ C"]:
        """What a query has to beat: "anything" (the mean of the classes of training), then the negatives."""
        anything = unit(self.embed(self.info["classes"]).mean(axis=0, keepdims=True))
        return np.concatenate([anything, self.embed(negatives)]) if len(negatives) else anything

    @property
    def _channels(self) -> int:
        return self.variables["params"]["final"]["kernel"].shape[-1]

    def voxel_features(
        self, points: Float[np.ndarray, "N 3"], colors: UInt8[np.ndarray, "N 3"] | None = None
    ) -> tuple[Float32[np.ndarray, "V C"], Int32[np.ndarray, "N"]]:
        """What `encode` gives with every feature once: those of the occupied voxels, and the voxel of each point."""
        ((features, voxel_of_point),) = self._per_voxel([points], [colors], lambda features: features)
        return features, voxel_of_point

    def _per_point(self, clouds: Sequence, colors: Sequence | None, of_features: Callable) -> list[np.ndarray]:
        """`of_features` of the features [v, C] of some voxels, for every point of every cloud."""
        return [values[inverse] for values, inverse in self._per_voxel(clouds, colors, of_features)]

    def _per_voxel(
        self, clouds: Sequence, colors: Sequence | None, of_features: Callable
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """`of_features` of the features [v, C] of some voxels, for all of every cloud, and the voxel of each point."""
        clouds = [np.asarray(points) for points in clouds]
        colors = [None] * len(clouds) if colors is None else colors
        colors = [None if rgb is None else np.asarray(rgb) for rgb in colors]
        if len(colors) != len(clouds):
            raise ValueError(f"colors are those of {len(colors)} clouds, and there are {len(clouds)}")
        for points, rgb in zip(clouds, colors, strict=True):
            if points.ndim != 2 or points.shape[1] != 3:
                raise ValueError(f"points has shape {list(points.shape)}: expected [N, 3], metres")
            if rgb is not None and (rgb.dtype != np.uint8 or rgb.shape != points.shape):
                raise ValueError(f"colors is {rgb.dtype} {list(rgb.shape)}: expected uint8 {list(points.shape)}")
        voxels = [voxelize(points, self.info["voxel_size"]) for points in clouds]
        feats = [input_features(v, c, self.info["input_color"]) for v, c in zip(voxels, colors, strict=True)]
        results: list[np.ndarray | None] = [None] * len(clouds)
        for scene, rows, features in self._batches([v.coords for v in voxels], feats):
            values = of_features(features)
            if results[scene] is None:
                results[scene] = np.empty((len(voxels[scene].coords), values.shape[1]), values.dtype)
            results[scene][rows] = values
        return [(values, v.inverse) for values, v in zip(results, voxels, strict=True)]

    def _batches(self, coords: list[np.ndarray], feats: list[np.ndarray]) -> Iterator[tuple[int, np.ndarray, Any]]:
        """Scene, voxel rows and their features [v, C], until every voxel of every scene was given once."""
        model = network(self.variables, self.info["arch"])
        parts = [(i, tile) for i, c in enumerate(coords) for tile in tiles(c, self.max_voxels, self.halo)]
        # Largest first: all batches then share its shapes, and one compiled program.
        parts.sort(key=lambda part: -len(part[1].rows))
        shapes: dict[str, int] = {}
        voxels = sum(len(tile.rows) for _, tile in parts)
        bar = tqdm(total=voxels, desc="encode", unit="voxel", unit_scale=True, delay=5, leave=False, dynamic_ncols=True)
        while parts:
            room, batch = self.max_voxels, []
            while parts and len(parts[0][1].rows) <= room and len(batch) < BATCH_LIMIT:
                batch.append(parts.pop(0))
                room -= len(batch[-1][1].rows)
            stacked = np.concatenate([_in_batch(coords[i][tile.rows], k) for k, (i, tile) in enumerate(batch)])
            try:
                pyramid = build_pyramid(stacked, **shapes)
            except CapacityError:
                pyramid = build_pyramid(stacked)
            shapes = {"bucket": pyramid.bucket, "spread": pyramid.spread}
            inputs = np.concatenate([feats[i][tile.rows] for i, tile in batch])
            features = _forward(model, self.variables, inputs, pyramid)
            bar.update(len(inputs))
            for i, tile in batch:
                own, features = features[: len(tile.rows)], features[len(tile.rows) :]
                yield i, tile.rows[tile.core], own[tile.core]
        bar.close()


def unit(rows: Float32[np.ndarray, "N C"]) -> Float32[np.ndarray, "N C"]:
    """Rows of length 1; a zero row stays zero."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), MIN_NORM)


def relevancy(positive: Float32[np.ndarray, "N Q"], contrast: Float32[np.ndarray, "N M"]) -> Float32[np.ndarray, "N Q"]:
    """Score in 0..1 of each point for each query: over 1/2 where it is nearer than everything it is held against.

    The softmax of a query's cosine similarity against that of its strongest contrast, at LERF's temperature of 0.1
    (Kerr et al., ICCV 2023). LERF holds a query against "object", "things", "stuff" and "texture"; here it is against
    the mean of the class texts. Of the CLIP texts of ScanNet's 20 classes (ViT-B/32 and ViT-L/14@336px), each is
    nearer to itself than to that mean, and 3 of 380 to a wrong class.
    """
    return 1 / (1 + np.exp((contrast.max(axis=1, keepdims=True) - positive) / RELEVANCY_TEMPERATURE))


def load(path: str | Path) -> Model:
    """The model in a run's work directory, in its `model/` folder, or in a folder that `ggsd_jax.export` wrote.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: a file is damaged or incomplete, or the network was trained with labels: it knows no words.
    """
    path = Path(path)
    folder = path / "model" if (path / "model").is_dir() else path
    variables, info = checkpoint.load_model(folder)
    for field, kind in _FIELDS.items():
        if not isinstance(info.get(field) if isinstance(info, dict) else None, kind):
            raise ValueError(
                f"{folder / checkpoint.MODEL_FILE}: the field {field!r} is missing or no {kind.__name__}; "
                "copy or export the model again"
            )
    if info["voxel_size"] <= 0 or not all(isinstance(name, str) for name in info["classes"] or [None]):
        raise ValueError(
            f"{folder / checkpoint.MODEL_FILE}: voxel_size is {info['voxel_size']} and classes {info['classes']}: "
            "expected metres and a list of names; copy or export the model again"
        )
    network(variables, info["arch"])
    if not info["text_encoder"]:
        raise ValueError(f"{folder} was trained with labels (mode=supervised): it gives logits of classes, not words")
    own_encoder = folder / info["text_encoder"]  # an export brings its file of embeddings along
    if own_encoder.is_file():
        info["text_encoder"] = str(own_encoder)
    return Model(variables, info)


def keep_compiled_programs() -> None:
    """Keeps compiled programs in ~/.cache/ggsd_jax/xla, unless JAX was told of another place or there is no home."""
    if not jax.config.jax_compilation_cache_dir:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "ggsd_jax" / "xla"))


def network(variables: Mapping[str, Any], arch: str) -> MinkUNet:
    """The network of these variables; ValueError if they are not those of an `arch` of any widths."""
    shapes = {path: np.shape(leaf) for path, leaf in flatten_dict(dict(variables)).items()}
    try:
        return from_shapes(shapes, architecture(arch).layers)
    except ValueError as error:
        raise ValueError(f"variables are not those of a {arch}: {error}") from error


def _listed(argument: str, words: Sequence[str]) -> list[str]:
    if isinstance(words, str):
        raise ValueError(f"{argument} is the text {words!r}: give a list, as [{words!r}]")
    if len(words) == 0:
        raise ValueError(f"{argument} is empty: name at least one thing to look for")
    if other := [word for word in words if not isinstance(word, str)]:
        raise ValueError(f"{argument} holds {type(other[0]).__name__}: expected texts")
    return list(words)


def _in_batch(coords: Int32[np.ndarray, "V 3"], index: int) -> Int32[np.ndarray, "V 4"]:
    return np.pad(coords, ((0, 0), (1, 0)), constant_values=((0, 0), (index, 0)))


def _forward(
    model: MinkUNet,
    variables: Mapping[str, Any],
    feats: np.ndarray,
    pyramid: Pyramid,
    *,
    train: bool = False,
    dtype: str = "float32",
) -> Float[np.ndarray, "V C"]:
    stored = "float64" if dtype == "float64" else "float32"
    padded = np.zeros((pyramid.bucket, feats.shape[1]), stored)
    padded[: len(feats)] = feats
    with jax.enable_x64(dtype == "float64"):
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, stored), variables)
        return np.asarray(_apply(model.clone(dtype=dtype), train, variables, padded, pyramid))[: len(feats)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(model: MinkUNet, train: bool, variables: Any, feats: Any, pyramid: Any) -> jax.Array:
    logging.info("compiling the network for up to %d voxels, spread %d", feats.shape[0], pyramid.spread)  # when traced
    if train:
        return model.apply(variables, feats, pyramid, train=True, mutable=["batch_stats"])[0]
    return model.apply(variables, feats, pyramid, train=False)
