"""Reads the checkpoints OpenScene writes (.pth.tar) into this project's variables, without torch."""

import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from data import torch_file
from ggsd_jax.minkunet import LAYERS, PLANES, Path, architecture, from_shapes

# One GPU, several GPUs (DistributedDataParallel), or the bare network
PREFIXES = ("net3d.", "module.net3d.", "module.", "")

_LEAVES = {  # torch's name -> collection, ours
    "kernel": ("params", "kernel"),
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}
_TORCH_LEAVES = {ours: theirs for theirs, ours in _LEAVES.items()}


def load_checkpoint(path: str | pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables of an OpenScene checkpoint, and what the file says of itself.

    Returns:
        variables: {"params", "batch_stats"} of NumPy arrays.
        info: `epoch` (epochs done) and `best_iou`, None where the file has none; `prefix` of tensor names;
            `arch`, None if its widths are no multiple of a known one's; `in_channels`, `out_channels`.
    Raises:
        FileNotFoundError, or ValueError that names the file and what is wrong with it. Nothing the file asks
        for is executed, see `data.torch_file`.
    """
    checkpoint = torch_file.load(path)
    try:
        if not isinstance(checkpoint, dict):
            raise ValueError(f"holds a {type(checkpoint).__name__}, expected a dict with 'state_dict'")
        state = checkpoint.get("state_dict", checkpoint)
        if not isinstance(state, dict):
            raise ValueError(f"its state_dict is a {type(state).__name__}, expected a dict of tensors")
        variables = variables_from_state_dict(state)
        best_iou, epoch = checkpoint.get("best_iou"), checkpoint.get("epoch")
        best_iou = None if best_iou is None else float(best_iou)
        epoch = None if epoch is None else int(epoch)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    params = variables["params"]
    return variables, {
        "epoch": epoch,
        "best_iou": best_iou,
        "prefix": _prefix(state),
        "arch": _arch(params),
        "in_channels": params["conv0p1s1"]["kernel"].shape[-2],
        "out_channels": params["final"]["kernel"].shape[-1],
    }


def variables_from_state_dict(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{"params", "batch_stats"} from the tensors of a torch state dict, names with any of `PREFIXES`.

    Tensors keep shape and dtype; `num_batches_tracked` is left out. Raises ValueError, in torch's names, for
    tensors that are missing, unexpected, of the wrong shape, or not finite floating-point numbers.
    """
    prefix = _prefix(state)
    flat: dict[Path, np.ndarray] = {}
    for name, value in state.items():
        if name.endswith(".num_batches_tracked"):
            continue
        path = _path(name.removeprefix(prefix))
        if path is None or prefix + _name(path) != name:
            raise ValueError(f"tensor {name} is unexpected")
        flat[path] = value = np.asarray(value)
        if not np.issubdtype(value.dtype, np.floating) or not np.isfinite(value).all():
            raise ValueError(f"tensor {name} ({value.dtype}) must hold finite floating-point numbers only")
    shapes = {path: value.shape for path, value in flat.items()}
    layers = LAYERS[_family({path[1] for path in flat})]
    from_shapes(shapes, layers, spell=lambda path: f"tensor {prefix}{_name(path)}")
    return unflatten_dict(flat)


def _prefix(state: Mapping[str, Any]) -> str:
    for prefix in PREFIXES:
        if f"{prefix}conv0p1s1.kernel" in state:
            return prefix
    first = list(state)[:3]
    raise ValueError(f"not a MinkUNet: no conv0p1s1.kernel under a prefix of {PREFIXES}; it has {first}, ...")


def _path(name: str) -> Path | None:
    """block2.0.norm1.bn.weight -> (params, block2_0, norm1, scale)"""
    *modules, leaf = re.sub(r"\.(\d+)", r"_\1", name.replace(".bn.", ".")).split(".")
    if leaf not in _LEAVES:
        return None
    collection, leaf = _LEAVES[leaf]
    return (collection, *modules, leaf)


def _name(path: Path) -> str:
    """The inverse of `_path`."""
    collection, *modules, leaf = path
    modules = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    norm = [] if leaf == "kernel" else ["bn"]
    return ".".join([*modules, *norm, _TORCH_LEAVES[collection, leaf]])


def _family(modules: Collection[str]) -> str:
    """MinkUNet14, 18 or 34: whichever has the number of blocks nearest to these."""
    found = [sum(name.startswith(f"block{i}_") for name in modules) for i in range(1, 9)]
    return min(LAYERS, key=lambda name: sum(abs(a - b) for a, b in zip(found, LAYERS[name], strict=True)))


def _arch(params: Mapping[str, Any]) -> str | None:
    """Name of the network, whatever common factor its widths have."""
    init_dim = params["conv0p1s1"]["kernel"].shape[-1]
    planes = [params[f"block{i}_0"]["conv1"]["kernel"].shape[-1] for i in range(1, 9)]
    for name in PLANES:
        known = architecture(name)
        if name.startswith(_family(params)) and [p * known.init_dim for p in planes] == [
            p * init_dim for p in known.planes
        ]:
            return name
    return None
