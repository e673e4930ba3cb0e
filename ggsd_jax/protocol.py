"""Which words the points of a data set are compared with, and which class each word means."""

from typing import NamedTuple

import ml_collections
import numpy as np
from jaxtyping import Float32, Int

from data.labels import CLASS_OF_WORD, LABEL_SETS
from ggsd_jax import metrics, prepare
from ggsd_jax.vision_language import text


class Words(NamedTuple):
    """The words of an evaluation, OpenScene's where it published one."""

    classes: tuple[str, ...]
    """What is scored."""
    words: tuple[str, ...]
    """What points are compared with."""
    table: Int[np.ndarray, " W"]
    """The class that each word means."""
    source: str
    """What the results say of it."""
    quirk: str = ""
    """What OpenScene does to the words that it hardly means to do."""

    def class_of(self, predicted: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
        """The classes of predicted words; `metrics.UNKNOWN` stays."""
        return np.append(self.table, metrics.UNKNOWN)[np.minimum(predicted, len(self.table))]


def words(config: ml_collections.ConfigDict) -> Words:
    """The words that `eval.words` names, for the classes of `data.label_set`; a supervised network has no words.

    nuScenes' 16 classes are found by 43 detailed names. Of the most frequent 40, 80 and 160 names of Matterport3D the
    last but one is replaced by "other", as OpenScene does: it is so among the 21, for which that was written.

    Raises:
        ValueError: the words of `eval.words` are not known to mean classes of `data.label_set`.
    """
    labels = prepare.label_set(config)
    same = np.arange(len(labels.classes))
    if config.mode == "supervised":
        return Words(labels.classes, labels.classes, same, "none: logits of the classes")
    if config.eval.words:
        pair = (config.eval.words, labels.name)
        if pair not in CLASS_OF_WORD:
            known = "; ".join(f"{w!r} for {c!r}" for w, c in CLASS_OF_WORD)
            raise ValueError(
                f"eval.words={pair[0]!r} do not name the classes of data.label_set={pair[1]!r}, only {known} are "
                "known: leave eval.words empty to take the names of the classes"
            )
        named = LABEL_SETS[config.eval.words].classes
        return Words(labels.classes, named, CLASS_OF_WORD[pair], f"the {len(named)} names of {pair[0]}")
    if labels.name in ("matterport40", "matterport80", "matterport160"):
        replaced = (*labels.classes[:-2], "other", labels.classes[-1])
        quirk = f"the words of class {labels.classes[-2]!r} are replaced by 'other'"
        return Words(labels.classes, replaced, same, "the names of the classes", quirk)
    return Words(labels.classes, labels.classes, same, "the names of the classes")


def class_vectors(config: ml_collections.ConfigDict, names: tuple[str, ...]) -> Float32[np.ndarray, "L C"]:
    """What a network's output is compared with: text embeddings, or the axes of the logits of a supervised one."""
    if config.mode == "supervised":
        return np.eye(len(names), dtype=np.float32)
    return text.embed(list(names), encoder=config.text.encoder, prompt=config.text.prompt)
