"""OpenSeg: a miniature SavedModel with the signature of the exported network, run as OpenScene runs that."""

import sys

import ml_collections
import numpy as np
import pytest

from data.scene import View
from data.synthetic import generate_room
from ggsd_jax import datasets, prepare
from ggsd_jax.vision_language import openseg, teachers

SIDE, WIDTH = 16, 6  # of the square the miniature pads images to, and of its features


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """A network whose feature is its own row and column, the colour it saw there, and the sum of the text."""
    tf = pytest.importorskip("tensorflow")

    class Miniature(tf.Module):
        def __init__(self):
            super().__init__()
            self.gain = tf.Variable(1.0)

        @tf.function(input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([1, None, WIDTH], tf.float32)])
        def serve(self, inp_image_bytes, inp_text_emb):
            image = tf.io.decode_image(inp_image_bytes, 3, expand_animations=False)
            size = tf.cast(tf.shape(image)[:2], tf.float32)
            scale = SIDE / tf.reduce_max(size)
            inner = tf.cast(size * scale, tf.int32)
            colors = tf.image.resize(tf.cast(image, tf.float32), inner, method="nearest")
            places = tf.stack(tf.meshgrid(tf.range(inner[0]), tf.range(inner[1]), indexing="ij"), axis=-1)
            text = tf.fill([*tf.unstack(inner), 1], tf.reduce_sum(inp_text_emb))
            features = self.gain * tf.concat([tf.cast(places, tf.float32), colors, text], axis=-1)
            padding = [[0, SIDE - inner[0]], [0, SIDE - inner[1]], [0, 0]]
            info = tf.stack([size, tf.constant([SIDE, SIDE], tf.float32), [scale, scale], [0.0, 0.0]])
            features = tf.pad(features, padding, constant_values=999.0)[None]
            return {"image_info": info, "ppixel_ave_feat": features, "image_embedding_feat": -features}

    folder = tmp_path_factory.mktemp("openseg") / "exported"
    module = Miniature()
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    return folder


@pytest.mark.parametrize("size", [(8, 6), (5, 7), (32, 24), (16, 1)])
def test_features_are_cropped_and_brought_to_the_pixels_as_openscene_does(saved_model, size):
    width, height = size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    view = View("view", np.eye(4), np.eye(3), size, image=np.repeat(np.repeat(image, 3, axis=0), 3, axis=1))
    teacher = openseg.load(saved_model)
    views, features_of = teacher.look([view, view])
    features = [features_of(view) for view in views][1]
    assert (teacher.width, teacher.space) == (WIDTH, "ViT-L/14@336px")
    assert features.shape == (height, width, WIDTH) and features.dtype == np.float32
    for axis, side in enumerate((height, width)):
        inner = side * SIDE // max(size)
        places = np.floor(np.arange(side) * ((inner - 1) / max(side - 1, 1)) + 0.5)  # corners on corners, then nearest
        seen = features[:, 0, 0] if axis == 0 else features[0, :, 1]
        np.testing.assert_array_equal(seen, places)
    row, col = (((features[..., i] + 0.5) * max(size) / SIDE).astype(int) for i in (0, 1))
    np.testing.assert_array_equal(features[..., 2:5], image[row, col])  # PNG: not a bit of the image is lost
    np.testing.assert_array_equal(features[..., 5], 0)  # the text is zero


def test_the_config_takes_it_with_words_of_its_own_clip_only(saved_model, tmp_path):
    def words(model: str) -> str:
        path = tmp_path / f"{model.replace('/', '-')}.npz"
        np.savez(path, embedding=np.eye(1, WIDTH), names=["chair"], model=model)
        return str(path)

    teacher = dict(name="openseg", weights=str(saved_model))
    config = ml_collections.ConfigDict(dict(teacher=teacher, text=dict(encoder=words("ViT-B/32"))))
    with pytest.raises(ValueError, match="in the space of ViT-B/32, the 2D features are in that of ViT-L/14@336px"):
        teachers.make(config, ["chair"])
    config.text.encoder = words("ViT-L/14@336px")
    room = generate_room(0, scan_views=2, views=2, size=(40, 30))
    scene = prepare.add_features(datasets.RawScene(*room, border=0), teachers.make(config, ["chair"]))
    assert len(scene.features) > 50 and scene.features.shape[1] == WIDTH
    assert 0 <= scene.features.min() and scene.features.max() <= 255  # nothing of the padding


def test_another_model_a_damaged_one_and_none_are_named(saved_model, tmp_path):
    tf = pytest.importorskip("tensorflow")
    other = tf.Module()
    other.double = tf.function(lambda x: {"y": 2 * x}, input_signature=[tf.TensorSpec([], tf.float32, name="x")])
    tf.saved_model.save(other, str(tmp_path / "other"), signatures={"serving_default": other.double})
    lacks = "image_info, inp_image_bytes, inp_text_emb, ppixel_ave_feat; it has x -> y"
    with pytest.raises(ValueError, match=f"other: not OpenSeg's export, its signature lacks {lacks}"):
        openseg.load(tmp_path / "other")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "saved_model.pb").write_bytes((saved_model / "saved_model.pb").read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged: truncated or not a SavedModel"):
        openseg.load(damaged)


def test_a_missing_folder_is_named_without_tensorflow(tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved_model.pb there; expected .*openseg_exported_clip"):
        openseg.load(tmp_path)


def test_without_tensorflow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(ValueError, match=r"pip install -e .\[openseg\]"):
        openseg.load(tmp_path)
