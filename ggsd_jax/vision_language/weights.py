"""Tensors out of the files that networks are published in, and Flax variables made of them.

Nothing is executed that a file asks for. A Flax module is named so that its path, joined with dots, is the
name of the tensor; `variables` translates the last word and the layout.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from data import torch_file

Tensors = dict[str, np.ndarray]

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_LAYOUTS = {2: (1, 0), 4: (2, 3, 1, 0)}  # dense [out, in] and convolution [out, in, h, w] kernels into Flax's order


def read(path: Path) -> Tensors:
    """Name -> tensor of a network.

    Reads .safetensors, and the zip files of torch.save (a state dict, or a checkpoint with a `state_dict`) and
    of torch.jit.save.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, of another format, or holds no tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file of weights") from None
        except (SafetensorError, KeyError, TypeError, OSError) as error:  # KeyError: a dtype NumPy does not have
            raise ValueError(
                f"{path}: truncated or not a safetensors file ({error}); fetch it again "
                "(a clone made without git-lfs holds pointers in place of weights)"
            ) from error
    content = torch_file.load(path, inert=True)
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    tensors = dict(_tensors(content, ""))
    if not tensors:
        raise ValueError(f"{path}: holds no tensors; expected the state dict or the TorchScript archive of a network")
    return tensors


def _tensors(value: Any, name: str):
    if isinstance(value, torch_file.Inert):
        value = value.state
    if isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key))


def renamed(tensors: Mapping[str, np.ndarray], rules: Sequence[tuple[str, str]]) -> Tensors:
    """The tensors under other names: every (pattern, replacement) is applied in order."""
    result = {}
    for name, value in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def with_split_attention(tensors: Mapping[str, np.ndarray], fused: str) -> Tensors:
    """Tensors `<block>.<fused>weight` and `bias` [3 W, ...] replaced by those of q_proj, k_proj and v_proj."""
    result = {}
    for name, value in tensors.items():
        block, found, leaf = name.rpartition(fused)
        if not found:
            result[name] = value
            continue
        for part, rows in zip("qkv", np.split(value, 3), strict=True):
            result[f"{block}{part}_proj.{leaf}"] = rows
    return result


def depth(tensors: Mapping[str, np.ndarray], prefix: str) -> int:
    """How many of the blocks `<prefix>0.`, `<prefix>1.`, ... there are."""
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def variables(tensors: Mapping[str, np.ndarray], shapes: Any, *, origin: str) -> dict:
    """Float32 Flax variables of the given shapes from torch's tensors; further tensors are left out.

    Args:
        shapes: what `jax.eval_shape` gives of a module's `init`.
        origin: how errors call the file.

    Raises:
        ValueError: tensors are missing, of other shapes, or not finite; up to three are named.
    """
    found, problems = {}, []
    for path, expected in flatten_dict(shapes).items():
        *modules, leaf = path[1:]
        name = ".".join([*modules, _LEAVES.get(leaf, leaf)])
        if name not in tensors:
            problems.append(f"{name} is missing")
            continue
        value = np.asarray(tensors[name], np.float32)
        if leaf == "kernel":
            value = value.transpose(_LAYOUTS.get(value.ndim, range(value.ndim)))
        if value.shape != expected.shape:
            problems.append(f"{name} has shape {list(tensors[name].shape)}, which gives {_sizes(value, expected)}")
        elif not np.isfinite(value).all():
            problems.append(f"{name} has values that are not finite")
        found[path] = value
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{origin}: not the weights of this network: {'; '.join(problems[:3])}{more}")
    return unflatten_dict(found)


def _sizes(value: np.ndarray, expected: jax.ShapeDtypeStruct) -> str:
    return f"{list(value.shape)} where {list(expected.shape)} is expected"
