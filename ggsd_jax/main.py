r"""Trains and evaluates open-vocabulary 3D segmentation by Geometry Guided Self-Distillation (GGSD).

  python -m ggsd_jax.main --config=configs/synthetic.py --workdir=out/demo

does what is missing, in order: prepares the data, trains both stages (going on from the last checkpoint), evaluates.
The work directory then holds results.json, metrics.jsonl, pictures/ and model/ (for ggsd_jax.inference.load).

Any field of the configuration can be set from here:

  python -m ggsd_jax.main --config=configs/scannet.py --workdir=out/scannet \
      --config.data.root=/data/scannet --config.loss.superpoint_weight=0
"""

import logging as std_logging
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from ggsd_jax import run
from ggsd_jax.train import NonFiniteError

config_flags.DEFINE_config_file("config", None, "Configuration file, one of configs/*.py.", lock_config=True)
flags.DEFINE_string("workdir", None, "Folder for everything this run writes; give it again to go on.")
flags.DEFINE_enum("mode", "all", run.MODES, "The part to do; `all` does what is missing.")
flags.mark_flags_as_required(["config", "workdir"])
FLAGS = flags.FLAGS


def _is_ours(record) -> bool:
    """Libraries tell each of their steps; warnings pass from anywhere."""
    folder = Path(record.pathname).parent
    return record.levelno >= std_logging.WARNING or folder.is_relative_to(Path(__file__).parent)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; see --help")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_ours)
    run.use_cpu_devices(FLAGS.config)
    try:
        run.run(FLAGS.config, Path(FLAGS.workdir), FLAGS.mode)
    except (ValueError, FileNotFoundError, NonFiniteError) as error:
        logging.debug("details", exc_info=True)
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    app.run(main)
