"""Averaging features inside masks, and reading the masks SAM's script writes."""

import numpy as np
import pytest
from PIL import Image

from data.scene import View
from ggsd_jax.vision_language import sam_masks

FEATURES = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)


def test_a_pixel_takes_the_mean_of_the_smallest_mask_it_lies_in():
    masks = np.zeros((4, 4, 6), bool)
    masks[0, 1, 2] = True
    masks[1, :, :4] = True
    masks[2, 1:3, 2:5] = True  # masks[3] is empty
    refined = sam_masks.refine(FEATURES, masks)
    np.testing.assert_array_equal(refined[1, 2], FEATURES[1, 2])
    np.testing.assert_allclose(refined[2, 4], FEATURES[1:3, 2:5].mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(refined[2, 2], refined[2, 4], rtol=1e-6)
    np.testing.assert_allclose(refined[0, 0], FEATURES[:, :4].mean(axis=(0, 1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(refined[:, 5], FEATURES[:, 5])
    np.testing.assert_array_equal(sam_masks.refine(FEATURES, masks[:0]), FEATURES)


def test_masks_are_read_on_the_grid_of_the_view(tmp_path):
    view = View("scene/20", np.eye(4), np.eye(3), (6, 4))
    with pytest.raises(FileNotFoundError, match=r"scene/20: no masks of view 'scene/20'; SAM's scripts/amg.py"):
        sam_masks.read(tmp_path, view)
    folder = tmp_path / "scene" / "20"
    folder.mkdir(parents=True)
    (folder / "metadata.csv").write_text("id\n")
    assert sam_masks.read(tmp_path, view).shape == (0, 4, 6)
    mask = np.zeros((8, 12), np.uint8)
    mask[2:4, 6:] = 1  # or any other value but 0
    Image.fromarray(mask).save(folder / "0.png")
    (read,) = sam_masks.read(tmp_path, view)
    assert np.argwhere(read).tolist() == [[1, 3], [1, 4], [1, 5]]
    Image.fromarray(mask[:6]).save(folder / "1.png")
    with pytest.raises(ValueError, match=r"1\.png: 12 x 6 pixels, the shape of the view is 6 x 4"):
        sam_masks.read(tmp_path, view)
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"0\.png: truncated or no image"):
        sam_masks.read(tmp_path, view)
