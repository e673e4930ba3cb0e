"""Table 2 of the paper: words beyond the training classes, NYU-40 without its three "other..." classes.

  python -m experiments.table2                       # five minutes, on synthetic rooms (15 classes in three groups)
  python -m experiments.table2 --samples=DIR         # minutes, on seven ScanNet scans
  python -m experiments.table2 --config=configs/scannet.py data.root=/data/scannet text.encoder=/data/clip \\
      teacher.name=lseg teacher.weights=/data/demo_e200.ckpt

The network of Table 1 (give its --workdir, and its run is taken) is asked for 37 words. The classes are split into
head, common and tail by their points in the scored scenes; the paper's own split is in a supplement that is not public.
"""

import ml_collections

from data import scannet
from experiments import published, scannet_sample
from ggsd_jax import evaluate, metrics

GROUPS = ("Head", "Common", "Tail")
QUOTED = {  # mIoU and mAcc of head, common and tail
    "MaskCLIP-3D, ScanNet": [19.8, 33.1, 13.3, 26.8, 7.5, 15.3],
    "OpenScene, pure 3D, ScanNet": [64.4, 76.8, 27.8, 35.1, 14.9, 21.4],
    "GGSD, ScanNet": [66.8, 78.8, 30.1, 40.9, 16.0, 24.2],
}


def main() -> None:
    given = published.options(__doc__, "table2").parse_intermixed_args()
    config, workdir, title = published.configure(given)
    if config.data.name not in ("scannet", "synthetic"):
        raise ValueError(
            f"data.name={config.data.name!r}: Table 2 needs the 40 NYU labels of ScanNet's own files "
            "(data.name=scannet); OpenScene's downloads hold 20 classes"
        )
    config, _ = published.train(config, workdir, "ggsd")
    asked = ml_collections.ConfigDict(config.to_dict())
    if config.data.name == "scannet":
        asked.data.label_set = "nyu37"
    if given.samples:
        root = workdir / "root_nyu37"
        scannet_sample.collect(given.samples, root, scannet.LABEL_TABLES["nyu37"])
        asked.data.root = str(root.resolve())
    results = evaluate.evaluate(asked, workdir / "ggsd", None)
    groups = metrics.head_common_tail(results["protocol"]["points_of_class"])
    measured = {}
    for row, label in (("stage1", "Geometry guided distillation"), ("stage2", "GGSD")):
        scores = results["rows"][row]
        measured[label] = [
            round(100 * metrics.mean_over(scores[kind], groups[group]), 1)
            for group in GROUPS
            for kind in ("iou", "acc")
        ]
    present = {name for name, points in results["protocol"]["points_of_class"].items() if points}
    lists = "; ".join(
        f"{group}: {', '.join(name if name in present else f'({name})' for name in groups[group])}" for group in GROUPS
    )
    published.report(
        "table2",
        "Table 2: words beyond the training classes",
        title,
        text=published.about(asked, results) + f" Groups, absent classes in brackets (they count as 0): {lists}.",
        columns=[f"{group} {mean}" for group in GROUPS for mean in published.MEAN],
        measured=measured,
        quoted=QUOTED,
        short=given.samples is not None,
    )


if __name__ == "__main__":
    published.call(main)
