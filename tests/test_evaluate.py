import numpy as np

from ggsd_jax.evaluate import ensemble_scores, half_scores, table


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
