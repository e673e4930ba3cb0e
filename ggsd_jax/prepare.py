"""Raw data -> superpoints -> fused 2D features -> a TFDS dataset of scenes in ArrayRecord files.

A training scene is stored as `data.chunks` records that differ in their 2D features only: each has those of
its own random `data.chunk_points` points, as far as a view sees them; of OpenScene's fused features, which have been
through this once, each has as many as one of its files. A validation scene is one record with all of them. Nothing
random here hangs on the seed of a run, so runs with other seeds can share the dataset.
"""

import bisect
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import inspect
import io
import itertools
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import Int
from tqdm import tqdm

from data import feature_codes
from data.labels import IGNORE, LABEL_SETS, LabelSet
from data.ply import replacing
from data.projection import fuse
from data.scene import Scene, check_labels
from data.synthetic import SYNTHETIC
from ggsd_jax.datasets import DATASETS, LeftOut, RawScene, Readers, cut_superpoints, in_order
from ggsd_jax.lock import alone
from ggsd_jax.vision_language import teachers, text

_NOT_CONTENT = {"prepared", "prepare_workers", "voxel_size", "augment", "input_color", "loop", "workers"}
_NOT_CONTENT |= {"min_voxels", "max_voxels"}
_PATHS = {"root", "lists", "features", "weights", "masks"}
_WITH_FEATURES = "openscene"  # the data set that comes with its 2D features
_INCOMPLETE = "incomplete."  # TFDS's prefix of a dataset being written


def label_set(config: ml_collections.ConfigDict) -> LabelSet:
    """The classes that `data.label_set` names."""
    return SYNTHETIC if config.data.label_set == SYNTHETIC.name else LABEL_SETS[config.data.label_set]


def prepare(config: ml_collections.ConfigDict, data_dir: Path) -> None:
    """Builds the dataset of `config` in `data_dir`, unless it is there.

    It appears whole or not at all. The scenes a killed run had finished wait in `data_dir`/unfinished for the
    next run with the same settings. What went into each split is logged and kept in the dataset's metadata.
    Where another process is building a dataset in `data_dir`, this one waits for it.

    Raises:
        ValueError: the dataset there was made with other settings, or its features cannot be compared with the
            words of `text.encoder`; an unknown `data.name` or `teacher.name`; an empty split; a corrupt raw file
            or corrupt weights; a validation scene without labels.
        FileNotFoundError: raw data or weights are missing.
    """
    settings = _content_settings(config)
    _named(DATASETS, "data.name", config.data.name)
    if is_prepared(config, data_dir):
        shutil.rmtree(data_dir / "unfinished", ignore_errors=True)  # of a run that was killed, or is, at the very end
        scenes = ", ".join(f"{of['scenes']} of {split}" for split, of in load_report(data_dir).items())
        logging.info("%s is prepared, with the scenes of then: %s; delete it to prepare again", data_dir, scenes)
        return
    if config.data.name != SYNTHETIC.name and not (config.data.root and Path(config.data.root).is_dir()):
        raise FileNotFoundError(
            f"data.root is {config.data.root!r}: there is no such folder. {instructions(config.data.name)}"
        )
    made_so = json.dumps([str(_Dataset.VERSION), settings], sort_keys=True)
    unfinished = data_dir / "unfinished" / f"{zlib.crc32(made_so.encode()):08x}"
    builder = _Dataset(config, settings, data_dir, unfinished)
    data_dir.mkdir(parents=True, exist_ok=True)
    with alone(data_dir, wait=True):
        if not is_prepared(config, data_dir):
            _build(builder, config.data.root)


def is_prepared(config: ml_collections.ConfigDict, data_dir: Path) -> bool:
    """Whether `data_dir` holds the dataset; raises ValueError where it holds one that does not fit the config."""
    folder = _dataset_folder(data_dir)
    if folder is None:
        return False
    _check_settings(folder, _content_settings(config))
    space = tfds.builder_from_directory(folder).info.metadata["feature_space"]
    if space not in (teachers.SIMULATED, teachers.NONE):
        text.check_space(space, config.text.encoder)
    return True


def _build(builder: "_Dataset", root: str) -> None:
    for leftover in builder.unfinished.parents[1].glob(f"*/{_INCOMPLETE}*"):
        shutil.rmtree(leftover)
    builder.unfinished.mkdir(parents=True, exist_ok=True)
    # TFDS talks of downloads and counts records; our bar counts scenes and knows how many there are
    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        downloads = tfds.download.DownloadConfig(manual_dir=root or scratch, try_download_gcs=False)
        builder.download_and_prepare(download_dir=scratch, download_config=downloads)
    for split, info in builder.info.splits.items():
        logging.info("prepared %s: %d records, %.1f MB", split, info.num_examples, info.num_bytes / 1e6)
    logging.info("%s", report_text(builder.info.metadata["report"]))
    shutil.rmtree(builder.unfinished.parent, ignore_errors=True)  # a run that found the dataset may be at it, too


def load_split(data_dir: Path, split: str) -> "PreparedScenes":
    """Random access to the records of "train" or "val".

    Raises:
        FileNotFoundError: there is no prepared dataset in `data_dir`.
        ValueError: it has no such split; without labelled scenes there is no "val".
    """
    folder = _dataset_folder(data_dir)
    if folder is None:
        raise FileNotFoundError(f"{data_dir} holds no prepared dataset: prepare it first (--mode=prepare)")
    if split not in (found := tfds.builder_from_directory(folder).info.splits):
        raise ValueError(f"{folder} has no split {split!r}, only {sorted(found)}: its raw data has no such scenes")
    return PreparedScenes(folder, split)


def load_report(data_dir: Path) -> dict:
    """What went into each split of the dataset in `data_dir`, as `_Report` has it."""
    return tfds.builder_from_directory(_dataset_folder(data_dir)).info.metadata["report"]


def instructions(name: str) -> str:
    """What to download for a data set, and how its folder must look."""
    return f"{name}: {inspect.getdoc(_named(DATASETS, 'data.name', name))}"


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
            "feature_index": tensor(None, dtype=np.int32, encoding="zlib"),
            "feature_mean": tensor(channels, dtype=np.float16),  # these three: data/feature_codes.py
            "feature_steps": tensor(None, dtype=np.float16),
            "feature_codes": tensor(None, dtype=np.uint8),
        }
    )


_ABSENT = {  # what a record holds of a field that its scene does not have
    "colors": np.empty((0, 3), np.uint8),
    "normals": np.empty((0, 3), np.float32),
    "labels": np.empty(0, np.int32),
    "superpoints": np.empty(0, np.int32),
}


def encode(scene: Scene) -> dict:
    """The record of a scene that has features, which lose what `data.feature_codes` says."""
    fields = {field.name: getattr(scene, field.name) for field in dataclasses.fields(Scene)}
    coded = feature_codes.quantize(fields.pop("features"))
    return _ABSENT | {field: value for field, value in fields.items() if value is not None} | _coded_fields(coded)


def decode(record: dict) -> Scene:
    """The scene that was encoded."""
    names = [field.name for field in dataclasses.fields(Scene) if field.name != "features"]
    fields = {name: record[name] for name in names if name not in _ABSENT or len(record[name])}
    features = feature_codes.dequantize(_codes(record))
    return Scene(**fields | {"name": record["name"].decode(), "features": features})


def _coded_fields(coded: feature_codes.FeatureCodes) -> dict:
    stream = feature_codes.compress(coded.codes)
    return {"feature_mean": coded.mean, "feature_steps": coded.steps, "feature_codes": stream}


def _codes(record: dict) -> feature_codes.FeatureCodes:
    codes = feature_codes.decompress(record["feature_codes"], len(record["feature_mean"]))
    return feature_codes.FeatureCodes(record["feature_mean"], record["feature_steps"], codes)


def _content_settings(config: ml_collections.ConfigDict) -> dict:
    """What the content of a dataset depends on, as JSON gives it back."""
    settings = json.loads(config.to_json_best_effort())
    data = {field: value for field, value in settings["data"].items() if field not in _NOT_CONTENT}
    made_here = {} if _comes_with_features(config) else teachers.settings(config)
    return {"data": data, "superpoints": settings["superpoints"]} | made_here


def _check_settings(folder: Path, settings: dict) -> None:
    """Raises ValueError where the dataset in `folder` was made with other settings."""
    there = tfds.builder_from_directory(folder).info.metadata["settings"]
    if folder.name != str(_Dataset.VERSION):
        raise ValueError(f"{folder} is of format {folder.name}, this is {_Dataset.VERSION}: delete it")
    for part in sorted(there | settings):
        made_with, fields = there.get(part, {}), settings.get(part, {})
        for field in sorted(fields.keys() | made_with.keys(), key=lambda field: (field != "name", field)):
            old, new = made_with.get(field), fields.get(field)
            is_path = field in _PATHS and old and new
            if old == new or (is_path and os.path.abspath(old) == os.path.abspath(new)):
                continue
            moved = "give the old path if the same files have only moved, " if is_path else ""
            raise ValueError(
                f"{folder} was prepared with {part}.{field}={old!r}, the config says {new!r}: {moved}use "
                "another work directory or data.prepared, or delete that folder to prepare again"
            )


def _dataset_folder(data_dir: Path) -> Path | None:
    """The finished dataset in `data_dir`."""
    finished = [f.parent for f in data_dir.glob("*/*/dataset_info.json") if not f.parent.name.startswith(_INCOMPLETE)]
    if len(finished) > 1:
        raise ValueError(f"{data_dir} holds {len(finished)} datasets: delete all but one of {finished}")
    return finished[0] if finished else None


def _comes_with_features(config: ml_collections.ConfigDict) -> bool:
    return config.data.name == _WITH_FEATURES and config.teacher.name != teachers.NONE


def _named(table: dict, field: str, name: str):
    if name not in table:
        nearest = difflib.get_close_matches(name, table, n=1, cutoff=0)[0]
        raise ValueError(f"{field} is {name!r}, did you mean {nearest!r}? known: {', '.join(table)}")
    return table[name]


# ------------------------------------------------------------------------------------------- one scene's work


def make_teacher(config: ml_collections.ConfigDict) -> teachers.Teacher:
    """The 2D network that `teacher.name` names, or what stands for none or for the one that made ready-made features.

    Raises what `teachers.make` and `teachers.ready_made` raise, and ValueError for other names.
    """
    if _comes_with_features(config):
        return teachers.ready_made(config.data.features, config.text.encoder)
    _named(teachers.TEACHERS, "teacher.name", config.teacher.name)
    return teachers.make(config, label_set(config).classes)


def teacher_name(config: ml_collections.ConfigDict) -> str:
    """What made the 2D features, as results name it: a network, or the maker of ready-made features."""
    if _comes_with_features(config):
        return f"ready-made features: {Path(config.data.features).name}"
    return config.teacher.name


def add_features(raw: RawScene, teacher: teachers.Teacher, masks: str = "") -> Scene:
    """The scene with the mean over the views of the teacher's features, with those it came with, or with none.

    Args:
        masks: see `teachers.look`.
    """
    if raw.scene.features is not None and teacher.space != teachers.NONE:
        return raw.scene
    if isinstance(teacher, teachers.ReadyMade) or raw.views == ():
        nothing = {"features": np.zeros((0, teacher.width), np.float16), "feature_index": np.zeros(0, np.int32)}
        return dataclasses.replace(raw.scene, **nothing)
    points = raw.scene.points[: raw.num_supervised]
    try:
        looks = teachers.look(teacher, raw.scene, raw.views, masks)
        features, feature_index = fuse(points, *looks, tolerance=raw.tolerance, border=raw.border)
    except ValueError as error:
        raise ValueError(f"scene '{raw.scene.name}': {error}") from error
    if len(feature_index) < 0.01 * len(points):
        logging.warning(
            "scene '%s': its views see %d of %d points; are the poses camera to world, and in metres?",
            raw.scene.name, len(feature_index), len(points),
        )  # fmt: skip
    return dataclasses.replace(raw.scene, features=features, feature_index=feature_index)


def chunk_of_features(record: dict, chunk: int, pool: Int[np.ndarray, " P"], count: int) -> dict:
    """The record of a scene with the features of `count` random points of a pool only, as far as they have one."""
    if len(pool) <= count:
        return record
    rng = np.random.default_rng([zlib.crc32(record["name"].encode()), chunk])
    rows = np.isin(record["feature_index"], rng.choice(pool, count, replace=False))
    return record | {"feature_index": record["feature_index"][rows]} | _coded_fields(_codes(record).rows(rows))


# ------------------------------------------------------------------------------------------------ the dataset


class _Dataset(tfds.core.GeneratorBasedBuilder):
    """Makes the records; scenes that are done wait in `unfinished` until all are, for a killed run to go on."""

    VERSION = tfds.core.Version("3.1.0")

    def __init__(self, config: ml_collections.ConfigDict, settings: dict, data_dir: Path, unfinished: Path):
        self.name = config.data.name
        self.MANUAL_DOWNLOAD_INSTRUCTIONS = instructions(config.data.name)
        self._run_config, self._settings, self.unfinished = config, settings, unfinished
        splits = _named(DATASETS, "data.name", config.data.name)(config)
        self._readers = {split: look_for_scenes() for split, look_for_scenes in splits.items()}
        if both := self._readers.get("train", {}).keys() & self._readers.get("val", {}).keys():
            logging.warning("both scored and trained on: '%s' (%d such scenes)", min(both), len(both))
        self._teacher = make_teacher(config)
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=record_features(self._teacher.width),
            metadata=tfds.core.MetadataDict(settings=self._settings, feature_space=self._teacher.space, report={}),
            disable_shuffling=True,  # the records of a scene stay together
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split, readers) for split, readers in self._readers.items()}

    def _generate_examples(self, split: str, readers: Readers) -> Iterator[tuple[int, dict]]:
        config, key = self._run_config, itertools.count()
        report = self.info.metadata["report"][split] = _Report(label_set(config))
        absent = {name: str(reason) for name, reason in readers.items() if isinstance(reason, LeftOut)}
        report["left_out"] |= absent
        for name, record in self._records(split, {name: readers[name] for name in readers if name not in absent}):
            if isinstance(record, LeftOut):
                report.leave_out(name, str(record))
                continue
            report["frames_lost"] += int(record.pop("frames_lost"))
            in_chunk, supervised = int(record.pop("chunk_features")), int(record.pop("num_supervised"))
            if split == "val":
                report.add(record)
                yield next(key), record
            elif len(record["feature_index"]) or config.teacher.name == teachers.NONE:
                report.add(record)
                pool = record["feature_index"] if in_chunk else np.arange(supervised)
                count = min(in_chunk or config.data.chunk_points, config.data.chunk_points)
                for chunk in range(config.data.chunks):
                    yield next(key), chunk_of_features(record, chunk, pool, count)
            else:
                report.leave_out(name, "no view sees any of its points")
        if not report["scenes"]:
            reasons = "; ".join(dict.fromkeys(report["left_out"].values()))
            raise ValueError(f"split {split!r} has no scene left, all {len(readers)} are left out: {reasons}")
        if split == "val" and not report["labels"].keys() - {report.names[IGNORE]}:
            raise ValueError(f"split 'val': no point has a label of {config.data.label_set}: nothing can be scored")

    def _records(self, split: str, readers: Readers) -> Iterator[tuple[str, dict | LeftOut]]:
        """Each scene with superpoints and features, read back where a killed run had made it.

        Beside the fields of a record it has `frames_lost`, and of its `RawScene` `chunk_features` and `num_supervised`.
        """
        config = self._run_config
        files = {name: self.unfinished / f"{split} {_file_name(name)}.npz" for name in readers}
        missing = {name: readers[name] for name, file in files.items() if not file.exists()}
        if taken_over := len(files) - len(missing):
            logging.warning(
                "%s: %d scenes are taken over from a run that did not end; if you have changed their files since, "
                "delete %s", split, taken_over, self.unfinished.parent,
            )  # fmt: skip
        cut = functools.partial(cut_superpoints, settings=config.superpoints.to_dict())
        raw_scenes = in_order(cut, missing.values(), config.data.prepare_workers)
        with contextlib.closing(raw_scenes):
            for name in tqdm(readers, desc=f"prepare {split}", unit="scene", dynamic_ncols=True):
                if name not in missing:
                    with np.load(files[name], allow_pickle=False) as archive:
                        yield name, dict(archive) | {"name": str(archive["name"])}
                    continue
                raw = next(raw_scenes)
                if isinstance(raw, LeftOut):
                    yield name, raw
                    continue
                if split == "val" or config.mode == "supervised":
                    if raw.scene.labels is None:
                        purpose = "to be scored by" if split == "val" else "to learn from"
                        raise ValueError(f"scene '{name}' has no labels {purpose}. {instructions(self.name)}")
                    check_labels(raw.scene, len(label_set(config).classes))
                scene = add_features(raw, self._teacher, config.teacher.get("masks", ""))
                width = self.info.features["feature_mean"].shape[-1]
                if scene.features.shape[1] != width:
                    raise ValueError(
                        f"scene '{name}': features have {scene.features.shape[1]} channels, the words of text.encoder "
                        f"{width}: LSeg's 512 go with CLIP ViT-B/32, OpenSeg's 768 with ViT-L/14@336px"
                    )
                supervised = len(scene.points) if raw.num_supervised is None else raw.num_supervised
                counts = {"chunk_features": raw.chunk_features, "num_supervised": supervised}
                record = encode(scene) | counts | {"frames_lost": getattr(raw.views, "lost", 0)}
                with replacing(files[name]) as file:
                    np.savez(file, **record)
                yield name, record


class _Report(dict):
    """What went into a split, as JSON: scenes, points, the points of each class, and what was left out and why.

    `frames_lost` are those without a finite pose.
    """

    def __init__(self, labels: LabelSet):
        super().__init__(scenes=0, points=0, points_with_feature=0, points_in_superpoint=0)
        self |= dict(labels={}, left_out={}, frames_lost=0)
        self.names = dict(enumerate(labels.classes)) | {IGNORE: "ignored"}

    def add(self, record: dict) -> None:
        self["scenes"] += 1
        self["points"] += len(record["points"])
        self["points_with_feature"] += len(record["feature_index"])
        inside = int((record["superpoints"] >= 0).sum())
        self["points_in_superpoint"] += inside
        if inside < 0.01 * len(record["points"]):
            logging.warning(
                "scene '%s': %d of %d points are in a superpoint; are its points, superpoints.voxel_resolution and "
                "superpoints.seed_resolution in metres?", record["name"], inside, len(record["points"]),
            )  # fmt: skip
        for label, count in zip(*np.unique(record["labels"], return_counts=True), strict=True):
            name = self.names.get(int(label), f"label {label}")
            self["labels"][name] = self["labels"].get(name, 0) + int(count)

    def leave_out(self, name: str, reason: str) -> None:
        self["left_out"][name] = reason
        logging.warning("%s left out: %s", name, reason)


def _file_name(scene: str) -> str:
    """A short file name of a scene, whose own may hold anything."""
    return hashlib.blake2b(scene.encode(), digest_size=16).hexdigest()


def report_text(report: dict) -> str:
    """The report of each split in lines to read."""
    lines = []
    for split, of in report.items():
        seen, inside = (of[part] / max(of["points"], 1) for part in ("points_with_feature", "points_in_superpoint"))
        lines.append(
            f"{split}: scenes {of['scenes']}, left out {len(of['left_out'])}, points {of['points']:,}, "
            f"with a 2D feature {seen:.1%}, in a superpoint {inside:.1%}"
        )
        if of["frames_lost"]:
            lines.append(f"  left out, frames without a finite pose: {of['frames_lost']}")
        for reason in dict.fromkeys(of["left_out"].values()):
            names = [name for name, why in of["left_out"].items() if why == reason]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  left out, {reason}: {', '.join(names[:3])}{more}")
        total = sum(of["labels"].values())
        ranked = sorted(of["labels"].items(), key=lambda item: -item[1])
        lines += [f"  {100 * count / total:6.2f} % {name}" for name, count in ranked]
    return "\n".join(lines)
