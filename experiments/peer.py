"""spconv at the same work, to hold this project's times against; importing this module needs spconv and torch.

Sparse convolutions and MinkUNet18A as spconv writes them, on the GPU if torch and JAX both have one, else on the CPU.
The maps are made beforehand, as in the rows they stand beside. spconv has no kernels for bfloat16: float16 stands in.
"""

import os
from collections.abc import Callable
from importlib.metadata import version

import jax
import numpy as np
import spconv
import spconv.pytorch as sp
import torch
from torch import nn

from ggsd_jax.minkunet import architecture
from kernels.sparse_conv.bench import timed
from kernels.sparse_conv.shapes import Problem

VERSIONS = {"spconv": spconv.__version__, "torch": version("torch")}
_ON_GPU = jax.default_backend() == "gpu" and torch.cuda.is_available()
_DEVICE = "cuda" if _ON_GPU else "cpu"
_ALGORITHM = None if _ON_GPU else sp.ConvAlgo.Native  # the only one on CPUs; None leaves the choice to spconv
_DTYPES = {"float32": torch.float32, "bfloat16": torch.float16}
_INIT_CHANNELS, _DEEPEST = 32, 16  # of a MinkUNet: channels of the stem, stride of the coarsest level

if not _ON_GPU:
    sp.ops.get_current_stream = lambda: 0  # its backward asks for the CUDA stream even on a CPU
    torch.set_num_threads(os.cpu_count() or 1)


def convolution_seconds(coords: np.ndarray, problem: Problem, dtype: str) -> tuple[float, float]:
    """Forward, and forward + backward, of a 3^3 convolution on int32 coords [N, 4] (batch, x, y, z)."""
    layer = _convolution(problem.in_channels, problem.out_channels, 3, "map").to(_DEVICE, _DTYPES[dtype])
    return _seconds(layer, coords, problem.in_channels, dtype, lambda out: out.features)


def network_seconds(coords: np.ndarray, out_channels: int, dtype: str) -> tuple[float, float]:
    """Forward with running statistics, and forward + backward with the batch's, of MinkUNet18A on coords [N, 4]."""
    network = _MinkUNet(out_channels).to(_DEVICE, _DTYPES[dtype])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.float()  # as here, statistics are float32
    return _seconds(network, coords, 3, dtype, lambda out: out)


def _seconds(network: nn.Module, coords, in_channels: int, dtype: str, features_of: Callable) -> tuple[float, float]:
    order = np.lexsort(coords.T[::-1])
    coords = coords[order] - np.array([0, *coords[:, 1:].min(0)], np.int32)
    sizes = _DEEPEST * (coords.max(0) // _DEEPEST + 1)  # else strided convolutions leave voxels out at the end
    indices = torch.from_numpy(coords).to(_DEVICE)
    features = torch.randn(len(coords), in_channels, device=_DEVICE, dtype=_DTYPES[dtype], requires_grad=True)
    maps: dict = {}

    def run():
        x = sp.SparseConvTensor(features, indices, sizes[1:].tolist(), int(coords[:, 0].max()) + 1)
        x.indice_dict = maps
        return features_of(network(x))

    def finished(function):
        function()
        if _ON_GPU:
            torch.cuda.synchronize()

    def training():
        network.zero_grad(set_to_none=True)
        features.grad = None
        run().float().sum().backward()

    network.eval()
    with torch.no_grad():
        forward = timed(finished, run, at_least=3)
    network.train()
    return forward, timed(finished, training, at_least=3)


def _convolution(in_channels: int, out_channels: int, kernel_size: int, key: str) -> nn.Module:
    return sp.SubMConv3d(in_channels, out_channels, kernel_size, bias=False, indice_key=key, algo=_ALGORITHM)


def _norm_relu(norm: nn.Module, x, shortcut=0):
    return x.replace_feature(torch.relu(norm(x.features) + shortcut))


class _Block(nn.Module):
    def __init__(self, channels: int, out_channels: int, key: str):
        super().__init__()
        self.conv1, self.norm1 = _convolution(channels, out_channels, 3, key), nn.BatchNorm1d(out_channels)
        self.conv2, self.norm2 = _convolution(out_channels, out_channels, 3, key), nn.BatchNorm1d(out_channels)
        self.shortcut = nn.Identity()
        if channels != out_channels:
            self.shortcut = nn.Sequential(nn.Linear(channels, out_channels, bias=False), nn.BatchNorm1d(out_channels))

    def forward(self, x):
        y = self.conv2(_norm_relu(self.norm1, self.conv1(x)))
        return _norm_relu(self.norm2, y, self.shortcut(x.features))


class _Stage(nn.Module):
    """A strided convolution, down or up, the skip's channels beside its own, and the blocks."""

    def __init__(self, conv: nn.Module, width: int, skip: int, out_channels: int, blocks: int, key: str):
        super().__init__()
        self.conv, self.norm = conv, nn.BatchNorm1d(width)
        widths = [width + skip] + [out_channels] * blocks
        self.blocks = nn.Sequential(*(_Block(a, b, key) for a, b in zip(widths, widths[1:], strict=False)))

    def forward(self, x, skip=None):
        x = _norm_relu(self.norm, self.conv(x))
        if skip is not None:
            x = x.replace_feature(torch.cat([x.features, skip.features], 1))
        return self.blocks(x)


class _MinkUNet(nn.Module):
    def __init__(self, out_channels: int):
        super().__init__()
        layers, planes = architecture("MinkUNet18A")[:2]
        channels = [_INIT_CHANNELS, *planes[:4]]
        self.stem, self.norm = _convolution(3, _INIT_CHANNELS, 5, "stem"), nn.BatchNorm1d(_INIT_CHANNELS)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level in range(1, 5):
            width = channels[level - 1]
            conv = sp.SparseConv3d(width, width, 2, 2, bias=False, indice_key=f"stride {level}", algo=_ALGORITHM)
            self.down.append(_Stage(conv, width, 0, channels[level], layers[level - 1], f"level {level}"))
        width = channels[4]
        for level, out, blocks in zip((3, 2, 1, 0), planes[4:], layers[4:], strict=True):
            conv = sp.SparseInverseConv3d(width, out, 2, bias=False, indice_key=f"stride {level + 1}", algo=_ALGORITHM)
            self.up.append(_Stage(conv, out, channels[level], out, blocks, f"level {level}"))
            width = out
        self.final = nn.Linear(width, out_channels)

    def forward(self, x):
        x = _norm_relu(self.norm, self.stem(x))
        skips = []
        for stage in self.down:
            skips.append(x)
            x = stage(x)
        for stage in self.up:
            x = stage(x, skips.pop())
        return self.final(x.features)
