"""Looks over the machine, and whatever it is pointed to, and says what to do about each line that is not well.

  python -m ggsd_jax.doctor
  python -m ggsd_jax.doctor out/demo room.ply /data/scannet clip_scannet20.npz scannet_openseg.pth.tar

A path may be a model, a scan or a folder of scans, ScanNet, a text encoder, or an OpenScene checkpoint. The exit status
is 1 if a line says FAIL. Lines that say "note" cost speed or room, nothing else.
"""

import argparse
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PYTHONS = ((3, 11), (3, 13))
PALLAS_CAPABILITY = 8.0  # NVIDIA Ampere: what Triton's kernels are written for
ROOM, GOOD_ROOM = 1, 20  # GB of disk: a demo run; a prepared data set
MEMORY = 4  # GB: training the demo


class Check(NamedTuple):
    """One line of the report."""

    state: str
    """"ok", "note" or "FAIL"."""
    what: str
    advice: str = ""
    """What to do about it."""


def python(version: tuple[int, ...] = sys.version_info[:2]) -> Check:
    """Whether this Python has pins in requirements.txt."""
    name = "Python " + ".".join(map(str, version))
    if PYTHONS[0] <= tuple(version) <= PYTHONS[1]:
        return Check("ok", name)
    return Check("FAIL", f"{name}: 3.11, 3.12 or 3.13 is needed", "make PYTHON=python3.12 setup")


def packages(requirements: Path = ROOT / "requirements.txt", installed: Callable | None = None) -> Iterator[Check]:
    """Whether the pinned packages are there, in the pinned versions."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Check("FAIL", "packaging is not installed, and likely nothing else is", "make setup")
        return
    installed = installed or importlib.metadata.version
    count, missing, other = 0, [], []
    for line in requirements.read_text().splitlines():
        if not line.strip() or line.startswith(("#", "-")):
            continue
        pin = Requirement(line)
        if pin.marker is not None and not pin.marker.evaluate():
            continue
        count += 1
        try:
            found = installed(pin.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(pin.name)
            continue
        if not pin.specifier.contains(found, prereleases=True):
            other.append(f"{pin.name} {found} (pinned{pin.specifier})")
    if missing:
        yield Check("FAIL", f"not installed: {', '.join(missing)}", "make setup, or pip install -r requirements.txt")
    if other:
        yield Check("note", f"other versions than tested: {', '.join(other)}", "pip install -r requirements.txt")
    if not missing and not other:
        yield Check("ok", f"all {count} packages as pinned")


def devices() -> Iterator[Check]:
    """What jax computes on, that it can, and whether the hand-written GPU kernels have what they need."""
    try:
        import jax

        found = jax.devices()
        total = float(jax.numpy.arange(1000.0).sum())
    except Exception as error:  # a broken installation can fail in any way
        yield Check(
            "FAIL", f"jax cannot compute: {error}".splitlines()[0], "make setup; on a GPU see BUILD.md, Install"
        )
        return
    kinds = ", ".join(sorted({device.device_kind for device in found}))
    if total != 499500.0:
        yield Check("FAIL", f"jax {jax.__version__} adds up 0..999 to {total}", "reinstall jax and jaxlib: make setup")
        return
    yield Check("ok", f"jax {jax.__version__} on {len(found)} x {found[0].platform} ({kinds})")
    capability = getattr(found[0], "compute_capability", None)
    yield pallas(found[0].platform, capability, shutil.which("nvidia-smi") is not None)


def pallas(platform: str, capability: str | float | None, nvidia: bool) -> Check:
    """Whether Pallas kernels can run.

    Args:
        platform, capability: of the first jax device; capability None where it has no such thing.
        nvidia: the machine has an NVIDIA driver.
    """
    if platform not in ("gpu", "cuda"):
        if nvidia:
            fix = f'.venv/bin/pip install "jax[cuda12]=={_version("jax")}"'
            return Check("note", "there is an NVIDIA GPU that jax does not use", fix)
        return Check("ok", "no NVIDIA GPU: sparse convolutions run on XLA, as on any device")
    try:
        enough = float(capability) >= PALLAS_CAPABILITY
    except (TypeError, ValueError):
        return Check("note", f"a GPU of compute capability {capability}: XLA is used, not Pallas")
    if enough:
        return Check("ok", f"Pallas kernels can run (compute capability {capability})")
    return Check("note", f"compute capability {capability} is below {PALLAS_CAPABILITY}: XLA is used, not Pallas")


def disk(path: Path = Path(), free: int | None = None) -> Check:
    """Whether a run has room in a folder; `free` bytes, None asks the system."""
    free = shutil.disk_usage(path).free if free is None else free
    what = f"{free / 1e9:.0f} GB free in {path.resolve()}"
    if free < ROOM * 1e9:
        return Check("FAIL", what, f"make room, or give a --workdir elsewhere: the demo takes {ROOM} GB")
    if free < GOOD_ROOM * 1e9:
        return Check("note", what, f"enough for the demo; a prepared data set takes {GOOD_ROOM} GB and more")
    return Check("ok", what)


def writable(path: Path) -> Check:
    """Whether compiled programs can be kept in a folder (made if need be)."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return Check("note", f"{path}: {error.strerror}", "set JAX_COMPILATION_CACHE_DIR to a folder you can write")
    if os.access(path, os.W_OK):
        return Check("ok", f"compiled programs are kept in {path}")
    return Check("note", f"{path} cannot be written: every start compiles anew", "set JAX_COMPILATION_CACHE_DIR")


def memory(size: float | None = None) -> Check:
    """Whether the machine's memory (GB) holds a training run."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if size is None else size
    if size < MEMORY:
        return Check("note", f"{size:.0f} GB of memory", "lower batch_size and data.max_voxels")
    return Check("ok", f"{size:.0f} GB of memory")


def path(given: Path) -> Check:
    """What a path holds, and whether it can be read whole."""
    if not given.exists():
        return Check("FAIL", f"{given}: there is no such file or folder", "mistyped?")
    try:
        for holds, describe in _KINDS:
            if holds(given):
                return Check("ok", f"{given}: {describe(given)}")
    except Exception as error:  # whatever is wrong with a file belongs in the report
        return Check("FAIL", f"{given}: {type(error).__name__}: {error}")
    return Check("FAIL", f"{given}: neither a model, a scan, ScanNet, a text encoder nor an OpenScene checkpoint")


def _model(given: Path) -> str:
    from ggsd_jax import inference

    model = inference.load(given)
    inference.network(model.variables, model.info["arch"])
    model.contrast()
    return (
        f"a model, {model.info['arch']}, voxels of {model.info['voxel_size']} m, words by {model.info['text_encoder']}"
    )


def _openscene(given: Path) -> str:
    from ggsd_jax import openscene

    info = openscene.load_checkpoint(given)[1]
    return f"an OpenScene checkpoint, {info['arch']}, {info['out_channels']} channels (see ggsd_jax.export)"


def _encoder(given: Path) -> str:
    import numpy as np

    from ggsd_jax.vision_language import text

    word = "chair"
    if given.suffix == ".npz":
        with np.load(given, allow_pickle=False) as archive:
            word = str(archive["names"][0])
    rows = text.embed([word], encoder=given)
    return f"a text encoder, {rows.shape[1]} wide"


def _holds_embeddings(given: Path) -> bool:
    import numpy as np

    if given.suffix != ".npz":
        return False
    with np.load(given, allow_pickle=False) as archive:
        return "embedding" in archive.files


def _scans(given: Path) -> str:
    from ggsd_jax import query

    files = query.scene_files([given])
    points = len(query.read_scene(files[0]).points)
    return f"{len(files)} scan{'s' if len(files) > 1 else ''}, the first of {points:,} points"


def _scannet(given: Path) -> str:
    names = [name for split in ("train", "val") for name in (given / f"scannetv2_{split}.txt").read_text().split()]
    there = sum((given / "scans" / name).is_dir() or (given / f"{name}.npz").is_file() for name in names)
    if not there:
        raise FileNotFoundError(f"none of its {len(names)} scenes is there; configs/scannet.py says how it must look")
    return f"ScanNet, {there} of {len(names)} scenes"


_KINDS: list[tuple[Callable[[Path], bool], Callable[[Path], str]]] = [
    (lambda p: (p / "model.json").is_file() or (p / "model" / "model.json").is_file(), _model),
    (lambda p: p.name.endswith((".pth.tar", ".pth", ".pt")), _openscene),
    (lambda p: any((p / f"scannetv2_{split}.txt").is_file() for split in ("train", "val")), _scannet),
    (_holds_embeddings, _encoder),
    (lambda p: p.suffix in (".ply", ".npz") or any([*p.glob("*.ply"), *p.glob("*.npz")]), _scans),
    (lambda p: p.is_dir() and any(p.iterdir()), _encoder),
]
"""In this order: does a path hold it, and what is to be said of it. Other folders may be a text encoder's."""


def examine(paths: list[Path]) -> Iterator[Check]:
    """Every line of the report, as it is found out."""
    yield python()
    yield from packages()
    yield from devices()
    yield memory()
    yield disk()
    yield writable(Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", Path.home() / ".cache" / "ggsd_jax" / "xla")))
    for given in paths:
        yield path(given)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m ggsd_jax.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="a model, scan, data or weights")
    failed = False
    for check in examine(parser.parse_args(argv).paths):
        print(f"{check.state:6}{check.what}" + (f"\n      -> {check.advice}" if check.advice else ""), flush=True)
        failed |= check.state == "FAIL"
    raise SystemExit(int(failed))


def _version(package: str) -> str:
    return importlib.metadata.version(package)


if __name__ == "__main__":
    main(sys.argv[1:])
