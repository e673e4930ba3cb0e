r"""Trains and evaluates open-vocabulary 3D segmentation by Geometry Guided Self-Distillation (GGSD).

  python -m ggsd_jax.main --config=configs/synthetic.py --workdir=out/demo

does what is missing, in order: prepares the data, trains both stages (going on from the last checkpoint), evaluates.
The work directory then holds results.json, metrics.jsonl, pictures/ and model/ (for ggsd_jax.inference.load).

Any field of the configuration can be set from here:

  python -m ggsd_jax.main --config=configs/scannet.py --workdir=out/scannet \
      --config.data.root=/data/scannet --config.loss.superpoint_weight=0

Several machines, or several processes on one, work as one run: under SLURM by themselves, elsewhere by --coordinator,
--num_processes and --process_id (BUILD.md).
"""

import argparse
import difflib
import io
import logging as std_logging
import sys
import traceback
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from ggsd_jax import hosts, run
from ggsd_jax.metric_log import NonFiniteError

config_flags.DEFINE_config_file("config", None, "Configuration file, one of configs/*.py.", lock_config=True)
flags.DEFINE_string("workdir", None, "Folder for everything this run writes; give it again to go on.")
flags.DEFINE_enum(
    "mode", "all", run.MODES, "The part to do; `all` does what is missing. (Training with labels: --config.mode.)"
)
flags.DEFINE_boolean("profile", False, "Write a trace of five training steps to WORKDIR/profile.")
flags.DEFINE_boolean("compilation_cache", True, "Keep compiled programs in ~/.cache/ggsd_jax/xla for later runs.")
flags.DEFINE_string("coordinator", None, "host:port of process 0, where a run has several processes.")
flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
flags.mark_flags_as_required(["config", "workdir"])
FLAGS = flags.FLAGS

_OURS = ("ggsd_jax", "kernels", "data")


def _is_ours(record) -> bool:
    """Libraries tell each of their steps; warnings pass from anywhere."""
    file, clone = Path(record.pathname), Path(__file__).parents[1]
    return record.levelno >= std_logging.WARNING or any(file.is_relative_to(clone / name) for name in _OURS)


class AboveBars(io.TextIOBase):
    """Where the log is written, so that none of its lines ends up in a progress bar."""

    def write(self, text: str) -> int:
        tqdm.write(text, file=sys.stderr, end="")
        return len(text)


def parse(argv: list[str]) -> list[str]:
    """Parses the command line; a configuration or a field of it that is not there is answered in a sentence."""
    arguments = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    arguments.add_argument("--config", default="")
    path = arguments.parse_known_args(argv[1:])[0].config
    if path and not Path(path.split(":")[0]).is_file():
        known = sorted(str(known) for known in Path("configs").glob("*.py"))
        near = difflib.get_close_matches(path, known, n=1, cutoff=0)
        fix = f"the nearest there is {near[0]}" if near else "run from the clone, whose configs/ holds them"
        raise SystemExit(f"FileNotFoundError: {path}: no such configuration; {fix}")
    try:
        return app.parse_flags_with_usage(argv)
    except SystemExit:
        if {"--help", "--helpfull"} & set(argv):
            raise SystemExit(0) from None  # absl's is 1
        raise
    except (AttributeError, KeyError) as error:
        if "'get_config'" in str(error):
            raise SystemExit(f"ValueError: {path}: it has no function get_config()") from error
        if any(frame.filename == path for frame in traceback.extract_tb(error.__traceback__)):
            raise  # a mistake in the file itself: its line helps more than a sentence
        raise SystemExit(f"ValueError: {run.field_error(error)}") from error


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; see --help")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_ours)
    logging.get_absl_handler().python_handler.setStream(AboveBars())
    run.use_cpu_devices(FLAGS.config)
    jax.config.update("jax_enable_compilation_cache", FLAGS.compilation_cache)
    with hosts.ending_together():
        try:
            hosts.join(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
            if not hosts.is_first():
                logging.set_verbosity(logging.WARNING)
            run.run(FLAGS.config, Path(FLAGS.workdir), FLAGS.mode, profile=FLAGS.profile)
        except (ValueError, OSError, NonFiniteError) as error:
            logging.debug("details", exc_info=True)
            raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
