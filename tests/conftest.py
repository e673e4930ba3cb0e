"""Shape checking for every test, four CPU devices, and the folder of reference data."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

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
