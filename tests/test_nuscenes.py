"""nuScenes: a miniature release written here from its schema, and real keyframes put into one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from data import nuscenes
from data.labels import LABEL_SETS
from data.projection import project
from experiments import configs
from ggsd_jax import metrics, prepare

VERSION = "v1.0-mini"
KEYFRAME = "data/nuscenes/keyframe_ca9a282c"


def pose_fields(matrix: np.ndarray) -> dict:
    x, y, z, w = Rotation.from_matrix(matrix[:3, :3]).as_quat()
    return {"rotation": [w, x, y, z], "translation": matrix[:3, 3].tolist()}


class Release:
    """The tables of a release, filled row by row, and its files."""

    def __init__(self, root: Path):
        self.root = root
        self.tables = {
            name: []
            for name in ("scene", "sample", "sample_data", "ego_pose", "sensor", "calibrated_sensor", "lidarseg")
        }
        self.tables["category"] = [{"token": n, "name": n, "index": i} for i, n in enumerate(nuscenes._CATEGORIES)]

    def sensor(self, channel: str, to_car: np.ndarray, intrinsics: list) -> None:
        self.tables["sensor"].append({"token": f"s {channel}", "channel": channel, "modality": "-"})
        self.tables["calibrated_sensor"].append(
            {"token": f"c {channel}", "sensor_token": f"s {channel}", "camera_intrinsic": intrinsics}
            | pose_fields(to_car)
        )

    def scene(self, name: str, *samples: str) -> None:
        self.tables["scene"].append({"token": f"t {name}", "name": name, "nbr_samples": len(samples)})
        self.tables["sample"] += [{"token": sample, "scene_token": f"t {name}"} for sample in samples]

    def record(self, sample: str, channel: str, car: np.ndarray, file: str, key=True, prev="", size=(0, 0)) -> str:
        token = f"{channel} {file}"
        folder = "samples" if key else "sweeps"
        self.tables["ego_pose"].append({"token": f"e {token}", "timestamp": 0} | pose_fields(car))
        self.tables["sample_data"].append(
            {
                "token": token, "sample_token": sample, "ego_pose_token": f"e {token}",
                "calibrated_sensor_token": f"c {channel}", "filename": f"{folder}/{channel}/{file}", "prev": prev,
                "is_key_frame": key, "width": size[0], "height": size[1], "timestamp": 0,
            }
        )  # fmt: skip
        self.path(token).parent.mkdir(parents=True, exist_ok=True)
        return token

    def path(self, token: str) -> Path:
        return self.root / next(r["filename"] for r in self.tables["sample_data"] if r["token"] == token)

    def label(self, record: str, raw: np.ndarray) -> None:
        file = self.root / "lidarseg" / VERSION / f"{len(self.tables['lidarseg'])}_lidarseg.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        raw.astype(np.uint8).tofile(file)
        self.tables["lidarseg"].append(
            {"token": file.name, "sample_data_token": record, "filename": str(file.relative_to(self.root))}
        )

    def write(self) -> Path:
        (self.root / VERSION).mkdir(exist_ok=True)
        for name, rows in self.tables.items():
            (self.root / VERSION / f"{name}.json").write_text(json.dumps(rows))
        return self.root


def moved(x: float, y: float, z: float, yaw: float = 0.0) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("z", yaw).as_matrix()
    matrix[:3, 3] = x, y, z
    return matrix


LIDAR = moved(0.9, 0.0, 1.8, -np.pi / 2)
CAR = [moved(x, 5.0, 0.0, 0.1 * x) for x in (0.0, 1.0, 2.0)]  # at the two older sweeps and at the keyframe
LOOKS_ALONG_X = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])


def miniature(root: Path, samples: int = 4) -> Release:
    """A driving scene per sample, `scene-0001`...; the same room of 600 points around a turning, moving car."""
    release = Release(root)
    release.sensor("LIDAR_TOP", LIDAR, [])
    for i, channel in enumerate(nuscenes.CAMERAS):
        yaw = 2 * np.pi * i / len(nuscenes.CAMERAS)
        release.sensor(channel, moved(0, 0, 1.5, yaw) @ LOOKS_ALONG_X, [[80, 0, 79.5], [0, 80, 44.5], [0, 0, 1]])
    rng = np.random.default_rng(0)
    world = rng.uniform([-8, -5, 0], [12, 15, 4], (600, 3))
    for number in range(1, samples + 1):
        sample, prev = f"sample{number}", ""
        release.scene(f"scene-{number:04d}", sample)
        for i, car in enumerate(CAR):
            token = release.record(sample, "LIDAR_TOP", car, f"{number}-{i}.pcd.bin", key=i == 2, prev=prev)
            local = world @ np.linalg.inv(car @ LIDAR)[:3, :3].T + np.linalg.inv(car @ LIDAR)[:3, 3]
            np.pad(local, ((0, 0), (0, 2))).astype(np.float32).tofile(release.path(token))
            prev = token
        release.label(token, np.arange(600) % 32)
        for channel in nuscenes.CAMERAS:
            token = release.record(sample, channel, moved(2.3, 5, 0, 0.23), f"{number}.jpg", size=(160, 90))
            Image.fromarray(rng.integers(0, 256, (90, 160, 3)).astype(np.uint8)).save(release.path(token))
    return release


@pytest.fixture
def release(tmp_path) -> Release:
    release = miniature(tmp_path, samples=2)
    release.write()
    return release


# -------------------------------------------------------------------------------------------- the miniature


def test_older_sweeps_fall_on_the_keyframe_and_carry_no_labels(release):
    (keyframe,) = nuscenes.read_keyframes(release.root, VERSION, ["scene-0002"], sweeps=3)
    scene, own = nuscenes.read_scene(keyframe)
    assert keyframe.scene == "scene-0002"
    assert (scene.name, own, len(scene.points), scene.colors) == ("sample2", 600, 1800, None)
    for older in (1, 2):
        np.testing.assert_allclose(scene.points[600 * older : 600 * (older + 1)], scene.points[:600], atol=1e-4)
    np.testing.assert_array_equal(scene.labels[:32], nuscenes.LIDARSEG_TO_NUSCENES16)
    assert (scene.labels[600:] == 255).all()


@pytest.mark.parametrize(("sweeps", "found"), [(1, 1), (2, 2), (9, 3)])
def test_sweeps_are_counted_from_the_keyframe_backwards(release, sweeps, found):
    for keyframe in nuscenes.read_keyframes(release.root, VERSION, sweeps=sweeps):
        files = [sweep.file.name[2:] for sweep in keyframe.sweeps]
        assert files == ["2.pcd.bin", "1.pcd.bin", "0.pcd.bin"][:found]
    assert nuscenes.read_scene(keyframe)[0].points.shape == (600 * found, 3)


def test_views_are_six_on_the_feature_grid_without_depth(release):
    (keyframe, _) = nuscenes.read_keyframes(release.root, VERSION)
    views = nuscenes.read_views(keyframe)
    assert [view.name for view in views] == [f"sample1/{channel}" for channel in nuscenes.CAMERAS]
    assert all(view.size == (800, 450) and view.depth is None for view in views)
    np.testing.assert_allclose(views[0].intrinsics[0, [0, 2]], [400, 79.5 * 799 / 159])
    assert views[0].pixels().shape == (450, 800, 3)


def test_without_lidarseg_there_are_no_labels(release):
    (release.root / VERSION / "lidarseg.json").unlink()
    scene, _ = nuscenes.read_scene(nuscenes.read_keyframes(release.root, VERSION)[0])
    assert scene.labels is None


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda r: r.tables["sample_data"][0].pop("prev"), ValueError, "sample_data.json: a row has no field 'prev'"),
        (lambda r: r.tables["ego_pose"].pop(), ValueError, "ego_pose.json: no row .*named by sample_data.json"),
        (lambda r: r.tables["sample_data"].pop(), ValueError, "keyframe sample2 has no CAM_BACK_RIGHT"),
        (
            lambda r: r.tables["ego_pose"][-1].update(rotation=[0, 0, 0, 0]),
            ValueError,
            "ego_pose.json: rotation of the row .* is zero",
        ),
        (
            lambda r: r.tables["ego_pose"][-1].update(translation=[1, None, 2]),
            ValueError,
            r"ego_pose.json: translation of the row .* is \[1, None, 2\], expected finite numbers of the shape \[3\]",
        ),
        (
            lambda r: r.tables["calibrated_sensor"][-1].update(camera_intrinsic=[]),
            ValueError,
            "calibrated_sensor.json: camera_intrinsic of the row",
        ),
        (
            lambda r: r.tables["category"][17].update(name="vehicle.cars"),
            ValueError,
            "category.json: category 'vehicle.cars' has the index 17, .*nearest there is 'vehicle.car' with 17",
        ),
        (
            lambda r: [row.pop("index") for row in r.tables["category"]],
            ValueError,
            "category.json: a row has no field 'index'; .*nuScenes-lidarseg brings one that has: let it replace this",
        ),
        (
            lambda r: r.tables["category"].append({"name": "sky", "index": 32}),
            ValueError,
            "'sky' has the index 32, expected those of nuScenes-lidarseg",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_named(release, spoil, error, message):
    spoil(release)
    release.write()
    with pytest.raises(error, match=message):
        nuscenes.read_keyframes(release.root, VERSION)


def test_a_missing_cut_off_or_mistaken_release_is_named(release):
    with pytest.raises(ValueError, match="no scene 'scene-0009', nearest there: .'scene-000"):
        nuscenes.read_keyframes(release.root, VERSION, ["scene-0009"])
    with pytest.raises(FileNotFoundError, match="v1.0-trainval/scene.json: missing; is this the nuScenes root"):
        nuscenes.read_keyframes(release.root, "v1.0-trainval")
    path = release.root / VERSION / "sample_data.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="sample_data.json: truncated or not JSON"):
        nuscenes.read_keyframes(release.root, VERSION)


def test_a_missing_or_damaged_file_of_a_keyframe_is_named(release):
    keyframe = nuscenes.read_keyframes(release.root, VERSION, sweeps=2)[0]
    keyframe.sweeps[1].file.unlink()
    with pytest.raises(FileNotFoundError, match="1-1.pcd.bin: missing; .*or set data.sweeps=1"):
        nuscenes.read_scene(keyframe)
    keyframe = keyframe._replace(sweeps=keyframe.sweeps[:1])
    keyframe.labels.write_bytes(bytes(599))
    with pytest.raises(ValueError, match="0_lidarseg.bin: 599 labels for a sweep of 600 points"):
        nuscenes.read_scene(keyframe)
    keyframe.labels.write_bytes(bytes(599) + b"\x20")
    with pytest.raises(ValueError, match="label row 599 is 32, expected lidarseg ids 0..31"):
        nuscenes.read_scene(keyframe)
    keyframe.labels.unlink()
    with pytest.raises(FileNotFoundError, match="0_lidarseg.bin: missing; unpack nuScenes-lidarseg"):
        nuscenes.read_scene(keyframe)
    keyframe.sweeps[0].file.write_bytes(bytes(30))
    with pytest.raises(ValueError, match="1-2.pcd.bin: truncated, 30 bytes"):
        nuscenes.read_scene(keyframe)
    keyframe.cameras[2].file.unlink()
    with pytest.raises(FileNotFoundError, match="CAM_FRONT_LEFT/1.jpg: missing"):
        nuscenes.read_views(keyframe)


def test_an_image_of_another_camera_is_refused_when_it_is_looked_at(release):
    view = nuscenes.read_views(nuscenes.read_keyframes(release.root, VERSION)[0])[0]
    Image.fromarray(np.zeros((90, 120, 3), np.uint8)).save(view.image)
    with pytest.raises(ValueError, match="sample1/CAM_FRONT': its image .*120 x 90 pixels, .*camera is 800 x 450"):
        view.pixels()


def load_config(**overrides):
    config = configs.load("nuscenes")
    config.update_from_flattened_dict(
        {"teacher.name": "simulated", "text.encoder": "stand-in:64"}
        | {"data.version": VERSION, "data.prepare_workers": 0}
        | overrides
    )
    return config


def test_a_release_is_prepared_with_features_of_the_keyframes_points_only(release, tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.txt").write_text("scene-0002\n")
    config = load_config(**{"data.root": str(release.root), "data.lists": str(lists), "data.sweeps": 3})
    with pytest.raises(FileNotFoundError, match="val.txt: missing; point data.lists at"):
        prepare.prepare(config, tmp_path / "out")
    (lists / "val.txt").write_text("scene-0001\n")
    prepare.prepare(config, tmp_path / "out")
    (scene,) = prepare.load_split(tmp_path / "out", "train")
    (val,) = prepare.load_split(tmp_path / "out", "val")
    assert (scene.name, val.name) == ("sample2", "sample1")
    assert len(scene.points) == 1800 and (scene.superpoints >= 0).any()
    for part in (scene, val):
        assert 100 < len(part.feature_index) <= part.feature_index[-1] + 1 <= 600


# ------------------------------------------------------------------------------------------- real keyframes


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    """The real keyframe as a release of one sample, and its info.json."""
    folder = shared / KEYFRAME
    info = json.loads((folder / "info.json").read_text())
    release = Release(tmp_path_factory.mktemp("nuscenes"))
    release.scene("scene-0061", info["sample_token"])
    lidar_to_car, car = np.array(info["lidar"]["lidar2ego"]), np.array(info["ego2global"])
    release.sensor("LIDAR_TOP", lidar_to_car, [])
    token = release.record(info["sample_token"], "LIDAR_TOP", car, "key.pcd.bin")
    shutil.copyfile(folder / info["lidar"]["file"], release.path(token))
    for channel, camera in info["cams"].items():
        to_car, from_lidar = np.array(camera["cam2ego"]), np.array(camera["lidar2cam"])
        then = car @ lidar_to_car @ np.linalg.inv(from_lidar) @ np.linalg.inv(to_car)
        release.sensor(channel, to_car, camera["cam2img"])
        token = release.record(info["sample_token"], channel, then, camera["file"], size=(1600, 900))
        shutil.copyfile(folder / camera["file"], release.path(token))
    (keyframe,) = nuscenes.read_keyframes(release.write(), VERSION)
    return keyframe, info


def test_boxes_of_the_real_keyframe_hold_their_stated_points(real):
    keyframe, info = real
    points = nuscenes.read_scene(keyframe)[0].points.astype(np.float64)
    counts = []
    for box in info["boxes"]:
        local = (points - box["center"]) @ Rotation.from_euler("z", box["yaw"]).as_matrix()
        counts.append(int((np.abs(local) <= np.array(box["lwh"]) / 2).all(axis=1).sum()))
    stated = [box["num_lidar_pts"] for box in info["boxes"]]
    assert (len(counts), sum(counts), sum(stated)) == (69, 994, 1009)
    assert np.equal(counts, stated).sum() == 61


def test_cameras_of_the_real_keyframe_see_the_stated_points(real, shared):
    keyframe, info = real
    points = nuscenes.read_scene(keyframe)[0].points
    expected = json.loads((shared / KEYFRAME / "projection_expected.json").read_text())["cams"]
    for view in nuscenes.read_views(keyframe, size=(1600, 900)):
        channel = view.name.split("/")[1]
        stated_pose = np.linalg.inv(np.array(info["cams"][channel]["lidar2cam"]))
        np.testing.assert_allclose(view.pose, stated_pose, atol=1e-5)
        stated = project(points, stated_pose, view.intrinsics, view.size)
        sums = {"sum_u": stated.col.sum(), "sum_v": stated.row.sum(), "sum_index": np.flatnonzero(stated.visible).sum()}
        assert {"inside": stated.visible.sum()} | sums == expected[channel]
        # info.json has float32 matrices, the tables quaternions: a point on the border of two pixels may change sides
        seen = project(points, view.pose, view.intrinsics, view.size)
        assert sum((a != b).sum() for a, b in zip(seen, stated, strict=True)) <= 2


def test_without_ego_motion_the_real_points_would_fall_elsewhere(real):
    keyframe, info = real
    points = nuscenes.read_scene(keyframe)[0].points
    shifts = []
    for view in nuscenes.read_views(keyframe, size=(1600, 900)):
        mount = np.array(info["cams"][view.name.split("/")[1]]["cam2ego"])
        at_once = np.linalg.inv(np.array(info["lidar"]["lidar2ego"])) @ mount
        seen, naive = (project(points, pose, view.intrinsics, view.size) for pose in (view.pose, at_once))
        both = seen.visible & naive.visible
        shifts.append(np.median(np.hypot(seen.col - naive.col, seen.row - naive.row)[both]))
    assert max(shifts) > 3  # pixels


def test_lidarseg_maps_to_the_16_classes_of_the_reference(shared):
    reference = json.loads((shared / "data/nuscenes/lidarseg_scene/classes.json").read_text())
    assert list(nuscenes._CATEGORIES) == reference["raw_names"]
    np.testing.assert_array_equal(nuscenes.LIDARSEG_TO_NUSCENES16, (np.array(reference["raw_to_16"]) - 1) % 256)
    spelled = {"construction_vehicle": "construction vehicle", "pedestrian": "person"}
    spelled |= {"traffic_cone": "traffic cone", "driveable_surface": "drivable surface", "other_flat": "other flat"}
    names = [spelled.get(name, name) for name in reference["class16_names"][1:]]
    assert list(LABEL_SETS["nuscenes16"].classes) == names


def test_stored_predictions_score_the_reference_iou(shared):
    folder = shared / "data/nuscenes/lidarseg_scene"
    reference = json.loads((folder / "reference_iou.json").read_text())
    frames = sorted(folder.glob("frame*"))
    points = [nuscenes.read_points(frame / "points.bin") for frame in frames]
    gt = [nuscenes.read_labels(f / "lidarseg.bin", len(p)) for f, p in zip(frames, points, strict=True)]
    pred = np.concatenate([np.fromfile(frame / "pred16.bin", np.uint8) for frame in frames]).astype(int) - 1
    # a prediction of none is an error here; evaluation has no such class, so it is given one of its own
    scores = metrics.evaluate(np.where(pred < 0, 16, pred), np.concatenate(gt), num_classes=17)
    assert (len(frames), len(pred)) == (14, 486_048)
    assert scores["iou"][:16] == pytest.approx(reference["iou"], abs=0) and scores["iou"][16] is None
    assert scores["acc"][:16] == pytest.approx(reference["acc"], abs=0)
