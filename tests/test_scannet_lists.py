"""ScanNet's lists, scans and clouds, prepared as `configs/scannet.py` has them but for a simulated teacher."""

import dataclasses
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from data.scene import Scene
from data.synthetic import generate_room
from experiments import configs
from ggsd_jax import prepare
from ggsd_jax.prepare import load_split


def scannet_config(root: Path, **overrides) -> ml_collections.ConfigDict:
    config = configs.load("scannet")
    config.update_from_flattened_dict(
        {
            "data.root": str(root),
            "data.chunks": 1,
            "data.prepare_workers": 0,
            "superpoints.voxel_resolution": 0.08,
            "teacher.name": "simulated",
            "text.encoder": "stand-in:64",
        }
        | overrides
    )
    return config


def npz_scene(name: str, seed: int) -> Scene:
    """A room with labels of ScanNet, without frames."""
    scene = generate_room(seed, scan_views=4, views=1, size=(80, 60)).scene
    return Scene(name, scene.points, scene.colors, labels=scene.labels % 20)


@pytest.fixture
def scannet_root(tmp_path) -> Path:
    root = tmp_path / "scannet"
    root.mkdir()
    for i in range(2):
        npz_scene(f"scene000{i}_00", i).save_npz(root / f"scene000{i}_00.npz")
    (root / "scannetv2_train.txt").write_text("scene0000_00\nscene0005_00\n")
    (root / "scannetv2_val.txt").write_text("scene0001_00\nscene0006_00\n")
    return root


def test_listed_clouds_without_frames_are_seen_by_simulated_cameras(scannet_root, tmp_path, caplog):
    with caplog.at_level("INFO"):
        prepare.prepare(scannet_config(scannet_root), tmp_path / "out")
    (train,), (val,) = load_split(tmp_path / "out", "train"), load_split(tmp_path / "out", "val")
    assert (train.name, val.name) == ("scene0000_00", "scene0001_00")
    assert len(val.feature_index) > 0.3 * len(val.points)
    assert "scannetv2_train.txt: 1 found, 1 not there" in caplog.text
    left_out = prepare.load_report(tmp_path / "out")["train"]["left_out"]
    assert list(left_out) == ["scene0005_00"] and "not there" in left_out["scene0005_00"]
    assert f"left out, not there ({scannet_root}/scans/<scene>/ or" in caplog.text


def test_a_scene_may_have_a_long_name_of_any_letters(scannet_root, tmp_path):
    name = "ж" * 120
    npz_scene(name, seed=0).save_npz(scannet_root / f"{name}.npz")
    with (scannet_root / "scannetv2_train.txt").open("a", encoding="utf-8") as file:
        file.write(f"\n{name}\n")
    prepare.prepare(scannet_config(scannet_root), tmp_path / "out")
    assert name in {scene.name for scene in load_split(tmp_path / "out", "train")}


def test_a_split_without_a_scene_is_an_error(scannet_root, tmp_path):
    (scannet_root / "scene0001_00.npz").unlink()
    with pytest.raises(ValueError, match="none of the 2 scenes of scannetv2_val.txt"):
        prepare.prepare(scannet_config(scannet_root), tmp_path / "out")


def test_scannet_has_its_own_labels(scannet_root, tmp_path):
    config = scannet_config(scannet_root)
    config.data.label_set = "matterport21"
    with pytest.raises(ValueError, match="is 'matterport21': scannet is read with 'scannet20' or 'nyu40'"):
        prepare.prepare(config, tmp_path / "out")


def test_missing_raw_data_is_named(scannet_root, tmp_path):
    with pytest.raises(FileNotFoundError, match="data.root is '.*nowhere'"):
        prepare.prepare(scannet_config(tmp_path / "nowhere"), tmp_path / "out")
    (scannet_root / "scannetv2_val.txt").unlink()
    with pytest.raises(FileNotFoundError, match="scannetv2_val.txt"):
        prepare.prepare(scannet_config(scannet_root), tmp_path / "out")


def test_a_validation_scene_without_labels_is_an_error(scannet_root, tmp_path):
    path = scannet_root / "scene0001_00.npz"
    dataclasses.replace(Scene.load_npz(path), labels=None).save_npz(path)
    with pytest.raises(ValueError, match="scene0001_00' has no labels to be scored by. scannet: "):
        prepare.prepare(scannet_config(scannet_root), tmp_path / "out")


def test_a_real_scan_is_fused_from_its_frames(shared, tmp_path):
    root = tmp_path / "root"
    (root / "scans").mkdir(parents=True)
    (root / "scans" / "scene0000_00").symlink_to(shared / "data" / "scannet" / "scene0000_00")
    npz_scene("scene0001_00", 1).save_npz(root / "scene0001_00.npz")
    (root / "scannetv2_train.txt").write_text("scene0000_00")
    (root / "scannetv2_val.txt").write_text("scene0001_00")
    config = scannet_config(root, **{"superpoints.voxel_resolution": 0.05})
    prepare.prepare(config, tmp_path / "out")
    (scene,) = load_split(tmp_path / "out", "train")
    assert scene.name == "scene0000_00" and len(scene.points) == 81_369
    assert 8_000 < len(scene.feature_index) <= 20_000
    assert (scene.superpoints >= 0).mean() > 0.9


def test_prepared_data_is_found_again_however_its_folder_is_spelt(scannet_root, tmp_path):
    prepare.prepare(scannet_config(scannet_root), tmp_path / "out")
    prepare.prepare(scannet_config(f"{scannet_root}/../scannet/"), tmp_path / "out")
    moved = scannet_root.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="give the old path if the same files have only moved"):
        prepare.prepare(scannet_config(moved), tmp_path / "out")
    prepare.prepare(scannet_config(scannet_root), tmp_path / "out")


def test_labels_alone_need_no_features_that_a_cloud_brings_along(scannet_root, tmp_path):
    for i in range(2):
        scene = npz_scene(f"scene000{i}_00", i)
        given = dict(features=np.ones((3, 5), np.float16), feature_index=np.arange(3, dtype=np.int32))
        dataclasses.replace(scene, **given).save_npz(scannet_root / f"{scene.name}.npz")
    prepare.prepare(scannet_config(scannet_root, mode="supervised", **{"teacher.name": "none"}), tmp_path / "out")
    (train,) = load_split(tmp_path / "out", "train")
    assert len(train.features) == 0
