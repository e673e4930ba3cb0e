"""Runs the rows of an ablation table over seeds, and writes its Markdown and its plot.

All runs share the prepared data, and those of a seed that share a first stage share its checkpoint. Every run is an
ordinary work directory, so a killed table goes on where it was, and two tables share the rows they have in common.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments import published

ROOT = Path(__file__).parent
FIRST = "ggsd"  # the run whose end of stage 1 the others start from

# Row: the fields that make it, and whether its first stage is that of FIRST.
RUNS = {
    "ggsd": ({}, False),
    "pixel_point": ({"loss__superpoint_weight": 0.0, "loss__self_weight": 0.0}, False),
    "geometry_guided": ({"loss__self_weight": 0.0}, True),
    "self_distillation": ({"loss__voting": False}, True),
    "fixed_3d": ({"loss__voting": False, "loss__label_source": "fixed_3d"}, True),
    "fixed_2d": ({"loss__voting": False, "loss__label_source": "fixed_2d"}, True),
}


def run_table(description: str, name: str, title: str, rows: list[tuple[str, str, float]]) -> None:
    """Command line of one table; `rows` are (run, title, the paper's ScanNet mIoU), run "fusion_2d" = the teacher."""
    parser = published.options(description, "ablation")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (%(default)s)")
    given = parser.parse_intermixed_args()
    if given.seeds < 1:
        parser.error(f"--seeds={given.seeds}: a table needs at least one")
    config, workdir, _ = published.configure(given)
    needed = [row for row, _, _ in rows if row != "fusion_2d"]
    results = {row: [] for row, _, _ in rows}
    for seed in range(given.seeds):
        done = {}
        for row in (FIRST, *needed):
            fields, shares_first_stage = RUNS[row]
            if shares_first_stage:
                fields = fields | {"stage1_from": str(workdir / f"seed{seed}" / FIRST)}
            _, done[row] = published.train(config, workdir, f"seed{seed}/{row}", seed=seed, eval__pictures=0, **fields)
        for row in results:
            kind = ("fusion_2d", FIRST) if row == "fusion_2d" else ("stage2", row)
            results[row].append(done[kind[1]]["rows"][kind[0]])
        protocol = done[FIRST]["protocol"] | {"dataset": done[FIRST]["dataset"], "versions": done[FIRST]["versions"]}
    file = name if workdir.name == "synthetic" else f"{name}_{workdir.name}"  # the rooms' report stays
    _report(file, title, rows, results, protocol, short=given.samples is not None)


def _report(name: str, title: str, rows: list, results: dict, protocol: dict, short: bool) -> None:
    seeds = len(next(iter(results.values())))
    mean = {row: 100 * np.mean([r["miou"] for r in results[row]]) for row in results}
    lines = [
        f"# {title}",
        "",
        f"{protocol['scenes']} validation scenes of the data set {protocol['dataset']!r}; teacher: "
        f"{protocol['teacher']}; text: {protocol['text_encoder']}. {seeds} seeds of network and data order, on the "
        "same scenes. Every row is trained for the same number of steps. The paper's column is ScanNet with LSeg, "
        "quoted: compare the order of the rows, not the values.",
        "",
        *([published.SHORT_RUN, ""] if short else []),
        "| row | mIoU (mean ± standard deviation) | per seed | mAcc | paper, mIoU |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row, label, paper in rows:
        miou = np.array([100 * r["miou"] for r in results[row]])
        macc = np.mean([100 * r["macc"] for r in results[row]])
        spread = f" ± {miou.std(ddof=1):.1f}" if seeds > 1 else ""
        each = ", ".join(f"{value:.1f}" for value in miou)
        lines.append(f"| {label} | {miou.mean():.1f}{spread} | {each} | {macc:.1f} | {paper} |")
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
