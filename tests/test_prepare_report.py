"""What preparing says: of what went in, of what is left out and why, and of raw data that is not there."""

import dataclasses

import numpy as np
import pytest
from test_prepare import make_config

from data.labels import IGNORE
from data.synthetic import generate_room
from ggsd_jax import datasets, prepare
from ggsd_jax.prepare import load_split


def test_the_report_counts_scenes_points_labels_and_what_was_left_out(tmp_path, tiny_rooms, monkeypatch, caplog):
    readable = datasets.generate_room

    def partly(seed):
        if seed == 1:
            raise datasets.LeftOut("no camera in the room")
        room = readable(seed)
        return room._replace(scene=dataclasses.replace(room.scene, labels=room.scene.labels % 2)) if seed else room

    monkeypatch.setattr(datasets, "generate_room", partly)
    with caplog.at_level("INFO"):
        prepare.prepare(make_config(), tmp_path)
    assert len(load_split(tmp_path, "train")) == 2
    report = prepare.load_report(tmp_path)
    scene = load_split(tmp_path, "val")[0]
    names = prepare.label_set(make_config()).classes
    assert report["val"] == {
        "scenes": 1,
        "points": len(scene.points),
        "points_with_feature": len(scene.feature_index),
        "points_in_superpoint": int((scene.superpoints >= 0).sum()),
        "labels": {names[i]: int((scene.labels == i).sum()) for i in (0, 1)},
        "left_out": {},
        "frames_lost": 0,
    }
    assert report["train"]["scenes"] == 1 and report["train"]["left_out"] == {"room 1": "no camera in the room"}
    assert f"val: scenes 1, left out 0, points {len(scene.points):,}, with a 2D feature" in caplog.text
    assert "left out, no camera in the room: room 1" in caplog.text


def test_a_split_without_a_label_of_the_set_is_refused(tmp_path, monkeypatch):
    room = generate_room(0, scan_views=2, views=1, size=(40, 30))
    unlabelled = dataclasses.replace(room.scene, labels=np.full_like(room.scene.labels, IGNORE))
    monkeypatch.setattr(datasets, "read_room", lambda seed: datasets.RawScene(unlabelled, room.views, border=0))
    with pytest.raises(ValueError, match="split 'val': no point has a label of synthetic"):
        prepare.prepare(make_config(), tmp_path)


def test_scenes_taken_over_from_a_killed_run_and_data_that_is_there_are_told(tmp_path, tiny_rooms, monkeypatch, caplog):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(prepare._Report, "add", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        prepare.prepare(make_config(), tmp_path)
    with caplog.at_level("INFO"):
        prepare.prepare(make_config(), tmp_path)
    assert "1 scenes are taken over from a run that did not end; if you have changed their files" in caplog.text
    with caplog.at_level("INFO"):
        prepare.prepare(make_config(), tmp_path)
    assert f"{tmp_path} is prepared, with the scenes of then: " in caplog.text


def test_scenes_without_superpoints_and_in_both_splits_are_told(tmp_path, tiny_rooms, monkeypatch, caplog):
    monkeypatch.setattr(datasets, "room_seeds", lambda split, count: range(count))
    prepare.prepare(make_config(**{"superpoints.seed_resolution": 50.0}), tmp_path)
    assert "0 of 2001 points are in a superpoint; are its points" in caplog.text
    assert "both scored and trained on: 'room 0' (1 such scenes)" in caplog.text
    assert "in a superpoint 0.0%" in prepare.report_text(prepare.load_report(tmp_path))


def test_a_long_list_of_scenes_left_out_is_told_in_one_line():
    reasons = {f"scene{i}": "not there" for i in range(5)} | {"attic": "no view sees any of its points"}
    report = prepare._Report(prepare.label_set(make_config())) | {"left_out": reasons, "frames_lost": 2}
    lines = prepare.report_text({"train": report}).splitlines()
    assert lines[1:] == [
        "  left out, frames without a finite pose: 2",
        "  left out, not there: scene0, scene1, scene2 and 2 more",
        "  left out, no view sees any of its points: attic",
    ]


@pytest.mark.parametrize("name", sorted(datasets.DATASETS.keys() - {"synthetic"}))
def test_without_raw_data_every_builder_says_what_to_download_and_how_it_must_look(tmp_path, name):
    for root in ("", str(tmp_path / "nowhere")):
        with pytest.raises(
            FileNotFoundError, match=f"data.root is '{root}': there is no such folder. {name}: "
        ) as error:
            prepare.prepare(make_config(**{"data.name": name, "data.root": root}), tmp_path / "out")
        assert str(error.value).endswith(prepare.instructions(name)) and len(prepare.instructions(name)) > 100
