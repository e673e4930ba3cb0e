"""What the values of a configuration may be, so that a mistake shows at once and not after hours."""

import math
from collections.abc import Callable

import ml_collections

from ggsd_jax import train

_AT_LEAST = {
    "seed": 0,
    "batch_size": 1,
    "checkpoint_every": 1,
    "cpu_devices": 1,
    "log_every": 1,
    "stage1_epochs": 0,
    "stage2_epochs": 0,
    "data.chunks": 1,
    "data.chunk_points": 1,
    "data.loop": 1,
    "data.min_voxels": 0,
    "data.max_voxels": 1000,
    "data.workers": 0,
    "data.prepare_workers": 0,
    "data.sweeps": 1,
    "eval.repeats": 1,
    "eval.pictures": 0,
}
_POSITIVE = (
    "data.voxel_size",
    "data.depth_units",
    "superpoints.voxel_resolution",
    "superpoints.seed_resolution",
    "model.width",
    "loss.temperature",
    "optimizer.learning_rate",
    "supervised.learning_rate",
)
_NOT_NEGATIVE = (
    "data.scale",
    "superpoints.color_importance",
    "superpoints.spatial_importance",
    "superpoints.normal_importance",
    "loss.distill_weight",
    "loss.superpoint_weight",
    "loss.self_weight",
    "optimizer.power",
    "supervised.weight_decay",
)
_SHARES = ("loss.ema_momentum", "supervised.momentum")
_CHOICES = {"mode": train.MODES, "loss.label_source": ("ema", "fixed_3d", "fixed_2d")}


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError where a field of `config` has a value that no run can have; fields it lacks are not missed."""
    for field, least in _AT_LEAST.items():
        _expect(config, field, lambda value, least=least: value >= least, f"at least {least}")
    for field in _POSITIVE:
        _expect(config, field, lambda value: 0 < value < math.inf, "a positive number")
    for field in _NOT_NEGATIVE:
        _expect(config, field, lambda value: 0 <= value < math.inf, "0 or more")
    for field in _SHARES:
        _expect(config, field, lambda value: 0 <= value <= 1, "0 to 1")
    for field, choices in _CHOICES.items():
        _expect(
            config, field, lambda value, choices=choices: value in choices, f"one of {', '.join(map(repr, choices))}"
        )
    if config.stage1_epochs + config.stage2_epochs < 1:
        raise ValueError("stage1_epochs and stage2_epochs are both 0: expected at least one epoch")
    least, most = config.data.min_voxels, config.data.max_voxels
    if least > most:
        raise ValueError(f"data.min_voxels is {least}: expected no more than data.max_voxels={most}")
    train.make_model(config, out_channels=1)


def _expect(config: ml_collections.ConfigDict, field: str, right: Callable[..., bool], expected: str) -> None:
    *parents, name = field.split(".")
    part = config
    for parent in parents:
        part = part.get(parent, {})
    if name in part and not right(part[name]):
        raise ValueError(f"{field} is {part[name]!r}: expected {expected}")
