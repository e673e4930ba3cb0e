"""Resizing as torch does it. The blocks are tested with the networks made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ggsd_jax.vision_language.transformer import resize, resize_positions

SIZES = [((3, 4), (3, 4)), ((3, 4), (6, 8)), ((5, 7), (11, 9)), ((1, 2), (4, 1)), ((6, 6), (4, 5))]


@pytest.mark.parametrize("old, new", SIZES)
@pytest.mark.parametrize("kernel, align_corners", [("linear", False), ("linear", True), ("cubic", False)])
def test_resizing_is_torchs(old, new, kernel, align_corners):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).normal(size=(2, *old, 3)).astype(np.float32)
    mode = {"linear": "bilinear", "cubic": "bicubic"}[kernel]
    theirs = torch.nn.functional.interpolate(
        torch.tensor(image).permute(0, 3, 1, 2), new, mode=mode, align_corners=align_corners
    ).permute(0, 2, 3, 1)
    ours = resize(jnp.asarray(image), new, kernel=kernel, align_corners=align_corners)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kernel, align_corners", [("linear", False), ("linear", True), ("cubic", False)])
def test_a_constant_stays_constant_and_aligned_corners_stay_in_place(kernel, align_corners):
    for old, new in SIZES:
        ones = resize(jnp.ones((1, *old, 1)), new, kernel=kernel, align_corners=align_corners)
        np.testing.assert_allclose(ones, np.ones((1, *new, 1)), atol=1e-6)
    ramp = jnp.arange(4.0).reshape(1, 4, 1, 1)
    np.testing.assert_allclose(resize(ramp, (7, 1), align_corners=True)[0, :, 0, 0], np.arange(7) / 2, atol=1e-6)


def test_positions_keep_their_class_token_and_their_own_grid():
    table = jax.random.normal(jax.random.key(0), (10, 2))
    np.testing.assert_array_equal(resize_positions(table, (3, 3), "cubic"), table)
    wider = resize_positions(table, (3, 6), "cubic")
    assert wider.shape == (19, 2)
    np.testing.assert_array_equal(wider[0], table[0])
