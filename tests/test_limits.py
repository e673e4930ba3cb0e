from pathlib import Path

import pytest

from experiments import configs
from ggsd_jax import limits, run

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_within_the_limits(path):
    limits.check(configs.load(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_number_has_limits(path):
    """But for the rates of the simulated teacher, whose class explains them."""
    limited = {*limits._AT_LEAST, *limits._POSITIVE, *limits._NOT_NEGATIVE, *limits._SHARES}
    elsewhere = {"model.remat", "data.train_rooms", "data.val_rooms"}

    def numbers(part, prefix=""):
        for name, value in part.items():
            if hasattr(value, "items"):
                yield from numbers(value, f"{prefix}{name}.")
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield prefix + name

    found = {name for name in numbers(configs.load(path)) if not name.startswith("teacher.")}
    assert found - elsewhere <= limited


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", -1, "batch_size is -1: expected at least 1"),
        ("data.chunks", 0, "data.chunks is 0: expected at least 1"),
        ("data.workers", -1, "data.workers is -1: expected at least 0"),
        ("seed", -1, "seed is -1: expected at least 0"),
        ("data.min_voxels", 200_000, "data.min_voxels is 200000: expected no more than data.max_voxels=100000"),
        ("data.max_voxels", 10, "data.max_voxels is 10: expected at least 1000"),
        ("data.voxel_size", 0.0, "data.voxel_size is 0.0: expected a positive number"),
        ("loss.temperature", float("nan"), "loss.temperature is nan: expected a positive number"),
        ("loss.self_weight", -1.0, "loss.self_weight is -1.0: expected 0 or more"),
        ("loss.ema_momentum", 2.0, "loss.ema_momentum is 2.0: expected 0 to 1"),
        ("loss.label_source", "emma", "loss.label_source is 'emma': expected one of 'ema', 'fixed_3d', 'fixed_2d'"),
        ("model.arch", "MinkUNet99", "unknown architecture 'MinkUNet99'"),
        ("model.dtype", "int8", "model.dtype is 'int8'"),
        ("model.remat", 9, "model.remat is 9"),
    ],
)
def test_a_value_that_no_run_can_have_is_refused_before_anything_is_done(tmp_path, field, value, message):
    config = configs.load("synthetic")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        run.run(config, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_run_has_an_epoch():
    config = configs.load("synthetic")
    config.stage1_epochs = config.stage2_epochs = 0
    with pytest.raises(ValueError, match="are both 0: expected at least one epoch"):
        limits.check(config)
