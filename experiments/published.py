"""What the scripts of the tables share: their command line, the runs behind a row, and the reports.

A report of Tables 1, 2, 3 and 6 has a section per data set it was run on. It is kept in a JSON file beside the script,
from which the Markdown is written, so that a table run on synthetic rooms today can have its ScanNet section tomorrow.
"""

import argparse
import ast
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import ml_collections
from absl import logging

from experiments import configs, scannet_sample
from ggsd_jax import run

ROOT = Path(__file__).parent
MEAN = ("mIoU", "mAcc")

SHORT = scannet_sample.OVERRIDES | {  # minutes, to see that a table runs on real scans
    "stage1_epochs": 7,
    "stage2_epochs": 3,
    "log_every": 5,
    "eval.pictures": 0,
    "eval.repeats": 2,
    "model.width": 0.125,
}
SHORT_RUN = (
    "**A short run to see that the table runs, on a network that has hardly begun to learn: its values say nothing "
    "about the method.**"
)


def options(description: str, name: str) -> argparse.ArgumentParser:
    """The command line that all tables have."""
    parser = argparse.ArgumentParser(
        f"python -m experiments.{Path(sys.argv[0]).stem}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", type=Path, help="one of configs/*.py; without it, the rooms of synthetic.py")
    source.add_argument("--samples", type=Path, help="a short run on the scans experiments/scannet_sample.py describes")
    parser.add_argument("--workdir", type=Path, default=Path("out") / name, help="where the runs go (%(default)s)")
    parser.add_argument("fields", nargs="*", metavar="field=value", help="fields of the config, as data.root=/data/x")
    return parser


def call(main: Callable[[], None]) -> None:
    """Runs a script; what is wrong with its input is said in a sentence."""
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def configure(given: argparse.Namespace) -> tuple[ml_collections.ConfigDict, Path, str]:
    """The config of a table, the work directory of its runs, and how its report calls what it was run on."""
    logging.set_verbosity(logging.WARNING)
    name = given.config.stem if given.config else "scannet" if given.samples else "synthetic"
    config = configs.load(name if given.config is None else given.config)
    workdir = given.workdir / name
    if given.samples:
        config.update_from_flattened_dict(SHORT)
        root = workdir / "root_scannet20"
        scannet_sample.collect(given.samples, root)
        config.data.root = str(root.resolve())
        config.text.encoder = "stand-in"
    try:
        config.lock().update_from_flattened_dict(_parsed(given.fields))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{' '.join(given.fields)}: {run.field_error(error)}") from error
    config.data.prepared = config.data.prepared or str((workdir / "data").resolve())
    title = {"scannet": "seven ScanNet scans"}.get(name, "synthetic rooms") if given.config is None else name
    return config, workdir, title


def _parsed(fields: Sequence[str]) -> dict:
    values = {}
    for field in fields:
        name, equals, value = field.partition("=")
        if not equals:
            raise ValueError(f"{field!r}: expected field=value, as data.root=/data/scannet")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
    return values


def train(
    config: ml_collections.ConfigDict, workdir: Path, row: str, **fields
) -> tuple[ml_collections.ConfigDict, dict]:
    """The run of one row in `workdir`/`row`, with other values of some fields: its config and its results.

    A finished run is read, a killed one goes on.
    """
    config = ml_collections.ConfigDict(config.to_dict())
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    run.use_cpu_devices(config)
    print(f"\n== {row}")
    results = run.run(config, workdir / row)
    jax.clear_caches()
    return config, results


def about(config: ml_collections.ConfigDict, results: dict) -> str:
    """What a section was run on, in a sentence or two."""
    protocol = results["protocol"]
    steps = (config.stage1_epochs, config.stage2_epochs)
    return (
        f"{protocol['scenes']} scenes of the data set {results['dataset']!r} ({results['split']}), "
        f"{protocol['points']:,} points. 2D teacher: {protocol['teacher']}; words: {protocol['text_encoder']}, "
        f"{protocol['words']}. Trained for {steps[0]} + {steps[1]} epochs of {config.data.loop} visits, batch size "
        f"{config.batch_size}, {config.model.arch} of width {config.model.width}, voxels of {config.data.voxel_size} "
        f"m; {protocol['repeats']} evaluation repeats. OpenScene's quirks, reproduced: "
        + "; ".join(protocol["openscene_quirks"]) + "."
    )  # fmt: skip


def percent(row: dict) -> list[float]:
    """mIoU and mAcc of a row of results, in percent."""
    return [round(100 * row[key], 1) for key in ("miou", "macc")]


def report(
    table: str,
    heading: str,
    section: str,
    *,
    text: str,
    columns: Sequence[str],
    measured: dict[str, list[float]],
    quoted: dict[str, list[float | None]],
    short: bool,
) -> None:
    """Writes one section of a table's report, `table`.json and `table`.md, and leaves its other sections."""
    path = ROOT / f"{table}.json"
    sections = json.loads(path.read_text()) if path.exists() else {}
    sections[section] = dict(
        text=text, columns=list(columns), measured=measured, quoted=quoted, short=short, versions=_versions()
    )
    run.write_json(path, sections)
    lines = [f"# {heading}", ""]
    for name, part in sections.items():
        lines += [f"## Run on {name}", "", part["text"], ""]
        if part["short"]:
            lines += [SHORT_RUN, ""]
        lines += ["| row | " + " | ".join(part["columns"]) + " |", "| --- |" + " --- |" * len(part["columns"])]
        lines += [_line(f"{row} (this run)", values) for row, values in part["measured"].items()]
        lines += [_line(f"{row} (quoted)", values) for row, values in part["quoted"].items()]
        lines += ["", "Rows marked *quoted* are the paper's, on the data set its column names. Versions of this run: "
                  + ", ".join(f"{k} {v}" for k, v in part["versions"].items()) + ".", ""]  # fmt: skip
    (ROOT / f"{table}.md").write_text("\n".join(lines))
    print("\n".join(lines))


def _line(row: str, values: Sequence[float | None]) -> str:
    return f"| {row} | " + " | ".join("" if value is None else f"{value:.1f}" for value in values) + " |"


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")} | {
        "device": jax.devices()[0].device_kind
    }
