"""MaskCLIP (Zhou et al. 2022, "Extract Free Dense Labels from CLIP"): dense features out of plain CLIP.

In the last block every token keeps its own value instead of attending to others, and the projection into the
space of the text is applied to each patch. No training, no weights but CLIP's. The paper's refinements by keys
and prompts (its "key smoothing", "prompt denoising") work on scores, not on features, and are left out.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data.scene import View
from ggsd_jax.vision_language import clip
from ggsd_jax.vision_language.dense import DenseTeacher, compute_dtype

SHORT_SIDE = 448  # pixels of the image the network sees: a multiple of the patches 14, 16 and 32


def load(folder: str | Path, short_side: int = SHORT_SIDE) -> DenseTeacher:
    """The teacher made of a folder with CLIP's weights: unit features, one per patch.

    Images are used at their full resolution, resized so that both sides are multiples of the patch.

    Raises what `clip.load` raises.
    """
    model = clip.load(folder)
    tower = clip.ImageTower(model.config, compute_dtype())
    variables = jax.device_put(model.vision)

    def show(view: View) -> UInt8[np.ndarray, "H W 3"]:
        pixels = view.full_pixels()
        size = network_size(pixels.shape[1::-1], model.config.patch, short_side)
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))

    return DenseTeacher(model.space, model.config.width, show, partial(_features, tower, variables))


def network_size(size: tuple[int, int], patch: int, short_side: int) -> tuple[int, int]:
    """The (w, h) in multiples of the patch that comes nearest to `short_side` and the aspect of an image."""
    scale = short_side / min(size)
    width, height = (max(1, round(side * scale / patch)) * patch for side in size)
    return width, height


@partial(jax.jit, static_argnums=0)
def _features(tower: clip.ImageTower, variables: Any, images: jax.Array) -> jax.Array:
    x = (images / 255.0 - jnp.array(clip.MEAN)) / jnp.array(clip.STD)
    x = tower.apply(variables, x, dense=True)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
