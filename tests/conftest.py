"""Shape checking for every test, four CPU devices, and the folder of reference data."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import numpy as np
import pytest
from jaxtyping import install_import_hook

install_import_hook(["kernels", "data", "ggsd_jax"], "beartype.beartype")

SHARED = Path(os.environ.get("GGSD_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of golden numbers and real samples; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"reference data not found at {SHARED}; set GGSD_SHARED to the folder that holds it")
    return SHARED


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """An untrained MinkUNet14A of one-sixteenth of the width, as a folder that `inference.load` takes."""
    from flax.traverse_util import unflatten_dict

    from data.synthetic import SYNTHETIC
    from ggsd_jax import checkpoint
    from ggsd_jax.minkunet import MinkUNet, _variable_shapes, architecture

    arch = architecture("MinkUNet14A")
    shapes = _variable_shapes(MinkUNet(arch.layers, tuple(p // 16 for p in arch.planes), 32, 2), 3)
    rng = np.random.default_rng(0)
    initial = {
        "kernel": lambda shape: rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape),
        "bias": np.zeros,
        "scale": np.ones,
        "mean": np.zeros,
        "var": np.ones,
    }
    variables = unflatten_dict({path: initial[path[-1]](shape).astype(np.float32) for path, shape in shapes.items()})
    info = {
        "arch": "MinkUNet14A",
        "voxel_size": 0.1,
        "input_color": False,
        "text_encoder": "stand-in:32",
        "prompt": "a {} in a scene",
        "label_set": "synthetic",
        "classes": list(SYNTHETIC.classes),
        "trained_on": {"dataset": "synthetic", "teacher": "simulated", "scenes": 0},
    }
    folder = tmp_path_factory.mktemp("untrained") / "model"
    checkpoint.save_model(folder, variables, info)
    return folder
