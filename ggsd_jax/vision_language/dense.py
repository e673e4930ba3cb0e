"""Frozen 2D networks as teachers: views in, per-pixel features in the space of a text encoder out."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from data.scene import View
from ggsd_jax.vision_language.transformer import resize


@dataclass(frozen=True, eq=False)
class DenseTeacher:
    """A 2D network and how it wants to be shown a view.

    Attributes:
      space: of its features, as `text.space` names it.
      width: C.
      show: the pixels of a view that the network is given.
      network: features of a batch of images of one size, at any resolution.
      batch_size: images in one call; the features of one batch are in memory at a time.
    """

    space: str
    width: int
    show: Callable[[View], UInt8[np.ndarray, "H W 3"]]
    network: Callable[[UInt8[np.ndarray, "B H W 3"]], Float[Array, "B h w C"]]
    batch_size: int = 4

    def look(self, views: Iterable[View]) -> tuple[Iterator[View], Callable[[View], Float32[np.ndarray, "h w C"]]]:
        """The same views, read a batch ahead, and the features of the one last given (or another of its batch).

        Both go into `data.projection.fuse`. Features are resized to the view's pixels one view at a time.
        """
        ready: dict[int, tuple[View, jax.Array]] = {}  # with the view: while it lives, no other has its id

        def ahead() -> Iterator[View]:
            for batch, images in self._batches(views):
                ready.clear()
                padded = images + images[-1:] * (self.batch_size - len(images))  # one size, one compiled program
                for view, features in zip(batch, self.network(np.stack(padded)), strict=False):
                    ready[id(view)] = view, features
                yield from batch

        def features_of(view: View) -> Float32[np.ndarray, "h w C"]:
            return np.asarray(_at_pixels(ready[id(view)][1], view.size[::-1]))

        return ahead(), features_of

    def _batches(self, views: Iterable[View]) -> Iterator[tuple[list[View], list[np.ndarray]]]:
        """Up to `batch_size` successive views whose images have the same size."""
        batch, images = [], []
        for view in views:
            image = self.show(view)
            if batch and (len(batch) == self.batch_size or image.shape != images[0].shape):
                yield batch, images
                batch, images = [], []
            batch.append(view)
            images.append(image)
        if batch:
            yield batch, images


def compute_dtype() -> type:
    """bfloat16 on an accelerator, float32 on a CPU, which has no fast bfloat16."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


@partial(jax.jit, static_argnums=1)
def _at_pixels(features: jax.Array, size: tuple[int, int]) -> jax.Array:
    return resize(features[None].astype(jnp.float32), size)[0]
