"""Replica: miniatures of both layouts, written here."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import replica
from data.projection import project
from data.scene import write_ply
from experiments import configs
from ggsd_jax import datasets, prepare
from ggsd_jax.vision_language.simulated import SimulatedTeacher

POINTS = np.random.default_rng(0).uniform([-1, -1, 3], [1, 1, 3.01], (300, 3)).astype(np.float32)
COLORS = np.full((300, 3), 255, np.uint8)


def write_frame(color: Path, depth: Path, size: tuple[int, int], metres: float = 3.0) -> None:
    for path in (color, depth):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(color)
    Image.fromarray(np.full(size[::-1], round(metres * 6553.5), np.uint16)).save(depth)


@pytest.fixture
def rendered(tmp_path) -> Path:
    """One scene, 12 poses, of which frames 0 and 10 are used; the camera steps 0.1 m to the right per frame."""
    write_ply(tmp_path / "room1_mesh.ply", POINTS, COLORS)
    poses = np.tile(np.eye(4), (12, 1, 1))
    poses[:, 0, 3] = 0.1 * np.arange(12)
    (tmp_path / "room1").mkdir()
    np.savetxt(tmp_path / "room1/traj.txt", poses.reshape(12, 16))
    for number in (0, 10):
        results = tmp_path / "room1/results"
        write_frame(results / f"frame{number:06d}.jpg", results / f"depth{number:06d}.png", replica.IMAGE_SIZE)
    return tmp_path


@pytest.fixture
def preprocessed(tmp_path) -> Path:
    root = tmp_path / "replica_processed"
    (root / "replica_3d").mkdir(parents=True)
    content = (POINTS, np.ones((300, 3), np.float32), np.full(300, 255))
    with zipfile.ZipFile(root / "replica_3d/room1.pth", "w") as archive:
        archive.writestr("room1/data.pkl", pickle.dumps(content, protocol=2))
    folder = root / "replica_2d/room1"
    (folder / "pose").mkdir(parents=True)
    for number, x in ((0, 0.0), (1, 1.0)):
        pose = np.eye(4)
        pose[0, 3] = x
        np.savetxt(folder / f"pose/{number}.txt", pose)
        write_frame(folder / f"color/{number}.jpg", folder / f"depth/{number}.png", replica.FEATURE_SIZE)
    return root


def test_both_layouts_give_the_same_scene_and_views(rendered, preprocessed):
    clouds = [replica.read_scene(root, "room1") for root in (rendered, preprocessed)]
    views = [replica.read_views(root, "room1") for root in (rendered, preprocessed)]
    assert replica.scenes(rendered) == replica.scenes(preprocessed) == ["room1"]
    for cloud in clouds:
        assert cloud.name == "room1" and cloud.labels is None
        np.testing.assert_array_equal(cloud.points, POINTS)
        np.testing.assert_array_equal(cloud.colors, COLORS)
    assert [v.name for v in views[0]] == ["room1/0", "room1/10"] and [v.name for v in views[1]] == [
        "room1/0",
        "room1/1",
    ]
    for one, other in zip(*views, strict=True):
        np.testing.assert_allclose(
            one.intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]], [317.5, 317.647, 319.5, 179.5], rtol=1e-5
        )
        np.testing.assert_array_equal(one.intrinsics, other.intrinsics)
        np.testing.assert_array_equal(one.pose, other.pose)
        np.testing.assert_array_equal(one.depth, other.depth)
        assert one.pixels().shape == (360, 640, 3)
    seen = project(POINTS, one.pose, one.intrinsics, one.size, one.depth)
    assert seen.visible.all()


def test_what_is_missing_or_damaged_is_named(rendered):
    with pytest.raises(FileNotFoundError, match="office0_mesh.ply: missing; is this the folder"):
        replica.read_scene(rendered, "office0")
    depth = rendered / "room1/results/depth000010.png"
    Image.fromarray(np.zeros((360, 640), np.uint16)).save(depth)
    with pytest.raises(ValueError, match="depth000010.png: 640 x 360 pixels, expected the camera's 1200 x 680"):
        replica.read_views(rendered, "room1")[1]
    depth.unlink()
    with pytest.raises(FileNotFoundError, match="depth000010.png: missing, but there is a pose for it"):
        replica.read_views(rendered, "room1")
    trajectory = rendered / "room1/traj.txt"
    text = trajectory.read_text()
    trajectory.write_text("nan " * 16 + "\n" + text)
    with pytest.raises(ValueError, match="the pose of frame 0 of room1 is not finite"):
        replica.read_views(rendered, "room1")
    trajectory.write_text(text.replace(text.split()[0], "2", 1))
    with pytest.raises(ValueError, match="traj.txt, frame 0: its left upper 3x3 part is no rotation"):
        replica.read_views(rendered, "room1")
    trajectory.write_text("\ufeff" + text + " \n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="depth000010.png"):  # no longer the poses
        replica.read_views(rendered, "room1")
    trajectory.write_text(text[:-30])
    with pytest.raises(ValueError, match="traj.txt: expected 16 numbers in each line"):
        replica.read_views(rendered, "room1")
    trajectory.unlink()
    with pytest.raises(FileNotFoundError, match="traj.txt: missing"):
        replica.read_views(rendered, "room1")


def test_scenes_without_labels_are_prepared_for_training_only(rendered, tmp_path, monkeypatch):
    class AllOnes(SimulatedTeacher):  # as a real network, it does not look at labels
        def __call__(self, scene):
            return lambda view: np.ones((360, 640, 8), np.float32)

    monkeypatch.setattr(prepare, "make_teacher", lambda config: AllOnes(np.eye(2, 8, dtype=np.float32)))
    config = configs.load("replica")
    config.update_from_flattened_dict({"data.root": str(rendered), "data.chunks": 1, "data.prepare_workers": 0})
    prepare.prepare(config, tmp_path / "out")
    (scene,) = prepare.load_split(tmp_path / "out", "train")
    assert scene.labels is None and len(scene.feature_index) == 300
    with pytest.raises(ValueError, match="has no split 'val', only .'train'."):
        prepare.load_split(tmp_path / "out", "val")
    config.data.root = str(tmp_path / "out")
    with pytest.raises(ValueError, match="none of the 8 scenes of Replica is there"):
        datasets.DATASETS["replica"](config)["train"]()
