"""The pre-norm transformer block that CLIP's towers and LSeg's backbone share, and resizing as torch does it."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The sigmoid approximation of GELU that OpenAI trained CLIP with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable] = {"quick_gelu": quick_gelu, "gelu": partial(jax.nn.gelu, approximate=False)}


class Attention(nn.Module):
    """Multi-head self-attention."""

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T W"], causal: bool = False, value_only: bool = False
    ) -> Float[Array, "B T W"]:
        width = x.shape[-1]

        def project(name: str, x: jax.Array) -> jax.Array:
            return nn.Dense(width, dtype=self.dtype, name=name)(x)

        value = project("v_proj", x)
        if not value_only:
            heads = (*x.shape[:2], self.heads, width // self.heads)
            query, key = project("q_proj", x).reshape(heads), project("k_proj", x).reshape(heads)
            value = jax.nn.dot_product_attention(query, key, value.reshape(heads), is_causal=causal).reshape(x.shape)
        return project("out_proj", value)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on the normalised input and added to it.

    With `value_only` every token attends to itself alone: what MaskCLIP does in the last block.
    """

    heads: int
    mlp_width: int
    activation: str
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T W"], causal: bool = False, value_only: bool = False
    ) -> Float[Array, "B T W"]:
        norm = partial(layer_norm, epsilon=self.epsilon, dtype=self.dtype)
        attention = Attention(self.heads, self.dtype, name="self_attn")
        x = x + attention(norm(name="layer_norm1")(x), causal, value_only)
        hidden = nn.Dense(self.mlp_width, dtype=self.dtype, name="mlp.fc1")(norm(name="layer_norm2")(x))
        hidden = ACTIVATIONS[self.activation](hidden)
        return x + nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp.fc2")(hidden)


def layer_norm(*, name: str, epsilon: float, dtype: DTypeLike) -> nn.LayerNorm:
    """Layer normalisation with torch's two-pass variance."""
    return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, name=name)


def resize_positions(table: Float[Array, "P W"], grid: tuple[int, int], kernel: str) -> Float[Array, "T W"]:
    """Position embeddings of a class token and a square grid of patches, for a grid of (rows, columns)."""
    side = round((len(table) - 1) ** 0.5)
    if grid == (side, side):
        return table
    patches = resize(table[None, 1:].reshape(1, side, side, -1), grid, kernel=kernel)
    return jnp.concatenate([table[:1], patches.reshape(-1, table.shape[1])])


def resize(
    images: Float[Array, "B h w C"], size: tuple[int, int], *, kernel: str = "linear", align_corners: bool = False
) -> Float[Array, "B H W C"]:
    """Images interpolated onto a grid of (rows, columns), as torch.nn.functional.interpolate does.

    `jax.image.resize` has neither `align_corners` nor torch's bicubic kernel.

    Args:
        kernel: "linear" or "cubic".
        align_corners: the centres of the corner pixels stay where they are, instead of their outer corners.
    """
    if images.shape[1:3] == size:
        return images
    rows, columns = (
        jnp.asarray(_interpolation(new, old, kernel, align_corners), images.dtype)
        for new, old in zip(size, images.shape[1:3], strict=True)
    )
    return jnp.einsum("bhwc,Hh,Ww->bHWc", images, rows, columns)


def _interpolation(new: int, old: int, kernel: str, align_corners: bool) -> Float32[np.ndarray, "new old"]:
    """The matrix that interpolates `old` samples at `new` places; samples beyond the ends repeat the last."""
    places = np.arange(new, dtype=np.float64)
    places = places * ((old - 1) / max(new - 1, 1)) if align_corners else (places + 0.5) * (old / new) - 0.5
    first = np.floor(places).astype(int)
    matrix = np.zeros((new, old))
    for tap in (0, 1) if kernel == "linear" else (-1, 0, 1, 2):
        weight = _WEIGHTS[kernel](np.abs(places - first - tap))
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), weight)
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel with torch's a = -0.75."""
    a, d = -0.75, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


_WEIGHTS = {"linear": lambda distance: 1 - distance, "cubic": _cubic}
