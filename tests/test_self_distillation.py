import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ggsd_jax.self_distillation import pseudo_labels, update_teacher, vote


def test_pseudo_label_is_the_nearest_text_whatever_the_scale_of_the_feature():
    text = np.eye(3, 8, dtype=np.float32)
    features = np.array([[9, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1e-3, 0, 0, 0, 0, 5]], np.float32)
    np.testing.assert_array_equal(pseudo_labels(jnp.asarray(features), jnp.asarray(text)), [0, 2])
    np.testing.assert_array_equal(pseudo_labels(jnp.asarray(1e4 * features), jnp.asarray(text)), [0, 2])
    np.testing.assert_array_equal(pseudo_labels(jnp.asarray(0 * features), jnp.asarray(text)), [-1, -1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 5)), min_size=7, max_size=7))
def test_a_vote_is_the_majority_of_the_superpoint_and_leaves_the_rest_alone(rows):
    labels, superpoints = np.array(rows, np.int32).T
    voted = np.asarray(vote(jnp.asarray(labels), jnp.asarray(superpoints), 6, 4))
    for row, (label, superpoint) in enumerate(rows):
        members = labels[(superpoints == superpoint) & (labels >= 0)]
        if superpoint < 0:
            assert voted[row] == label
        elif len(members) == 0:
            assert voted[row] == -1
        else:
            assert voted[row] == np.bincount(members).argmax()  # the smallest of the most frequent


def test_a_young_teacher_follows_the_student_and_an_old_one_hardly_moves():
    student, teacher = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
    young = update_teacher(teacher, student, jnp.int32(0), 0.999)["w"]
    old = update_teacher(teacher, student, jnp.int32(100_000), 0.999)["w"]
    np.testing.assert_allclose(young, 0.9, rtol=1e-5)
    np.testing.assert_allclose(old, 0.001, rtol=1e-3)
