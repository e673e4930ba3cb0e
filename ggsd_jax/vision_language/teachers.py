"""The 2D teachers by the names a config calls them, and what they make of the views of a scene."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_collections
import numpy as np
from tqdm import tqdm

from data.scene import Scene, View
from ggsd_jax.vision_language import lseg, maskclip, openseg, sam_masks, text
from ggsd_jax.vision_language.dense import DenseTeacher
from ggsd_jax.vision_language.simulated import SimulatedTeacher

SIMULATED, NONE = "simulated", "none"
_FIELDS = ("name", "weights", "masks")  # the others of `teacher` are rates of the simulated one's errors
_WEIGHTS = {
    "maskclip": "the folder of a CLIP snapshot",
    "lseg": "LSeg's checkpoint demo_e200.ckpt",
    "openseg": "the folder of its SavedModel, openseg_exported_clip",
}


class ReadyMade(NamedTuple):
    """In place of a network where scenes come with features, or need none: the space they live in, and their width."""

    space: str
    width: int


OPENSCENE_TEACHERS = {"lseg": ReadyMade("ViT-B/32", 512), "openseg": ReadyMade("ViT-L/14@336px", 768)}
"""By the names of OpenScene's downloads, the CLIP whose text their features go with."""


TEACHERS = {
    "maskclip": maskclip.load,
    "lseg": lseg.load,
    "openseg": openseg.load,
    SIMULATED: SimulatedTeacher,
    NONE: ReadyMade,
}
Teacher = SimulatedTeacher | DenseTeacher | ReadyMade


def make(config: ml_collections.ConfigDict, classes: Sequence[str]) -> Teacher:
    """The 2D network that `teacher.name` names, from `teacher.weights`; the simulated one has no weights.

    Raises:
        ValueError, FileNotFoundError: missing or damaged weights; a text encoder of another space than the
            network's; no network where one is learned from.
    """
    name, weights = config.teacher.name, config.teacher.get("weights", "")
    if name == NONE:
        if config.mode != "supervised":
            raise ValueError(f"teacher.name={name!r} is for --config.mode=supervised: GGSD learns from a 2D network")
        return ReadyMade(NONE, width=1)
    if name == SIMULATED:
        rates = {field: value for field, value in config.teacher.items() if field not in _FIELDS}
        return SimulatedTeacher(text.embed(classes, config.text.encoder, config.text.prompt), **rates)
    if not weights:
        without = "; training with labels alone needs teacher.name=none" if config.mode == "supervised" else ""
        raise ValueError(f"teacher.weights is empty: teacher.name={name!r} needs {_WEIGHTS[name]}{without}")
    try:
        teacher = TEACHERS[name](weights)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"teacher.weights: {error}") from error
    text.check_space(teacher.space, config.text.encoder)
    return teacher


def ready_made(folder: str | Path, encoder: str) -> ReadyMade:
    """What a folder of OpenScene's fused features holds, told by its name, as in `scannet_multiview_lseg`.

    Features in a folder of another name pass for those of the encoder's space: nothing tells.

    Raises:
        ValueError: the encoder is of another space; else what `text.space` raises.
    """
    known = next((made for name, made in OPENSCENE_TEACHERS.items() if name in Path(folder).name.lower()), None)
    space = text.space(encoder) if known is None else known.space
    text.check_space(space, encoder)
    return ReadyMade(space, text.width(encoder))


def settings(config: ml_collections.ConfigDict) -> dict[str, dict]:
    """The parts of a config that 2D features depend on; empty fields are left out.

    A network knows nothing of the classes, so any text of its space will do. The simulated one is made of them.
    """
    teacher = {field: value for field, value in config.teacher.items() if value != ""}
    if config.teacher.name == SIMULATED:
        return {"teacher": teacher, "text": config.text.to_dict()}
    return {"teacher": {field: value for field, value in teacher.items() if field in _FIELDS}}


def look(
    teacher: Teacher, scene: Scene, views: Iterable[View], masks: str = ""
) -> tuple[Iterable[View], Callable[[View], np.ndarray]]:
    """The views and the features [h, w, C] of each, for `data.projection.fuse`.

    Args:
        masks: folder of SAM's masks to average the features in; empty: they stay as they are. Where scenes call
            their views alike, a folder in it of the scene's name holds them.
    """
    if isinstance(teacher, DenseTeacher):
        bar = tqdm(views, desc=scene.name, unit="view", leave=False, dynamic_ncols=True)
        views, features_of = teacher.look(bar)
    else:
        features_of = teacher(scene)
    if not masks:
        return views, features_of

    def refined(view: View) -> np.ndarray:
        own = Path(masks) / scene.name
        folder = own if (own / view.name).is_dir() else Path(masks)
        return sam_masks.refine(features_of(view), sam_masks.read(folder, view))

    return views, refined
