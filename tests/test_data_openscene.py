"""OpenScene's preprocessed scenes and feature files, its own ones and small ones made to be wrong."""

import pickle
import zipfile

import numpy as np
import pytest

from data import openscene
from data.feature_codes import dequantize, quantize
from data.labels import LABEL_SETS
from experiments import configs
from ggsd_jax import datasets, prepare

POINTS = np.arange(12, dtype=np.float32).reshape(4, 3)
COLORS = np.array([[-1, 0, 1]] * 4, np.float32)
LABELS = np.array([0, 19, -100, 255], np.float64)


def save(path, content) -> str:
    """A torch zip file of NumPy arrays, as torch.save of them makes it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr(f"{path.stem}/version", "3\n")
    return str(path)


@pytest.fixture(scope="module")
def golden(shared):
    return dict(np.load(shared / "golden/extras_pipeline.npz"))


def test_a_preprocessed_scene_becomes_bytes_of_color_and_ignored_labels(tmp_path):
    scene = openscene.read_scene(save(tmp_path / "scene0000_01_vh_clean_2.pth", (POINTS, COLORS, LABELS)))
    assert scene.name == "scene0000_01"
    np.testing.assert_array_equal(scene.points, POINTS)
    assert scene.colors[0].tolist() == [0, 128, 255] and scene.labels.tolist() == [0, 19, 255, 255]


def test_a_lidar_scene_without_colors_has_none(tmp_path):
    scene = openscene.read_scene(save(tmp_path / "3a4b.pth", (POINTS.astype(np.float64), 0, LABELS.astype(np.int64))))
    assert scene.colors is None and scene.points.dtype == np.float32 and scene.name == "3a4b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((POINTS, COLORS), r"expected a tuple \(coords, colors, labels\), got tuple of 2"),
        ({"coords": POINTS}, r"got dict with \['coords'\]"),
        ((POINTS, COLORS * 255, LABELS), r"colors row 0 is .*expected -1\.\.1"),
        ((POINTS, COLORS, LABELS + 0.5), "labels row 0 is 0.5, expected a class 0..254"),
        ((POINTS, COLORS, np.array([0, 1, 2, 256])), "labels row 3 is 256"),
        ((POINTS, COLORS, LABELS[:3]), r"labels must be int32 \[4\], got shape \[3\]"),
        ((POINTS * np.nan, COLORS, LABELS), "points row 0"),
    ],
)
def test_a_bad_preprocessed_scene_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"bad.pth: .*{message}"):
        openscene.read_scene(save(tmp_path / "bad.pth", content))


def test_the_real_preprocessed_scene_equals_its_unpacked_arrays(shared):
    path = shared / "data/scannet/preprocessed/scene0000_01_vh_clean_2.pth"
    scene, arrays = openscene.read_scene(path), np.load(path.with_suffix(".npz"))
    assert scene.name == "scene0000_01"
    np.testing.assert_array_equal(scene.points, arrays["coords"])
    np.testing.assert_array_equal(scene.labels, arrays["labels"])
    np.testing.assert_allclose(scene.colors / 127.5 - 1, arrays["colors"], atol=1e-6)


def voxel_targets(golden, features, index):
    """The supervised voxels and their targets, if a voxel takes the feature of its representative point."""
    row_of_point = np.full(len(golden["fl_mask_full"]), -1)
    row_of_point[index] = np.arange(len(index))
    rows = row_of_point[golden["vox_ind"]]
    return rows >= 0, features[rows[rows >= 0]]


@pytest.mark.parametrize("legacy", [False, True])
def test_features_of_both_formats_give_openscenes_training_targets(golden, tmp_path, legacy):
    if legacy:
        names = {"feat": "fl_legacy_feat", "mask": "fl_legacy_mask_idx", "mask_full": "fl_legacy_mask_full"}
    else:
        names = {"feat": "fl_feat", "mask_full": "fl_mask_full"}
    path = save(tmp_path / "scene_0.pt", {key: golden[name] for key, name in names.items()})
    features, index = openscene.read_features(path, num_points=3000)
    mask, targets = voxel_targets(golden, features, index)
    case = "fl_train_legacy" if legacy else "fl_train"
    np.testing.assert_array_equal(mask, golden[f"{case}__mask"])
    np.testing.assert_array_equal(targets, golden[f"{case}__feat_3d"])


def test_validation_features_are_openscenes_dense_ones(golden, tmp_path):
    path = save(tmp_path / "scene_0.pt", {"feat": golden["fl_val_feat"], "mask_full": golden["fl_val_mask_full"]})
    features, index = openscene.read_features(path, num_points=3000)
    dense = np.zeros((3000, features.shape[1]), np.float16)
    dense[index] = features
    np.testing.assert_array_equal(dense[golden["vox_ind"]], golden["fl_val__feat_3d"])


FEATURES = np.ones((2, 5), np.float16)
MASK = np.array([False, True, False, True])


@pytest.mark.parametrize("dtype", [bool, np.uint8])  # torch takes both for flags
def test_legacy_features_with_a_trailing_axis_and_a_mask_of_flags_are_read(tmp_path, dtype):
    content = {
        "feat": FEATURES[..., None] * np.float16(3),
        "mask": np.array([False, True], dtype),
        "mask_full": MASK,
    }
    features, index = openscene.read_features(save(tmp_path / "a.pt", content), num_points=4)
    assert features.tolist() == [[3] * 5] and index.tolist() == [3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((FEATURES, MASK), "expected a dict with 'feat' and 'mask_full', got tuple of 2"),
        ({"feat": FEATURES}, r"got dict with \['feat'\]"),
        ({"feat": FEATURES, "mask_full": MASK[:3]}, r"mask_full has shape \[3\], but the scene has 4 points"),
        ({"feat": FEATURES[:1], "mask_full": MASK}, r"feat has shape \[1, 5\], expected \[2, C\]"),
        (
            {"feat": FEATURES, "mask_full": MASK, "mask": np.array([2])},
            "mask names row 2 of feat, expected rows 0..1",
        ),
    ],
)
def test_a_bad_feature_file_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"bad.pt: .*{message}"):
        openscene.read_features(save(tmp_path / "bad.pt", content), num_points=4)


def test_the_chunks_of_a_scene_are_put_together(tmp_path):
    with pytest.raises(FileNotFoundError, match="a_0.pt: missing, and so is a.pt"):
        openscene.read_features_of_scene(tmp_path, "a", 4)
    rows = np.arange(20).reshape(4, 5).astype(np.float16)
    for chunk, points in {0: [1, 3], 12: [0]}.items():
        mask = np.isin(np.arange(4), points)
        save(tmp_path / f"a_{chunk}.pt", {"feat": rows[mask], "mask_full": mask})
    save(tmp_path / "ab_0.pt", {"feat": FEATURES, "mask_full": MASK})
    features, index, in_file = openscene.read_features_of_scene(tmp_path, "a", 4)
    assert index.tolist() == [0, 1, 3] and index.dtype == np.int32 and in_file == 2
    np.testing.assert_array_equal(features, rows[index])


def test_features_of_two_networks_in_one_folder_are_named(tmp_path):
    for number, width in enumerate((512, 768)):
        content = {"feat": np.zeros((3, width), np.float16), "mask_full": LABELS > -1}
        save(tmp_path / f"a_{number}.pt", content)
    with pytest.raises(ValueError, match="unlike widths .a_0.pt 512 and a_1.pt 768."):
        openscene.read_features_of_scene(tmp_path, "a", len(POINTS))


def test_openscenes_downloads_are_prepared_as_they_are(tmp_path):
    def text_file(model: str, width: int) -> str:
        path = tmp_path / f"{model.replace('/', '-')}_{width}.npz"
        np.savez(path, embedding=np.eye(20, width), names=LABEL_SETS["scannet20"].classes, model=model)
        return str(path)

    rng = np.random.default_rng(0)
    features = tmp_path / "scannet_multiview_lseg"
    features.mkdir()
    for split, scene in (("train", "scene0000_00"), ("train", "scene0000_01"), ("val", "scene0000_02")):
        (tmp_path / "scannet_3d" / split).mkdir(parents=True, exist_ok=True)
        points = rng.uniform(0, 2, (500, 3)).astype(np.float32) * [1, 1, 0.01]
        cloud = (points, np.zeros((500, 3), np.float32), np.zeros(500))
        save(tmp_path / "scannet_3d" / split / f"{scene}_vh_clean_2.pth", cloud)
        if scene != "scene0000_01":
            mask = rng.random(500) < 0.5
            feat = rng.normal(size=(mask.sum(), 64)).astype(np.float16)
            save(features / f"{scene}_0.pt", {"feat": feat, "mask_full": mask})
    config = configs.load("scannet")
    config.update_from_flattened_dict(
        {"data.name": "openscene", "data.root": str(tmp_path / "scannet_3d"), "data.prepare_workers": 0}
        | {"data.chunks": 1, "text.encoder": text_file("ViT-B/32", 64)}
    )
    with pytest.raises(FileNotFoundError, match="data.features is '': expected the folder with OpenScene's"):
        prepare.prepare(config, tmp_path / "out")
    config.data.features = str(features)
    prepare.prepare(config, tmp_path / "out")
    (train,) = prepare.load_split(tmp_path / "out", "train")
    (val,) = prepare.load_split(tmp_path / "out", "val")
    assert val.name == "scene0000_02" and train.superpoints.max() > 3
    np.testing.assert_array_equal(np.flatnonzero(mask), val.feature_index)
    np.testing.assert_array_equal(dequantize(quantize(feat)), val.features)
    assert prepare.teacher_name(config) == "ready-made features: scannet_multiview_lseg"
    left_out = prepare.load_report(tmp_path / "out")["train"]["left_out"]
    assert list(left_out) == ["scene0000_01_vh_clean_2"] and "missing" in left_out["scene0000_01_vh_clean_2"]
    config.teacher.name = "none"
    with pytest.raises(ValueError, match="teacher.name='none' is for --config.mode=supervised"):
        prepare.prepare(config, tmp_path / "labels_alone")
    with config.unlocked():
        labelled = config.copy_and_resolve_references()
    labelled.mode, labelled.data.features = "supervised", ""
    for _ in range(2):  # made, and found again
        prepare.prepare(labelled, tmp_path / "labels_alone")
    scenes = prepare.load_split(tmp_path / "labels_alone", "train")
    assert len(scenes) == 2 and not any(len(scene.features) for scene in scenes)
    config.teacher.name, labelled.data.features = "lseg", config.data.features
    for place, other in (("labels_alone", config), ("out", labelled)):
        with pytest.raises(ValueError, match="was prepared with "):
            prepare.prepare(other, tmp_path / place)
    config.text.encoder = text_file("ViT-B/32", 48)
    with pytest.raises(ValueError, match="features have 64 channels, the words of text.encoder 48: LSeg's 512 go"):
        prepare.prepare(config, tmp_path / "other")
    config.text.encoder = text_file("ViT-B/16", 64)  # the same width, and unrelated
    for place in ("other", "out"):
        with pytest.raises(ValueError, match="words in the space of ViT-B/16, the 2D features are in that of ViT-B/32"):
            prepare.prepare(config, tmp_path / place)
    features.rename(tmp_path / "mine")  # nothing tells whose these are
    config.data.features = str(tmp_path / "mine")
    prepare.prepare(config, tmp_path / "mine_prepared")


def test_records_have_as_many_features_as_openscenes_files_and_matterports_test_buildings_are_scored(tmp_path, caplog):
    rng = np.random.default_rng(0)
    features = tmp_path / "matterport_multiview_openseg"
    for split in ("train", "val", "test"):
        (tmp_path / "matterport_3d" / split).mkdir(parents=True)
        points = (rng.uniform(0, 3, (900, 3)) * [1, 1, 0.01]).astype(np.float32)
        cloud = (points, np.zeros((900, 3), np.float32), np.zeros(900))
        save(tmp_path / "matterport_3d" / split / f"{split}_region0.pth", cloud)
        folder = features.with_name(features.name + "_test") if split == "test" else features
        folder.mkdir(exist_ok=True)
        for chunk in range(5 if split == "train" else 1):
            mask = rng.random(900) < 0.2
            feat = rng.normal(size=(mask.sum(), 8)).astype(np.float16)
            save(folder / f"{split}_region0_{chunk}.pt", {"feat": feat, "mask_full": mask})
    words = LABEL_SETS["matterport21"].classes
    np.savez(tmp_path / "words.npz", embedding=rng.normal(size=(len(words), 8)), names=words, model="ViT-L/14@336px")
    config = configs.load("matterport")
    config.update_from_flattened_dict(
        {"data.name": "openscene", "data.root": str(tmp_path / "matterport_3d"), "data.features": str(features)}
        | {"data.prepare_workers": 0, "data.chunk_points": 300, "text.encoder": str(tmp_path / "words.npz")}
    )
    prepare.prepare(config, tmp_path / "out")
    (scored,) = prepare.load_split(tmp_path / "out", "val")
    assert scored.name == "test_region0"
    np.testing.assert_array_equal(scored.feature_index, np.flatnonzero(mask))
    counts = [len(scene.features) for scene in prepare.load_split(tmp_path / "out", "train")]
    assert len(counts) == 5 and len(set(counts)) == 1 and 150 < counts[0] < 210  # a fifth of 900
    config.data.label_set = "nyu40"
    with pytest.raises(ValueError, match="data.label_set is 'nyu40': openscene is read with 'scannet20' or"):
        prepare.prepare(config, tmp_path / "other")
    config.data.label_set = "matterport40"
    datasets.openscene_scenes(config)
    assert "the labels of data.label_set=matterport40 are in OpenScene's matterport_3d_40" in caplog.text
    config.data.label_set = "matterport21"
    config.data.chunk_points = 100  # a batch has room for no more
    prepare.prepare(config, tmp_path / "fewer")
    assert {len(scene.features) for scene in prepare.load_split(tmp_path / "fewer", "train")} == {100}
