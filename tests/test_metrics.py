import numpy as np
import pytest

from ggsd_jax.metrics import UNKNOWN, confusion_matrix, evaluate


@pytest.mark.parametrize(("dataset", "classes"), [("scannet", 20), ("matterport160", 160), ("nuscenes", 16)])
@pytest.mark.parametrize("variant", ["", "_nofeat"])
def test_scores_equal_openscene_also_where_some_points_have_no_prediction(shared, dataset, classes, variant):
    golden = np.load(shared / "golden" / "extras_pipeline.npz")
    name = f"metric_{dataset}_"
    result = evaluate(golden[f"{name}pred{variant}"], golden[f"{name}gt"], classes)
    np.testing.assert_array_equal(result["confusion"], golden[f"{name}confusion{variant}"])
    assert result["miou"] == pytest.approx(float(golden[f"{name}miou{variant}"]), abs=1e-12)
    assert result["macc"] == pytest.approx(float(golden[f"{name}macc{variant}"]), abs=1e-12)


def test_an_absent_class_counts_as_zero_in_the_means_and_is_none_in_the_list():
    labels = np.array([0, 0, 1, 1])
    result = evaluate(labels, labels, 4)
    assert result["iou"] == [1.0, 1.0, None, None]
    assert result["miou"] == result["macc"] == 0.5


def test_counts_of_two_scenes_add_up_to_the_counts_of_both():
    rng = np.random.default_rng(0)
    pred, gt = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    gt[::7], pred[::11] = 255, UNKNOWN
    parts = confusion_matrix(pred[:90], gt[:90], 5) + confusion_matrix(pred[90:], gt[90:], 5)
    np.testing.assert_array_equal(parts, confusion_matrix(pred, gt, 5))


def test_predictions_on_ignored_points_do_not_matter():
    gt = np.array([0, 1, 255, 255])
    assert evaluate(np.array([0, 1, 0, 1]), gt, 2)["miou"] == evaluate(np.array([0, 1, 1, 77]), gt, 2)["miou"] == 1.0


def test_labels_outside_the_set_are_refused_with_their_row():
    with pytest.raises(ValueError, match=r"gt\[1\] is 7; expected 0\.\.4 or 255"):
        evaluate(np.array([0, 1]), np.array([0, 7]), 5)
    with pytest.raises(ValueError, match=r"pred\[0\] is -1"):
        evaluate(np.array([-1, 1]), np.array([0, 1]), 5)


@pytest.mark.parametrize(("num_classes", "ignore"), [(256, 255), (300, -1), (4, 3)])
def test_no_class_has_the_number_of_ignore_or_unknown(num_classes, ignore):
    ids = np.zeros(3, np.int32)
    with pytest.raises(ValueError, match=f"{num_classes} classes: one of them is {ignore} .ignore. or 256"):
        confusion_matrix(ids, ids, num_classes, ignore)
