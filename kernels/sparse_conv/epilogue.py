"""What a convolution may do to its rows before it stores them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Epilogue(NamedTuple):
    """`relu((row - mean) * scale + bias + residual)`: batch norm by known statistics, a shortcut, the activation.

    Taken of the sums before they are rounded, where the kernel does it itself.
    """

    mean: Float[Array, " Cout"]
    scale: Float[Array, " Cout"]
    bias: Float[Array, " Cout"]
    keep: Bool[Array, " M"]
    """Rows that are voxels; the others come out zero."""
    residual: Float[Array, "M Cout"] | None = None

    def __call__(self, rows: Float[Array, "M Cout"]) -> Float[Array, "M Cout"]:
        wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
        out = (wide - self.mean[None, :]) * self.scale[None, :] + self.bias[None, :]
        if self.residual is not None:
            out += self.residual.astype(out.dtype)
        return jnp.where(self.keep[:, None], jax.nn.relu(out), 0).astype(rows.dtype)
