"""The raw scenes of every data set that `data.name` can name, and the host's share of preparing them.

Nothing here needs JAX: scenes are read and cut into superpoints in worker processes.
"""

import dataclasses
import functools
import multiprocessing
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import ml_collections
import numpy as np
from absl import logging

from data import folder, matterport, nuscenes, openscene, replica, scannet, semantickitti
from data.scene import Scene, View
from data.superpoints import vccs
from data.synthetic import generate_room, room_seeds
from data.virtual_camera import look_around_views
from ggsd_jax.workers import end_with_parent


class RawScene(NamedTuple):
    """A scene before it has superpoints and 2D features, and the views its features come from.

    border and tolerance are those of `data.projection.project`; only the first `num_supervised` points may get
    a feature (None: all). A scene that comes with its features, or is to have none, needs no views; where they come in
    chunks, `chunk_features` is how many a chunk has, else 0.
    """

    scene: Scene
    views: Iterable[View]
    border: int
    tolerance: float = 0.25
    num_supervised: int | None = None
    chunk_features: int = 0


class LeftOut(Exception):
    """A scene that the rules of its data set leave out; the message says why."""


Readers = dict[str, Callable[[], RawScene] | LeftOut]
"""By the name of each scene the function that reads it, fit for another process, or the reason why it is not there."""

Splits = dict[str, Callable[[], Readers]]
"""By the name of each split, "train" or "val", the function that looks for its scenes."""


def cut_superpoints(read: Callable[[], RawScene], settings: dict) -> RawScene | LeftOut:
    """What `read` gives, with the VCCS superpoints of these settings in place of any it has.

    LeftOut is returned, not raised.
    """
    try:
        raw = read()
    except LeftOut as reason:
        return reason
    scene = raw.scene
    try:
        superpoints = vccs(scene.points, scene.colors, scene.normals, **settings)
    except ValueError as error:
        raise ValueError(f"scene '{scene.name}': {error}") from error
    return raw._replace(scene=dataclasses.replace(scene, superpoints=superpoints))


def in_order(function: Callable, items: Iterable, workers: int) -> Iterator:
    """function(item) for each item in order, made ahead of time by `workers` processes; 0: in this one."""
    if workers == 0:
        yield from map(function, items)
        return
    spawn = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, spawn, initializer=end_with_parent)
    try:
        ahead = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------- the data sets


def synthetic(config: ml_collections.ConfigDict) -> Splits:
    """Generated rooms, `data.train_rooms` and `data.val_rooms` of them."""
    _expect_label_set(config, "synthetic")

    def rooms(split: str) -> Readers:
        count = config.data[f"{split}_rooms"]
        if count < 1:
            raise ValueError(f"data.{split}_rooms is {count}, expected at least 1")
        return {f"room {seed}": functools.partial(read_room, seed) for seed in room_seeds(split, count)}

    return {split: functools.partial(rooms, split) for split in ("train", "val")}


def read_room(seed: int) -> RawScene:
    return RawScene(*generate_room(seed), border=0)


def scannet_scans(config: ml_collections.ConfigDict) -> Splits:
    """Scenes that are on ScanNet's lists `scannetv2_train.txt` and `scannetv2_val.txt`.

    Agree to the terms on www.scan-net.org, and get of each scene the types `_vh_clean_2.ply`, `_vh_clean_2.labels.ply`
    and `.sens` with the script that its owners send. data.root holds `scans/<scene>/` with them (frames exported to
    color/, depth/ and pose/ do as well as the .sens), or a neutral `<scene>.npz` (data.scene.Scene), at which the
    simulated network looks through cameras of its own. The lists are in Tasks/Benchmark/ of ScanNet/ScanNet; data.lists
    names their folder, if that is not data.root.
    """
    _expect_label_set(config, *scannet.LABEL_TABLES)
    root, with_views = Path(config.data.root), _needs_views(config)

    def scans(split: str) -> Readers:
        listed = _read_list(config, f"scannetv2_{split}.txt")
        found = {}
        for name in listed:
            if (root / "scans" / name).is_dir():
                found[name] = functools.partial(_read_scan, root / "scans" / name, config.data.label_set, with_views)
            elif (root / f"{name}.npz").is_file():
                found[name] = functools.partial(_read_npz, root / f"{name}.npz", _is_simulated(config))
        return _some(found, listed, f"scannetv2_{split}.txt", f"{root}/scans/<scene>/ or {root}/<scene>.npz")

    return {split: functools.partial(scans, split) for split in ("train", "val")}


def _read_scan(folder: Path, label_set: str, with_views: bool) -> RawScene:
    views = scannet.read_views(folder) if with_views else ()
    return RawScene(scannet.read_scene(folder, label_set), views, scannet.BORDER, scannet.DEPTH_TOLERANCE)


def _read_npz(path: Path, simulated: bool) -> RawScene:
    scene = Scene.load_npz(path)
    return RawScene(scene, _look_around(path, scene) if simulated else (), border=0)


def _look_around(path: Path, scene: Scene) -> list[View]:
    try:
        return look_around_views(scene.points, seed=zlib.crc32(scene.name.encode()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def matterport_regions(config: ml_collections.ConfigDict) -> Splits:
    """The regions of the buildings listed in `scenes_train.txt`, and in `scenes_test.txt` for "val", as OpenScene.

    Agree to the terms on niessner.github.io/Matterport, and get of each building the types region_segmentations,
    undistorted_color_images, undistorted_depth_images and undistorted_camera_parameters with the script that its
    owners send. Unpacked, data.root/<building>/ holds folders of these names. The lists and `category_mapping.tsv`
    are in tasks/benchmark/ and metadata/ of niessner/Matterport; data.lists names their folder, if that is not
    data.root.
    """
    _expect_label_set(config, *matterport.LABEL_SET_NAMES)
    root, with_views = Path(config.data.root), _needs_views(config)
    table = Path(config.data.lists or config.data.root) / "category_mapping.tsv"
    class_of_category = matterport.read_categories(table, config.data.label_set)

    def regions(list_name: str, nearest: int) -> Readers:
        listed = _read_list(config, list_name)
        found = {
            f"{building} {mesh.stem}": functools.partial(_read_region, mesh, class_of_category, nearest, with_views)
            for building in listed
            for mesh in sorted((root / building / "region_segmentations").glob("region*.ply"))
        }
        with_regions = {name.split()[0] for name in found}
        absent = [building for building in listed if building not in with_regions]
        return _some(found, absent, list_name, f"{root}/<building>/region_segmentations/region*.ply")

    return {
        "train": functools.partial(regions, "scenes_train.txt", 0),
        "val": functools.partial(regions, "scenes_test.txt", matterport.NEAREST),
    }


def _read_region(mesh: Path, class_of_category: np.ndarray, nearest: int, with_views: bool) -> RawScene:
    scene = matterport.read_region(mesh, class_of_category)
    if not with_views:
        return RawScene(scene, (), matterport.BORDER, matterport.DEPTH_TOLERANCE)
    cameras = _cameras_of_building(mesh.parent.parent)
    chosen = matterport.cameras_of_region(cameras, scene.points, nearest)
    if not chosen:
        raise LeftOut("no camera stands in it")
    return RawScene(scene, matterport.read_views(chosen), matterport.BORDER, matterport.DEPTH_TOLERANCE)


_cameras_of_building = functools.lru_cache(maxsize=2)(matterport.read_cameras)


def nuscenes_keyframes(config: ml_collections.ConfigDict) -> Splits:
    """The keyframes of the driving scenes listed in `train.txt` and `val.txt`, with data.sweeps sweeps each.

    Register at www.nuscenes.org, and unpack into one folder, data.root, of "Full dataset (v1.0)" the metadata and
    the file blobs of trainval, and nuScenes-lidarseg: `v1.0-trainval/`, `samples/`, `sweeps/` (not needed with
    data.sweeps=1) and `lidarseg/`. The lists hold names such as scene-0061, one per line, of
    nuscenes.utils.splits in the official development kit; data.lists names their folder, if that is not data.root.
    """
    _expect_label_set(config, "nuscenes16")

    listed = {split: set(_read_list(config, f"{split}.txt")) for split in ("train", "val")}
    keyframes = nuscenes.read_keyframes(
        config.data.root, config.data.version, sorted(set.union(*listed.values())), config.data.sweeps
    )

    def of_split(split: str) -> Readers:
        with_views = _needs_views(config)
        return {
            k.token: functools.partial(_read_keyframe, k, with_views) for k in keyframes if k.scene in listed[split]
        }

    return {split: functools.partial(of_split, split) for split in listed}


def _read_keyframe(keyframe: nuscenes.Keyframe, with_views: bool) -> RawScene:
    scene, own = nuscenes.read_scene(keyframe)
    views = nuscenes.read_views(keyframe) if with_views else ()
    return RawScene(scene, views, border=nuscenes.BORDER, num_supervised=own)


def semantickitti_scans(config: ml_collections.ConfigDict) -> Splits:
    """The scans of `sequences/00` to `10` that are there; 08 is "val".

    Get velodyne laser data, left color images and calibration of KITTI's odometry benchmark (www.cvlibs.net), and the
    labels from semantic-kitti.org. data.root/sequences/<sequence>/ holds `velodyne/`, `labels/`, `image_2/` and
    `calib.txt`.
    """
    _expect_label_set(config, "semantickitti19")
    root, with_views = Path(config.data.root) / "sequences", _needs_views(config)

    def scans(sequences: tuple[str, ...]) -> Readers:
        paths = [path for sequence in sequences for path in sorted((root / sequence / "velodyne").glob("[0-9]*.bin"))]
        found = {f"{p.parent.parent.name}_{p.stem}": functools.partial(_read_lidar_scan, p, with_views) for p in paths}
        absent = [s for s in sequences if s not in {path.parent.parent.name for path in paths}]
        return _some(found, absent, "SemanticKITTI", f"{root}/<sequence>/velodyne/*.bin")

    return {
        "train": functools.partial(scans, semantickitti.TRAIN),
        "val": functools.partial(scans, semantickitti.VAL),
    }


def _read_lidar_scan(path: Path, with_views: bool) -> RawScene:
    views = semantickitti.read_views(path) if with_views else ()
    return RawScene(semantickitti.read_scan(path), views, semantickitti.BORDER)


def replica_scenes(config: ml_collections.ConfigDict) -> Splits:
    """The eight scenes of Replica, as far as they are there; without labels there is no "val".

    data.root is Replica as rendered for NICE-SLAM (https://cvg-data.inf.ethz.ch/nice-slam/data/Replica.zip: meshes
    `<scene>_mesh.ply`, and `<scene>/traj.txt` with `<scene>/results/`), or OpenScene's `replica_processed` with
    `replica_3d/` and `replica_2d/`.
    """
    root = config.data.root
    found = {name: functools.partial(_read_replica, root, name) for name in replica.scenes(root)}
    places = f"{root}/<scene>_mesh.ply or {root}/replica_3d/<scene>.pth"
    return {"train": functools.partial(_some, found, list(replica.SCENES), "Replica", places)}


def _read_replica(root: str, name: str) -> RawScene:
    views = replica.read_views(root, name)
    return RawScene(replica.read_scene(root, name), views, replica.BORDER, replica.DEPTH_TOLERANCE)


def folder_scenes(config: ml_collections.ConfigDict) -> Splits:
    """The scenes of a folder of your own; configs/folder.py shows its layout.

    Those listed in `val.txt`, if there is one, are "val" and must be labelled; all others are for training.
    """
    clouds = folder.find_scenes(config.data.root)
    listed = set()
    if (Path(config.data.lists or config.data.root) / "val.txt").is_file():
        listed = set(_read_list(config, "val.txt"))
    unknown = sorted(listed - clouds.keys())
    if unknown:
        raise ValueError(
            f"val.txt lists {unknown[0]!r}, which is not in {config.data.root}; there: {', '.join(clouds)}"
        )
    readers = {
        name: functools.partial(
            _read_own,
            name,
            path,
            config.data.scale or None,
            config.data.depth_units,
            _needs_views(config),
            _is_simulated(config),
        )
        for name, path in clouds.items()
    }
    splits = {
        "train": {name: read for name, read in readers.items() if name not in listed},
        "val": {name: read for name, read in readers.items() if name in listed},
    }
    if not splits["train"]:
        raise ValueError(f"val.txt lists every scene of {config.data.root}: none is left to train on")
    splits = {split: scenes for split, scenes in splits.items() if scenes}
    absent = LeftOut(f"it holds no {', '.join(folder.CLOUD_SUFFIXES)}")
    splits[next(iter(splits))] |= dict.fromkeys(folder.without_cloud(config.data.root), absent)
    return {split: functools.partial(dict, scenes) for split, scenes in splits.items()}


def _read_own(
    name: str, path: Path, scale: float | None, depth_units: float, with_views: bool, simulated: bool
) -> RawScene:
    scene = dataclasses.replace(folder.read_cloud(path, scale), name=name)
    if scene.features is not None or not with_views:
        return RawScene(scene, views=(), border=0)
    views = folder.read_views(path, scene, scale or 1.0, depth_units)
    if views is None and scene.labels is None:
        raise LeftOut(f"it has neither images nor labels to simulate them from; expected:{folder.LAYOUT}")
    if views is None:  # no network sees it; it can be scored
        views = _look_around(path, scene) if simulated else ()
    return RawScene(scene, views, border=0)


def openscene_scenes(config: ml_collections.ConfigDict) -> Splits:
    """OpenScene's downloads: `train/*.pth` and `val/*.pth` with the files of data.features.

    OpenScene's scripts/download_dataset.sh and download_fused_features.sh fetch them: data.root is e.g. its scannet_3d,
    data.features its scannet_multiview_lseg, whose name tells the text that goes with it. Of Matterport3D `test/` is
    scored, with the features in a second folder beside the first, matterport_multiview_openseg_test. As in OpenScene,
    a scene without a feature file is left out. With teacher.name=none no features are read.
    """
    _expect_label_set(config, "scannet20", *matterport.LABEL_SET_NAMES, "nuscenes16")
    root, named = Path(config.data.root), config.data.get("features", "")
    most_frequent = config.data.label_set.removeprefix("matterport")
    if most_frequent in ("40", "80", "160") and not root.name.endswith(f"_{most_frequent}"):
        logging.warning(
            "data.root is %s: the labels of data.label_set=%s are in OpenScene's matterport_3d_%s",
            root, config.data.label_set, most_frequent,
        )  # fmt: skip
    features = Path(named)
    if config.teacher.name == "none":
        features = None
    elif not named or not features.is_dir():
        raise FileNotFoundError(
            f"data.features is {named!r}: expected the folder with OpenScene's fused features, "
            "e.g. scannet_multiview_lseg"
        )

    def scenes(split: str) -> Readers:
        own = features and features.with_name(f"{features.name}_{split}")
        folder = own if own and own.is_dir() else features
        paths = sorted((root / split).glob("[!.]*.pth"))
        found = {path.stem: functools.partial(_read_preprocessed, path, folder) for path in paths}
        return _some(found, [], f"split '{split}'", f"{root}/{split}/*.pth")

    scored = "test" if config.data.label_set in matterport.LABEL_SET_NAMES else "val"
    return {"train": functools.partial(scenes, "train"), "val": functools.partial(scenes, scored)}


def _read_preprocessed(path: Path, folder: Path | None) -> RawScene:
    scene = openscene.read_scene(path)
    if folder is None:
        return RawScene(scene, views=(), border=0)
    try:
        features, feature_index, in_file = openscene.read_features_of_scene(folder, scene.name, len(scene.points))
    except FileNotFoundError as error:
        raise LeftOut(str(error)) from error
    scene = dataclasses.replace(scene, features=features, feature_index=feature_index)
    return RawScene(scene, views=(), border=0, chunk_features=in_file)


# ------------------------------------------------------------------------------------------- what they share


def _expect_label_set(config: ml_collections.ConfigDict, *known: str) -> None:
    if config.data.label_set not in known:
        expected = " or ".join(repr(name) for name in known)
        raise ValueError(f"data.label_set is {config.data.label_set!r}: {config.data.name} is read with {expected}")


def _needs_views(config: ml_collections.ConfigDict) -> bool:
    """Whether scenes need their views: not where nothing is learned from 2D features."""
    return config.teacher.name != "none"


def _is_simulated(config: ml_collections.ConfigDict) -> bool:
    """Whether the 2D network is the simulated one, which needs no images: a cloud without views gets some."""
    return config.teacher.name == "simulated"


def _read_list(config: ml_collections.ConfigDict, name: str) -> list[str]:
    """The names in a list file, one per line, in `data.lists`, or in `data.root` where that is empty."""
    path = Path(config.data.lists or config.data.root) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; point data.lists at the folder with the lists of the data set")
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{path}: lists no scene; expected a name per line")
    return names


def _some(found: Readers, listed: Sequence[str], source: str, places: str) -> Readers:
    """`found`, if anything is, with why the others that are listed are left out."""
    if not found:
        none = f"none of the {len(listed)} scenes of {source}" if listed else f"no scene of {source}"
        raise ValueError(f"{none} is there, looked for {places}: download some, or point data.root at them")
    absent = [name for name in listed if name not in found]
    logging.info("%s: %d found, %d not there", source, len(found), len(absent))
    return found | {name: LeftOut(f"not there ({places})") for name in absent}


DATASETS: dict[str, Callable[[ml_collections.ConfigDict], Splits]] = {
    "synthetic": synthetic,
    "scannet": scannet_scans,
    "matterport": matterport_regions,
    "nuscenes": nuscenes_keyframes,
    "semantickitti": semantickitti_scans,
    "replica": replica_scenes,
    "folder": folder_scenes,
    "openscene": openscene_scenes,
}
"""By `data.name` the function that gives the splits. "val", where there is one, is what is scored."""


class RawScenes(Sequence):
    """The scenes of one split of `config.data`, read when they are asked for: points, colours, labels; no image.

    Raises:
        ValueError, FileNotFoundError, LeftOut: what the readers raise; ValueError also where there is no such split.
    """

    def __init__(self, config: ml_collections.ConfigDict, split: str):
        config = config.copy_and_resolve_references()
        config.teacher.name = "none"
        splits = DATASETS[config.data.name](config)
        if split not in splits:
            raise ValueError(f"data set {config.data.name!r} has no split {split!r}, only {sorted(splits)}")
        self._readers = list(splits[split]().values())

    def __len__(self) -> int:
        return len(self._readers)

    def __getitem__(self, index: int) -> Scene:
        return self._readers[index]().scene
