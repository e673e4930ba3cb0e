"""nuScenes as distributed: lidar sweeps, six cameras, lidarseg and the JSON tables that tie them together.

Schema: nuScenes' docs/schema_nuscenes.md and schema_nuscenes-lidarseg.md.  The root holds the tables in a folder
like `v1.0-trainval`, and `samples/`, `sweeps/` and `lidarseg/`, whose files the tables name.

A scene in the sense of `Scene` is a keyframe, as in OpenScene: a driving scene of 20 s has about 40.  Its frame
is that of the lidar at the keyframe: x right, y forward, z up.
"""

import difflib
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int32

from data.labels import IGNORE, LABEL_SETS
from data.projection import adjust_intrinsics
from data.scene import Scene, View

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
FEATURE_SIZE = (800, 450)  # (w, h) on which OpenScene computes 2D features
BORDER = 5  # pixels, as OpenScene

# All lidarseg categories, id = place in the list, and what the benchmark of 16 classes calls them.
_CATEGORIES = {
    "noise": None,
    "animal": None,
    "human.pedestrian.adult": "person",
    "human.pedestrian.child": "person",
    "human.pedestrian.construction_worker": "person",
    "human.pedestrian.personal_mobility": None,
    "human.pedestrian.police_officer": "person",
    "human.pedestrian.stroller": None,
    "human.pedestrian.wheelchair": None,
    "movable_object.barrier": "barrier",
    "movable_object.debris": None,
    "movable_object.pushable_pullable": None,
    "movable_object.trafficcone": "traffic cone",
    "static_object.bicycle_rack": None,
    "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.car": "car",
    "vehicle.construction": "construction vehicle",
    "vehicle.emergency.ambulance": None,
    "vehicle.emergency.police": None,
    "vehicle.motorcycle": "motorcycle",
    "vehicle.trailer": "trailer",
    "vehicle.truck": "truck",
    "flat.driveable_surface": "drivable surface",
    "flat.other": "other flat",
    "flat.sidewalk": "sidewalk",
    "flat.terrain": "terrain",
    "static.manmade": "manmade",
    "static.other": None,
    "static.vegetation": "vegetation",
    "vehicle.ego": None,
}

LIDARSEG_TO_NUSCENES16 = np.array(
    [IGNORE if c is None else LABEL_SETS["nuscenes16"].classes.index(c) for c in _CATEGORIES.values()], np.int32
)
"""int32 [32]: lidarseg id to one of the 16 classes, 255 for ids outside the benchmark."""


class Sweep(NamedTuple):
    """One turn of the lidar: its file, and the pose [4, 4] of its frame in that of the keyframe's."""

    file: Path
    pose: Float64[np.ndarray, "4 4"]


class Camera(NamedTuple):
    """One image: its pose [4, 4] in the frame of the keyframe's lidar, intrinsics in pixels of size = (w, h)."""

    name: str
    file: Path
    pose: Float64[np.ndarray, "4 4"]
    intrinsics: Float64[np.ndarray, "3 3"]
    size: tuple[int, int]


class Keyframe(NamedTuple):
    """What belongs to one annotated moment; sweeps[0] is its own, the others are ever older."""

    token: str
    scene: str  # name of the driving scene
    sweeps: tuple[Sweep, ...]
    cameras: tuple[Camera, ...]
    labels: Path | None


def read_keyframes(
    root: str | os.PathLike, version: str, scenes: Collection[str] | None = None, sweeps: int = 1
) -> list[Keyframe]:
    """The keyframes of driving scenes, in the order of the tables, with calibration and ego motion worked out.

    A point of a sweep goes from the lidar to the car, to the world, and by the car's pose at the other moment
    to the lidar of the keyframe or to a camera: the car moves up to a metre between the two exposures.  Of
    the two large tables (2.6 million rows each) only the rows needed are kept.

    Args:
      root: folder with the tables' folder, samples/, sweeps/ and lidarseg/.
      version: the tables' folder, e.g. "v1.0-trainval".
      scenes: names such as "scene-0061"; None: all.
      sweeps: how many, the keyframe's own among them; the first keyframe of a driving scene has fewer.

    Raises:
      FileNotFoundError: a table is missing.
      ValueError: a table is corrupt or lacks a field or a row that another names, a pose or a camera is no matrix, a
        driving scene is unknown, or the categories are not those of lidarseg.
    """
    root = Path(root)
    tables = root / version
    if sweeps < 1:
        raise ValueError(f"sweeps is {sweeps}, expected at least 1, the keyframe's own")
    samples = _read_samples(tables, scenes)
    mounts = _read_mounts(tables)
    records = _read_records(tables, samples.keys(), sweeps, mounts)
    needed = {record["ego_pose_token"] for record in records.values()}
    rows = _read_table(tables, "ego_pose", _fields("token", "translation", "rotation", only=needed))
    car_poses = {row["token"]: _matrix(tables / "ego_pose.json", row) for row in rows}
    labels = _read_label_files(root, tables)

    def to_world(record: dict) -> Float64[np.ndarray, "4 4"]:
        if record["ego_pose_token"] not in car_poses:
            raise ValueError(f"{tables}/ego_pose.json: no row {record['ego_pose_token']}, named by sample_data.json")
        return car_poses[record["ego_pose_token"]] @ mounts[record["calibrated_sensor_token"]].to_car

    own = {
        (record["sample_token"], mounts[record["calibrated_sensor_token"]].channel): record
        for record in records.values()
        if record["is_key_frame"]
    }
    keyframes = []
    for sample, scene in samples.items():
        missing = [channel for channel in ("LIDAR_TOP", *CAMERAS) if (sample, channel) not in own]
        if missing:
            raise ValueError(f"{tables}/sample_data.json: keyframe {sample} has no {', '.join(missing)}")
        lidar = own[sample, "LIDAR_TOP"]
        to_keyframe = np.linalg.inv(to_world(lidar))
        turns, record = [], lidar
        while record is not None and len(turns) < sweeps:
            turns.append(Sweep(root / record["filename"], to_keyframe @ to_world(record)))
            record = records.get(record["prev"])
        cameras = []
        for channel in CAMERAS:
            record = own[sample, channel]
            intrinsics = mounts[record["calibrated_sensor_token"]].intrinsics
            file, size = root / record["filename"], (record["width"], record["height"])
            cameras.append(Camera(channel, file, to_keyframe @ to_world(record), intrinsics, size))
        keyframes.append(Keyframe(sample, scene, tuple(turns), tuple(cameras), labels.get(lidar["token"])))
    return keyframes


def _read_samples(tables: Path, scenes: Collection[str] | None) -> dict[str, str]:
    """The driving scene's name by the token of each keyframe of the named ones."""
    token_of = {row["name"]: row["token"] for row in _read_table(tables, "scene", _fields("token", "name"))}
    for name in scenes or ():
        if name not in token_of:
            near = difflib.get_close_matches(name, token_of, n=1, cutoff=0)
            raise ValueError(f"{tables}/scene.json: no scene {name!r}, nearest there: {near}; is this the version?")
    name_of = {token_of[name]: name for name in (token_of if scenes is None else scenes)}
    samples = _read_table(tables, "sample", _fields("token", "scene_token"))
    return {row["token"]: name_of[row["scene_token"]] for row in samples if row["scene_token"] in name_of}


class _Mount(NamedTuple):
    """Where a sensor sits on a car; intrinsics is empty for a lidar."""

    channel: str
    to_car: Float64[np.ndarray, "4 4"]
    intrinsics: Float64[np.ndarray, "..."]


def _read_mounts(tables: Path) -> dict[str, _Mount]:
    channels = {row["token"]: row["channel"] for row in _read_table(tables, "sensor", _fields("token", "channel"))}
    fields = _fields("token", "sensor_token", "translation", "rotation", "camera_intrinsic")
    path, mounts = tables / "calibrated_sensor.json", {}
    for row in _read_table(tables, "calibrated_sensor", fields):
        channel = channels.get(row["sensor_token"])
        if channel is not None:
            intrinsics = _array(path, row, "camera_intrinsic", (3, 3)) if channel in CAMERAS else np.empty(0)
            mounts[row["token"]] = _Mount(channel, _matrix(path, row), intrinsics)
    return mounts


def _read_records(tables: Path, samples: Collection[str], sweeps: int, mounts: dict[str, _Mount]) -> dict[str, dict]:
    """Rows of sample_data.json by token: the keyframes' lidar and cameras, and where asked for, all other sweeps."""
    keep = _fields(
        "token", "sample_token", "ego_pose_token", "calibrated_sensor_token",
        "filename", "prev", "is_key_frame", "width", "height",
    )  # fmt: skip
    used = {token: mount.channel for token, mount in mounts.items() if mount.channel in ("LIDAR_TOP", *CAMERAS)}

    def wanted(row: dict) -> dict | None:
        row = keep(row)
        channel = used.get(row["calibrated_sensor_token"])
        keyframe = row["is_key_frame"] and row["sample_token"] in samples
        return row if channel and (keyframe or (sweeps > 1 and channel == "LIDAR_TOP")) else None

    return {row["token"]: row for row in _read_table(tables, "sample_data", wanted)}


def _fields(*names: str, only: Collection[str] | None = None) -> Callable[[dict], dict | None]:
    """Of a row of a table the named fields; None where `only` is given and the row's token is not in it."""
    return lambda row: {name: row[name] for name in names} if only is None or row["token"] in only else None


def _read_table(tables: Path, name: str, keep: Callable[[dict], dict | None]) -> list[dict]:
    path = tables / f"{name}.json"
    try:
        with path.open("rb") as file:
            # as an object_hook it runs while parsing: rows it drops never pile up
            rows = json.load(file, object_hook=keep)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; is this the nuScenes root, and the version its folder?") from None
    except KeyError as error:
        own = "; nuScenes-lidarseg brings one that has: let it replace this" if name == "category" else ""
        raise ValueError(f"{path}: a row has no field {error}; is it of nuScenes v1.0?{own}") from None
    except ValueError as error:
        raise ValueError(f"{path}: truncated or not JSON ({error}); unpack the metadata again") from error
    return [row for row in rows if row is not None]


def _read_label_files(root: Path, tables: Path) -> dict[str, Path]:
    """Label file by the token of its sweep; empty where lidarseg is not installed (or this is the test set)."""
    if not (tables / "lidarseg.json").is_file():
        return {}
    known = list(_CATEGORIES)
    for row in _read_table(tables, "category", _fields("name", "index")):
        if not 0 <= row["index"] < len(known) or known[row["index"]] != row["name"]:
            near = difflib.get_close_matches(row["name"], known, n=1, cutoff=0)[0]
            raise ValueError(
                f"{tables}/category.json: category {row['name']!r} has the index {row['index']}, expected those of "
                f"nuScenes-lidarseg; the nearest there is {near!r} with {known.index(near)}"
            )
    rows = _read_table(tables, "lidarseg", _fields("sample_data_token", "filename"))
    return {row["sample_data_token"]: root / row["filename"] for row in rows}


def _array(path: Path, row: dict, field: str, shape: tuple[int, ...]) -> Float64[np.ndarray, "..."]:
    try:
        array = np.array(row[field], np.float64)
    except (TypeError, ValueError):
        array = np.array(np.nan)
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(
            f"{path}: {field} of the row {row['token']} is {str(row[field])[:60]}, expected finite numbers of the "
            f"shape {list(shape)}; unpack the metadata again"
        )
    return array


def _matrix(path: Path, row: dict) -> Float64[np.ndarray, "4 4"]:
    """The pose of a row of a table with `rotation`, a quaternion w, x, y, z, and `translation` in metres."""
    rotation = _array(path, row, "rotation", (4,))
    if not rotation.any():
        raise ValueError(f"{path}: rotation of the row {row['token']} is zero; unpack the metadata again")
    w, x, y, z = rotation / np.linalg.norm(rotation)
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = _array(path, row, "translation", (3,))
    return matrix


def read_scene(keyframe: Keyframe) -> tuple[Scene, int]:
    """The cloud of a keyframe, and how many of its first points are of the keyframe's own sweep.

    Returns:
      The scene, named by the token: the points of all its sweeps in the frame of the keyframe's lidar, its own
      first; labels 0..15 for these, 255 for the points of older sweeps; None without lidarseg.

    Raises:
      FileNotFoundError: a sweep or label file is missing.
      ValueError: one is truncated, or the labels are not lidarseg's or not of this sweep.
    """
    clouds = [read_points(sweep.file) for sweep in keyframe.sweeps]
    moved = [c @ s.pose[:3, :3].T + s.pose[:3, 3] for c, s in zip(clouds[1:], keyframe.sweeps[1:], strict=True)]
    points = np.concatenate([clouds[0], *moved]).astype(np.float32)
    labels = None
    if keyframe.labels is not None:
        labels = np.full(len(points), IGNORE, np.int32)
        labels[: len(clouds[0])] = read_labels(keyframe.labels, len(clouds[0]))
    return Scene(keyframe.token, points, labels=labels), len(clouds[0])


def read_points(path: str | os.PathLike) -> Float32[np.ndarray, "N 3"]:
    """x, y, z of a `.pcd.bin` file: rows of five float32, x, y, z, intensity and ring.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it does not hold whole rows.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        fix = ", or set data.sweeps=1 to do without sweeps" if "sweeps" in path.parts else ""
        raise FileNotFoundError(f"{path}: missing; unpack all the file blobs of nuScenes{fix}") from None
    if not content or len(content) % 20:
        raise ValueError(f"{path}: truncated, {len(content)} bytes are no whole rows of five float32")
    return np.frombuffer(content, "<f4").reshape(-1, 5)[:, :3].astype(np.float32)


def read_labels(path: str | os.PathLike, num_points: int) -> Int32[np.ndarray, " N"]:
    """The 16 classes, 255 = none of them, of a lidarseg file: one byte per point of its sweep.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has another number of labels, or ids above 31.
    """
    try:
        raw = np.frombuffer(Path(path).read_bytes(), np.uint8)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; unpack nuScenes-lidarseg into the same folder") from None
    if len(raw) != num_points:
        raise ValueError(f"{path}: {len(raw)} labels for a sweep of {num_points} points; unpack lidarseg again")
    bad = np.flatnonzero(raw >= len(LIDARSEG_TO_NUSCENES16))
    if bad.size:
        raise ValueError(
            f"{path}: label row {bad[0]} is {raw[bad[0]]}, expected lidarseg ids 0..31; is it a panoptic file?"
        )
    return LIDARSEG_TO_NUSCENES16[raw]


def read_views(keyframe: Keyframe, size: tuple[int, int] = FEATURE_SIZE) -> list[View]:
    """The six images of a keyframe on a pixel grid of the given size = (w, h); the lidar gives them no depth.

    Raises:
      FileNotFoundError: an image is missing.
    """
    for camera in keyframe.cameras:
        if not camera.file.is_file():
            raise FileNotFoundError(f"{camera.file}: missing; unpack the file blobs with samples/ of nuScenes")
    return [
        View(
            name=f"{keyframe.token}/{camera.name}",
            pose=camera.pose,
            intrinsics=adjust_intrinsics(camera.intrinsics, camera.size, size),
            size=size,
            image=camera.file,
        )
        for camera in keyframe.cameras
    ]
