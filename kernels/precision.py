"""float32 is multiplied in full, on GPUs too, where XLA by itself rounds the operands of a product to tensorfloat32."""

import jax
from jax import lax


def matmul_precision() -> lax.Precision | None:
    """Of a product: in full, unless `jax.default_matmul_precision` asks for something else."""
    return None if jax.config.jax_default_matmul_precision else lax.Precision.HIGHEST
