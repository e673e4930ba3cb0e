"""The terms of the GGSD objective: Eq. 1 (points), Eq. 2-3 (superpoints) and Eq. 6 (self-distillation); and that of
training with labels.

Every term comes back as (sum, count) over this replica's rows: the training step adds both over the replicas
and divides once, so that replicas with unequal numbers of voxels weigh as one batch would. Rows marked
invalid take no part, whatever they hold. Arithmetic is float32 (float64 where the student is).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.precision import matmul_precision
from kernels.segment import segment_mean

MIN_NORM = 1e-8  # as torch.nn.functional.cosine_similarity

LossTerm = tuple[Float[Array, ""], Float[Array, ""]]  # sum, count


def normalize(rows: Float[Array, "*N C"]) -> Float[Array, "*N C"]:
    """Rows scaled to length 1; a row of zeros stays zero, and its gradient finite."""
    rows = _full_precision(rows)
    squared = jnp.sum(rows * rows, axis=-1, keepdims=True)
    return rows * jax.lax.rsqrt(jnp.maximum(squared, MIN_NORM**2))


@jax.custom_vjp
def cosine_similarity(a: Float[Array, "N C"], b: Float[Array, "N C"]) -> Float[Array, " N"]:
    """Row-wise cosine, norms clamped at 1e-8; 0 where a row is zero.

    Its gradient is written down: autodiff would store the unit rows, and read and write them several times.
    """
    return _cosine_forward(a, b)[0]


def _cosine_forward(a, b):
    wide_a, wide_b = _full_precision(a), _full_precision(b)
    norm_a, norm_b = (jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1), MIN_NORM**2)) for x in (wide_a, wide_b))
    cosine = jnp.sum(wide_a * wide_b, axis=-1) / (norm_a * norm_b)
    return cosine, (a, b, norm_a, norm_b, cosine)


def _cosine_backward(residuals, grad):
    a, b, norm_a, norm_b, cosine = residuals
    towards = grad / (norm_a * norm_b)

    def gradient(x, other, norm):
        along = jnp.where(norm > MIN_NORM, grad * cosine / jnp.square(norm), 0)  # what a clamped norm does not take
        return (towards[:, None] * _full_precision(other) - along[:, None] * _full_precision(x)).astype(x.dtype)

    return gradient(a, b, norm_a), gradient(b, a, norm_b)


cosine_similarity.defvjp(_cosine_forward, _cosine_backward)


def point_distillation_loss(
    student: Float[Array, "M C"], targets: Float[Array, "M C"], valid: Bool[Array, " M"]
) -> LossTerm:
    """Eq. 1: 1 - cos(2D feature, 3D feature), summed over the valid rows, and their number."""
    keep = valid[:, None]
    # selected before the arithmetic: a NaN in a padding row would reach the gradient through 0 * NaN
    cosine = cosine_similarity(jnp.where(keep, student, 0), jnp.where(keep, targets, 0))
    return _masked_sum(1 - cosine, valid)


def superpoint_distillation_loss(
    student: Float[Array, "M C"],
    targets: Float[Array, "M C"],
    superpoints: Int[Array, " M"],
    num_superpoints: int,
    valid: Bool[Array, " M"],
) -> LossTerm:
    """Eq. 2-3: 1 - cos of the mean 2D and mean 3D feature of each superpoint, and the number of superpoints.

    Means run over valid rows. Rows in no superpoint (-1) and superpoints without a valid row are left out.
    """
    inside = valid & (superpoints >= 0)
    keep = inside[:, None]
    mean_student, mean_targets = (
        segment_mean(jnp.where(keep, _full_precision(rows), 0), superpoints, num_superpoints, inside)
        for rows in (student, targets)
    )
    slot = jnp.where(inside, superpoints, num_superpoints)  # one past the end: dropped
    occupied = jnp.zeros(num_superpoints, bool).at[slot].set(True, mode="drop")
    return point_distillation_loss(mean_student, mean_targets, occupied)


def self_distillation_loss(
    student: Float[Array, "V C"],
    text: Float[Array, "L C"],
    labels: Int[Array, " V"],
    valid: Bool[Array, " V"],
    temperature: float,
) -> LossTerm:
    """Eq. 6: cross-entropy of softmax(student . text / temperature) against pseudo labels, and their number.

    Student and text rows are scaled to length 1 first: at the paper's temperature of 0.01 raw products would
    saturate the softmax. Rows with label -1 and invalid rows are left out.
    """
    labelled = valid & (labels >= 0)
    student = _full_precision(jnp.where(labelled[:, None], student, 0))
    products = jnp.matmul(student, normalize(text).T, precision=matmul_precision())
    squared = jnp.sum(student * student, axis=-1, keepdims=True)
    cosine = products * jax.lax.rsqrt(jnp.maximum(squared, MIN_NORM**2))
    log_p = jax.nn.log_softmax(cosine / temperature, axis=-1)
    picked = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return _masked_sum(-picked, labelled)


def cross_entropy_loss(logits: Float[Array, "V L"], labels: Int[Array, " V"]) -> LossTerm:
    """Cross-entropy of softmax(logits) against true labels, and their number; rows with label -1 are left out."""
    logits = jnp.where((labels >= 0)[:, None], _full_precision(logits), 0)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return _masked_sum(-picked, labels >= 0)


def _masked_sum(values: Float[Array, " N"], mask: Bool[Array, " N"]) -> LossTerm:
    return jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask, dtype=values.dtype)


def _full_precision(rows: Float[Array, "*N C"]) -> Float[Array, "*N C"]:
    return rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
