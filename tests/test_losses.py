"""The loss terms against their equations written out row by row, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggsd_jax.losses import (
    cosine_similarity,
    normalize,
    point_distillation_loss,
    self_distillation_loss,
    superpoint_distillation_loss,
)

ROWS, CHANNELS, LABELS, SUPERPOINTS = 13, 7, 4, 5  # one shape, so that hypothesis compiles each term once
TEMPERATURE = 0.01

point = jax.jit(jax.value_and_grad(point_distillation_loss, has_aux=True))
superpoint = jax.jit(jax.value_and_grad(superpoint_distillation_loss, has_aux=True), static_argnums=3)
self_distillation = jax.jit(jax.value_and_grad(self_distillation_loss, has_aux=True), static_argnums=4)


def cos(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b / (max(np.linalg.norm(a), 1e-8) * max(np.linalg.norm(b), 1e-8))


@st.composite
def batches(draw):
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return {
        "student": generator.standard_normal((ROWS, CHANNELS)).astype(np.float32),
        "targets": generator.standard_normal((ROWS, CHANNELS)).astype(np.float16),
        "text": generator.standard_normal((LABELS, CHANNELS)).astype(np.float32),
        "superpoints": generator.integers(-1, SUPERPOINTS, ROWS).astype(np.int32),
        "labels": generator.integers(-1, LABELS, ROWS).astype(np.int32),
        "valid": generator.random(ROWS) < share,
    }


@settings(max_examples=15, deadline=None)
@given(batches())
def test_point_term_is_equation_1(b):
    (total, count), _ = point(b["student"], b["targets"], b["valid"])
    expected = [1 - cos(s, t) for s, t, v in zip(b["student"], b["targets"], b["valid"], strict=True) if v]
    assert count == len(expected)
    assert total == pytest.approx(sum(expected), abs=1e-5)


@settings(max_examples=15, deadline=None)
@given(batches())
def test_superpoint_term_is_equations_2_and_3(b):
    (total, count), _ = superpoint(b["student"], b["targets"], b["superpoints"], SUPERPOINTS, b["valid"])
    expected = []
    for n in range(SUPERPOINTS):
        rows = b["valid"] & (b["superpoints"] == n)
        if rows.any():
            student, targets = (b[key][rows].astype(np.float64).mean(0) for key in ("student", "targets"))
            expected.append(1 - cos(student, targets))
    assert count == len(expected)
    assert total == pytest.approx(sum(expected), abs=1e-4)


@settings(max_examples=15, deadline=None)
@given(batches())
def test_self_distillation_term_is_equation_6(b):
    (total, count), _ = self_distillation(b["student"], b["text"], b["labels"], b["valid"], TEMPERATURE)
    expected = []
    for row, label, valid in zip(b["student"], b["labels"], b["valid"], strict=True):
        if valid and label >= 0:
            logits = np.array([cos(row, text) for text in b["text"]]) / TEMPERATURE
            expected.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])
    assert count == len(expected)
    assert total == pytest.approx(sum(expected), rel=1e-4, abs=1e-3)


@settings(max_examples=10, deadline=None)
@given(batches())
def test_rows_left_out_change_neither_terms_nor_gradients(b):
    out = ~b["valid"]
    garbage = {key: b[key].copy() for key in ("student", "targets", "labels", "superpoints")}
    garbage["student"][out] = np.nan
    garbage["targets"][out] = np.inf
    garbage["labels"][out] = LABELS + 9
    garbage["superpoints"][out] = SUPERPOINTS + 9
    g = b | garbage
    for one, other in (
        [point(x["student"], x["targets"], x["valid"]) for x in (b, g)],
        [superpoint(x["student"], x["targets"], x["superpoints"], SUPERPOINTS, x["valid"]) for x in (b, g)],
        [self_distillation(x["student"], x["text"], x["labels"], x["valid"], TEMPERATURE) for x in (b, g)],
    ):
        jax.tree.map(np.testing.assert_array_equal, one, other)
        assert not np.asarray(one[1])[out].any()


@settings(max_examples=10, deadline=None)
@given(batches())
def test_sums_and_counts_of_parts_add_up_to_the_whole(b):
    """What lets replicas divide once."""
    for term in (
        lambda valid: point(b["student"], b["targets"], valid)[0],
        lambda valid: self_distillation(b["student"], b["text"], b["labels"], valid, TEMPERATURE)[0],
    ):
        first = np.arange(ROWS) < 4
        parts = [term(b["valid"] & first), term(b["valid"] & ~first)]
        np.testing.assert_allclose(np.sum(parts, axis=0), term(b["valid"]), rtol=1e-5, atol=1e-5)


def test_terms_do_not_depend_on_the_length_of_features():
    generator = np.random.default_rng(0)
    student, targets = generator.standard_normal((2, ROWS, CHANNELS)).astype(np.float32)
    labels, valid = np.arange(ROWS) % CHANNELS, np.ones(ROWS, bool)
    text = np.eye(CHANNELS, dtype=np.float32)
    for scale in (1e-4, 1e4):
        scaled = point(scale * student, targets / scale, valid)[0]
        np.testing.assert_allclose(scaled, point(student, targets, valid)[0], rtol=1e-5)
        scaled = self_distillation(scale * student, text * scale, labels, valid, TEMPERATURE)[0]
        np.testing.assert_allclose(scaled, self_distillation(student, text, labels, valid, TEMPERATURE)[0], rtol=1e-4)


def test_zero_rows_have_cosine_zero_and_finite_gradients():
    zeros, ones = np.zeros((3, CHANNELS), np.float32), np.ones((3, CHANNELS), np.float32)
    valid, ids = np.ones(3, bool), np.zeros(3, np.int32)
    assert not np.asarray(cosine_similarity(jnp.asarray(zeros), jnp.asarray(ones))).any()
    assert not np.asarray(normalize(jnp.asarray(zeros))).any()
    for (total, count), grad in (
        point(zeros, ones, valid),
        superpoint(zeros, ones, ids, 2, valid),
        self_distillation(zeros, ones[:2], ids, valid, TEMPERATURE),
    ):
        assert np.isfinite(total) and count > 0 and np.isfinite(grad).all()


def test_confident_mistakes_at_low_temperature_stay_finite():
    text = np.array([[1, 0], [-1, 0]], np.float32)
    student, labels = np.array([[5, 0]], np.float32), np.array([1])
    (total, count), grad = self_distillation(student, text, labels, np.ones(1, bool), 1e-3)
    assert total == pytest.approx(2000) and count == 1 and np.isfinite(grad).all()


@pytest.mark.parametrize("term", ["point", "superpoint", "self"])
def test_gradients_are_those_of_finite_differences(term):
    generator = np.random.default_rng(1)
    with jax.enable_x64(True):
        student, targets, tangent = generator.standard_normal((3, ROWS, CHANNELS))
        ids, valid = np.arange(ROWS) % 4 - 1, np.arange(ROWS) % 5 > 0
        loss = {
            "point": lambda x: point_distillation_loss(x, targets, valid)[0],
            "superpoint": lambda x: superpoint_distillation_loss(x, targets, ids, 3, valid)[0],
            "self": lambda x: self_distillation_loss(x, targets[:LABELS], ids, valid, 0.1)[0],
        }[term]
        student, targets, tangent, ids, valid = map(jnp.asarray, (student, targets, tangent, ids, valid))
        slope = jnp.sum(jax.grad(loss)(student) * tangent)
        step = 1e-6
        difference = (loss(student + step * tangent) - loss(student - step * tangent)) / (2 * step)
        assert slope.dtype == jnp.float64
        assert float(slope) == pytest.approx(float(difference), rel=1e-7)
