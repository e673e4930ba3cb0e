"""CLIP (Radford et al. 2021): the text and image towers of the ViT models, with the public weights.

Tensor names are Hugging Face's; OpenAI's are translated.
"""

import functools
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from ggsd_jax.vision_language import tokenizer, weights
from ggsd_jax.vision_language.transformer import ACTIVATIONS, Block, layer_norm, resize_positions

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue in 0..1, as CLIP was trained
STD = (0.26862954, 0.26130258, 0.27577711)

_TEXT_BATCH = 64  # sentences in one call
_HEAD_WIDTH = 64  # of all models OpenAI published

# (patch, image size, width of the image tower) -> OpenAI's name
_PUBLISHED = {
    (32, 224, 768): "ViT-B/32",
    (16, 224, 768): "ViT-B/16",
    (14, 224, 1024): "ViT-L/14",
    (14, 336, 1024): "ViT-L/14@336px",
}

# What a config.json may leave out, from transformers' CLIPTextConfig and CLIPVisionConfig
_SHARED_DEFAULTS = {"num_hidden_layers": 12, "hidden_act": "quick_gelu"}
_TEXT_DEFAULTS = _SHARED_DEFAULTS | {
    "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49408,
    "max_position_embeddings": 77,
}  # fmt: skip
_VISION_DEFAULTS = _SHARED_DEFAULTS | {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
}  # fmt: skip

_FROM_OPENAI = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # Hugging Face's spelling
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


@dataclass(frozen=True)
class Tower:
    """Sizes of one transformer."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str


@dataclass(frozen=True)
class Config:
    """Sizes of a CLIP model; `width` is that of the space both towers end in."""

    width: int
    text: Tower
    vision: Tower
    vocabulary: int
    context: int
    image_size: int
    patch: int

    @property
    def name(self) -> str:
        """OpenAI's name of the model, e.g. "ViT-B/32"."""
        key = (self.patch, self.image_size, self.vision.width)
        return _PUBLISHED.get(key, f"ViT-{self.vision.width}/{self.patch}@{self.image_size}px")


class TextTower(nn.Module):
    """Token ids -> embedding of the sentence, not normalised."""

    config: Config

    @nn.compact
    def __call__(self, ids: Int32[Array, "L T"], ends: Int32[Array, " L"]) -> Float32[Array, "L C"]:
        """`ends` is where each sentence's end token stands; what follows it makes no difference."""
        config, tower = self.config, self.config.text
        tokens = self.param(
            "text_model.embeddings.token_embedding.weight", _INIT, (config.vocabulary, tower.width), jnp.float32
        )
        positions = self.param(
            "text_model.embeddings.position_embedding.weight", _INIT, (config.context, tower.width), jnp.float32
        )
        x = tokens[ids] + positions
        for i in range(tower.layers):
            x = _block(tower, f"text_model.encoder.layers.{i}", jnp.float32)(x, causal=True)
        x = _norm("text_model.final_layer_norm", jnp.float32)(x[jnp.arange(len(x)), ends])
        return nn.Dense(config.width, use_bias=False, name="text_projection")(x)


class ImageTower(nn.Module):
    """Normalised pixels -> embedding of the image, or of each patch."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"], dense: bool = False) -> Float32[Array, "B *grid C"]:
        """Embeddings, not normalised, of images whose sides are multiples of the patch.

        Args:
            dense: embed each patch as MaskCLIP (Zhou et al. 2022) does. In the last block a token takes its own
                value instead of attending to others; all that follows is applied to every patch.
        """
        config, tower, dtype = self.config, self.config.vision, self.dtype
        patch = (config.patch, config.patch)
        embedding = nn.Conv(
            tower.width, patch, patch, "VALID", use_bias=False, dtype=dtype,
            name="vision_model.embeddings.patch_embedding",
        )  # fmt: skip
        x = embedding(images)
        batch, *grid, width = x.shape
        token = self.param("vision_model.embeddings.class_embedding", _INIT, (width,), jnp.float32)
        positions = self.param(
            "vision_model.embeddings.position_embedding.weight",
            _INIT, (1 + (config.image_size // config.patch) ** 2, width), jnp.float32,
        )  # fmt: skip
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, width)), x.reshape(batch, -1, width)], axis=1)
        x = (x + resize_positions(positions, tuple(grid), "cubic")).astype(dtype)
        x = _norm("vision_model.pre_layrnorm", dtype)(x)
        for i in range(tower.layers):
            value_only = dense and i == tower.layers - 1
            x = _block(tower, f"vision_model.encoder.layers.{i}", dtype)(x, value_only=value_only)
        x = x[:, 1:].reshape(batch, *grid, width) if dense else x[:, 0]
        x = _norm("vision_model.post_layernorm", dtype)(x)
        return nn.Dense(config.width, use_bias=False, dtype=dtype, name="visual_projection")(x).astype(jnp.float32)


_INIT = nn.initializers.normal(0.02)


def _block(tower: Tower, name: str, dtype: DTypeLike) -> Block:
    return Block(tower.heads, tower.mlp_width, tower.activation, dtype=dtype, name=name)


def _norm(name: str, dtype: DTypeLike) -> nn.LayerNorm:
    return layer_norm(name=name, epsilon=1e-5, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP model with its weights; made by `load`.

    Attributes:
        folder: where it came from.
        space: name and fingerprint of the space it embeds in, as `space` makes them.
        text, vision: Flax variables of `TextTower` and `ImageTower`.
    """

    folder: Path
    config: Config
    space: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]


def load(folder: str | Path) -> Clip:
    """Reads a Hugging Face snapshot or OpenAI's weights.

    Args:
        folder: with `config.json` and `model.safetensors` (or `pytorch_model.bin`), or with one of OpenAI's .pt
            files, as they are or saved again as a state dict.

    Raises:
        FileNotFoundError: the folder, or the weights in it, are missing.
        ValueError: a file is damaged, or tensors are missing or of other sizes than the config says.
    """
    folder = Path(folder)
    file = _weights_file(folder)
    tensors = weights.read(file)
    if (folder / "config.json").is_file():
        config = _read_config(folder / "config.json")
    else:
        tensors = _from_openai(tensors, file)
        config = _measure(tensors, file)
    text, vision = (weights.variables(tensors, tower, origin=str(file)) for tower in shapes(config))
    return Clip(folder, config, space(config.name, tensors["text_projection.weight"]), text, vision)


def shapes(config: Config) -> tuple[Any, Any]:
    """Shapes of the variables of `TextTower` and `ImageTower`."""
    ids, pixels = jnp.zeros((1, config.context), jnp.int32), jnp.zeros((1, config.image_size, config.image_size, 3))
    key = jax.random.key(0)
    return (
        jax.eval_shape(TextTower(config).init, key, ids, ids[:, 0]),
        jax.eval_shape(ImageTower(config).init, key, pixels),
    )


def space(name: str, text_projection: np.ndarray) -> str:
    """A text space by the name of its CLIP model and a checksum of the weights [C, W] that lead into it.

    The checksum is of half-precision values: OpenAI's files and their float32 copies have the same.
    """
    return f"{name}#{zlib.crc32(np.ascontiguousarray(text_projection, np.float16).tobytes()):08x}"


class TextEncoder:
    """Sentences -> unit rows, by the text tower in float32."""

    def __init__(self, folder: str | Path):
        """Raises what `load` and `tokenizer.load` raise."""
        model = load(folder)
        self.space = model.space
        self._tokenizer = tokenizer.load(Path(folder))
        self._tower, self._variables = TextTower(model.config), jax.device_put(model.text)

    def __call__(self, sentences: Sequence[str]) -> Float32[np.ndarray, "L C"]:
        """Raises ValueError where a sentence has more tokens than CLIP reads."""
        ids, ends = self._tokenizer.batch(sentences, self._tower.config.context)
        size = min(_TEXT_BATCH, 1 << (len(ids) - 1).bit_length())  # few programs to compile, however many sentences
        rows = []
        for start in range(0, len(ids), size):
            batch = np.arange(start, start + size).clip(max=len(ids) - 1)
            rows.append(np.asarray(_embed(self._tower, self._variables, ids[batch], ends[batch])))
        return np.concatenate(rows)[: len(ids)]


@functools.partial(jax.jit, static_argnums=0)
def _embed(tower: TextTower, variables: Any, ids: jax.Array, ends: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("float32"):
        rows = tower.apply(variables, ids, ends)
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def _weights_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a CLIP snapshot with config.json and weights")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    files = sorted(file for file in folder.iterdir() if file.suffix in (".pt", ".pth"))
    if len(files) == 1:
        return files[0]
    raise FileNotFoundError(
        f"{folder}: expected model.safetensors, pytorch_model.bin or exactly one of OpenAI's .pt files, found "
        f"{', '.join(file.name for file in files) or 'none of them'}"
    )


def _read_config(path: Path) -> Config:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        text = _TEXT_DEFAULTS | (content.get("text_config") or {})
        vision = _VISION_DEFAULTS | (content.get("vision_config") or {})
        numbers = {
            "width": content.get("projection_dim", 512),
            "vocabulary": text["vocab_size"],
            "context": text["max_position_embeddings"],
            "image_size": vision["image_size"],
            "patch": vision["patch_size"],
        }
        for name, number in numbers.items():
            if not (isinstance(number, int) and number > 0):
                raise ValueError(f"{name} is {number!r}, expected a positive whole number")
        return Config(text=_tower(text), vision=_tower(vision), **numbers)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not the config of a CLIP model: {error}") from error


def _tower(config: dict) -> Tower:
    activation = config["hidden_act"]
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    sizes = [config[f] for f in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or sizes[0] % sizes[2]:
        raise ValueError(
            f"hidden_size, layers, heads, intermediate_size are {sizes}: expected heads to divide the width"
        )
    return Tower(*sizes, activation)


def _from_openai(tensors: Mapping[str, np.ndarray], file: Path) -> weights.Tensors:
    """OpenAI's tensors under Hugging Face's names; they keep projections the other way round."""
    if "visual.proj" not in tensors:
        what = (
            "a CLIP with a ResNet, only the ViT models are read"
            if "visual.attnpool.c_proj.weight" in tensors
            else "not CLIP"
        )
        raise ValueError(
            f"{file}: {what}: it has no tensor visual.proj. Weights with Hugging Face's names need their config.json"
        )
    turned = {name: value.T if name in ("visual.proj", "text_projection") else value for name, value in tensors.items()}
    return weights.with_split_attention(weights.renamed(turned, _FROM_OPENAI), "in_proj_")


def _measure(tensors: Mapping[str, np.ndarray], file: Path) -> Config:
    """The sizes of a model by its tensors, as OpenAI's own reader finds them."""
    try:
        width, _, patch, _ = tensors["vision_model.embeddings.patch_embedding.weight"].shape
        positions, _ = tensors["vision_model.embeddings.position_embedding.weight"].shape
        vocabulary, text_width = tensors["text_model.embeddings.token_embedding.weight"].shape
        context, _ = tensors["text_model.embeddings.position_embedding.weight"].shape
        embedding, _ = tensors["text_projection.weight"].shape
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: not the weights of a CLIP ViT: {error}") from error

    def tower(width: int, prefix: str) -> Tower:
        layers = weights.depth(tensors, f"{prefix}_model.encoder.layers.")
        return Tower(width, layers, max(1, width // _HEAD_WIDTH), 4 * width, "quick_gelu")

    return Config(
        embedding, tower(text_width, "text"), tower(width, "vision"), vocabulary, context,
        image_size=patch * round((positions - 1) ** 0.5), patch=patch,
    )  # fmt: skip
