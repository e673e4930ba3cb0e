"""Which device implementations are traced for."""

import contextlib
import re

import jax

INTERPRET = "interpret"

_forced_target: str | None = None


@contextlib.contextmanager
def targeting(target: str):
    """Trace kernels for `target` whatever the device: "sm_80", "sm_90", or `INTERPRET` to run them without a GPU.

    A jitted function keeps the kernels it was first traced with.
    """
    global _forced_target
    before, _forced_target = _forced_target, target
    try:
        yield
    finally:
        _forced_target = before


def default_target() -> str:
    """The architecture kernels are traced for, "sm_90" say; else the name of a device that is not NVIDIA's."""
    if _forced_target:
        return _forced_target
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    capability = str(getattr(device, "compute_capability", ""))
    return f"sm_{capability.replace('.', '')}" if re.fullmatch(r"\d+\.\d", capability) else device.device_kind
