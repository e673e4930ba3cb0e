"""The configurations of configs/, loaded without the flags of ggsd_jax.main."""

import runpy
from pathlib import Path

import ml_collections

FOLDER = Path(__file__).parents[1] / "configs"


def load(name_or_file: str | Path) -> ml_collections.ConfigDict:
    """The config of that name in configs/, or in that file.

    Raises:
        FileNotFoundError: there is none.
    """
    file = name_or_file if isinstance(name_or_file, Path) else FOLDER / f"{name_or_file}.py"
    if not file.is_file():
        raise FileNotFoundError(f"--config={file}: no such configuration; configs/ of the clone holds them")
    return runpy.run_path(str(file))["get_config"]()
