"""Segment reductions against plain NumPy loops."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from kernels.segment import segment_mean, segment_mode

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)
S, L = 7, 4  # of fixed size, so that each function is compiled once


def case(seed, n=60):
    """Values, labels, segments with -1 and empty ones, validity."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, L + 1, n).astype(np.int32)
    segments = rng.integers(-1, rng.integers(1, S + 1), n).astype(np.int32)
    return rng.normal(size=(n, 3)).astype(np.float32), labels, segments, rng.random(n) < 0.7


@few
@given(seeds)
def test_mean_is_taken_over_the_valid_rows_of_each_segment(seed):
    values, _, segments, valid = case(seed)
    for keep, flags in ((valid, jnp.asarray(valid)), (np.ones_like(valid), None)):
        found = segment_mean(jnp.asarray(values), jnp.asarray(segments), S, flags)
        for s in range(S):
            mine = keep & (segments == s)
            expected = values[mine].mean(0) if mine.any() else np.zeros(3)
            np.testing.assert_allclose(found[s], expected, atol=1e-6)


@few
@given(seeds)
def test_mode_is_the_most_frequent_valid_label_and_ties_go_to_the_smaller(seed):
    _, labels, segments, valid = case(seed)
    for keep, flags in ((valid, jnp.asarray(valid)), (np.ones_like(valid), None)):
        found = segment_mode(jnp.asarray(labels), jnp.asarray(segments), S, L, flags)
        assert found.dtype == jnp.int32
        for s in range(S):
            votes = labels[keep & (segments == s) & (labels >= 0) & (labels < L)]
            expected = np.bincount(votes, minlength=L).argmax() if len(votes) else -1
            assert found[s] == expected


@few
@given(seeds)
def test_order_of_the_rows_does_not_matter(seed):
    values, labels, segments, valid = (jnp.asarray(a) for a in case(seed))
    order = np.random.default_rng(seed).permutation(len(labels))
    mode = segment_mode(labels, segments, S, L, valid)
    np.testing.assert_array_equal(mode, segment_mode(labels[order], segments[order], S, L, valid[order]))
    mean = segment_mean(values, segments, S, valid)
    np.testing.assert_allclose(mean, segment_mean(values[order], segments[order], S, valid[order]), atol=1e-6)


def test_mean_of_means_is_itself():
    values, _, segments, _ = (jnp.asarray(a) for a in case(3))
    inside = segments >= 0
    mean = segment_mean(values, segments, S)
    np.testing.assert_allclose(segment_mean(mean[segments], segments, S, inside), mean, atol=1e-6)


def test_mean_has_the_gradient_of_finite_differences_and_none_from_rows_left_out():
    values, _, segments, valid = (jnp.asarray(a) for a in case(1))
    with jax.enable_x64(True):
        exact = jnp.asarray(np.asarray(values, np.float64))
        mean = jax.jit(lambda v: segment_mean(v, segments, S, valid))
        check_grads(mean, (exact,), order=1, modes=("fwd", "rev"))
    grad = jax.grad(lambda v: (segment_mean(v, segments, S, valid) ** 2).sum())(values)
    left_out = np.asarray(~valid | (segments < 0))
    assert not np.asarray(grad)[left_out].any() and np.isfinite(grad).all()


def test_a_label_that_marks_no_class_does_not_vote():
    labels = jnp.asarray([255, 255, 1, 255], jnp.uint8)
    assert segment_mode(labels, jnp.zeros(4, jnp.int32), 1, L).tolist() == [1]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_mean_of_many_half_precision_rows_does_not_lose_the_small_ones(dtype):
    mean = segment_mean(jnp.ones((5000, 1), dtype), jnp.zeros(5000, jnp.int32), 1)
    assert mean.dtype == dtype and mean.item() == 1.0


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.uint64])
def test_wide_ids_are_not_turned_into_floats(dtype):
    segments, labels = np.array([2, 2, 0], dtype), np.array([3, 3, 1], dtype)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        assert segment_mode(labels, segments, 4, 4).tolist() == [1, -1, 3, -1]
        assert segment_mean(np.array([[5.0], [7.0], [1.0]]), segments, 4).tolist() == [[1], [0], [6], [0]]


def test_rows_that_do_not_belong_together_are_refused_and_the_shapes_named():
    values, labels, segments, valid = (jnp.asarray(a) for a in case(1))
    mean, mode = inspect.unwrap(segment_mean), inspect.unwrap(segment_mode)  # without the check of annotations
    for call, name in (
        (lambda: mean(values[:, 0], segments, S), "values"),
        (lambda: mean(labels[:, None], segments, S), "values"),
        (lambda: mean(values, segments[1:], S), "segments"),
        (lambda: mean(values, segments.astype(float), S), "segments"),
        (lambda: mean(values, segments, S, valid[:, None]), "valid"),
        (lambda: mode(labels[1:], segments, S, L), "segments"),
        (lambda: mode(labels.astype(float), segments, S, L), "labels"),
        (lambda: mode(labels, segments, S, L, valid[:, None]), "valid"),
        (lambda: mode(labels, segments, S, 0), "labels"),
        (lambda: mode(labels, segments, 2**20, 2**11), "labels"),
    ):
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_narrow_ids_are_counted_as_wide_ones(dtype):
    segments, labels = jnp.array([100, 100, 7], dtype), jnp.array([3, 3, 4], dtype)
    np.testing.assert_array_equal(segment_mode(labels, segments, 300, 400)[jnp.array([100, 7, 8])], [3, 4, -1])
    means = segment_mean(jnp.array([[5.0], [7.0], [1.0]]), segments, 300)
    np.testing.assert_array_equal(means[jnp.array([100, 7, 8])], [[6], [1], [0]])
