"""Runs the rows of an ablation table over seeds, and writes its Markdown and its plot.

All runs share the prepared data, and those of a seed that share a first stage share its checkpoint. Every run is an
ordinary work directory, so a killed table goes on where it was, and two tables share the rows they have in common.
"""

import argparse
import json
import runpy
from pathlib import Path

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from absl import logging

from ggsd_jax import run

ROOT = Path(__file__).parent
FIRST = "ggsd"  # the run whose end of stage 1 the others start from

# Row: the loss fields that make it, and whether its first stage is that of FIRST.
RUNS = {
    "ggsd": ({}, False),
    "pixel_point": ({"superpoint_weight": 0.0, "self_weight": 0.0}, False),
    "geometry_guided": ({"self_weight": 0.0}, True),
    "self_distillation": ({"voting": False}, True),
    "fixed_3d": ({"voting": False, "label_source": "fixed_3d"}, True),
    "fixed_2d": ({"voting": False, "label_source": "fixed_2d"}, True),
}


def run_table(name: str, title: str, rows: list[tuple[str, str, float]]) -> None:
    """Command line of one table; `rows` are (run, title, the paper's ScanNet mIoU), run "fusion_2d" = the teacher."""
    parser = argparse.ArgumentParser(
        description=f"{title}. Writes {name}.md, .json and .png beside the module; killed, it goes on where it was.",
        epilog=f"One seed takes a third of the time: python -m experiments.{name} --seeds=1",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=ROOT.parent / "configs" / "synthetic.py")
    parser.add_argument("--workdir", type=Path, default=Path("out/ablation"), help="runs go to WORKDIR/seedN/ROW")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds={options.seeds}: a table needs at least one")
    logging.set_verbosity(logging.WARNING)
    needed = [row for row, _, _ in rows if row != "fusion_2d"]
    results = {row: [] for row, _, _ in rows}
    for seed in range(options.seeds):
        done = {row: _run(options.config, options.workdir / f"seed{seed}", row, seed) for row in (FIRST, *needed)}
        for row in results:
            kind = ("fusion_2d", FIRST) if row == "fusion_2d" else ("stage2", row)
            results[row].append(done[kind[1]]["rows"][kind[0]])
        protocol = done[FIRST]["protocol"] | {"dataset": done[FIRST]["dataset"], "versions": done[FIRST]["versions"]}
    _report(name, title, rows, results, protocol)


def _run(config_file: Path, folder: Path, row: str, seed: int) -> dict:
    config = runpy.run_path(str(config_file))["get_config"]()
    config.seed = seed
    config.eval.pictures = 0
    config.data.prepared = str(folder.parent / "data")
    loss, shares_first_stage = RUNS[row]
    config.loss.update(loss)
    if shares_first_stage:
        config.stage1_from = str(folder / FIRST)
    run.use_cpu_devices(config)
    print(f"\n== seed {seed}: {row}")
    results = run.run(config, folder / row)
    jax.clear_caches()  # the programs of all runs together can be more than one process holds
    return results


def _report(name: str, title: str, rows: list, results: dict, protocol: dict) -> None:
    seeds = len(next(iter(results.values())))
    mean = {row: 100 * np.mean([r["miou"] for r in results[row]]) for row in results}
    lines = [
        f"# {title}",
        "",
        f"{protocol['scenes']} validation scenes of the data set {protocol['dataset']!r}; teacher: "
        f"{protocol['teacher']}; text: {protocol['text_encoder']}. {seeds} seeds of network and data order, on the "
        "same rooms. Every row is trained for the same number of steps. The paper's column is ScanNet with LSeg, "
        "quoted: compare the order of the rows, not the values.",
        "",
        "| row | mIoU (mean ± standard deviation) | per seed | mAcc | paper, mIoU |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row, label, paper in rows:
        miou = np.array([100 * r["miou"] for r in results[row]])
        macc = np.mean([100 * r["macc"] for r in results[row]])
        spread = miou.std(ddof=1) if seeds > 1 else float("nan")
        each = ", ".join(f"{value:.1f}" for value in miou)
        lines.append(f"| {label} | {miou.mean():.1f} ± {spread:.1f} | {each} | {macc:.1f} | {paper} |")
    steps = []
    for (lower, a, _), (upper, b, _) in zip(rows, rows[1:], strict=False):
        gains = [100 * (y["miou"] - x["miou"]) for x, y in zip(results[lower], results[upper], strict=True)]
        steps.append(f"- {b} over {a}: " + ", ".join(f"{gain:+.1f}" for gain in gains))
    lines += ["", "Differences of neighbouring rows, seed by seed (points of mIoU):", "", *steps, ""]
    lines += ["Versions: " + ", ".join(f"{k} {v}" for k, v in protocol["versions"].items()) + ".", ""]
    (ROOT / f"{name}.md").write_text("\n".join(lines))
    (ROOT / f"{name}.json").write_text(json.dumps({"rows": results, "protocol": protocol}, indent=1))

    figure, axes = plt.subplots(figsize=(8, 0.6 * len(rows) + 1.6), layout="constrained")
    for y, (row, _, paper) in enumerate(rows):
        values = [100 * r["miou"] for r in results[row]]
        axes.barh(y, mean[row], color="#9ec9e2", zorder=1)
        axes.plot(values, [y] * len(values), "o", color="#1f4e79", zorder=3, label="one seed" if y == 0 else None)
        axes.plot(paper, y, "|", color="#b22222", ms=22, mew=2, zorder=2, label="paper (ScanNet)" if y == 0 else None)
    axes.set_yticks(range(len(rows)), [label for _, label, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"mIoU, {protocol['dataset']} validation scenes")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(ROOT / f"{name}.png", dpi=110)
    print("\n".join(lines))
