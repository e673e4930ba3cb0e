"""Raw data -> superpoints -> fused 2D features -> a TFDS dataset of scenes in ArrayRecord files.

A training scene is stored as `data.chunks` records that differ in their 2D features only: each has those of
its own random `data.chunk_points` points, as far as a view sees them. A validation scene is one record with
all of them. Nothing random here hangs on the seed of a run, so runs with other seeds can share the dataset.
"""

import abc
import bisect
import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tqdm import tqdm

from data import scannet
from data.labels import LABEL_SETS, LabelSet
from data.projection import fuse
from data.scene import Scene, View, check_labels
from data.superpoints import vccs
from data.synthetic import SYNTHETIC, generate_room, room_seeds
from data.virtual_camera import look_around_views
from ggsd_jax.vision_language import teachers, text

_TRAINING_ONLY = {"prepared", "voxel_size", "augment", "input_color", "loop", "min_voxels", "max_voxels", "workers"}
_INCOMPLETE = "incomplete."  # TFDS's prefix of a dataset being written


def label_set(config: ml_collections.ConfigDict) -> LabelSet:
    """The classes that `data.label_set` names."""
    return SYNTHETIC if config.data.label_set == SYNTHETIC.name else LABEL_SETS[config.data.label_set]


def prepare(config: ml_collections.ConfigDict, data_dir: Path) -> None:
    """Builds the dataset of `config` in `data_dir`, unless it is there.

    It appears whole or not at all: what a killed run had written is deleted and made again.

    Raises:
        ValueError: the dataset there was made with other settings, or its features cannot be compared with the
            words of `text.encoder`; an unknown `data.name` or `teacher.name`; an empty split; a corrupt raw file
            or corrupt weights; a validation scene without labels.
        FileNotFoundError: raw data or weights are missing.
    """
    settings = _content_settings(config)
    builder_class = _named(_BUILDERS, "data.name", config.data.name)
    folder = _dataset_folder(data_dir)
    if folder is not None:
        _check_settings(folder, settings)
        if config.teacher.name != teachers.SIMULATED:
            space = tfds.builder_from_directory(folder).info.metadata["feature_space"]
            text.check_space(space, config.text.encoder)
        return
    if config.data.root and not Path(config.data.root).is_dir():
        raise FileNotFoundError(f"data.root is {config.data.root!r}: there is no such folder")
    for leftover in data_dir.glob(f"*/{_INCOMPLETE}*"):
        shutil.rmtree(leftover)
    builder = builder_class(config, settings, data_dir)
    # TFDS talks of downloads and counts records; our bar counts scenes and knows how many there are
    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        downloads = tfds.download.DownloadConfig(manual_dir=config.data.root or scratch, try_download_gcs=False)
        builder.download_and_prepare(download_dir=scratch, download_config=downloads)
    for split, info in builder.info.splits.items():
        logging.info("prepared %s: %d records, %.1f MB", split, info.num_examples, info.num_bytes / 1e6)


def load_split(data_dir: Path, split: str) -> "PreparedScenes":
    """Random access to the records of "train" or "val".

    Raises:
        FileNotFoundError: there is no prepared dataset in `data_dir`.
    """
    folder = _dataset_folder(data_dir)
    if folder is None:
        raise FileNotFoundError(f"{data_dir} holds no prepared dataset: prepare it first (--mode=prepare)")
    return PreparedScenes(folder, split)


class PreparedScenes(Sequence):
    """The records of one split, `chunks` consecutive ones for each scene.

    Reading a record raises ValueError where its file is missing, truncated or corrupt.
    """

    def __init__(self, folder: Path, split: str):
        builder = tfds.builder_from_directory(folder)
        self._records = builder.as_data_source(split=split)
        self._shards = builder.info.splits[split]
        self.chunks: int = builder.info.metadata["settings"]["data"]["chunks"] if split == "train" else 1

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, record: int) -> Scene:
        if not 0 <= record < len(self):
            raise IndexError(f"record {record} of {len(self)}")
        try:
            return decode(self._records[record])
        except RuntimeError as error:
            ends = list(itertools.accumulate(self._shards.shard_lengths))
            file = Path(self._shards.filepaths[bisect.bisect_right(ends, record)])
            raise ValueError(
                f"{file} is missing, truncated or corrupt ({error}): delete {file.parent} and prepare again"
            ) from error


# --------------------------------------------------------------------------------- records and their settings


def record_features(channels: int) -> tfds.features.FeaturesDict:
    """How a scene with 2D features of `channels` channels is stored, field by field."""

    def tensor(*shape: int | None, dtype: type, encoding: str = "bytes") -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=encoding)

    return tfds.features.FeaturesDict(
        {
            "name": tfds.features.Text(),
            "points": tensor(None, 3, dtype=np.float32),
            "colors": tensor(None, 3, dtype=np.uint8),
            "normals": tensor(None, 3, dtype=np.float32),
            "labels": tensor(None, dtype=np.int32, encoding="zlib"),
            "superpoints": tensor(None, dtype=np.int32, encoding="zlib"),
            "features": tensor(None, channels, dtype=np.float16),
            "feature_index": tensor(None, dtype=np.int32, encoding="zlib"),
        }
    )


_ABSENT = {  # what a record holds of a field that its scene does not have
    "colors": np.empty((0, 3), np.uint8),
    "normals": np.empty((0, 3), np.float32),
    "labels": np.empty(0, np.int32),
    "superpoints": np.empty(0, np.int32),
}


def encode(scene: Scene) -> dict:
    """The record of a scene that has features."""
    present = {f.name: getattr(scene, f.name) for f in dataclasses.fields(Scene)}
    return _ABSENT | {field: value for field, value in present.items() if value is not None}


def decode(record: dict) -> Scene:
    """The scene that was encoded."""
    absent = {field: None for field in _ABSENT if not len(record[field])}
    return Scene(**record | absent | {"name": record["name"].decode()})


def _content_settings(config: ml_collections.ConfigDict) -> dict:
    """What the content of a dataset depends on, as JSON gives it back."""
    settings = json.loads(config.to_json_best_effort())
    data = {field: value for field, value in settings["data"].items() if field not in _TRAINING_ONLY}
    return {"data": data, "superpoints": settings["superpoints"]} | teachers.settings(config)


def _check_settings(folder: Path, settings: dict) -> None:
    """Raises ValueError where the dataset in `folder` was made with other settings."""
    there = tfds.builder_from_directory(folder).info.metadata["settings"]
    if folder.name != str(_Dataset.VERSION):
        raise ValueError(f"{folder} is of format {folder.name}, this is {_Dataset.VERSION}: delete it")
    for part, fields in settings.items():
        for field in sorted(fields.keys() | there[part].keys(), key=lambda field: (field != "name", field)):
            old, new = there[part].get(field), fields.get(field)
            if old != new:
                raise ValueError(
                    f"{folder} was prepared with {part}.{field}={old!r}, the config says {new!r}: use "
                    "another work directory or data.prepared, or delete that folder to prepare again"
                )


def _dataset_folder(data_dir: Path) -> Path | None:
    """The finished dataset in `data_dir`."""
    finished = [f.parent for f in data_dir.glob("*/*/dataset_info.json") if not f.parent.name.startswith(_INCOMPLETE)]
    if len(finished) > 1:
        raise ValueError(f"{data_dir} holds {len(finished)} datasets: delete all but one of {finished}")
    return finished[0] if finished else None


def _named(table: dict, field: str, name: str):
    if name not in table:
        nearest = difflib.get_close_matches(name, table, n=1, cutoff=0)[0]
        raise ValueError(f"{field} is {name!r}, did you mean {nearest!r}? known: {', '.join(table)}")
    return table[name]


# ------------------------------------------------------------------------------------------- one scene's work


class _RawScene(NamedTuple):
    scene: Scene
    views: Iterable[View]
    border: int  # pixels at the rim of a view that see nothing


def make_teacher(config: ml_collections.ConfigDict) -> teachers.Teacher:
    """The 2D network that `teacher.name` names; raises what `teachers.make` raises, and ValueError for other names."""
    _named(teachers.TEACHERS, "teacher.name", config.teacher.name)
    return teachers.make(config, label_set(config).classes)


def add_superpoints_and_features(raw: _RawScene, config: ml_collections.ConfigDict, teacher: teachers.Teacher) -> Scene:
    """The scene with its VCCS superpoints and the mean over the views of the teacher's features."""
    scene = raw.scene
    superpoints = vccs(scene.points, scene.colors, scene.normals, **config.superpoints)
    looks = teachers.look(teacher, scene, raw.views, config.teacher.get("masks", ""))
    features, feature_index = fuse(scene.points, *looks, border=raw.border)
    return dataclasses.replace(scene, superpoints=superpoints, features=features, feature_index=feature_index)


def chunk_of_features(scene: Scene, chunk: int, chunk_points: int) -> Scene:
    """The scene with the features of `chunk_points` random points only, as far as they have one."""
    rng = np.random.default_rng([zlib.crc32(scene.name.encode()), chunk])
    chosen = np.zeros(len(scene.points), bool)
    chosen[rng.choice(len(chosen), min(chunk_points, len(chosen)), replace=False)] = True
    rows = chosen[scene.feature_index]
    return dataclasses.replace(scene, features=scene.features[rows], feature_index=scene.feature_index[rows])


# ---------------------------------------------------------------------------------------------- the data sets


class _Dataset(tfds.core.GeneratorBasedBuilder, abc.ABC):
    """What the data sets share; each knows how to read its raw scenes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Raw data is read from the folder that config.data.root names."

    def __init__(self, config: ml_collections.ConfigDict, settings: dict, data_dir: Path):
        self._run_config, self._settings = config, settings
        self._teacher = make_teacher(config)
        super().__init__(data_dir=data_dir, file_format="array_record")

    @abc.abstractmethod
    def _readers(self, split: str, root: Path) -> dict[str, Callable[[], _RawScene]]:
        """For the name of each scene of "train" or "val" the function that reads it."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=record_features(self._teacher.width),
            metadata=tfds.core.MetadataDict(settings=self._settings, feature_space=self._teacher.space),
            disable_shuffling=True,  # the records of a scene stay together
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        root = Path(dl_manager.manual_dir)
        readers = {split: self._readers(split, root) for split in ("train", "val")}
        return {split: self._generate_examples(split, readers[split]) for split in readers}

    def _generate_examples(self, split: str, readers: dict[str, Callable[[], _RawScene]]) -> Iterator[tuple[int, dict]]:
        config = self._run_config
        key = itertools.count()
        for name, read in tqdm(readers.items(), desc=f"prepare {split}", unit="scene", dynamic_ncols=True):
            scene = add_superpoints_and_features(read(), config, self._teacher)
            if split == "val":
                check_labels(scene, len(label_set(config).classes))
                yield next(key), encode(scene)
            elif len(scene.feature_index):
                for chunk in range(config.data.chunks):
                    yield next(key), encode(chunk_of_features(scene, chunk, config.data.chunk_points))
            else:
                logging.warning("%s left out of training: no view sees any of its points", name)


class Synthetic(_Dataset):
    """Generated rooms, `data.train_rooms` and `data.val_rooms` of them."""

    def _readers(self, split: str, root: Path) -> dict[str, Callable[[], _RawScene]]:
        count = self._run_config.data[f"{split}_rooms"]
        if count < 1:
            raise ValueError(f"data.{split}_rooms is {count}, expected at least 1")
        return {f"room {seed}": functools.partial(_read_room, seed) for seed in room_seeds(split, count)}


def _read_room(seed: int) -> _RawScene:
    return _RawScene(*generate_room(seed), border=0)


class ScanNet(_Dataset):
    """Scenes of `data.root` that are on ScanNet's lists `scannetv2_train.txt` and `scannetv2_val.txt` there.

    A scene is a folder `scans/<scene>` with mesh, labels and exported frames, or a neutral `<scene>.npz`,
    which simulated cameras look at.
    """

    name = "scannet"

    def _readers(self, split: str, root: Path) -> dict[str, Callable[[], _RawScene]]:
        if self._run_config.data.label_set != "scannet20":
            raise ValueError(f"data.label_set is {self._run_config.data.label_set!r}: ScanNet is read with 'scannet20'")
        listed = (root / f"scannetv2_{split}.txt").read_text().split()
        found = {}
        for name in listed:
            if (root / "scans" / name).is_dir():
                found[name] = functools.partial(_read_scan, root / "scans" / name)
            elif (root / f"{name}.npz").is_file():
                found[name] = functools.partial(_read_npz, root / f"{name}.npz")
        if not found:
            raise ValueError(
                f"{root}: none of the {len(listed)} scenes of scannetv2_{split}.txt is there, neither as "
                "scans/<scene>/ nor as <scene>.npz: download some, or point data.root at them"
            )
        logging.info("scannet %s: %d of %d listed scenes found in %s", split, len(found), len(listed), root)
        return found


def _read_scan(folder: Path) -> _RawScene:
    return _RawScene(scannet.read_scene(folder), scannet.read_views(folder), border=scannet.BORDER)


def _read_npz(path: Path) -> _RawScene:
    scene = Scene.load_npz(path)
    try:
        views = look_around_views(scene.points, seed=zlib.crc32(scene.name.encode()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _RawScene(scene, views, border=0)


_BUILDERS = {"synthetic": Synthetic, "scannet": ScanNet}
