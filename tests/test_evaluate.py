import dataclasses

import numpy as np
import pytest

from data.scene import Scene
from experiments import configs
from ggsd_jax import datasets
from ggsd_jax.evaluate import ensemble_scores, half_scores, predict, table
from ggsd_jax.metrics import UNKNOWN


def synthetic(**changes):
    config = configs.load("synthetic")
    config.update_from_flattened_dict(changes)
    return config


def test_distilled_and_ensemble_predictions_are_openscenes_away_from_ties(shared):
    golden = np.load(shared / "golden" / "extras_pipeline.npz")
    features = golden["ov_pred"]
    fused, class_text = (golden[name].astype(np.float32) for name in ("ov_fused", "ov_text"))
    distilled = half_scores(features, class_text)
    np.testing.assert_array_equal(distilled.argmax(1), golden["ov_distill_argmax"])
    sure = np.abs(golden["ov_margin"]) > 2e-3  # half precision decides the others
    assert sure.mean() > 0.9
    ensemble = ensemble_scores(features, fused, class_text)
    np.testing.assert_array_equal(ensemble.argmax(1)[sure], golden["ov_ensemble_argmax"][sure])


def test_the_surer_of_2d_and_3d_is_openscenes_choice_away_from_ties(shared):
    golden = np.load(shared / "golden" / "extras_pipeline.npz")
    features, fused, class_text = (golden[name].astype(np.float32) for name in ("ov_pred", "ov_fused", "ov_text"))
    sure = np.abs(golden["ov_margin"]) > 2e-3
    by_2d = (ensemble_scores(features, fused, class_text) == half_scores(fused, class_text)).all(1)
    np.testing.assert_array_equal(by_2d[sure], golden["ov_use2d"][sure])


def test_a_point_without_2d_feature_takes_the_3d_scores_unless_all_are_negative():
    class_text = np.eye(2, 4, dtype=np.float32)
    features = np.array([[1, 2, 0, 0], [-1, -2, 0, 0]], np.float32)
    scores = ensemble_scores(features, np.zeros_like(features), class_text)
    np.testing.assert_array_equal(scores, [[1, 2], [0, 0]])


def test_the_table_has_a_line_for_every_row_and_says_who_taught():
    row = {"miou": 0.5, "macc": 0.6}
    rows = {"fusion_2d": row, "stage1": row | {"miou": 0.55}, "stage2": row, "ensemble": row}
    protocol = {"scenes": 3, "teacher": "simulated"}
    text = table({"rows": rows, "protocol": protocol, "dataset": "synthetic", "split": "val"})
    assert "+5.0" in text and "teacher: simulated" in text and len(text.splitlines()) == 6


@pytest.mark.parametrize(
    ("by_voxel", "expected"), [(True, [0, 0, UNKNOWN, UNKNOWN]), (False, [0, 1, UNKNOWN, 1])], ids=["voxel", "point"]
)
def test_the_2d_feature_of_a_point_is_its_own_or_as_in_openscene_that_of_its_voxels_first_point(by_voxel, expected):
    points = np.array([[5, 5, 5], [5, 5, 5.0001], [0, 1, 2], [0, 1, 2.0001]], np.float32)
    words = np.eye(3, dtype=np.float32)
    index = np.array([0, 1, 3], np.int32)
    scene = Scene("pairs", points, features=words[[0, 1, 1]].astype(np.float16), feature_index=index)
    config = synthetic(**{"data.voxel_size": 0.5, "eval.fusion_by_voxel": by_voxel, "eval.repeats": 3})
    assert predict(scene, {}, words, config, index=0)["fusion_2d"].tolist() == expected


def test_without_2d_features_only_the_networks_predict():
    scene = Scene("bare", np.zeros((3, 3), np.float32))
    assert predict(scene, {}, np.eye(3, dtype=np.float32), synthetic(), 0, with_2d=False) == {}


def test_raw_scenes_are_read_one_by_one_with_their_labels(monkeypatch):
    room = datasets.read_room(0)
    read = []

    def of_seed(seed):
        read.append(seed)
        return dataclasses.replace(room.scene, name=str(seed)), room.views

    monkeypatch.setattr(datasets, "generate_room", of_seed)
    scenes = datasets.RawScenes(synthetic(**{"data.val_rooms": 3}), "val")
    assert len(scenes) == 3 and not read
    assert scenes[1].labels is not None and len(read) == 1 and scenes[1].name == str(read[0])
    with pytest.raises(ValueError, match="data set 'synthetic' has no split 'test', only"):
        datasets.RawScenes(synthetic(), "test")


def test_a_table_of_a_supervised_run_has_no_column_over_2d():
    results = {"rows": {"supervised": {"miou": 0.5, "macc": 0.6}}, "dataset": "synthetic", "split": "val"}
    text = table(results | {"protocol": {"scenes": 3, "teacher": "simulated"}})
    assert "trained with labels" in text and "over 2D" not in text
