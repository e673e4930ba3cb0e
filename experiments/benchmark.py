"""Every speed of this project in one table, beside what else is installed and what the device could do at best.

  make bench
  python -m experiments.benchmark --voxels 20000 --golden=DIR     # fewer sizes; MinkowskiEngine's recorded times

Writes benchmark_<device>.md, .json and .png beside this file. Times are medians of wall seconds of calls that end when
their result is ready, after one that is not counted. The roofline is max(operations / peak, bytes / bandwidth) of what
a call cannot do without, the peaks measured on this device (kernels/sparse_conv/bench.py). spconv is timed where it can
be imported; MinkowskiEngine's columns are its recorded times on another machine (--golden).
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import resource
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from data.superpoints import vccs
from data.synthetic import generate_room
from ggsd_jax.minkunet import MinkUNet, architecture
from kernels import voxel_grid
from kernels.sparse_conv.bench import measure_peaks, time_convolution, timed, voxels_of
from kernels.sparse_conv.shapes import Problem

ROOT = Path(__file__).parent
PACKAGES = ["jax", "jaxlib", "flax", "numpy", "numba"]
OUT_CHANNELS = 768


def convolutions(sizes: list[int], dtype: str) -> list[dict]:
    """Single 3^3 convolutions of the network's widths, and its strided pair, at every size."""
    peaks = measure_peaks(dtype)
    spconv = _spconv() if dtype == "float32" and jax.default_backend() == "cpu" else None
    rows = []
    for voxels in sizes:
        problems = [Problem(voxels, 3, channels, channels) for channels in (32, 96, 256)]
        problems += [Problem(voxels, 5, 3, 32), Problem(voxels, 2, 32, 32), Problem(voxels, 2, 96, 96, True)]
        for problem in problems:
            coords = voxels_of(problem)
            row = time_convolution(coords, problem, dtype, peaks)
            peer = spconv(coords, problem) if spconv and problem.kernel_size == 3 else (None, None)
            for what, ours, best, theirs in (
                ("forward", row.forward, row.forward_roofline, peer[0]),
                ("forward + backward", row.training, row.training_roofline, peer[1]),
            ):
                rows.append(_row(f"{row.problem}, {dtype}, {what}", voxels, ours, roofline=best, spconv=theirs))
    return rows


def networks(clouds: dict[int, np.ndarray], dtype: str, recorded: dict) -> list[dict]:
    """MinkUNet18A with 768 outputs on whole clouds, forward and forward + backward; maps already made."""
    arch = architecture("MinkUNet18A")
    model = MinkUNet(arch.layers, arch.planes, OUT_CHANNELS, dtype=jnp.dtype(dtype))
    direction = jax.random.normal(jax.random.key(1), (OUT_CHANNELS,))

    def forward(variables, feats, pyramid):
        return model.apply(variables, feats, pyramid, train=False)

    def training(variables, feats, pyramid):
        def loss(params):
            state = {"params": params, "batch_stats": variables["batch_stats"]}
            out, _ = model.apply(state, feats, pyramid, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.where(pyramid.mask(0)[:, None], out.astype(jnp.float32), 0) @ direction)

        return jax.grad(loss)(variables["params"])

    rows = []
    for voxels, coords in clouds.items():
        pyramid = jax.device_put(voxel_grid.build_pyramid(coords))
        feats = jnp.ones((pyramid.bucket, 3)) * jnp.asarray(pyramid.mask(0))[:, None]
        variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), feats, pyramid, train=False)
        for what, function in (("forward", forward), ("forward + backward", training)):
            seconds = timed(jax.jit(function), variables, feats, pyramid, at_least=3)
            row = _row(f"MinkUNet18A, {voxels:,} voxels, {dtype}, {what}", voxels, seconds)
            rows.append(row | {"minkowski_engine": recorded.get((voxels, what)), "memory_gb": _peak_memory()})
    return rows


def host_work(sizes: list[int]) -> list[dict]:
    """What the loader's workers and the preparation do, on one thread."""
    rows = []
    for voxels in sizes:
        coords = voxels_of(Problem(voxels, 3, 1, 1))
        points = (coords[:, 1:] + 0.5) * 0.02
        rows.append(_row(f"voxelize, {voxels:,} points", voxels, timed(voxel_grid.voxelize, points, 0.02)))
        rows.append(
            _row(f"pyramid and maps of five levels, {voxels:,} voxels", voxels, timed(voxel_grid.build_pyramid, coords))
        )
    scene = generate_room(0).scene
    seconds = timed(lambda: vccs(scene.points, scene.colors, voxel_resolution=0.06, seed_resolution=0.25))
    rows.append(_row(f"VCCS, {len(scene.points):,} points", len(scene.points), seconds))
    return rows


def _row(name: str, voxels: int, seconds: float, **others: float | None) -> dict:
    return {"what": name, "voxels": voxels, "seconds": seconds} | others


def _peak_memory() -> float:
    """GB: of the device where it tells, else of this process so far."""
    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9


def _spconv():
    """Seconds of spconv's CPU convolution, forward and forward + backward, as a function; None without spconv."""
    try:
        import spconv.pytorch as spconv
        import torch
    except ImportError:
        return None
    # its backward asks for the CUDA stream even on a CPU
    spconv.ops.get_current_stream = lambda: 0
    torch.set_num_threads(os.cpu_count() or 1)

    def seconds(coords: np.ndarray, problem: Problem) -> tuple[float, float]:
        order = np.lexsort(coords.T[::-1])
        indices = torch.from_numpy(coords[order] - [0, *coords[:, 1:].min(0)]).int()
        features = torch.randn(len(coords), problem.in_channels, requires_grad=True)
        shape = (indices[:, 1:].max(0).values + 1).tolist()
        layer = spconv.SubMConv3d(
            problem.in_channels, problem.out_channels, 3, bias=False, indice_key="map", algo=spconv.ConvAlgo.Native
        )
        first = layer(spconv.SparseConvTensor(features, indices, shape, 1))

        def forward():
            x = spconv.SparseConvTensor(features, indices, shape, 1)
            x.indice_dict = first.indice_dict
            return layer(x).features

        def training():
            forward().sum().backward()

        return timed(forward), timed(training)

    return seconds


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voxels", type=int, nargs="+", help="default: 20k and 100k on a CPU, and up to 1M on a GPU")
    parser.add_argument("--golden", type=Path, help="folder with performance_anchor.json and perf_rooms.npz")
    options = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    sizes = options.voxels or ([20_000, 100_000] if on_cpu else [20_000, 100_000, 300_000, 1_000_000])
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
    for dtype in ("float32",) if on_cpu else ("float32", "bfloat16"):
        rows += convolutions(sizes, dtype) + networks(clouds, dtype, recorded)
    _report(rows)


def _report(rows: list[dict]) -> None:
    device = jax.devices()[0].device_kind
    machine = f"{device}, {os.cpu_count()} cores, {platform.machine()}"
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    titles = {"roofline": "roofline", "spconv": "spconv", "minkowski_engine": "MinkowskiEngine (recorded)"}
    lines = [
        f"# Speed on {device}",
        "",
        f"{machine}; {', '.join(f'{k} {v}' for k, v in versions.items())}.",
        "Median milliseconds; ratios are theirs / ours. The roofline's peaks are those of JAX's own product and copy.",
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
        series.setdefault(re.sub(r",? ?[\d,]+ (voxels|points),?", "", row["what"]), []).append(row)
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
