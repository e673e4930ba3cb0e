"""OpenSeg (Ghiasi et al. 2022, "Scaling Open-Vocabulary Image Segmentation with Image-Level Labels") as OpenScene
takes features from it.

The network is the TensorFlow SavedModel its authors exported, `openseg_exported_clip`, in the space of CLIP
ViT-L/14@336px's text. TensorFlow is an extra: `pip install -e .[openseg]`.
"""

import io
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float16, UInt8
from PIL import Image

from data.scene import View
from ggsd_jax.vision_language.dense import DenseTeacher

_TEXT_MODEL = "ViT-L/14@336px"  # its text is not in the export
_WIDTH = 768  # where the export leaves it open
_INPUTS = {"inp_image_bytes", "inp_text_emb"}
_OUTPUTS = {"image_info", "ppixel_ave_feat"}


def load(folder: str | Path) -> DenseTeacher:
    """The teacher of a SavedModel folder: each pixel has the mean feature of its region, which may be zero.

    The network sees one image at a time, on the view's pixel grid as OpenScene shows it (there as JPEG, here
    without loss as PNG).

    Raises:
        FileNotFoundError: there is no such folder, or no SavedModel in it.
        ValueError: the SavedModel is damaged or is not OpenSeg's; TensorFlow is not installed.
    """
    folder = Path(folder)
    if not (folder / "saved_model.pb").is_file():
        raise FileNotFoundError(
            f"{folder}: no saved_model.pb there; expected OpenSeg's exported folder, openseg_exported_clip"
        )
    try:
        import tensorflow as tf  # an extra that takes seconds to import
    except ImportError as error:
        raise ValueError(f"OpenSeg is a TensorFlow model: pip install -e .[openseg] ({error})") from error
    try:
        model = tf.saved_model.load(str(folder), tags=[tf.saved_model.SERVING])
        network = model.signatures["serving_default"]
    except Exception as error:  # damaged bytes can make TensorFlow fail in many ways
        raise ValueError(f"{folder}: truncated or not a SavedModel for serving ({error}); fetch it again") from error
    inputs, outputs = network.structured_input_signature[1], network.structured_outputs
    missing = sorted((_INPUTS - inputs.keys()) | (_OUTPUTS - outputs.keys()))
    if missing:
        raise ValueError(
            f"{folder}: not OpenSeg's export, its signature lacks {', '.join(missing)}; it has "
            f"{', '.join(sorted(inputs))} -> {', '.join(sorted(outputs))}"
        )
    width = outputs["ppixel_ave_feat"].shape[-1] or inputs["inp_text_emb"].shape[-1] or _WIDTH
    network.keep_alive = model  # its variables go with the model
    return DenseTeacher(_TEXT_MODEL, width, View.pixels, partial(_features, network, width), batch_size=1)


def _features(network: Any, width: int, images: UInt8[np.ndarray, "1 h w 3"]) -> Float16[Array, "1 h w C"]:
    """Features of one image at its own pixels: the network's larger grid by nearest neighbour, corners on corners."""
    import tensorflow as tf

    (image,) = images
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    found = network(
        inp_image_bytes=tf.constant(content.getvalue()),
        inp_text_emb=tf.zeros([1, 1, width]),  # no words are asked for
    )
    size, scale = found["image_info"][0], found["image_info"][2]
    height, width = (int(side) for side in size * scale)  # the rest of the square is padding
    features = found["ppixel_ave_feat"][:, :height, :width]
    features = tf.compat.v1.image.resize_nearest_neighbor(features, image.shape[:2], align_corners=True)
    return jnp.asarray(tf.cast(features, tf.float16).numpy())
