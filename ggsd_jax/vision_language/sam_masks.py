"""Refinement of 2D features by the masks of Segment Anything (Kirillov et al. 2023), the rival of superpoints in
the paper's Table 6: the features are averaged within each mask.

Masks are read as SAM's own `scripts/amg.py` writes them. For ScanNet, whose views are called `<scene>/<frame>`:

  python scripts/amg.py --input scans/SCENE/color --output MASKS/SCENE --model-type vit_h --checkpoint sam_vit_h.pth
"""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32

from data.scene import View, opened_image, resize_nearest, same_shape


def refine(features: Float32[np.ndarray, "h w C"], masks: Bool[np.ndarray, "K h w"]) -> Float32[np.ndarray, "h w C"]:
    """Every pixel takes the mean of the smallest mask it lies in; one that lies in none keeps its feature.

    The paper does not say what becomes of masks that overlap: the smallest is the most specific.
    """
    refined = features.copy()
    areas = masks.sum(axis=(1, 2))
    for mask in masks[np.argsort(-areas, kind="stable")]:  # smaller ones overwrite larger ones
        if mask.any():
            refined[mask] = features[mask].mean(axis=0)
    return refined


def read(folder: Path, view: View) -> Bool[np.ndarray, "K h w"]:
    """The masks `<folder>/<view.name>/*.png` of a view, on its pixel grid.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a mask is damaged, or of another shape than the view.
    """
    place = folder / view.name
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: no masks of view '{view.name}'; SAM's scripts/amg.py makes such folders")
    masks = np.zeros((0, view.size[1], view.size[0]), bool)
    files = sorted(place.glob("*.png"))
    return np.stack([_read_mask(path, view.size) for path in files]) if files else masks


def _read_mask(path: Path, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    with opened_image(path) as file:
        mask = np.asarray(file.convert("L")) > 0
    height, width = mask.shape
    if not same_shape((width, height), size):
        raise ValueError(f"{path}: {width} x {height} pixels, the shape of the view is {size[0]} x {size[1]}")
    return resize_nearest(mask, size)
