"""Reductions over segments (superpoints): mean of features, majority vote of labels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, Integer


def _bins(segments, num_segments, counted):
    """Segment of every row; `num_segments`, which the reductions drop, for rows that are in none or do not count."""
    segments = _wide(segments)
    counted = counted & (segments >= 0) & (segments < num_segments)
    return jnp.where(counted, segments, num_segments)


def _wide(ids):
    """At least 32 bits: `num_segments`, and the slots of `segment_mode`, may be beyond narrower ones."""
    return ids.astype(jnp.promote_types(ids.dtype, jnp.int32))


def segment_mean(
    values: Float[Array, "N C"],
    segments: Int[Array, " N"],
    num_segments: int,
    valid: Bool[Array, " N"] | None = None,
) -> Float[Array, "{num_segments} C"]:
    """Mean of the valid rows of each segment, zeros for an empty segment; differentiable in `values`.

    Sums are taken in at least float32; the result has the dtype of `values`.

    Args:
        segments: 0..num_segments - 1; a row with any other id (-1) is in none.
        valid: rows that count; None counts all.
    """
    bins = _bins(segments, num_segments, True if valid is None else valid.astype(bool))
    summands = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    total = jax.ops.segment_sum(summands, bins, num_segments)
    count = jax.ops.segment_sum(jnp.ones_like(summands[:, 0]), bins, num_segments)
    return (total / jnp.maximum(count, 1)[:, None]).astype(values.dtype)


def segment_mode(
    labels: Integer[Array, " N"],
    segments: Int[Array, " N"],
    num_segments: int,
    num_labels: int,
    valid: Bool[Array, " N"] | None = None,
) -> Int32[Array, "{num_segments}"]:
    """Most frequent label among the valid rows of each segment; ties go to the smaller label.

    Args:
        labels: 0..num_labels - 1; a row with any other label (-1, 255) does not vote.
        segments: 0..num_segments - 1; a row with any other id (-1) is in none.
        valid: rows that vote; None lets all vote.
    Returns:
        The label of each segment, -1 where nobody votes.
    """
    labels = _wide(labels)
    votes = (labels >= 0) & (labels < num_labels)
    bins = _bins(segments, num_segments, votes if valid is None else votes & valid.astype(bool))
    slots = jnp.where(bins < num_segments, bins * num_labels + labels, num_segments * num_labels)
    counts = jax.ops.segment_sum(jnp.ones_like(slots), slots, num_segments * num_labels)
    counts = counts.reshape(num_segments, num_labels)
    return jnp.where(counts.any(1), counts.argmax(1), -1).astype(jnp.int32)
