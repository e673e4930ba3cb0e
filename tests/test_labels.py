"""Label sets: sizes, tables and palettes agree with each other and with the benchmarks."""

import csv

import numpy as np
import pytest

from data.labels import (
    IGNORE,
    LABEL_SETS,
    NUSCENES43_TO_NUSCENES16,
    NYU40_TO_SCANNET20,
    LabelSet,
)


@pytest.mark.parametrize("name", sorted(LABEL_SETS))
def test_a_label_set_has_distinct_names(name):
    label_set = LABEL_SETS[name]
    assert all(c == " ".join(c.split()) and c for c in label_set.classes)
    if name != "nuscenes43":
        assert len(set(label_set.classes)) == len(label_set.classes)


def test_the_benchmarks_have_their_number_of_classes():
    sizes = {
        "scannet20": 20,
        "matterport21": 21,
        "matterport40": 40,
        "matterport80": 80,
        "matterport160": 160,
    }
    sizes |= {"nuscenes16": 16, "nuscenes43": 43, "nyu40": 40}
    assert {name: len(LABEL_SETS[name].classes) for name in sizes} == sizes


def test_every_nyu40_id_maps_to_the_scannet_class_of_its_name_or_to_ignore():
    nyu40, scannet20 = LABEL_SETS["nyu40"], LABEL_SETS["scannet20"]
    assert NYU40_TO_SCANNET20.shape == (41,) and NYU40_TO_SCANNET20[0] == IGNORE
    for nyu40_id, label in enumerate(NYU40_TO_SCANNET20[1:], start=1):
        name = nyu40.classes[nyu40_id - 1]
        assert (label == IGNORE) == (name not in scannet20.classes)
        assert label == IGNORE or scannet20.classes[label] == name
        assert label == IGNORE or (scannet20.palette[label] == nyu40.palette[nyu40_id - 1]).all()
    assert np.flatnonzero(NYU40_TO_SCANNET20 < 20).tolist() == [
        *range(1, 13), 14, 16, 24, 28, 33, 34, 36, 39,
    ]  # fmt: skip


def test_detailed_nuscenes_names_map_to_the_class_they_detail():
    detailed, coarse = LABEL_SETS["nuscenes43"].classes, LABEL_SETS["nuscenes16"].classes
    meaning = {d: coarse[c] for d, c in zip(detailed, NUSCENES43_TO_NUSCENES16, strict=True)}
    assert meaning["road"] == "drivable surface" and meaning["lawn"] == "terrain"
    assert meaning["pedestrian"] == "person" and meaning["woods"] == "vegetation"
    assert (np.diff(NUSCENES43_TO_NUSCENES16) >= 0).all() and set(NUSCENES43_TO_NUSCENES16) == set(range(16))
    assert all(name in detailed for name in coarse[:10] if name != "construction vehicle")


def test_nyu40_names_are_those_of_the_scannet_label_table(shared):
    with open(shared / "data/scannet/meta/scannetv2-labels.combined.tsv", newline="") as file:
        table = {int(r["nyu40id"]): r["nyu40class"] for r in csv.DictReader(file, delimiter="\t") if r["nyu40id"]}
    table[24] = "refrigerator"  # spelled "refridgerator" there
    names = LABEL_SETS["nyu40"].classes
    assert {i: names[i - 1] for i in table if 0 < i <= 40} == {i: n for i, n in table.items() if 0 < i <= 40}


def test_matterport_names_are_the_most_frequent_ones_of_its_category_table(shared):
    with open(shared / "data/matterport_meta/category_mapping.tsv", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        names = list(dict.fromkeys(r["nyuClass"] for r in rows if r["nyuClass"] not in ("void", "unknown", "")))
    assert LABEL_SETS["matterport160"].classes == tuple(names[:160])
    assert LABEL_SETS["matterport40"].classes == tuple(names[:40])


def test_labels_outside_the_set_are_drawn_black():
    label_set = LABEL_SETS["scannet20"]
    colors = label_set.colorize(np.array([0, 19, 20, IGNORE, -1]))
    assert colors.dtype == np.uint8
    np.testing.assert_array_equal(colors[:2], label_set.palette[[0, 19]])
    assert (colors[2:] == 0).all()


def test_an_unknown_label_set_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown label set 'scanet20'; did you mean 'scannet20'"):
        LABEL_SETS["scanet20"]


def test_a_palette_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"label set 'mine': palette must be \[2, 3\]"):
        LabelSet("mine", ("a", "b"), np.zeros((3, 3), np.uint8))
