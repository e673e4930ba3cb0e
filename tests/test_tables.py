"""The command lines of experiments/table*.py: what is wrong shows before anything is trained."""

import sys

import numpy as np
import pytest
from absl import logging

from experiments import ablation, published, scannet_sample, table2, table3, table4, table5, table6
from ggsd_jax import run


@pytest.fixture(autouse=True)
def verbosity():
    """The scripts are quieter than the rest."""
    logger = logging.get_absl_logger()
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        (table2, ["data.rot=/x"], 'has no field .*Did you mean "root"'),
        (table2, ["eval.repeat=9"], "has no field .*repeats"),
        (table2, ["batch_size=2.5"], "batch_size=2.5"),
        (table2, ["seed"], "expected field=value"),
        (table2, ["--config=configs/none.py"], "none.py: no such configuration"),
        (table2, ["--config=configs/scannet.py", "data.name=openscene"], "hold 20 classes"),
        (table2, ["--samples={tmp_path}"], "scene0000_00: no such folder"),
        (table4, ["--config=configs/scannet.py", "data.rot=/x"], 'has no field .*Did you mean "root"'),
        (table5, ["--samples={tmp_path}"], "scene0000_00: no such folder"),
        (
            table3,
            ["--config=configs/scannet.py", "--matterport={tmp_path}", "text.encoder=stand-in"],
            "no such|missing",
        ),
    ],
)
def test_what_is_wrong_is_said_before_the_training(tmp_path, monkeypatch, table, arguments, message):
    monkeypatch.setattr(published, "train", lambda *args, **fields: pytest.fail("the training began"))
    arguments = [argument.format(tmp_path=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["table", f"--workdir={tmp_path}", *arguments])
    with pytest.raises(SystemExit, match=message):
        published.call(table.main)


@pytest.mark.parametrize(("table", "option"), [(table3, "--matterport"), (table6, "--masks")])
def test_an_option_that_a_data_set_needs_is_named(monkeypatch, capsys, table, option):
    monkeypatch.setattr(sys, "argv", ["table", "--config=configs/scannet.py"])
    with pytest.raises(SystemExit):
        published.call(table.main)
    assert f"{option} is missing" in capsys.readouterr().err


def test_an_ablation_of_another_data_set_leaves_the_report_of_the_rooms(tmp_path, monkeypatch):
    configs = {}

    def finished(config, workdir):
        configs[workdir.relative_to(tmp_path).as_posix()] = config
        row = {"miou": 0.5, "macc": 0.6}
        protocol = {"scenes": 2, "teacher": "lseg", "text_encoder": "clip"}
        return {"rows": {"fusion_2d": row, "stage2": row}, "protocol": protocol, "dataset": "scannet", "versions": {}}

    monkeypatch.setattr(run, "run", finished)
    monkeypatch.setattr(ablation, "ROOT", tmp_path)
    arguments = ["--config=configs/scannet.py", f"--workdir={tmp_path}", "--seeds=2", "data.root=/x"]
    monkeypatch.setattr(sys, "argv", ["table", *arguments])
    published.call(table4.main)
    written = {path.name for path in tmp_path.glob("table4*")}
    assert written == {"table4_scannet.json", "table4_scannet.md", "table4_scannet.png"}
    assert len(configs) == 8 and {config.data.root for config in configs.values()} == {"/x"}
    voted, first = configs["scannet/seed1/self_distillation"], configs["scannet/seed1/ggsd"]
    assert (voted.seed, voted.loss.voting, voted.stage1_from) == (1, False, str(tmp_path / "scannet/seed1/ggsd"))
    assert (first.seed, first.loss.voting, first.stage1_from) == (1, True, "")


def test_fields_and_options_may_come_in_any_order():
    given = published.options("", "x").parse_intermixed_args(["seed=1", "--workdir=w", "batch_size=2"])
    assert given.fields == ["seed=1", "batch_size=2"]


def test_samples_are_found_after_a_try_with_another_folder(tmp_path):
    (tmp_path / "root" / "scans").mkdir(parents=True)
    (tmp_path / "root" / "scans" / "scene0000_00").symlink_to(tmp_path / "lost")
    (tmp_path / "samples" / "scene0000_00").mkdir(parents=True)
    scannet_sample.collect(tmp_path / "samples", tmp_path / "root", np.zeros(41, np.int32))
    assert (tmp_path / "root" / "scans" / "scene0000_00").is_dir()
