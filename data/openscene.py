"""Data sets as OpenScene publishes them: preprocessed scenes and fused 2D features, files of torch.save.

Formats: OpenScene's scripts/preprocess and scripts/feature_fusion, and its loaders in dataset/.
"""

import glob
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Int32, UInt8

from data import torch_file
from data.labels import IGNORE
from data.scene import Scene


def read_scene(path: str | os.PathLike) -> Scene:
    """Reads a preprocessed scene: a tuple of coords [N, 3] in metres, colors [N, 3] in -1..1 and labels [N].

    The labels -100 and 255 are ignore.  nuScenes has the number 0 in place of colours: such a scene has none.
    The name is the file's, without ScanNet's `_vh_clean_2`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is corrupt, holds something else, or a field is out of range.
    """
    path = Path(path)
    content = torch_file.load(path)
    if not isinstance(content, tuple | list) or len(content) != 3:
        raise ValueError(f"{path}: expected a tuple (coords, colors, labels), got {_describe(content)}")
    coords, colors, labels = map(np.asarray, content)
    try:
        return Scene(
            name=path.stem.removesuffix("_vh_clean_2"),
            points=coords.astype(np.float32),
            colors=None if colors.ndim == 0 else _decode_colors(colors),
            labels=_decode_labels(labels),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _decode_colors(colors: np.ndarray) -> UInt8[np.ndarray, "N 3"]:
    bad = ~((colors >= -1) & (colors <= 1)).reshape(len(colors), -1).all(axis=1)
    if bad.any():
        row = np.flatnonzero(bad)[0]
        raise ValueError(f"colors row {row} is {colors[row]}, expected -1..1; store them as rgb / 127.5 - 1")
    return np.round((colors.astype(np.float64) + 1) * 127.5).astype(np.uint8)


def _decode_labels(labels: np.ndarray) -> Int32[np.ndarray, " N"]:
    decoded = np.where(labels == -100, IGNORE, labels)
    bad = np.flatnonzero(~((decoded >= 0) & (decoded <= IGNORE) & (decoded == np.trunc(decoded))))
    if bad.size:
        raise ValueError(
            f"labels row {bad[0]} is {labels[bad[0]]}, expected a class 0..254, or 255 or -100 = ignore; "
            "map other ids to 255"
        )
    return decoded.astype(np.int32)


def read_features(
    path: str | os.PathLike, num_points: int
) -> tuple[Float16[np.ndarray, "M C"], Int32[np.ndarray, " M"]]:
    """Reads a file of fused 2D features: `features` and `feature_index` as `Scene` holds them.

    `mask_full` [N] marks the points of the scene that have a feature, `feat` holds theirs in order.  In the
    older form of the LSeg features, known by its key `mask`, mask_full marks a chunk of points, `feat` has a
    row for each point of the chunk, and `mask` lists the rows of the points some view sees.

    Args:
      path: a `.pt` file.
      num_points: N of the scene the features are of.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is corrupt, lacks a key, is of another cloud, or the numbers of features and of
        marked points differ.
    """
    content = torch_file.load(Path(path))
    if not isinstance(content, dict) or not {"feat", "mask_full"} <= content.keys():
        raise ValueError(f"{path}: expected a dict with 'feat' and 'mask_full', got {_describe(content)}")
    features = np.asarray(content["feat"])
    features = features[..., 0] if features.ndim == 3 else features
    mask = np.asarray(content["mask_full"])
    if mask.shape != (num_points,):
        raise ValueError(
            f"{path}: mask_full has shape {list(mask.shape)}, but the scene has {num_points} points; "
            "are features and scene of the same cloud?"
        )
    feature_index = np.flatnonzero(mask)
    if features.ndim != 2 or len(features) != len(feature_index):
        raise ValueError(
            f"{path}: feat has shape {list(features.shape)}, expected [{len(feature_index)}, C], "
            "one row for each point marked in mask_full"
        )
    if "mask" in content:
        seen = np.asarray(content["mask"])
        flags = seen.dtype in (bool, np.uint8)  # torch takes uint8 for flags, and so does OpenScene
        seen = np.flatnonzero(seen) if flags else np.unique(seen)
        if seen.size and not 0 <= seen[0] <= seen[-1] < len(features):
            raise ValueError(f"{path}: mask names row {seen[-1]} of feat, expected rows 0..{len(features) - 1}")
        features, feature_index = features[seen], feature_index[seen]
    return features.astype(np.float16), feature_index.astype(np.int32)


def read_features_of_scene(
    folder: str | os.PathLike, name: str, num_points: int
) -> tuple[Float16[np.ndarray, "M C"], Int32[np.ndarray, " M"], int]:
    """The features of all chunk files `<name>_0.pt`, `<name>_1.pt`, ... of a scene, or of `<name>.pt` (nuScenes).

    Returns:
      `features` and `feature_index` as `Scene` holds them, and how many a file has on average.

    Raises:
      FileNotFoundError: there are none.
      ValueError: as `read_features`.
    """
    folder = Path(folder)
    stem = glob.escape(name)
    files = [file for digits in ("[0-9]", "[0-9][0-9]") for file in sorted(folder.glob(f"{stem}_{digits}.pt"))]
    files = files or sorted(folder.glob(f"{stem}.pt"))
    if not files:
        raise FileNotFoundError(f"{folder}/{name}_0.pt: missing, and so is {name}.pt")
    chunks = [read_features(file, num_points) for file in files]
    widths = {features.shape[1]: file for (features, _), file in zip(chunks, files, strict=True)}
    if len(widths) > 1:
        some = " and ".join(f"{file.name} {width}" for width, file in widths.items())
        raise ValueError(f"{folder}: features of one scene have unlike widths ({some}): keep each 2D network's apart")
    feature_index, first = np.unique(np.concatenate([index for _, index in chunks]), return_index=True)
    in_file = round(sum(len(index) for _, index in chunks) / len(chunks))
    return np.concatenate([features for features, _ in chunks])[first], feature_index, in_file


def _describe(content: object) -> str:
    kind = type(content).__name__
    if isinstance(content, dict):
        return f"{kind} with {sorted(map(str, content))}"
    return f"{kind} of {len(content)}" if isinstance(content, tuple | list) else kind
