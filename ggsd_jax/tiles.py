"""Cuts a large cloud of voxels into overlapping tiles, so that a network with bounded memory sees it in pieces."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32


class Tile(NamedTuple):
    """The voxels a network is shown at once, and those of them whose features it is asked for."""

    rows: Int[np.ndarray, " T"]
    """Ascending rows of the cloud."""
    core: Bool[np.ndarray, " T"]
    """Every voxel of the cloud is in the core of exactly one tile; the others are its halo."""


def tiles(coords: Int32[np.ndarray, "V 3"], max_voxels: int, halo: int) -> Iterator[Tile]:
    """Tiles of at most `max_voxels` voxels, by cutting boxes in two at the median of their longest side.

    Args:
        coords: distinct voxels.
        max_voxels: the bound, 2 or more; one tile holds a cloud within it.
        halo: voxels shown around the box of a core, in every direction. Where the bound leaves no room for all of
            them (a box no longer than the halo is still too full), those nearest to the box are shown.
    """
    boxes = [(np.arange(len(coords)), np.arange(len(coords)))]
    while boxes:
        core, around = boxes.pop()
        low, high = coords[core].min(axis=0), coords[core].max(axis=0)
        distance = np.maximum(low - coords[around], coords[around] - high).max(axis=1)  # Chebyshev, 0 or less inside
        shown = around[distance <= halo]
        side = high - low + 1
        if len(shown) > max_voxels and (side.max() > halo or len(core) > max_voxels):
            along = coords[core, side.argmax()]
            cut = np.median(along)
            left = along <= cut if cut < along.max() else along < cut
            boxes += [(core[~left], shown), (core[left], shown)]
            continue
        if len(shown) > max_voxels:
            # the core first: other voxels may lie in its box too
            order = np.lexsort((distance[distance <= halo], ~np.isin(shown, core, assume_unique=True)))
            shown = np.sort(shown[order[:max_voxels]])
        yield Tile(shown, np.isin(shown, core, assume_unique=True))
