"""Named problem sizes: the ones implementations get wrong, and the ones the network spends its time on."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32


class Problem(NamedTuple):
    """One sparse convolution, on voxels scattered over a slab two voxels thick."""

    voxels: int
    kernel_size: int  # 2 has stride 2, the others stride 1
    in_channels: int
    out_channels: int
    transposed: bool = False
    tensor_stride: int = 1
    scenes: int = 1
    fill: float = 0.5  # share of the slab's cells that hold a voxel; 0.5 gives a surface's 9 neighbours of 27

    @property
    def stride(self) -> int:
        return 2 if self.kernel_size == 2 else 1

    def coords(self, seed: int = 0) -> Int32[np.ndarray, "N 4"]:
        """Distinct (batch, x, y, z) rows of the finer side, in random order, around the origin."""
        side = math.ceil(math.sqrt(self.voxels / (2 * self.fill * self.scenes)))
        cells = np.random.default_rng(seed).choice(self.scenes * side * side * 2, self.voxels, replace=False)
        batch, x, y, z = np.unravel_index(cells, (self.scenes, side, side, 2))
        xyz = np.stack([x - side // 2, y - side // 2, z - 1], axis=1) * self.tensor_stride
        return np.column_stack([batch, xyz]).astype(np.int32)


AWKWARD = {
    "one voxel": Problem(1, 3, 3, 2),
    "one voxel, 5^3": Problem(1, 5, 1, 1),
    "one voxel, stride 2": Problem(1, 2, 2, 3),
    "one voxel, transposed": Problem(1, 2, 2, 3, transposed=True),
    "odd channels": Problem(301, 3, 7, 13),
    "one channel in": Problem(301, 3, 1, 5),
    "one channel out": Problem(301, 3, 6, 1),
    "empty offsets": Problem(97, 3, 5, 4, fill=0.02),
    "no neighbours": Problem(61, 5, 3, 4, fill=0.001),
    "every neighbour": Problem(338, 3, 4, 4, fill=1.0),
    "several scenes": Problem(515, 3, 5, 7, scenes=4),
    "several scenes, 5^3": Problem(515, 5, 3, 8, scenes=3),
    "several scenes, stride 2": Problem(515, 2, 5, 7, scenes=3),
    "several scenes, transposed": Problem(515, 2, 7, 5, scenes=3, transposed=True),
    "tensor stride 4": Problem(203, 3, 5, 7, tensor_stride=4),
    "tensor stride 8, stride 2": Problem(203, 2, 5, 7, tensor_stride=8),
    "more than one tile per offset": Problem(1777, 3, 3, 3),
}

# MinkUNet18A on a room of 20,000 voxels at 2 cm
NETWORK = {
    "stem": Problem(20_000, 5, 3, 32),
    "level 0": Problem(20_000, 3, 96, 96),
    "level 0, after the skip": Problem(20_000, 3, 128, 96),
    "level 1": Problem(4_300, 3, 32, 32, tensor_stride=2),
    "level 2": Problem(1_000, 3, 64, 64, tensor_stride=4),
    "level 3": Problem(230, 3, 128, 128, tensor_stride=8),
    "level 4": Problem(52, 3, 256, 256, tensor_stride=16),
    "down 0 to 1": Problem(20_000, 2, 32, 32),
    "down 3 to 4": Problem(230, 2, 128, 128, tensor_stride=8),
    "up 4 to 3": Problem(230, 2, 256, 128, tensor_stride=8, transposed=True),
    "up 1 to 0": Problem(20_000, 2, 96, 96, transposed=True),
}
