"""Stage 2 of GGSD: an EMA teacher labels every voxel with its nearest text, superpoints vote (paper section 3.4)."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ggsd_jax.losses import normalize
from kernels.precision import matmul_precision
from kernels.segment import segment_mode


def pseudo_labels(features: Float[Array, "V C"], text: Float[Array, "L C"]) -> Int[Array, "V"]:
    """Index of the class text with the largest cosine similarity to each feature (Eq. 5).

    A feature's length scales all its similarities alike, and is left out; one of zeros has no nearest text: -1.
    """
    scores = jnp.matmul(features.astype(jnp.float32), normalize(text).T, precision=matmul_precision())
    return jnp.where(scores.any(axis=1), jnp.argmax(scores, axis=1), -1).astype(jnp.int32)


def vote(
    labels: Int[Array, "V"], superpoints: Int[Array, "V"], num_superpoints: int, num_classes: int
) -> Int[Array, "V"]:
    """Gives every voxel the majority label of its superpoint (section 3.4); ties go to the smaller class id.

    Args:
        labels: pseudo labels 0..num_classes-1; -1 = none: such a voxel has no vote, but takes the majority.
        superpoints: superpoint of each voxel, -1 = in none: such a voxel keeps its own label.
        num_superpoints: number of superpoint ids (a capacity: ids may be unused).
        num_classes: number of classes.
    """
    majority = segment_mode(labels, superpoints, num_superpoints, num_classes, labels >= 0)
    return jnp.where(superpoints >= 0, majority[superpoints], labels)


def update_teacher(teacher: PyTree, student: PyTree, step: Int[Array, ""], momentum: float) -> PyTree:
    """One exponential-moving-average step of parameters and batch-norm statistics.

    The momentum is warmed up as min(momentum, (1 + step) / (10 + step)): early on the teacher is the mean of few
    networks rather than of the random first one.
    """
    warm = (1.0 + step) / (10.0 + step)
    return optax.incremental_update(student, teacher, 1.0 - jnp.minimum(momentum, warm))
