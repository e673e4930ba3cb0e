"""OpenScene checkpoints to variables: names, prefixes, and what is said of files that do not fit."""

import json
import shutil
import sys

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from data import torch_file
from ggsd_jax import openscene


@pytest.fixture(scope="module")
def state(shared) -> dict[str, np.ndarray]:
    """Tensors of a narrow MinkUNet18A, without a prefix."""
    stored = torch_file.load(shared / "golden/narrow_ckpt.pth.tar")["state_dict"]
    return {name.removeprefix("net3d."): value for name, value in stored.items()}


def write_checkpoint(monkeypatch, tmp_path, value):
    """A file for which `torch_file.load` gives `value`; the zip format is tests/test_torch_file.py's business."""
    monkeypatch.setattr(torch_file, "load", lambda path: value)
    return tmp_path / "model.pth.tar"


@pytest.mark.parametrize(("name", "prefix"), [("narrow_ckpt", "net3d."), ("narrow_ckpt_ddp", "module.net3d.")])
def test_both_golden_checkpoints_are_read(shared, name, prefix):
    path = shared / f"golden/{name}.pth.tar"
    variables, info = openscene.load_checkpoint(path)
    assert info == {
        "epoch": 3, "best_iou": pytest.approx(0.5375), "prefix": prefix, "arch": "MinkUNet18A",
        "in_channels": 3, "out_channels": 96,
    }  # fmt: skip
    stored = torch_file.load(path)["state_dict"]
    flat = flatten_dict(variables)
    assert len(flat) == sum(not key.endswith("num_batches_tracked") for key in stored)
    for ours, theirs in {
        ("params", "conv0p1s1", "kernel"): "conv0p1s1.kernel",
        ("params", "block2_0", "downsample_0", "kernel"): "block2.0.downsample.0.kernel",
        ("params", "block2_0", "downsample_1", "scale"): "block2.0.downsample.1.bn.weight",
        ("params", "bntr4", "bias"): "bntr4.bn.bias",
        ("batch_stats", "block8_1", "norm2", "mean"): "block8.1.norm2.bn.running_mean",
        ("batch_stats", "block8_1", "norm2", "var"): "block8.1.norm2.bn.running_var",
    }.items():
        assert np.array_equal(flat[ours], stored[prefix + theirs])


def test_every_tensor_of_the_real_network_has_its_place(shared):
    names = json.loads((shared / "golden/state_dict_names.json").read_text())["out_768"]
    state = {name: np.zeros(shape, np.float32) for name, shape, _ in names}
    params = flatten_dict(openscene.variables_from_state_dict(state)["params"])
    assert sum(value.size for value in params.values()) == 15_564_960


def test_reading_needs_no_torch(shared, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would raise
    assert openscene.load_checkpoint(shared / "golden/narrow_ckpt.pth.tar")[1]["arch"] == "MinkUNet18A"


@pytest.mark.parametrize("prefix", openscene.PREFIXES)
@pytest.mark.parametrize("wrapped", [True, False])
def test_any_prefix_and_a_bare_state_dict_are_read(monkeypatch, tmp_path, state, prefix, wrapped):
    value = {prefix + name: tensor for name, tensor in state.items()}
    path = write_checkpoint(monkeypatch, tmp_path, {"state_dict": value} if wrapped else value)
    variables, info = openscene.load_checkpoint(path)
    assert (info["prefix"], info["epoch"], info["best_iou"]) == (prefix, None, None)
    assert np.array_equal(variables["params"]["final"]["kernel"], state["final.kernel"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block3.1.conv2.kernel": None}, "tensor net3d.block3.1.conv2.kernel is missing"),
        ({"bn0.bn.running_var": None}, "tensor net3d.bn0.bn.running_var is missing"),
        ({"conv0p1s1.kernel": None}, "no conv0p1s1.kernel"),
        ({"final.kernel": None}, "tensor net3d.final.kernel is missing"),
        ({"final.bias": np.zeros(96, np.float32)}, "tensor net3d.final.bias is unexpected"),
        ({"block3.2.conv1.kernel": np.zeros((27, 16, 16), np.float32)}, "block3.2.conv1.kernel is unexpected"),
        ({"bn1.bn.bias": np.zeros(5, np.float32)}, r"net3d.bn1.bn.bias has shape \(5,\), expected \(4,\)"),
        ({"conv1p1s2.kernel": np.zeros((27, 4, 4), np.float32)}, r"has shape \(27, 4, 4\), expected \(8, 4, 4\)"),
        ({"bn1.bn.bias": np.full(4, np.nan, np.float32)}, "net3d.bn1.bn.bias.*finite"),
        ({"bn1.bn.bias": np.zeros(4, np.int64)}, r"net3d.bn1.bn.bias \(int64\).*floating-point"),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_their_file(monkeypatch, tmp_path, state, change, message):
    changed = {f"net3d.{name}": value for name, value in (state | change).items() if value is not None}
    path = write_checkpoint(monkeypatch, tmp_path, {"state_dict": changed})
    with pytest.raises(ValueError, match=message) as caught:
        openscene.load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_a_whole_missing_block_is_missed(state):
    changed = {name: value for name, value in state.items() if not name.startswith("block3.1.")}
    with pytest.raises(ValueError, match="block3.1.conv1.kernel is missing"):
        openscene.variables_from_state_dict(changed)


@pytest.mark.parametrize("value", [[1, 2], {"state_dict": 3}, {}, {"state_dict": {"classifier.weight": 0}}])
def test_other_content_is_refused_with_the_file_named(monkeypatch, tmp_path, value):
    path = write_checkpoint(monkeypatch, tmp_path, value)
    with pytest.raises(ValueError, match=str(path)):
        openscene.load_checkpoint(path)


def test_a_truncated_checkpoint_is_refused(shared, tmp_path):
    path = tmp_path / "model_best.pth.tar"
    shutil.copy(shared / "golden/narrow_ckpt.pth.tar", path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(ValueError, match="model_best.pth.tar: truncated or damaged"):
        openscene.load_checkpoint(path)


def test_architecture_is_inferred_whatever_the_common_factor(state):
    variables = openscene.variables_from_state_dict(state)
    assert openscene._arch(variables["params"]) == "MinkUNet18A"
    for layers, planes, init_dim, expected in (
        ((1,) * 8, (16, 32, 64, 128, 96, 96, 64, 64), 16, "MinkUNet14C"),
        ((2, 3, 4, 6, 2, 2, 2, 2), (64, 128, 256, 512, 512, 256, 128, 64), 64, "MinkUNet34B"),
        ((2,) * 8, (5, 64, 128, 256, 128, 128, 96, 96), 32, None),
    ):
        params = {"conv0p1s1": {"kernel": np.zeros((125, 3, init_dim))}}
        for i, (blocks, width) in enumerate(zip(layers, planes, strict=True), start=1):
            for j in range(blocks):
                params[f"block{i}_{j}"] = {"conv1": {"kernel": np.zeros((27, 1, width))}}
        assert openscene._arch(params) == expected
