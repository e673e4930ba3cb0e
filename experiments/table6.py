"""Table 6 of the paper: superpoints against 2D features averaged within the masks of Segment Anything.

  python -m experiments.table6                       # ten minutes, on synthetic rooms with simulated masks
  python -m experiments.table6 --config=configs/scannet.py --masks=/data/sam data.root=/data/scannet \\
      text.encoder=/data/clip teacher.name=lseg teacher.weights=/data/demo_e200.ckpt

SAM's masks come from its own script (ggsd_jax/vision_language/sam_masks.py says how to call it). Those of the synthetic
rooms are the true pieces of one class in each image: better than any network's.
"""

from pathlib import Path

import ml_collections
import numpy as np
from PIL import Image
from scipy import ndimage

from data.virtual_camera import point_spacing, splat
from experiments import published
from ggsd_jax.datasets import DATASETS

ALONE = {"loss__superpoint_weight": 0.0, "loss__self_weight": 0.0}
QUOTED = {
    "Pixel-point distillation, ScanNet": [52.9, 63.2],
    "SAM refine, ScanNet": [53.0, 63.3],
    "Geometry guided distillation, ScanNet": [53.5, 65.0],
}


def simulate_masks(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Writes the connected pieces of one class in every view of every scene, as SAM's script writes its masks."""
    for readers in DATASETS[config.data.name](config).values():
        for read in readers().values():
            scene, views, *_ = read()
            if (folder / scene.name).is_dir():
                continue
            spacing = 1.5 * point_spacing(scene.points)
            for view in views:
                _, index = splat(scene.points, view.pose, view.intrinsics, view.size, spacing, view.depth)
                classes = np.where(index < 0, -1, scene.labels[index])
                place = folder / scene.name / view.name
                place.mkdir(parents=True, exist_ok=True)
                pieces = []
                for label in np.unique(classes[classes >= 0]):
                    numbered, count = ndimage.label(classes == label)
                    pieces += [numbered == i for i in range(1, count + 1)]
                for i, piece in enumerate(piece for piece in pieces if piece.sum() > 20):
                    Image.fromarray(255 * piece.astype(np.uint8)).save(place / f"{i}.png")


def main() -> None:
    parser = published.options(__doc__, "table6")
    parser.add_argument("--masks", type=Path, help="folder of SAM's masks of all views")
    given = parser.parse_intermixed_args()
    if (given.config or given.samples) and not given.masks:
        parser.error("--masks is missing: the second row needs SAM's masks")
    config, workdir, title = published.configure(given)
    masks = given.masks or workdir / "simulated_masks"
    if not given.masks:
        simulate_masks(config, masks)
    refined = {"teacher__masks": str(masks.resolve()), "data__prepared": str((workdir / "data_sam").resolve())}
    _, sam = published.train(config, workdir, "sam_refine", **ALONE, **refined)  # first: masks may be missing
    _, point = published.train(config, workdir, "pixel_point", **ALONE)
    config, guided = published.train(config, workdir, "geometry_guided", loss__self_weight=0.0)
    runs = {"Pixel-point distillation": point, "SAM refine": sam, "Geometry guided distillation": guided}
    kind = "SAM's" if given.masks else "simulated from the labels"
    fusion = " and ".join(f"{published.percent(r['rows']['fusion_2d'])[0]}" for r in (point, sam))
    published.report(
        "table6",
        "Table 6: superpoints against masks of images",
        title,
        text=f"{published.about(config, guided)} Masks: {kind}; 2D fusion without and with them: {fusion} mIoU.",
        columns=published.MEAN,
        measured={label: published.percent(results["rows"]["stage2"]) for label, results in runs.items()},
        quoted=QUOTED,
        short=given.samples is not None,
    )


if __name__ == "__main__":
    published.call(main)
