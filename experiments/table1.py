"""Table 1 of the paper: against training with labels, on ScanNet's 20 classes or nuScenes' 16.

  python -m experiments.table1                       # ten minutes, on synthetic rooms
  python -m experiments.table1 --samples=DIR         # minutes, on seven ScanNet scans
  python -m experiments.table1 --config=configs/scannet.py data.root=/data/scannet text.encoder=/data/clip \\
      teacher.name=lseg teacher.weights=/data/demo_e200.ckpt
  python -m experiments.table1 --config=configs/nuscenes.py data.root=/data/nuscenes text.encoder=/data/clip \\
      teacher.weights=/data/openseg

Two runs: GGSD (its teacher, both stages and the ensemble are rows) and the same network trained with labels. OpenScene
trains that on nuScenes with batch_size=24 and data.loop=2.
"""

from experiments import published

# ScanNet and nuScenes: mIoU, mAcc
QUOTED = {
    "MinkowskiNet, trained with labels": ([69.0, 77.5], [78.0, 83.7]),
    "MSeg voting": ([45.6, 54.4], [31.0, 36.9]),
    "PLA": ([17.7, 33.5], [None, None]),
    "CLIP2Scene": ([25.1, None], [20.8, None]),
    "CNS": ([26.8, None], [33.5, None]),
    "CLIP-FO3D": ([30.2, 49.1], [None, None]),
    "OpenScene, 2D-3D ensemble": ([54.2, 66.6], [42.1, 61.8]),
    "OpenScene, pure 3D": ([52.9, 63.2], [42.9, 57.1]),
    "GGSD": ([56.5, 68.6], [46.1, 59.2]),
}
ROWS = {
    "fusion_2d": "2D fusion (the teacher)",
    "stage1": "Geometry guided distillation",
    "stage2": "GGSD",
    "ensemble": "GGSD, 2D-3D ensemble",
}


def main() -> None:
    given = published.options(__doc__, "table1").parse_intermixed_args()
    config, workdir, title = published.configure(given)
    config, ggsd = published.train(config, workdir, "ggsd")
    _, labelled = published.train(config, workdir, "supervised", mode="supervised")
    measured = {"MinkowskiNet, trained with labels": published.percent(labelled["rows"]["supervised"])}
    measured |= {label: published.percent(ggsd["rows"][row]) for row, label in ROWS.items()}
    outdoors = config.data.label_set == "nuscenes16"
    published.report(
        "table1",
        "Table 1: against training with labels",
        title,
        text=published.about(config, ggsd),
        columns=published.MEAN,
        measured=measured,
        quoted={f"{row}, {('ScanNet', 'nuScenes')[outdoors]}": values[outdoors] for row, values in QUOTED.items()},
        short=given.samples is not None,
    )


if __name__ == "__main__":
    published.call(main)
