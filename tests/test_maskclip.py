"""MaskCLIP: against transformers' CLIP with the last block opened up, and how images are shown to it."""

from collections import Counter

import numpy as np
import pytest

from data.scene import View
from ggsd_jax.vision_language import clip, maskclip


def view_of(image: np.ndarray, size=(20, 15)) -> View:
    return View("view", np.eye(4), np.eye(3), size, image=image)


def features(teacher, *views) -> list[np.ndarray]:
    given, features_of = teacher.look(views)
    return [features_of(view) for view in given]


def test_features_of_a_view_are_those_of_the_reference(clip_snapshot):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = clip_snapshot()
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    (ours,) = features(maskclip.load(folder, short_side=32), view_of(image, (24, 16)))

    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tower = model.vision_model
    pixels = (torch.tensor(image).float() / 255 - torch.tensor(clip.MEAN)) / torch.tensor(clip.STD)
    pixels = pixels.permute(2, 0, 1)[None]
    with torch.no_grad():
        states = tower(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        last = tower.encoder.layers[-1]
        x = states[-2]
        x = x + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(x)))
        x = x + last.mlp(last.layer_norm2(x))
        x = model.visual_projection(tower.post_layernorm(x[:, 1:])).reshape(1, 4, 6, -1)
        x = x / x.norm(dim=-1, keepdim=True)
        theirs = torch.nn.functional.interpolate(x.permute(0, 3, 1, 2), (16, 24), mode="bilinear")[0].permute(1, 2, 0)
    assert ours.shape == (16, 24, 16) and ours.dtype == np.float32
    assert np.abs(ours - theirs.numpy()).max() < 1e-5 * np.abs(theirs.numpy()).max()


def test_on_an_accelerator_it_computes_in_bfloat16_and_stays_near(clip_snapshot, on_an_accelerator):
    folder, image = clip_snapshot(), np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    full, half, products = on_an_accelerator(
        lambda: maskclip.load(folder, short_side=32),
        lambda teacher: features(teacher, view_of(image, (24, 16)))[0],
        image[None],
    )
    assert half.dtype == np.float32 and 1e-4 < np.abs(half - full).max() < 0.05
    assert Counter(products) == {"bf16": 14, "f32": 2}  # which resize the position embeddings


def test_images_keep_their_aspect_in_multiples_of_the_patch():
    assert maskclip.network_size((1296, 968), 16, 448) == (592, 448)
    assert maskclip.network_size((640, 512), 14, 448) == (560, 448)
    assert maskclip.network_size((968, 1296), 32, 448) == (448, 608)


def test_the_full_image_is_used_not_the_views_coarse_grid(clip_snapshot):
    teacher = maskclip.load(clip_snapshot(), short_side=32)
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    coarse = view_of(image).pixels()
    one, other = features(teacher, view_of(image), view_of(coarse))
    assert one.shape == other.shape and np.abs(one - other).max() > 0.05


def test_features_are_local(clip_snapshot):
    """Each patch keeps its own value in the last block; with one block there would be no mixing at all."""
    teacher = maskclip.load(clip_snapshot(), short_side=32)
    image = np.zeros((32, 64, 3), np.uint8)
    changed = image.copy()
    changed[:, 56:] = 255
    one, other = features(teacher, view_of(image, (8, 4)), view_of(changed, (8, 4)))
    moved = np.abs(one - other).max(axis=(0, 2))
    assert moved[7] > 2 * moved[:4].max()


def test_a_view_without_an_image_is_named(clip_snapshot):
    with pytest.raises(ValueError, match="view 'blind' has no image"):
        features(maskclip.load(clip_snapshot(), short_side=32), View("blind", np.eye(4), np.eye(3), (4, 3)))
