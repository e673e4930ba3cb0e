import contextlib
import fcntl
import json
import sys

import ml_collections
import pytest
from tqdm import tqdm

from experiments import configs
from ggsd_jax import run
from ggsd_jax.main import AboveBars
from ggsd_jax.run import _claim, differences, write_json


def test_differences_name_nested_fields_and_both_values():
    old = {"a": 1, "b": {"c": 2, "d": 3}}
    new = {"a": 1, "b": {"c": 5, "e": 3}}
    assert differences(old, new) == {"b.c": (2, 5), "b.d": (3, None), "b.e": (None, 3)}


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n "a": 1\n}'


def test_a_field_can_be_mended_until_training_has_begun(tmp_path):
    for root in ("/nope", "/data"):
        _claim(tmp_path, ml_collections.ConfigDict({"root": root}))
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)  # killed while it wrote its first state
    _claim(tmp_path, ml_collections.ConfigDict({"root": "/data"}))
    (tmp_path / "checkpoints" / "20").mkdir()
    with pytest.raises(ValueError, match="root is '/data' there and '/nope' here"):
        _claim(tmp_path, ml_collections.ConfigDict({"root": "/nope"}))


@pytest.mark.parametrize("left", ["stage1", "model", "results.json"])
def test_a_run_whose_states_were_deleted_keeps_its_configuration(tmp_path, left):
    _claim(tmp_path, ml_collections.ConfigDict({"root": "/data"}))
    (tmp_path / left).mkdir()
    with pytest.raises(ValueError, match="root is '/data' there and '/nope' here"):
        _claim(tmp_path, ml_collections.ConfigDict({"root": "/nope"}))


def test_without_labelled_scenes_a_run_ends_with_the_training(tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(run.prepare, "prepare", lambda config, data_dir: None)
    monkeypatch.setattr(run.prepare, "load_report", lambda data_dir: {"train": {}})
    monkeypatch.setattr(run.train, "train", lambda *args, **kwargs: trained.append(args))
    assert run.run(configs.load("synthetic"), tmp_path) is None
    assert trained and "there was no labelled scene to score" in capsys.readouterr().out


def test_how_the_work_is_done_may_change_between_one_part_of_a_run_and_the_next(tmp_path):
    config = configs.load("synthetic")
    _claim(tmp_path, config)
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    (tmp_path / "results.json").touch()
    config.model.remat, config.data.workers = 2, 3
    _claim(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["remat"] == 2
    assert (tmp_path / "results.json").exists()
    config.eval.repeats = 7
    _claim(tmp_path, config)
    assert not (tmp_path / "results.json").exists()


def test_a_network_that_is_there_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(run.prepare, "prepare", lambda config, data_dir: None)
    monkeypatch.setattr(run.prepare, "load_report", lambda data_dir: {"train": {}})
    monkeypatch.setattr(run.train, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    (tmp_path / "model").mkdir()
    assert run.run(configs.load("synthetic"), tmp_path) is None


def test_processes_of_different_configurations_do_not_work_as_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run.hosts, "gather", lambda value: [value, {"eval": {"repeats": 1}}])
    with pytest.raises(ValueError, match="different configurations: start all with the same command"):
        _claim(tmp_path, configs.load("synthetic"))


def test_a_damaged_file_of_a_run_is_named(tmp_path):
    _claim(tmp_path, configs.load("synthetic"))
    (tmp_path / "model").mkdir()
    (tmp_path / "config.json").write_text("")
    with pytest.raises(ValueError, match="config.json: damaged .*; delete it"):
        _claim(tmp_path, configs.load("synthetic"))


def test_a_second_process_is_kept_out_of_a_work_directory(tmp_path):
    config = configs.load("synthetic")
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is at work here"):
            run.run(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_a_failed_part_cannot_note_does_not_hide_why_it_failed(tmp_path):
    with pytest.raises(KeyError, match="why"), run._timed(tmp_path / "gone", "train"):
        raise KeyError("why")
    with pytest.raises(FileNotFoundError), run._timed(tmp_path / "gone", "train"):
        pass


def test_how_a_run_is_evaluated_can_change_and_its_old_results_go(tmp_path):
    def config(**fields):
        return ml_collections.ConfigDict({"eval": {"repeats": 5}, "data": {"max_voxels": 10}} | fields)

    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    write_json(tmp_path / "config.json", config().to_dict())
    (tmp_path / "results.json").touch()
    _claim(tmp_path, config())
    assert (tmp_path / "results.json").exists()
    _claim(tmp_path, config(eval={"repeats": 1}))
    assert not (tmp_path / "results.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["eval"] == {"repeats": 1}
    larger = config(eval={"repeats": 1}, data={"max_voxels": 20})
    with pytest.raises(ValueError, match="data.max_voxels is 10 there and 20 here"):
        _claim(tmp_path, larger)
    (tmp_path / "model").mkdir()
    _claim(tmp_path, larger)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.words": "nuscene43"}, "leave eval.words empty"),
        ({"text.encoder": "/nowhere.npz"}, "nowhere.npz: no such"),
    ],
)
def test_words_that_cannot_be_evaluated_are_refused_before_anything_is_done(tmp_path, changes, message):
    config = configs.load("synthetic")
    config.update_from_flattened_dict(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run.run(config, tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("field", "value", "answer"),
    [
        ("loss.voting", False, None),
        ("eval.repeats", 1, None),
        ("seed", 5, "seed 0, here it is 5: another stage 1"),
        ("loss.superpoint_weight", 0.0, "loss.superpoint_weight 1.0, here it is 0.0: another stage 1"),
    ],
)
def test_a_stage_1_that_was_another_is_not_taken_over(tmp_path, field, value, answer):
    config = configs.load("synthetic")
    write_json(tmp_path / "config.json", json.loads(config.to_json_best_effort()))
    config.update_from_flattened_dict({"stage1_from": str(tmp_path), field: value})
    with pytest.raises(ValueError, match=answer) if answer else contextlib.nullcontext():
        run._check_stage1_from(config)


def test_a_stage_1_that_is_nowhere_is_missed_before_anything_is_prepared(tmp_path):
    config = configs.load("synthetic")
    config.stage1_from = str(tmp_path / "mistyped")
    with pytest.raises(ValueError, match="stage1_from: .*mistyped is no work directory of a run"):
        run.run(config, tmp_path / "work")
    assert not (tmp_path / "work" / "data").exists()


def test_seconds_of_sittings_add_up_and_those_of_the_last_evaluation_count(tmp_path):
    write_json(tmp_path / "seconds.json", {"train": 50.0, "eval": 50.0})
    for part in ("train", "eval"):
        with run._timed(tmp_path, part):
            pass
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert seconds["train"] >= 50 and seconds["eval"] < 50


def test_a_line_of_the_log_stands_above_the_progress_bar(capsys):
    with tqdm(total=2, file=sys.stderr):
        AboveBars().write("a line\n")
    before, after = capsys.readouterr().err.split("a line\n")
    assert "0/2" in before and before.endswith("\r") and "0/2" in after
