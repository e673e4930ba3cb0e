"""Table 3 of the paper: trained on ScanNet, tested on Matterport3D with its 21, 40, 80 and 160 classes.

  python -m experiments.table3 --samples=DIR         # minutes: from seven ScanNet scans to synthetic rooms
  python -m experiments.table3 --config=configs/scannet.py data.root=/data/scannet text.encoder=/data/clip \\
      teacher.name=lseg teacher.weights=/data/demo_e200.ckpt \\
      --matterport=/data/v1/scans --lists=/data/matterport/lists

The network of Table 1 (give its --workdir, and its run is taken) is shown Matterport3D's test regions as they are: of
these the meshes, the cameras and the category table are needed. As in OpenScene, K = 160 is evaluated once,
the others five times, and at K = 40, 80 and 160 one class is called "other" (ggsd_jax/protocol.py).
"""

import ml_collections

from experiments import configs, published
from ggsd_jax import datasets, evaluate

SIZES = (21, 40, 80, 160)
QUOTED = {  # mIoU and mAcc for each K
    "OpenScene, pure 3D": [36.0, 48.0, 21.1, 27.5, 10.8, 13.9, 6.0, 8.1],
    "GGSD": [40.1, 54.4, 22.8, 31.6, 11.9, 16.2, 6.3, 9.6],
}


def targets(given, trained: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
    """The configs of what the network is tested on, by the names of their columns."""
    found = {}
    if given.matterport is None:
        rooms = configs.load("synthetic")
        rooms.update_from_flattened_dict({"data.val_rooms": 4, "eval.repeats": trained.eval.repeats})
        found["15 classes of synthetic rooms"] = rooms
    else:
        for classes in SIZES:
            regions = configs.load("matterport")
            regions.data.update(root=given.matterport, lists=given.lists, label_set=f"matterport{classes}")
            regions.eval.repeats = 1 if classes == 160 else trained.eval.repeats
            found[f"Matterport{classes}"] = regions
    for config in found.values():
        config.model, config.text = trained.model, trained.text
        config.eval.pictures = 0
        config.data.update(voxel_size=trained.data.voxel_size, input_color=trained.data.input_color)
    return found


def main() -> None:
    parser = published.options(__doc__, "table3")
    parser.add_argument("--matterport", help="folder of the buildings; without it the rooms of configs/synthetic.py")
    parser.add_argument("--lists", default="", help="folder of scenes_test.txt and category_mapping.tsv")
    given = parser.parse_intermixed_args()
    if given.config is None and given.samples is None:
        parser.error("what to train on: --samples=DIR or --config=configs/scannet.py")
    if given.config and given.matterport is None:
        parser.error("--matterport is missing: the folder of the buildings to test on")
    config, workdir, title = published.configure(given)
    tests = targets(given, config)
    for target in tests.values():  # what is missing shows before a day of training
        evaluate.check(target)
        datasets.RawScenes(target, "val")
    config, trained = published.train(config, workdir, "ggsd")
    results = {name: evaluate.evaluate(target, workdir / "ggsd", None) for name, target in tests.items()}
    measured = {
        label: [value for result in results.values() for value in published.percent(result["rows"][row])]
        for row, label in (("stage1", "Geometry guided distillation"), ("stage2", "GGSD"))
    }
    columns = [f"{name} {mean}" for name in results for mean in published.MEAN]
    quoted = QUOTED
    tested = " ".join(f"Tested on {name}: {published.about(config, result)}" for name, result in results.items())
    if given.matterport is None:
        quoted = {f"{row}, Matterport21": values[:2] for row, values in QUOTED.items()}
        tested += " The rooms stand in for Matterport3D, of which no scan was at hand."
    published.report(
        "table3",
        "Table 3: trained on ScanNet, tested elsewhere",
        title,
        text=f"Trained on {trained['dataset']}, evaluated there on {trained['protocol']['scenes']} scenes. {tested}",
        columns=columns,
        measured=measured,
        quoted=quoted,
        short=given.samples is not None,
    )


if __name__ == "__main__":
    published.call(main)
