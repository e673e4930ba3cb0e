"""Words and classes of the published evaluations."""

from pathlib import Path

import numpy as np
import pytest

from data.labels import LABEL_SETS
from experiments import configs
from ggsd_jax import metrics
from ggsd_jax.protocol import class_vectors, words

ROOT = Path(__file__).parents[1]


def config(name: str, **changes):
    config = configs.load(name)
    config.update_from_flattened_dict(changes)
    return config


def test_nuscenes_classes_are_found_by_their_43_detailed_names():
    found = words(config("nuscenes"))
    assert len(found.classes) == 16 and len(found.words) == 43
    meaning = {word: found.classes[c] for word, c in zip(found.words, found.table, strict=True)}
    assert (
        meaning["pedestrian"] == "person"
        and meaning["lawn"] == "terrain"
        and meaning["crane"] == "construction vehicle"
    )
    predicted = np.array([found.words.index("road"), metrics.UNKNOWN, 0])
    assert found.class_of(predicted).tolist() == [found.classes.index("drivable surface"), metrics.UNKNOWN, 0]


def test_a_word_of_any_class_scores_as_its_class():
    found = words(config("nuscenes"))
    truth = np.arange(16)
    for pick in (0, -1):
        chosen = np.array([np.flatnonzero(found.table == c)[pick] for c in truth])
        assert metrics.evaluate(found.class_of(chosen), truth, 16)["miou"] == 1.0


@pytest.mark.parametrize(("classes", "replaced"), [(40, "air vent"), (80, "headboard"), (160, "person")])
def test_openscene_calls_a_class_of_matterport_other_and_the_results_say_so(classes, replaced):
    found = words(config("matterport", **{"data.label_set": f"matterport{classes}"}))
    assert found.words[-2] == "other" and replaced in found.quirk
    assert found.classes == LABEL_SETS[f"matterport{classes}"].classes
    assert found.words[:-2] == found.classes[:-2] and found.words[-1] == found.classes[-1]


@pytest.mark.parametrize("name", ["scannet20", "matterport21", "nyu40", "nyu37"])
def test_other_label_sets_are_found_by_their_own_names(name):
    found = words(config("scannet", **{"data.label_set": name}))
    assert found.words == found.classes and not found.quirk


def test_nyu37_is_nyu40_without_the_three_that_mean_nothing_of_their_own():
    left_out = set(LABEL_SETS["nyu40"].classes) - set(LABEL_SETS["nyu37"].classes)
    assert left_out == {"otherstructure", "otherfurniture", "otherprop"}


def test_words_that_mean_other_classes_are_refused():
    with pytest.raises(
        ValueError, match=r"eval\.words='nuscenes43' do not name the classes of data\.label_set='nyu40'"
    ):
        words(config("nuscenes", **{"data.label_set": "nyu40"}))


def test_a_supervised_network_is_scored_by_its_logits():
    supervised = config("nuscenes", mode="supervised")
    found = words(supervised)
    assert found.words == found.classes
    logits = np.random.default_rng(0).standard_normal((9, 16))
    scores = logits @ class_vectors(supervised, found.words).T
    np.testing.assert_array_equal(scores.argmax(1), logits.argmax(1))


def test_classes_fall_into_head_common_and_tail_by_their_points():
    points = {"a": 5, "b": 900, "c": 70, "d": 0, "e": 300, "f": 20, "g": 1}
    groups = metrics.head_common_tail(points)
    assert groups == {"Head": ["b", "e", "c"], "Common": ["f", "a"], "Tail": ["g", "d"]}
    row = {"iou": {"a": 0.5, "b": 1.0, "c": 0.2, "d": None, "e": 0.6, "f": 0.1, "g": 0.3}}
    assert metrics.mean_over(row["iou"], groups["Head"]) == pytest.approx(0.6)
    assert metrics.mean_over(row["iou"], groups["Tail"]) == pytest.approx(0.15)
    names = LABEL_SETS["nyu37"].classes
    assert [len(g) for g in metrics.head_common_tail(dict.fromkeys(names, 1)).values()] == [13, 12, 12]
