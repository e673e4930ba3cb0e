"""Reductions over segments (superpoints): mean of features, majority vote of labels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32


def _bins(segments, num_segments, valid):
    """Segment of every row, with rows that are in none sent to the extra bin `num_segments`."""
    counted = segments >= 0
    if valid is not None:
        counted &= valid
    return jnp.where(counted, segments, num_segments)


def segment_mean(
    values: Float[Array, "N C"],
    segments: Int[Array, "N"],
    num_segments: int,
    valid: Bool[Array, "N"] | None = None,
) -> Float[Array, "{num_segments} C"]:
    """Mean of the valid rows of each segment, differentiable in `values`; zeros for an empty segment.

    Args:
        segments: 0..num_segments - 1, or -1 for a row in no segment.
        valid: rows that count; None counts all.
    """
    bins = _bins(segments, num_segments, valid)
    total = jax.ops.segment_sum(values, bins, num_segments + 1)[:-1]
    count = jax.ops.segment_sum(jnp.ones_like(values[:, :1]), bins, num_segments + 1)[:-1]
    return total / jnp.maximum(count, 1)


def segment_mode(
    labels: Int[Array, "N"],
    segments: Int[Array, "N"],
    num_segments: int,
    num_labels: int,
    valid: Bool[Array, "N"] | None = None,
) -> Int32[Array, "{num_segments}"]:
    """Most frequent label among the valid rows of each segment; ties go to the smaller label, -1 for an empty segment.

    Args:
        labels: 0..num_labels - 1; rows with any other label do not vote.
        segments: 0..num_segments - 1, or -1 for a row in no segment.
        valid: rows that vote; None lets all vote.
    """
    votes = (labels >= 0) & (labels < num_labels)
    bins = _bins(segments, num_segments, votes if valid is None else votes & valid)
    slots = jnp.where(bins < num_segments, bins * num_labels + labels, num_segments * num_labels)
    counts = jax.ops.segment_sum(jnp.ones_like(slots, jnp.int32), slots, num_segments * num_labels + 1)[:-1]
    counts = counts.reshape(num_segments, num_labels)
    return jnp.where(counts.any(1), counts.argmax(1), -1).astype(jnp.int32)
