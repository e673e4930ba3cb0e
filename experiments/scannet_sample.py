"""The whole method on a handful of real ScanNet scans: what it takes, and what comes out on two CPU cores.

  python -m experiments.scannet_sample --samples=DIR --text=clip_scannet20_vitb32_512.npz

DIR holds `scene0000_00/` as ScanNet distributes it, with exported frames, and `labelled_50k/*.npz`, clouds of 50,000
vertices in VoteNet's export (xyz_aligned, rgb, nyu40, axis_align_matrix), which have no frames. The first scan goes
through the real projection of its real frames; the views of the others are simulated; the 2D teacher always is.
Voxels are 10 cm and the network is narrow, so that it ends within the hour; the paper's setting is configs/scannet.py.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from absl import logging

from data.labels import NYU40_TO_SCANNET20
from data.scene import Scene
from experiments import configs
from ggsd_jax import evaluate, run

ROOT = Path(__file__).parent
VALIDATION = ("scene0005_00", "scene0010_00")  # never trained on
OVERRIDES = {
    "batch_size": 2,
    "cpu_devices": 2,
    "stage1_epochs": 150,
    "stage2_epochs": 50,
    "teacher.name": "simulated",
    "data.voxel_size": 0.1,
    "data.chunks": 1,
    "data.chunk_points": 100_000,
    "data.loop": 4,
    "data.min_voxels": 15_000,
    "model.arch": "MinkUNet14A",
    "model.width": 0.5,
    "optimizer.learning_rate": 4e-3,
    "loss.ema_momentum": 0.99,
    "loss.self_weight": 0.1,
}


def collect(samples: Path, root: Path, class_of_nyu40: np.ndarray = NYU40_TO_SCANNET20) -> None:
    """Lays the samples out as `configs/scannet.py` expects its data, labelled by a table of `data.scannet`."""
    scan = samples / "scene0000_00"
    if not scan.is_dir():
        raise FileNotFoundError(f"{scan}: no such folder; --samples holds this scan and labelled_50k/")
    (root / "scans").mkdir(parents=True, exist_ok=True)
    link = root / "scans" / scan.name
    link.unlink(missing_ok=True)
    link.symlink_to(scan.resolve())
    names = [link.name]
    for path in sorted((samples / "labelled_50k").glob("*.npz")):
        cloud = np.load(path)
        align = cloud["axis_align_matrix"].astype(np.float64)
        aligned = np.pad(cloud["xyz_aligned"].astype(np.float64), ((0, 0), (0, 1)), constant_values=1.0)
        points = (aligned @ np.linalg.inv(align).T)[:, :3].astype(np.float32)
        labels = class_of_nyu40[cloud["nyu40"]].astype(np.int32)
        Scene(name=path.stem, points=points, colors=cloud["rgb"], labels=labels).save_npz(root / path.name)
        names.append(path.stem)
    for split in ("train", "val"):
        chosen = [name for name in names if (name in VALIDATION) == (split == "val")]
        (root / f"scannetv2_{split}.txt").write_text("\n".join(chosen) + "\n")


def _section(title: str, results: dict) -> list[str]:
    rows = results["rows"]
    present = [name for name, value in rows["stage2"]["iou"].items() if value is not None]
    columns = [f"{100 * rows[row]['miou']:.1f}" for row in evaluate.ROWS]
    lines = [
        f"## {title}",
        "",
        f"{len(present)} of 20 classes are present: the best possible mIoU is {5 * len(present)}.",
        "",
        "| IoU | " + " | ".join(evaluate.ROWS.values()) + " |",
        "| --- |" + " --- |" * len(evaluate.ROWS),
        "| **mean** | " + " | ".join(columns) + " |",
    ]
    for name in present:
        lines.append(f"| {name} | " + " | ".join(f"{100 * rows[row]['iou'][name]:.1f}" for row in evaluate.ROWS) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m experiments.scannet_sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="CLIP embeddings of the 20 class names, .npz")
    parser.add_argument("--workdir", type=Path, default=Path("out/scannet_sample"))
    options = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    root = options.workdir / "root"
    collect(options.samples, root)
    config = configs.load("scannet")
    config.update_from_flattened_dict(
        OVERRIDES | {"data.root": str(root.resolve()), "text.encoder": str(options.text.resolve())}
    )
    run.use_cpu_devices(config)
    unseen = run.run(config, options.workdir / "run")
    seen = evaluate.evaluate(config, options.workdir / "run", options.workdir / "run" / "data", split="train")
    lines = [
        "# GGSD on seven ScanNet scans",
        "",
        f"Trained on five scans, one of them through its 60 real frames; {' and '.join(VALIDATION)} were never seen. "
        "**The 2D teacher is simulated from labels**, and the student sees its features, never a label; text: CLIP "
        "ViT-B/32. Absent classes count as 0 in the means, as OpenScene has it.",
        "",
        *_section("The five scans trained on", seen),
        *_section("The two never seen", unseen),
    ]
    changed = ", ".join(f"{key}={value}" for key, value in OVERRIDES.items())
    lines += [f"configs/scannet.py with {changed}.", "", f"Seconds: {json.dumps(unseen['seconds'])}.", ""]
    (ROOT / "scannet_sample.md").write_text("\n".join(lines))


if __name__ == "__main__":
    from experiments import published  # which imports this module

    published.call(main)
