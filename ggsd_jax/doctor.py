"""Checks the machine and the paths it is given, and says how to fix each problem.

  python -m ggsd_jax.doctor
  python -m ggsd_jax.doctor out/demo room.ply /data/scannet /data/clip scannet_openseg.pth.tar

A path may be a model, a run, a scan or a folder of scans, a data set (ScanNet, Matterport3D, nuScenes, SemanticKITTI,
Replica, OpenScene's clouds or features, a folder of your own), a text encoder, LSeg's or an OpenScene checkpoint. The
exit status is 1 if a line says FAIL. Lines that say "note" cost speed, room or convenience, nothing else.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PYTHONS = ((3, 11), (3, 13))
PALLAS_CAPABILITY = 8.0  # NVIDIA Ampere: what Triton's kernels are written for
ROOM, GOOD_ROOM = 1, 20  # GB of disk: a demo run; a prepared data set
MEMORY = 4  # GB: training the demo
SHARED_MEMORY = 1  # GB: batches of worker processes


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


def viewer() -> Check:
    """Whether the viewer's extra is there."""
    if importlib.util.find_spec("viser") is None:
        return Check("note", "viser is not installed: no ggsd_jax.viewer", "pip install viser==1.1.1")
    return Check("ok", "viser is there, for ggsd_jax.viewer")


def devices() -> Iterator[Check]:
    """What jax computes on, that it can, and whether the hand-written GPU kernels have what they need."""
    try:
        import jax

        found = jax.devices()
        total = float(jax.numpy.arange(1000.0).sum())
    except Exception as error:  # a broken installation can fail in any way
        yield Check(
            "FAIL",
            f"jax cannot compute: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            "make setup; on a GPU see BUILD.md, Install",
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
        path = "compiled by numba for this CPU" if platform == "cpu" else "run by XLA, as on any device"
        return Check("ok", f"no NVIDIA GPU: sparse convolutions are {path}")
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


def compiled_loops() -> Check:
    """Whether numba, which compiles the loops of readers and kernel maps, can keep what it compiles."""
    try:
        importlib.import_module("kernels.columns")
    except RuntimeError as error:
        return Check("FAIL", f"numba: {error}", "set NUMBA_CACHE_DIR to a folder you can write")
    except ImportError as error:
        return Check("FAIL", str(error), "make setup")
    return Check("ok", "numba keeps what it compiles")


def writable(path: Path | None = None) -> Check:
    """Whether compiled programs can be kept in a folder (made if need be); None: JAX's, or the one in the home."""
    try:
        path = path or Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "ggsd_jax" / "xla")
    except RuntimeError:
        return Check("note", "no home: every start compiles anew", "set JAX_COMPILATION_CACHE_DIR")
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


def shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Whether worker processes can hand their batches over."""
    if not folder.is_dir() or shutil.disk_usage(folder).total >= SHARED_MEMORY * 1e9:
        return Check("ok", "shared memory for data.workers")
    what = f"{shutil.disk_usage(folder).total / 1e6:.0f} MB of shared memory ({folder})"
    return Check("note", what, "data.workers need more; in a container docker run --shm-size=8g")


class Kind(NamedTuple):
    """Something a path may be."""

    holds: Callable[[Path], bool]
    describe: Callable[[Path], str]
    """What is to be said of it; raises where it is broken."""
    advice: str
    """What to do where it is broken."""


def path(given: Path) -> Check:
    """What a path holds, and whether it can be read."""
    advice = "name a path of a kind that --help lists: the folder itself, not one above or inside it"
    try:
        if not given.exists():
            missing = f"{given}: there is no such file or folder"
            return Check("FAIL", missing, "is it mistyped, or on a disk not mounted?")
        for kind in KINDS:
            if kind.holds(given):
                advice = kind.advice
                return Check("ok", f"{given}: {kind.describe(given)}")
    except Exception as error:  # whatever is wrong with a file belongs in the report
        return Check("FAIL", f"{given}: {type(error).__name__}: {error}", advice)
    return Check("FAIL", f"{given}: neither a model, scans, a data set, a text encoder nor a checkpoint", advice)


def _model(given: Path) -> str:
    from ggsd_jax import inference

    model = inference.load(given)
    inference.network(model.variables, model.info["arch"])
    model.contrast()
    return (
        f"a model, {model.info['arch']}, voxels of {model.info['voxel_size']} m, words by {model.info['text_encoder']}"
    )


def _is_run(given: Path) -> bool:
    return (given / "config.json").is_file() and '"stage1_epochs"' in (given / "config.json").read_text()


def _run(given: Path) -> str:
    states = [int(state.name) for state in (given / "checkpoints").glob("*") if state.name.isdigit()]
    reached = f"saved at step {max(states):,}" if states else "no step of the training saved yet"
    return f"an unfinished run, {reached}; the same command goes on from there"


def _openscene(given: Path) -> str:
    from ggsd_jax import openscene

    info = openscene.load_checkpoint(given)[1]
    return f"an OpenScene checkpoint, {info['arch']}, {info['out_channels']} channels (see ggsd_jax.export)"


def _lseg(given: Path) -> str:
    from ggsd_jax.vision_language import lseg

    lseg.load(given)
    return "LSeg's weights (teacher.name=lseg)"


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
    if given.suffix != ".npz" or not zipfile.is_zipfile(given):
        return False
    with zipfile.ZipFile(given) as archive:
        return "embedding.npy" in archive.namelist()


def _holds_vocabulary(given: Path) -> bool:
    from ggsd_jax.vision_language import tokenizer

    return any((given / name).is_file() for name in ("vocab.json", "tokenizer.json", tokenizer.OPENAI_FILE))


def _is_cloud(given: Path) -> bool:
    from data.folder import CLOUD_SUFFIXES

    return given.suffix.lower() in CLOUD_SUFFIXES and given.is_file()


def _scans(given: Path) -> str:
    from ggsd_jax import query

    files, points, broken = query.scene_files([given]), 0, []
    for file in files.values():
        try:
            points += len(query.read_scene(file).points)
        except (ValueError, OSError) as error:
            broken.append(str(error))
    if broken:
        raise ValueError(f"{len(broken)} of {_count(len(files), 'scan')} cannot be used: {broken[0]}")
    return f"{_count(len(files), 'scan')}, {points:,} points"


def _own(given: Path) -> str:
    from data import folder

    clouds = folder.find_scenes(given)
    first = folder.read_cloud(next(iter(clouds.values())))
    with_images = sum((cloud.parent / "images").is_dir() for cloud in clouds.values())
    points = len(first.points)
    return f"{_count(len(clouds), 'scene')} of your own, {with_images} with images, the first of {points:,} points"


def _scannet(given: Path) -> str:
    names = [name for split in ("train", "val") for name in (given / f"scannetv2_{split}.txt").read_text().split()]
    there = sum((given / "scans" / name).is_dir() or (given / f"{name}.npz").is_file() for name in names)
    if not there:
        raise FileNotFoundError(f"none of its {len(names)} scenes is there")
    return f"ScanNet, {there} of {len(names)} scenes"


def _preprocessed_clouds(given: Path) -> list[Path]:
    return [cloud for split in ("train", "val", "test") for cloud in sorted(given.glob(f"{split}/[!.]*.pth"))]


def _preprocessed(given: Path) -> str:
    from data import openscene

    clouds = _preprocessed_clouds(given)
    points = len(openscene.read_scene(clouds[0]).points)
    return f"OpenScene's clouds, {_count(len(clouds), 'scene')}, the first of {points:,} points (data.name=openscene)"


def _fused_features(given: Path) -> str:
    from data import torch_file
    from ggsd_jax.vision_language.teachers import OPENSCENE_TEACHERS

    files = sorted(given.glob("[!.]*.pt"))
    channels = torch_file.load(files[0])["feat"].shape[1]
    name = given.absolute().name.lower()
    known = OPENSCENE_TEACHERS.items()
    texts = [f", for the text of CLIP {made.space}" for teacher, made in known if teacher in name]
    return f"OpenScene's 2D features, {_count(len(files), 'file')}, {channels} channels{''.join(texts)}"


def _nuscenes(given: Path) -> str:
    missing = [part for part in ("samples", "lidarseg") if not (given / part).is_dir()]
    if missing:
        raise FileNotFoundError(f"{' and '.join(missing)} missing beside its tables")
    return f"nuScenes, {', '.join(sorted(table.parent.name for table in given.glob('v1.0-*/sample.json')))}"


def _semantickitti(given: Path) -> str:
    scans = len([*given.glob("sequences/*/velodyne/*.bin")])
    if not scans:
        raise FileNotFoundError("no sequences/<number>/velodyne/*.bin")
    return f"SemanticKITTI, {_count(scans, 'scan')}"


def _replica(given: Path) -> str:
    from data import replica

    return f"Replica, {_count(len(replica.scenes(given)), 'scene')}"


def _has_replica(given: Path) -> bool:
    from data import replica

    return bool(replica.scenes(given))


_LOOKS = "configs/{}.py says how the folder must look"
_MEND = "mend the file as the line says, or leave it out; --unit is for query and viewer"
KINDS = [
    Kind(
        lambda p: (p / "model.json").is_file() or (p / "model" / "model.json").is_file(),
        _model,
        "export it again; its file of embeddings or CLIP's folder must be where it says",
    ),
    Kind(_is_run, _run, "give another --workdir"),
    Kind(lambda p: p.name.endswith((".pth.tar", ".pth", ".pt")), _openscene, "download it again, or name another"),
    Kind(lambda p: p.suffix == ".ckpt", _lseg, "download demo_e200.ckpt of isl-org/lang-seg again"),
    Kind(
        lambda p: any((p / f"scannetv2_{split}.txt").is_file() for split in ("train", "val")),
        _scannet,
        _LOOKS.format("scannet"),
    ),
    Kind(lambda p: any(p.glob("v1.0-*/sample.json")), _nuscenes, _LOOKS.format("nuscenes")),
    Kind(lambda p: (p / "sequences").is_dir(), _semantickitti, "BUILD.md, Data, says how the folder must look"),
    Kind(
        lambda p: any(p.glob("*/region_segmentations")),
        lambda p: f"Matterport3D, {_count(len([*p.glob('*/region_segmentations')]), 'building')}",
        _LOOKS.format("matterport"),
    ),
    Kind(_has_replica, _replica, _LOOKS.format("replica")),
    Kind(lambda p: bool(_preprocessed_clouds(p)), _preprocessed, "run OpenScene's scripts/download_dataset.sh again"),
    Kind(
        lambda p: any(p.glob("[!.]*.pt")) and not _holds_vocabulary(p),
        _fused_features,
        "run OpenScene's scripts/download_fused_features.sh again",
    ),
    Kind(_holds_embeddings, _encoder, "BUILD.md, 2D networks and text, says what the file holds"),
    Kind(lambda p: any(map(_is_cloud, [p, *p.glob("*")])), _scans, _MEND),
    Kind(lambda p: any(map(_is_cloud, p.glob("*/*"))), _own, _LOOKS.format("folder")),
    Kind(
        lambda p: p.is_dir() and any(p.iterdir()),
        _encoder,
        "if it is meant as CLIP's folder, BUILD.md, 2D networks and text, says what it holds",
    ),
]
"""In this order: the first that a path holds is what is said of it."""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def examine(paths: list[Path]) -> Iterator[Check]:
    """Every line of the report, as it is found out."""
    yield python()
    yield from packages()
    yield viewer()
    yield from devices()
    yield memory()
    yield shared_memory()
    yield disk()
    yield compiled_loops()
    yield writable()
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
