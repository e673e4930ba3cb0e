"""Every speed of this project in one table, beside what else is installed and what the device could do at best.

  make bench
  python -m experiments.benchmark --voxels 20000 --golden=DIR     # fewer sizes; MinkowskiEngine's recorded times

Writes benchmark_<device>.md, .json and .png beside this file. Times are medians of wall seconds of calls that end when
their result is ready, after one that is not counted. "XLA" is the portable path, where another is faster here. The
roofline is max(operations / peak, bytes / bandwidth) of what a call cannot do without, the peaks measured on this
device (kernels/sparse_conv/bench.py). spconv is timed where it and torch can be imported (experiments/peer.py), on a
GPU in float16 beside bfloat16; XLA_PYTHON_CLIENT_PREALLOCATE=false leaves it its memory. MinkowskiEngine's columns are
its recorded times on another machine (--golden).
"""

import argparse
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import ml_collections
import numpy as np
from flax import jax_utils

from data.superpoints import vccs
from data.synthetic import generate_room
from experiments import configs, loader_bench
from ggsd_jax.input_pipeline import steps_per_epoch, train_iterator
from ggsd_jax.minkunet import MinkUNet, architecture
from ggsd_jax.train import AXIS, initial_state, learning_rate_schedule, make_model, make_optimizer, train_step
from kernels import voxel_grid
from kernels.sparse_conv.api import fastest
from kernels.sparse_conv.bench import measure_peaks, time_convolution, timed, voxels_of
from kernels.sparse_conv.shapes import Problem

try:
    from experiments import peer
except ImportError:
    peer = None

ROOT = Path(__file__).parent
PACKAGES = ["jax", "jaxlib", "flax", "numpy", "numba"]
OUT_CHANNELS = 768
CPU_TRAINING_VOXELS = 300_000  # at 33 kB each, more would not fit the memory of many machines
CPU_OTHERS_VOXELS = 100_000  # beyond, spconv, the portable path and the loader take many minutes
CLASSES = 20


def convolutions(sizes: list[int], dtype: str) -> list[dict]:
    """Single 3^3 convolutions of the network's widths, and its strided pair, at every size."""
    peaks = measure_peaks(dtype)
    on_cpu = jax.default_backend() == "cpu"
    rows = []
    for voxels in sizes:
        others = not on_cpu or voxels <= CPU_OTHERS_VOXELS
        problems = [Problem(voxels, 3, channels, channels) for channels in (32, 96, 256)]
        problems += [Problem(voxels, 5, 3, 32), Problem(voxels, 2, 32, 32), Problem(voxels, 2, 96, 96, True)]
        for problem in problems:
            coords = voxels_of(problem)
            row = time_convolution(coords, problem, dtype, peaks)
            plain = (
                time_convolution(coords, problem, dtype, peaks, "xla") if others and fastest(dtype) != "xla" else None
            )
            theirs = None, None
            if peer and others and problem.kernel_size == 3:
                theirs = peer.convolution_seconds(coords, problem, dtype)
            for what, ours, xla, best, spconv in (
                ("forward", row.forward, plain and plain.forward, row.forward_roofline, theirs[0]),
                ("forward + backward", row.training, plain and plain.training, row.training_roofline, theirs[1]),
            ):
                name = f"{row.problem}, {dtype}, {what}"
                rows.append(_row(name, voxels, ours, xla=xla, roofline=best, spconv=spconv))
    return rows


def networks(clouds: dict[int, np.ndarray], dtype: str, recorded: dict) -> list[dict]:
    """MinkUNet18A with 768 outputs on whole clouds, forward and forward + backward; maps already made."""
    arch = architecture("MinkUNet18A")
    direction = jax.random.normal(jax.random.key(1), (OUT_CHANNELS,))

    def network(implementation: str | None) -> MinkUNet:
        return MinkUNet(arch.layers, arch.planes, OUT_CHANNELS, dtype=jnp.dtype(dtype), implementation=implementation)

    def forward(model, variables, feats, pyramid):
        return model.apply(variables, feats, pyramid, train=False)

    def training(model, variables, feats, pyramid):
        def loss(params):
            state = {"params": params, "batch_stats": variables["batch_stats"]}
            out, _ = model.apply(state, feats, pyramid, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.where(pyramid.mask(0)[:, None], out.astype(jnp.float32), 0) @ direction)

        return jax.grad(loss)(variables["params"])

    on_cpu = jax.default_backend() == "cpu"
    rows = []
    for voxels, coords in clouds.items():
        pyramid = jax.device_put(voxel_grid.build_pyramid(coords))
        feats = jnp.ones((pyramid.bucket, 3)) * jnp.asarray(pyramid.mask(0))[:, None]
        variables = jax.jit(network(None).init, static_argnames="train")(jax.random.key(0), feats, pyramid, train=False)
        others = not on_cpu or voxels <= CPU_OTHERS_VOXELS
        theirs = peer.network_seconds(coords, OUT_CHANNELS, dtype) if peer and others else (None, None)
        for what, function, spconv in (
            ("forward", forward, theirs[0]),
            ("forward + backward", training, theirs[1]),
        ):
            if on_cpu and function is training and voxels > CPU_TRAINING_VOXELS:
                continue

            def seconds(implementation, function=function, arguments=(variables, feats, pyramid)):
                return timed(jax.jit(function, static_argnums=0), network(implementation), *arguments, at_least=3)

            if on_cpu:
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            row = _row(f"MinkUNet18A, {voxels:,} voxels, {dtype}, {what}", voxels, seconds(None))
            row |= {"spconv": spconv, "minkowski_engine": recorded.get((voxels, what)), "memory_gb": _peak_memory()}
            if fastest(dtype) != "xla" and others:
                row["xla"] = seconds("xla")
            rows.append(row)
    return rows


def scannet(batch_size: int, dtype: str = "float32") -> ml_collections.ConfigDict:
    config = configs.load("scannet")
    config.batch_size = batch_size
    config.model.dtype = dtype
    return config


def training_steps(sizes: list[int], dtype: str) -> list[dict]:
    """Whole steps of configs/scannet.py, one scene on one device: losses, teacher, votes, Adam, EMA."""
    config = scannet(1, dtype)
    text = np.random.default_rng(0).standard_normal((CLASSES, loader_bench.CHANNELS), np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    model = make_model(config, loader_bench.CHANNELS, AXIS)
    optimizer = make_optimizer(config, learning_rate_schedule(config, 1_000_000))
    rows = []
    for voxels in sizes:
        source = loader_bench.Rooms(1, voxels, config.data.voxel_size, config.data.chunk_points)
        batch = next(train_iterator(source, config, num_replicas=1))
        count = int(batch.pyramid.num_voxels[0, 0])
        for stage in (1, 2):
            state = jax_utils.replicate(
                initial_state(model, optimizer, jax_utils.unreplicate(batch), 0), jax.devices()[:1]
            )
            step = jax.pmap(
                functools.partial(train_step, model=model, optimizer=optimizer, loss=config.loss, stage=stage),
                axis_name=AXIS,
                in_axes=(0, 0, None),
                devices=jax.devices()[:1],
            )
            name = f"training step of stage {stage}, {count:,} voxels, {dtype}"
            seconds = timed(step, state, batch, text, at_least=3)
            rows.append(_row(name, count, seconds))
    return rows


def host_work(sizes: list[int]) -> list[dict]:
    """What the loader's workers and the preparation do, on one thread; an epoch of the loader, on two."""
    rows = []
    for voxels in sizes:
        coords = voxels_of(Problem(voxels, 3, 1, 1))
        points = (coords[:, 1:] + 0.5) * 0.02
        rows.append(_row(f"voxelize, {voxels:,} points", voxels, timed(voxel_grid.voxelize, points, 0.02)))
        rows.append(
            _row(f"pyramid and maps of five levels, {voxels:,} voxels", voxels, timed(voxel_grid.build_pyramid, coords))
        )
    config = scannet(8)
    for voxels in (size for size in sizes if size <= CPU_OTHERS_VOXELS):
        source = loader_bench.Rooms(8, voxels, config.data.voxel_size, config.data.chunk_points)
        rate, _, per_step = loader_bench.measure(source, config, math.inf, 15.0)
        steps = steps_per_epoch(config, source)
        name = f"input pipeline, epoch of 8 scenes of {per_step / 8:,.0f} voxels, visited {config.data.loop} times"
        rows.append(_row(name, steps * round(per_step), steps / rate))
    scene = generate_room(0).scene
    seconds = timed(lambda: vccs(scene.points, scene.colors, voxel_resolution=0.06, seed_resolution=0.25))
    rows.append(_row(f"VCCS, {len(scene.points):,} points", len(scene.points), seconds))
    return rows


def _row(name: str, voxels: int, seconds: float, **others: float | None) -> dict:
    return {"what": name, "voxels": voxels, "seconds": seconds} | others


def _peak_memory() -> float:
    """GB: of the device since the start where it tells, else of this process since its peak was last cleared."""
    if statistics := jax.devices()[0].memory_stats():
        return statistics["peak_bytes_in_use"] / 1e9
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1e9


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        "python -m experiments.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--voxels", type=int, nargs="+", default=[20_000, 100_000, 300_000, 1_000_000], help="sizes of the clouds"
    )
    parser.add_argument("--golden", type=Path, help="folder with performance_anchor.json and perf_rooms.npz")
    options = parser.parse_args()
    sizes = options.voxels
    if min(sizes) < 1:
        parser.error(f"--voxels {min(sizes)}: a cloud has at least one")
    clouds = {voxels: voxels_of(Problem(voxels, 3, 1, 1)) for voxels in sizes}
    recorded = {}
    if options.golden:
        with np.load(options.golden / "perf_rooms.npz") as rooms:
            for key in rooms.files:
                voxels = int(key.removeprefix("coords_"))
                if voxels in clouds:
                    clouds[voxels] = np.pad(rooms[key].astype(np.int32), ((0, 0), (1, 0)))
        for entry in json.loads((options.golden / "performance_anchor.json").read_text())["network"]:
            what = "forward + backward" if "backward" in entry["pass"] else "forward"
            recorded[entry["n"], what] = entry["cached_s"]
    rows = host_work(sizes)
    on_cpu = jax.default_backend() == "cpu"
    trained = [voxels for voxels in sizes if not on_cpu or voxels <= CPU_OTHERS_VOXELS]
    for dtype in ("float32",) if on_cpu else ("float32", "bfloat16"):
        rows += networks(clouds, dtype, recorded) + training_steps(trained, dtype) + convolutions(sizes, dtype)
    _report(rows)


def _report(rows: list[dict]) -> None:
    device = jax.devices()[0].device_kind
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())  # Linux, but not on Arm
    machine = f"{device}, {os.cpu_count()} cores, {processor[1] if processor else platform.machine()}"
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | (peer.VERSIONS if peer else {})
    titles = {
        "xla": "XLA",
        "roofline": "roofline",
        "spconv": "spconv",
        "minkowski_engine": "MinkowskiEngine (recorded)",
    }
    lines = [
        f"# Speed on {device}",
        "",
        f"{machine}; {', '.join(f'{k} {v}' for k, v in versions.items())}.",
        "Median milliseconds; ratios are theirs / ours. The roofline's peaks are those of JAX's own product and copy.",
        "Peak memory is that of the one process that times all rows, with what earlier rows left in it.",
        "",
        "| | ours | " + " | ".join(f"{title} | ratio" for title in titles.values()) + " | peak GB |",
        "| --- | ---: |" + " ---: |" * (2 * len(titles) + 1),
    ]
    for row in rows:
        cells = [row["what"], f"{1e3 * row['seconds']:.1f}"]
        for key in titles:
            other = row.get(key)
            cells += [f"{1e3 * other:.1f}", f"{other / row['seconds']:.2f}"] if other else ["", ""]
        cells.append(f"{row['memory_gb']:.2f}" if "memory_gb" in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    name = "benchmark_" + re.sub(r"\W+", "_", device.lower())
    (ROOT / f"{name}.md").write_text("\n".join(lines) + "\n")
    (ROOT / f"{name}.json").write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=1))
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    series: dict[str, list[dict]] = {}
    for row in rows:
        series.setdefault(re.sub(r",? ?(of )?[\d,]+ (voxels|points),?", "", row["what"]).strip(), []).append(row)
    for i, (label, points) in enumerate(series.items()):
        if len(points) > 1:
            style = ("o-", "s--", "^:")[i // 10 % 3]  # colours repeat after ten
            axes.loglog([p["voxels"] for p in points], [p["seconds"] for p in points], style, label=label)
    axes.set_xlabel("voxels")
    axes.set_ylabel("seconds")
    axes.set_title(f"Growth on {device}")
    if axes.lines:
        figure.legend(loc="outside right center", fontsize=7)
    figure.savefig(ROOT / f"{name}.png", dpi=110)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
