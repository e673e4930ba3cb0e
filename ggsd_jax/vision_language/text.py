"""Label -> text embedding: CLIP's text tower, rows of a precomputed file, or a deterministic stand-in that
needs no file.

The stand-in is no language model. It knows a short table of concepts and places related names near each
other, so that demonstrations and tests run offline; nothing measured with it says anything about CLIP.
"""

import difflib
import functools
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

if TYPE_CHECKING:
    from ggsd_jax.vision_language.clip import TextEncoder

STAND_IN = "stand-in"
_STAND_IN_WIDTH = 64

# One axis of the stand-in per concept. A name that holds several of the words has several concepts.
_CONCEPTS = {
    "seat": "chair armchair sofa couch stool bench ottoman seat loveseat",
    "soft": "soft bed sofa couch pillow cushion mattress blanket crib towel clothes",
    "table": "table desk counter nightstand workbench",
    "storage": "storage cabinet bookshelf bookcase shelf shelves wardrobe dresser drawer cupboard closet chest box",
    "appliance": "refrigerator fridge oven stove microwave dishwasher washer machine heater radiator",
    "bath": "sink bathtub toilet shower basin bath faucet urinal",
    "structure": "wall floor ceiling column pillar beam stairs",
    "opening": "door window curtain blinds doorway gate",
    "flat": "picture mirror whiteboard poster painting sign board photo",
    "screen": "monitor tv television screen computer laptop display",
    "decoration": "lamp light chandelier candle vase plant sculpture clock",
    "vegetation": "plant tree bush vegetation flower shrub leaves hedge woods",
    "ground": "floor road sidewalk terrain grass surface carpet rug flat street lawn",
    "building": "building wall manmade house facade fence bridge pole",
    "vehicle": "car truck bus trailer vehicle van train",
    "cycle": "bicycle motorcycle bike scooter moped",
    "barrier": "barrier cone fence barricade railing curb",
    "person": "person pedestrian man woman child rider",
    "catch-all": "other furniture otherfurniture prop otherprop object thing structure otherstructure",
}
_SHARED, _CONCEPT, _OWN = 0.08, 0.57, 0.35  # squared lengths of the three parts of a stand-in row

# Spellings under which other data sets look up the same thing (OpenScene replaces the first one too).
_SYNONYMS = {"otherfurniture": "other", "refridgerator": "refrigerator", "television": "tv", "couch": "sofa"}


def embed(
    labels: Sequence[str], encoder: str | Path = STAND_IN, prompt: str = "a {} in a scene"
) -> Float32[np.ndarray, "L C"]:
    """Unit rows, one per label.

    Args:
      labels: names; upper case and underscores make no difference.
      encoder: a folder with CLIP's weights and vocabulary (`clip.load`), the path of an .npz file with
        `embedding` [n, C] and `names` [n], "stand-in" (64 wide) or "stand-in:128" (any width from 32 on).
      prompt: template of the sentence that CLIP embeds, with {} for the name; "other" and "otherfurniture"
        stand for themselves, as the bare word "other", as in OpenScene. The other encoders ignore it: the
        stand-in knows words, not sentences, and a file's rows were made with the prompt of its maker.

    Raises:
      ValueError: no labels, an empty one, one that the file does not have or that is too long for CLIP; a
        prompt without {}; a file without the two arrays, or damaged weights.
      FileNotFoundError: there is no such file.
    """
    names = [_normal(label) for label in labels]
    if not names or not all(names):
        raise ValueError(f"labels must be one or more names that are not empty, got {list(labels)}")
    kind, folder_or_file = _kind(encoder)
    if kind == "stand-in":
        return _stand_in(names, _width(encoder))
    if kind == "file":
        return _from_file(names, folder_or_file)
    if "{}" not in prompt:
        raise ValueError(f"prompt is {prompt!r}: it needs {{}} where the name goes, as in 'a {{}} in a scene'")
    sentences = ["other" if name in _CATCH_ALL else prompt.replace("{}", name) for name in names]
    return _clip_rows(folder_or_file, tuple(sentences)).copy()


def without_meaning(labels: Sequence[str], encoder: str | Path = STAND_IN) -> list[str]:
    """The labels of which the encoder knows no word: the stand-in gives them rows that are near to nothing."""
    if _kind(encoder)[0] != "stand-in":
        return []
    known = " ".join(_CONCEPTS.values()).split()
    words = {label: _normal(label).replace("-", " ").split() for label in labels}
    return [label for label, parts in words.items() if not any(_is_form(word, known) for word in parts)]


def space(encoder: str | Path) -> str:
    """The space that an encoder embeds in: a model's name, for CLIP's own weights with their checksum.

    Only features of the same space can be compared with the encoder's rows (`check_space`).

    Raises:
      ValueError: a file does not say what model its rows are of; else as `embed`.
    """
    kind, folder_or_file = _kind(encoder)
    if kind == "stand-in":
        return f"{STAND_IN}:{_width(encoder)}"
    if kind == "clip":
        return _clip(folder_or_file).space
    _read(folder_or_file)
    with np.load(folder_or_file, allow_pickle=False) as archive:
        if "model" not in archive.files:
            raise ValueError(
                f"{folder_or_file}: does not say whose embeddings these are, so they cannot be told to fit the 2D "
                "features; add its name, np.savez(..., model='ViT-B/32')"
            )
        return str(archive["model"])


def prompt_of(encoder: str | Path, prompt: str) -> str:
    """The prompt that an encoder's rows were made with, where `prompt` is asked for; only CLIP itself follows."""
    kind, folder_or_file = _kind(encoder)
    if kind == "clip":
        return prompt
    if kind == "stand-in":
        return "none: the stand-in knows words, not sentences"
    with np.load(folder_or_file, allow_pickle=False) as archive:
        return str(archive["prompt"]) if "prompt" in archive.files else "not stated by the file of embeddings"


def width(encoder: str | Path) -> int:
    """The length of an encoder's rows; raises what `embed` raises."""
    kind, folder_or_file = _kind(encoder)
    if kind == "stand-in":
        return _width(encoder)
    if kind == "file":
        return _read(folder_or_file)[1].shape[1]
    return embed(["thing"], encoder).shape[1]


def check_space(features: str, encoder: str | Path) -> None:
    """Raises ValueError where features of this space cannot be compared with the encoder's rows.

    Two models of the same width (CLIP's B/16 and B/32 have 512 both) give unrelated rows, and nothing fails.
    """
    words = space(encoder)
    (name, _, mark), (other, _, other_mark) = features.partition("#"), words.partition("#")
    if name != other or (mark and other_mark and mark != other_mark):
        raise ValueError(
            f"text.encoder {str(encoder)!r} embeds words in the space of {words}, the 2D features are in that of "
            f"{features}: their cosines mean nothing. Use the text tower of {name} that belongs to the 2D network"
        )


_CATCH_ALL = {"other", "otherfurniture"}


def _kind(encoder: str | Path) -> tuple[str, Path]:
    """What kind of encoder this is ("stand-in", "file", "clip"), and where it lies."""
    path = Path(encoder)
    if str(encoder).partition(":")[0] == STAND_IN:
        return "stand-in", path
    if path.suffix == ".npz":
        return "file", path
    if path.is_dir() and str(encoder):
        return "clip", path
    raise ValueError(
        f"text encoder {str(encoder)!r} is unknown; expected an existing folder with CLIP's weights, a path to an "
        ".npz, 'stand-in' or 'stand-in:64'"
    )


@functools.lru_cache(maxsize=2)
def _clip(folder: Path) -> "TextEncoder":
    from ggsd_jax.vision_language.clip import TextEncoder  # the other encoders start without JAX

    return TextEncoder(folder)


@functools.lru_cache(maxsize=64)
def _clip_rows(folder: Path, sentences: tuple[str, ...]) -> Float32[np.ndarray, "L C"]:
    return _clip(folder)(sentences)


def _normal(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _width(encoder: str | Path) -> int:
    _, given, text = str(encoder).partition(":")
    if not given:
        return _STAND_IN_WIDTH
    if not text.isdigit() or int(text) < len(_CONCEPTS) + 13:
        raise ValueError(f"text encoder 'stand-in:{text}': the width must be a whole number of at least 32")
    return int(text)


def _stand_in(names: list[str], width: int) -> Float32[np.ndarray, "L C"]:
    """Row = one direction shared by all names + the axes of its concepts + what is its own.

    Two names with the same concept have a cosine of about 0.65, with one of two in common about 0.5,
    unrelated ones about 0.1. CLIP's names are at 0.7-0.9 of each other; a training of minutes cannot pull
    those apart.
    """
    rows = np.zeros((len(names), width), np.float32)
    axes = 1 + len(_CONCEPTS)
    for row, name in zip(rows, names, strict=True):
        words = name.replace("-", " ").split() or [name]
        concepts = np.array([any(_is_form(word, known.split()) for word in words) for known in _CONCEPTS.values()])
        own = sum(_direction(word, width - axes) for word in words)
        row[0] = np.sqrt(_SHARED)
        row[1:axes] = np.sqrt(_CONCEPT / max(concepts.sum(), 1)) * concepts
        row[axes:] = np.sqrt(_OWN) * own / np.linalg.norm(own)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _is_form(word: str, known: list[str]) -> bool:
    return word in known or word.removesuffix("s") in known or word.removesuffix("es") in known


def _direction(word: str, width: int) -> Float32[np.ndarray, " C"]:
    direction = np.random.default_rng(zlib.crc32(word.encode())).standard_normal(width)
    return (direction / np.linalg.norm(direction)).astype(np.float32)


def _from_file(names: list[str], path: Path) -> Float32[np.ndarray, "L C"]:
    known, rows = _read(path)
    index = {}
    for i, name in enumerate(known):
        index.setdefault(_normal(name), i)
    for i, name in enumerate(known):  # LVIS writes the sense in brackets: car_(automobile)
        index.setdefault(_normal(re.sub(r"\(.*?\)", "", name)), i)
    for one, other in _SYNONYMS.items():
        for new, old in ((one, other), (other, one)):
            if old in index:
                index.setdefault(new, index[old])
    for name in names:
        if name not in index:
            near = difflib.get_close_matches(name, index, n=3, cutoff=0.0)
            raise ValueError(f"{path}: no embedding of {name!r}; the nearest names there are {', '.join(near)}")
    return rows[[index[name] for name in names]]


def _read(path: Path) -> tuple[list[str], Float32[np.ndarray, "n C"]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = {"embedding", "names"} - set(archive.files)
            if missing:
                raise ValueError(f"has no array {', '.join(sorted(missing))}; found {', '.join(archive.files)}")
            embedding, names = archive["embedding"], archive["names"]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file of text embeddings") from None
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a file of text embeddings: {error}") from error
    if embedding.ndim != 2 or embedding.dtype.kind != "f" or names.shape != embedding.shape[:1]:
        raise ValueError(
            f"{path}: embedding must be floating point [n, C] and names [n], "
            f"got {embedding.dtype} {list(embedding.shape)} and {list(names.shape)}"
        )
    rows = embedding.astype(np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if bad.size:
        raise ValueError(f"{path}: embedding row {bad[0]} ({names[bad[0]]}) is zero or not finite")
    return [str(name) for name in names], rows / norms
