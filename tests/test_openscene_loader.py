"""Voxels and batches against numbers of OpenScene's own loader."""

import dataclasses

import ml_collections
import numpy as np
import pytest

from data.scene import Scene
from ggsd_jax.input_pipeline import make_batch, transformed_voxels
from kernels.voxel_grid import Voxels


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden" / "extras_pipeline.npz") as archive:
        return {key: archive[key] for key in archive.files if key.startswith(("vox_", "fl_", "collate_"))}


def golden_voxels(golden) -> Voxels:
    transform = (golden["vox_Mr"] @ golden["vox_Mv"])[:3, :3]
    return transformed_voxels(golden["vox_locs"], 1.0, transform)


def make_config(mode: str = "ggsd") -> ml_collections.ConfigDict:
    data = dict(voxel_size=0.05, input_color=False, min_voxels=0, chunk_points=3000)
    return ml_collections.ConfigDict(dict(mode=mode, data=data))


def rows_in_order_of(expected_coords, coords):
    """Permutation p with coords[p] == expected_coords."""
    row = {tuple(c): i for i, c in enumerate(coords.tolist())}
    assert len(row) == len(coords) == len(expected_coords)
    return np.array([row[tuple(c)] for c in expected_coords.tolist()])


def test_voxels_representatives_and_inverse_are_openscenes(golden):
    voxels = golden_voxels(golden)
    order = rows_in_order_of(golden["vox_coords"], voxels.coords)
    np.testing.assert_array_equal(voxels.first[order], golden["vox_ind"])
    np.testing.assert_array_equal(voxels.coords[voxels.inverse], golden["vox_coords"][golden["vox_inverse"]])


@pytest.mark.parametrize("case", ["train", "val"])
def test_supervised_voxels_and_their_targets_are_openscenes(golden, case):
    prefix = {"train": "fl_", "val": "fl_val_"}[case]
    index = np.flatnonzero(golden[f"{prefix}mask_full"]).astype(np.int32)
    points = golden["vox_locs"]
    scene = Scene(
        "golden",
        points,
        superpoints=np.zeros(len(points), np.int32),
        features=golden[f"{prefix}feat"],
        feature_index=index,
    )
    voxels = golden_voxels(golden)
    batch = make_batch([scene], [voxels], make_config())

    expected = golden[f"fl_{case}__coords"]
    num_voxels = int(batch.pyramid.num_voxels[0])
    order = rows_in_order_of(expected[:, 1:], batch.pyramid.coords[0][:num_voxels, 1:])
    np.testing.assert_array_equal(batch.feats[order], golden[f"fl_{case}__feats"])
    mask = golden[f"fl_{case}__mask"]
    supervised = np.zeros(num_voxels, bool)
    supervised[batch.target_index[batch.target_index >= 0]] = True
    np.testing.assert_array_equal(supervised[order], mask)
    target_of = np.zeros((num_voxels, scene.features.shape[1]), np.float16)
    target_of[batch.target_index[batch.target_index >= 0]] = batch.targets[batch.target_index >= 0]
    wanted = golden[f"fl_{case}__feat_3d"]
    np.testing.assert_array_equal(target_of[order][mask], wanted if case == "train" else wanted[mask])


def golden_scene(golden, **fields) -> Scene:
    labels = np.where(golden["fl_labels_raw"] < 0, 255, golden["fl_labels_raw"]).astype(np.int32)
    return Scene(
        "golden",
        golden["vox_locs"],
        labels=labels,
        superpoints=np.zeros(len(labels), np.int32),
        features=golden["fl_feat"],
        feature_index=np.flatnonzero(golden["fl_mask_full"]).astype(np.int32),
        **fields,
    )


def test_labels_of_voxels_in_supervised_training_are_openscenes(golden):
    batch = make_batch([golden_scene(golden)], [golden_voxels(golden)], make_config("supervised"))
    count = int(batch.pyramid.num_voxels[0])
    order = rows_in_order_of(golden["vox_coords"], batch.pyramid.coords[0][:count, 1:])
    expected = golden["fl_train__labels"]
    np.testing.assert_array_equal(batch.labels[order], np.where(expected == 255, -1, expected))
    assert (batch.labels[count:] == -1).all()
    assert batch.targets.size == 0 and (batch.target_index == -1).all()


def test_labels_of_points_and_their_voxels_in_evaluation_are_openscenes(golden):
    np.testing.assert_array_equal(golden_scene(golden).labels, golden["fl_val__labels"])
    voxels = golden_voxels(golden)
    theirs = golden["fl_val__coords"][golden["fl_val__inds_reverse"], 1:]
    np.testing.assert_array_equal(voxels.coords[voxels.inverse], theirs)


def test_two_scenes_are_put_together_as_openscene_does(golden):
    scene, voxels = golden_scene(golden), golden_voxels(golden)
    batch = make_batch([scene, scene], [voxels, voxels], make_config())
    total = int(batch.pyramid.num_voxels[0])
    coords = np.asarray(batch.pyramid.coords[0][:total])
    np.testing.assert_array_equal(np.bincount(coords[:, 0]), golden["collate_batch_counts"])
    assert (batch.target_index >= 0).sum() == golden["collate_feat_rows"]
    assert set(map(tuple, golden["collate_coords_head"].tolist())) <= set(map(tuple, coords.tolist()))
    assert batch.labels is None


def test_a_scene_without_labels_cannot_teach_with_labels(golden):
    scene = dataclasses.replace(golden_scene(golden), labels=None)
    with pytest.raises(ValueError, match="scene 'golden' has no labels, which --config.mode=supervised learns from"):
        make_batch([scene], [golden_voxels(golden)], make_config("supervised"))


def test_mirroring_points_is_openscenes_flip_of_voxel_coordinates():
    points = np.random.default_rng(0).random((3000, 3)).astype(np.float32)
    plain = transformed_voxels(points, 0.05, np.eye(3))
    flipped = transformed_voxels(points, 0.05, np.diag([-1.0, 1.0, 1.0]))
    expected = plain.coords.copy()
    expected[:, 0] = plain.coords[:, 0].max() - plain.coords[:, 0]
    order = rows_in_order_of(expected, flipped.coords)
    np.testing.assert_array_equal(flipped.first[order], plain.first)
