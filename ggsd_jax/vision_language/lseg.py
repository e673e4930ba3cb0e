"""LSeg (Li et al. 2022, "Language-driven Semantic Segmentation") as OpenScene takes features from it.

A ViT-L/16 with the decoder of DPT (Ranftl et al. 2021) whose pixels live in the space of CLIP ViT-B/32's text.
Tensor names are those of the public checkpoint `demo_e200.ckpt`. How the image is shown follows
pengsongyou/lseg_feature_extraction; showing it at its own size costs 18 mIoU on ScanNet (OpenScene, issue 9).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from data.scene import View
from ggsd_jax.vision_language import clip, weights
from ggsd_jax.vision_language.dense import DenseTeacher, compute_dtype
from ggsd_jax.vision_language.transformer import Block, resize, resize_positions

_STAGES = (1, 2, 3, 4)
_COARSEST = 32  # pixels per cell of the last stage: images have multiples of it
_TEXT_MODEL = "ViT-B/32"  # its text is fixed by the backbone, clip_vitl16_384
_HEAD_WIDTH = 64

_TO_SHARED_BLOCK = (  # timm's names of a block's parts -> ours; the checkpoint is a Lightning module with a `net`
    (r"^net\.", ""),
    (r"(\.blocks\.\d+)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"(\.blocks\.\d+)\.attn\.proj\.", r"\1.self_attn.out_proj."),
    (r"(\.blocks\.\d+)\.attn\.qkv\.", r"\1.self_attn.in_proj_"),
)


@dataclass(frozen=True)
class Config:
    """Sizes of an LSeg network; `stages` are the widths of the four levels that DPT takes out of the ViT."""

    vit_width: int
    layers: int
    mlp_width: int
    patch: int
    positions: int
    stages: tuple[int, int, int, int]
    decoder_width: int
    width: int


class LSeg(nn.Module):
    """Pixels in -1..1 -> unit features at half their resolution, without batch statistics of their own."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float32[Array, "B h w C"]:
        """H and W are multiples of 32."""
        config = self.config
        conv = partial(nn.Conv, dtype=self.dtype)
        patch = (config.patch, config.patch)
        x = conv(config.vit_width, patch, patch, "VALID", name="pretrained.model.patch_embed.proj")(images)
        batch, *grid, width = x.shape
        token = self.param("pretrained.model.cls_token", nn.initializers.zeros, (1, 1, width))
        positions = self.param("pretrained.model.pos_embed", nn.initializers.zeros, (1, config.positions, width))
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, width)), x.reshape(batch, -1, width)], axis=1)
        x = (x + resize_positions(positions[0], tuple(grid), "linear")).astype(self.dtype)
        taps = []
        heads = max(1, width // _HEAD_WIDTH)
        for i in range(config.layers):
            name = f"pretrained.model.blocks.{i}"
            x = Block(heads, config.mlp_width, "gelu", epsilon=1e-6, dtype=self.dtype, name=name)(x)
            if (i + 1) % (config.layers // len(_STAGES)) == 0:
                taps.append(x)
        path = None
        for stage in reversed(_STAGES):
            level = self._reassemble(stage, taps[stage - 1], grid)
            level = conv(
                config.decoder_width, (3, 3), padding=1, use_bias=False, name=f"scratch.layer{stage}_rn"
            )(level)  # fmt: skip
            path = Fusion(self.dtype, name=f"scratch.refinenet{stage}")(path, level)
        x = conv(config.width, (1, 1), name="scratch.head1")(path).astype(jnp.float32)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def _reassemble(self, stage: int, tokens: jax.Array, grid: list[int]) -> jax.Array:
        """The patches as an image of 4, 2, 1 or 1/2 times the patch grid; each is told the class token."""
        name, width = f"pretrained.act_postprocess{stage}", self.config.stages[stage - 1]
        readout = jnp.broadcast_to(tokens[:, :1], tokens[:, 1:].shape)
        x = jnp.concatenate([tokens[:, 1:], readout], axis=-1)
        x = nn.Dense(tokens.shape[-1], dtype=self.dtype, name=f"{name}.0.project.0")(x)
        x = jax.nn.gelu(x, approximate=False).reshape(len(x), *grid, -1)
        x = nn.Conv(width, (1, 1), dtype=self.dtype, name=f"{name}.3")(x)
        if stage == 4:
            return nn.Conv(width, (3, 3), 2, padding=1, dtype=self.dtype, name=f"{name}.4")(x)
        if stage == 3:
            return x
        factor = (2 ** (3 - stage),) * 2
        up = nn.ConvTranspose(
            width, factor, factor, "VALID", transpose_kernel=True, dtype=self.dtype, name=f"{name}.4"
        )  # fmt: skip
        return up(x)


class Fusion(nn.Module):
    """DPT's fusion block: the coarser path (None at the coarsest) and a level of the ViT, at twice the size."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, path: Float[Array, "B h w D"] | None, level: Float[Array, "B h w D"]) -> Float[Array, "B H W D"]:
        if path is not None:
            level = path + Residual(self.dtype, name="resConfUnit1")(level)
        x = Residual(self.dtype, name="resConfUnit2")(level)
        x = resize(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=True)
        return nn.Conv(x.shape[-1], (1, 1), dtype=self.dtype, name="out_conv")(x)


class Residual(nn.Module):
    """Two convolutions, each after a ReLU and before its batch norm, added to the input."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        y = x
        for i in (1, 2):
            y = nn.Conv(x.shape[-1], (3, 3), padding=1, use_bias=False, dtype=self.dtype, name=f"conv{i}")(nn.relu(y))
            y = nn.BatchNorm(use_running_average=True, epsilon=1e-5, dtype=self.dtype, name=f"bn{i}")(y)
        return x + y


def load(path: str | Path) -> DenseTeacher:
    """The teacher of a checkpoint: OpenScene's features, of length 0 to 2, at every pixel of a view.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no LSeg with a ViT and batch norm; what is missing or unlike is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; LSeg's public checkpoint is demo_e200.ckpt")
    tensors = weights.with_split_attention(weights.renamed(weights.read(path), _TO_SHARED_BLOCK), "in_proj_")
    config = _measure(tensors, path)
    network = LSeg(config, compute_dtype())
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, _COARSEST, _COARSEST, 3)))
    variables = jax.device_put(weights.variables(tensors, shapes, origin=str(path)))
    projection = tensors.get("clip_pretrained.text_projection")
    space = _TEXT_MODEL if projection is None else clip.space(_TEXT_MODEL, projection.T)
    return DenseTeacher(space, config.width, View.pixels, partial(features, network, variables), batch_size=2)


@partial(jax.jit, static_argnums=0)
def features(network: LSeg, variables: Any, images: Array) -> Float32[Array, "B h w C"]:
    """Features uint8 [B, h, w, 3] -> [B, h, w, C] as OpenScene extracts them.

    The image is enlarged twofold, so that the network's half resolution is its own, and padded with black to a
    square. The features of its mirror image are added, not averaged.
    """
    batch, height, width, _ = images.shape
    side = -(-2 * max(height, width) // _COARSEST) * _COARSEST
    x = resize(images / 127.5 - 1.0, (2 * height, 2 * width), align_corners=True)
    x = jnp.pad(x, ((0, 0), (0, side - 2 * height), (0, side - 2 * width), (0, 0)), constant_values=-1.0)
    x = network.apply(variables, jnp.concatenate([x, x[:, :, ::-1]]))
    x = x[:batch] + x[batch:, :, ::-1]
    return x[:, :height, :width]


def _measure(tensors: weights.Tensors, path: Path) -> Config:
    try:
        width, _, patch, _ = tensors["pretrained.model.patch_embed.proj.weight"].shape
        layers = weights.depth(tensors, "pretrained.model.blocks.")
        if layers == 0 or layers % len(_STAGES):
            raise ValueError(f"its ViT has {layers} blocks, expected a multiple of {len(_STAGES)}")
        return Config(
            vit_width=width,
            layers=layers,
            mlp_width=len(tensors["pretrained.model.blocks.0.mlp.fc1.weight"]),
            patch=patch,
            positions=tensors["pretrained.model.pos_embed"].shape[1],
            stages=tuple(len(tensors[f"pretrained.act_postprocess{stage}.3.weight"]) for stage in _STAGES),
            decoder_width=len(tensors["scratch.layer1_rn.weight"]),
            width=len(tensors["scratch.head1.weight"]),
        )
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{path}: not an LSeg checkpoint with a ViT backbone, such as demo_e200.ckpt: {error}"
        ) from error
