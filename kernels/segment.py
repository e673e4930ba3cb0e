"""Reductions over segments (superpoints): mean of features, majority vote of labels."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Integer


def _bins(segments, num_segments, counted):
    """Segment of every row; `num_segments`, which the reductions drop, for rows that are in none or do not count."""
    counted = counted & (segments >= 0) & (segments < num_segments)
    return jnp.where(counted, segments, num_segments)


def _ids(name, ids, rows):
    """Checked, and of at least 32 bits: `num_segments` and the slots of `segment_mode` may be beyond narrower ones."""
    ids = jnp.asarray(ids)
    if ids.shape != (rows,) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} is {ids.dtype} {list(ids.shape)}: expected integers [{rows}], one per row")
    return ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids


def _counted(valid, rows):
    if valid is None:
        return jnp.ones(rows, bool)
    valid = jnp.asarray(valid)
    if valid.shape != (rows,):
        raise ValueError(f"valid has shape {list(valid.shape)}: expected [{rows}], one per row")
    return valid.astype(bool)


def segment_mean(
    values: Float[Array | np.ndarray, "N C"],
    segments: Integer[Array | np.ndarray, " N"],
    num_segments: int,
    valid: Bool[Array | np.ndarray, " N"] | None = None,
) -> Float[Array, "{num_segments} C"]:
    """Mean of the valid rows of each segment, zeros for an empty segment; differentiable in `values`.

    Sums are taken one row after the other in at least float32, so that a mean over 100,000 rows is good to about
    1e-4 (take float64 for more); the result has the dtype of `values`.

    Args:
        segments: 0..num_segments - 1; a row with any other id (-1) is in none.
        valid: rows that count; None counts all.
    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    values = jnp.asarray(values)
    if values.ndim != 2 or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"values is {values.dtype} {list(values.shape)}: expected floats [N, C]")
    rows = len(values)
    bins = _bins(_ids("segments", segments, rows), num_segments, _counted(valid, rows))
    summands = values.astype(jnp.float32) if values.dtype.itemsize < 4 else values
    total = jax.ops.segment_sum(summands, bins, num_segments)
    count = jax.ops.segment_sum(jnp.ones(rows, jnp.int32), bins, num_segments)
    return (total / jnp.maximum(count, 1).astype(total.dtype)[:, None]).astype(values.dtype)


def segment_mode(
    labels: Integer[Array | np.ndarray, " N"],
    segments: Integer[Array | np.ndarray, " N"],
    num_segments: int,
    num_labels: int,
    valid: Bool[Array | np.ndarray, " N"] | None = None,
) -> Int32[Array, "{num_segments}"]:
    """Most frequent label among the valid rows of each segment; ties go to the smaller label.

    Args:
        labels: 0..num_labels - 1; a row with any other label (-1, 255) does not vote.
        segments: 0..num_segments - 1; a row with any other id (-1) is in none.
        valid: rows that vote; None lets all vote.
    Returns:
        The label of each segment, -1 where nobody votes.
    Raises:
        ValueError: shapes or dtypes that do not fit, or a table of votes, segments times labels, that int32 cannot
            count.
    """
    rows, table = len(labels), num_segments * num_labels
    if num_labels < 1 or table >= 2**31:
        raise ValueError(f"{num_segments} segments, {num_labels} labels: expected a label, and a product under 2^31")
    labels = _ids("labels", labels, rows)
    votes = (labels >= 0) & (labels < num_labels) & _counted(valid, rows)
    bins = _bins(_ids("segments", segments, rows), num_segments, votes)
    bins, labels = bins.astype(jnp.int32), labels.astype(jnp.int32)
    slots = jnp.where(bins < num_segments, bins * num_labels + labels, table)
    counts = jax.ops.segment_sum(jnp.ones_like(slots), slots, table)
    counts = counts.reshape(num_segments, num_labels)
    return jnp.where(counts.any(1), counts.argmax(1), -1).astype(jnp.int32)
