"""Times the sparse convolution and its maps beside what the device could do at best.

  python -m kernels.sparse_conv.bench
  python -m kernels.sparse_conv.bench --voxels 20000 100000 --channels 32 96 256 --dtype bfloat16
  python -m kernels.sparse_conv.bench --tune          # times block sizes on this GPU and writes tuning.json

Best is the roofline: the larger of useful operations / peak arithmetic and necessary bytes / peak bandwidth, both peaks
measured on the spot by a dense product and by a copy. The voxels lie on surfaces, about 9 of 27 neighbours occupied.
"""

import argparse
import concurrent.futures
import functools
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32
from tqdm import tqdm

from kernels import voxel_grid
from kernels.precision import matmul_precision
from kernels.sparse_conv import pallas_triton, tuning
from kernels.sparse_conv.api import sparse_conv
from kernels.sparse_conv.shapes import Problem
from kernels.sparse_conv.target import default_target
from kernels.sparse_conv.tuning import Blocks, Entry, Key
from kernels.voxel_grid import KernelMap

TUNED_DTYPES = ("bfloat16", "tensorfloat32", "float32")  # float16 has the blocks of bfloat16
_LEVELS = (300_000, 240_000, 100_000, 27_000, 6_000)  # voxels to tune at; their ratios are those of ScanNet at 2 cm
_CALLS = 8  # in one program, on one map: a network makes the row tiles of a map once, so they must not weigh much


class Peaks(NamedTuple):
    """What the default device reaches on dense work of one dtype."""

    operations: float  # per second, a multiplication and an addition each counted
    bytes: float  # per second, read and written


class Work(NamedTuple):
    """What one call cannot do without."""

    operations: float
    bytes: float

    def seconds(self, peaks: Peaks) -> float:
        """The roofline: no implementation is faster."""
        return max(self.operations / peaks.operations, self.bytes / peaks.bytes)


def timed(function: Callable[..., Any], *args: Any, seconds: float = 2.0, at_least: int = 5) -> float:
    """Median wall seconds of a call that ends when its result is ready, after one that is not counted."""
    jax.block_until_ready(function(*args))
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < at_least or (time.perf_counter() - begin < seconds and len(times) < 1000):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def measure_peaks(dtype: str) -> Peaks:
    """Peaks of the default device: a square product that fills it, and a copy much larger than its caches."""
    on_cpu = jax.default_backend() == "cpu"
    side, rows = (2048, 1 << 26) if on_cpu else (8192, 1 << 30)
    square = jnp.ones((side, side), dtype)
    product = timed(jax.jit(functools.partial(jnp.matmul, precision=matmul_precision())), square, square)
    vector = jnp.ones(rows // 4, "float32")
    copy = timed(jax.jit(lambda x: x + 1), vector)
    return Peaks(2 * side**3 / product, 2 * rows / copy)


def convolution_work(kernel_map: KernelMap, in_channels: int, out_channels: int, itemsize: int) -> tuple[Work, Work]:
    """Forward pass, and forward + backward, of one convolution.

    Every array is read or written once per product it takes part in: features, output and weights in the forward pass,
    all three products of the backward pass likewise; a pair costs two 4-byte indices per product.
    """
    pairs = int((np.asarray(kernel_map.out_index) < kernel_map.num_out).sum())
    rows = kernel_map.num_in * in_channels + kernel_map.num_out * out_channels
    weights = kernel_map.kernel_volume * in_channels * out_channels
    forward = Work(2.0 * pairs * in_channels * out_channels, (rows + weights) * itemsize + 8.0 * pairs)
    return forward, Work(3 * forward.operations, 3 * forward.bytes)


def voxels_of(problem: Problem) -> Int32[np.ndarray, "N 4"]:
    """A problem's voxels in the order in which `voxel_grid.voxelize` gives those of a cloud, (batch, x, y, z)."""
    coords = problem.coords()
    return coords[np.lexsort(coords.T[::-1])]


class Row(NamedTuple):
    """One line of the table, times in seconds."""

    problem: str
    forward: float
    forward_roofline: float
    training: float  # forward and both gradients
    training_roofline: float


def time_convolution(
    coords: Int32[np.ndarray, "N 4"], problem: Problem, dtype: str, peaks: Peaks, implementation: str | None = None
) -> Row:
    """Times one convolution on `coords`; `problem.voxels` is not read."""
    kernel_map, _ = voxel_grid.kernel_map(
        coords, kernel_size=problem.kernel_size, stride=problem.stride, tensor_stride=problem.tensor_stride
    )
    rows_in, rows_out = kernel_map.num_in, kernel_map.num_out
    if problem.transposed:
        rows_in, rows_out = rows_out, rows_in
    rng = np.random.default_rng(0)
    shapes = (rows_in, problem.in_channels), (kernel_map.kernel_volume, problem.in_channels, problem.out_channels)
    features, weights = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    direction = jnp.asarray(rng.standard_normal((rows_out, problem.out_channels)), dtype)
    on_device = jax.device_put(kernel_map)

    def forward(features, weights, kernel_map):
        return sparse_conv(features, weights, kernel_map, transposed=problem.transposed, implementation=implementation)

    def training(features, weights, kernel_map):
        out, pullback = jax.vjp(lambda x, w: forward(x, w, kernel_map), features, weights)
        return out, pullback(direction)

    channels = problem.in_channels, problem.out_channels
    bounds = convolution_work(kernel_map, *channels, features.dtype.itemsize)
    return Row(
        f"{len(coords):,} voxels, {problem.kernel_size}^3{' transposed' if problem.transposed else ''}, "
        f"{channels[0]} -> {channels[1]}",
        timed(jax.jit(forward), features, weights, on_device),
        bounds[0].seconds(peaks),
        timed(jax.jit(training), features, weights, on_device),
        bounds[1].seconds(peaks),
    )


def network_problems(planes: tuple[int, ...] = (32, 64, 128, 256, 128, 128, 96, 96)) -> list[Problem]:
    """The sparse convolutions of a MinkUNet with two blocks per stage (MinkUNet18A), on `_LEVELS` voxels."""
    found, skips = [Problem(_LEVELS[0], 5, 3, 32)], [32]
    for level, width in enumerate(planes[:4], start=1):
        down, below = skips[-1], _LEVELS[level]
        found.append(Problem(_LEVELS[level - 1], 2, down, down))
        found += [Problem(below, 3, down, width), Problem(below, 3, width, width)]
        skips.append(width)
    channels = skips.pop()
    for level, width in zip((3, 2, 1, 0), planes[4:], strict=True):
        rows = _LEVELS[level]
        found.append(Problem(rows, 2, channels, width, transposed=True))
        found += [Problem(rows, 3, width + skips.pop(), width), Problem(rows, 3, width, width)]
        channels = width
    return found


def tuning_keys(problems: Iterable[Problem], dtype: str, arch: str) -> dict[Key, Problem]:
    """What to tune for these convolutions: each kernel of each, on the largest problem that asks for it."""
    found: dict[Key, Problem] = {}
    for problem in sorted(problems, key=lambda problem: problem.voxels):
        channels, size = (problem.in_channels, problem.out_channels), problem.kernel_size
        found[Key("conv", *channels, size, dtype, arch)] = problem
        found[Key("weight_gradient", *channels, size, dtype, arch)] = problem
        if size != 5:  # the stem reads the input, which has no gradient
            exchanged = problem._replace(in_channels=channels[1], out_channels=channels[0])
            backward = exchanged._replace(transposed=size == 2 and not problem.transposed)
            found[Key("conv", *channels[::-1], size, dtype, arch)] = backward
    return found


class Trial:
    """A kernel on the problem it is tuned on: programs that call it, by the blocks it is cut into, and their times."""

    def __init__(self, key: Key, problem: Problem):
        self.key, self.problem = key, problem
        kernel_map, _ = voxel_grid.kernel_map(
            voxels_of(problem), kernel_size=problem.kernel_size, stride=problem.stride
        )
        rows_in, rows_out = kernel_map.num_in, kernel_map.num_out
        if problem.transposed:
            rows_in, rows_out = rows_out, rows_in
        dtype = "float32" if key.dtype == "tensorfloat32" else key.dtype
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

        self.arguments = (
            [normal(rows_in, problem.in_channels) for _ in range(_CALLS)],
            normal(kernel_map.kernel_volume, problem.in_channels, problem.out_channels),
            jax.device_put(kernel_map),
            normal(rows_out, problem.out_channels),
        )

    def lower(self, blocks: Blocks) -> jax.stages.Lowered:
        """The program of these blocks; its `compile` raises JaxRuntimeError where they need more than there is."""

        @jax.jit
        def one(x, weights, kernel_map, direction):
            def conv(weights):
                return sparse_conv(
                    x, weights, kernel_map, transposed=self.problem.transposed, implementation="pallas_triton"
                )

            if self.key.kernel == "conv":
                return conv(weights)
            return jax.vjp(conv, weights)[1](direction)

        def many(inputs, *others):
            return [one(x, *others) for x in inputs]

        precision = "tensorfloat32" if self.key.dtype == "tensorfloat32" else None
        with tuning.trying(self.key.kernel, blocks), jax.default_matmul_precision(precision):
            return jax.jit(many).lower(*self.arguments)

    def seconds(self, program: jax.stages.Compiled) -> float:
        """Of one call of the kernel."""
        return timed(program, *self.arguments, seconds=0.03) / _CALLS


def tune(problems: dict[Key, Problem], device: str, trial: Callable = Trial, path: Path = tuning.TABLE) -> None:
    """Time the candidates of every key and write the fastest into the table, after each key.

    The candidates of a key are compiled on all cores, then timed one after the other. What `device` has measured before
    is kept, so that a tuning that was stopped goes on; and so are all other entries.

    Args:
        problems: what to time each kernel on.
        device: name and software, as the entries shall say.
        trial: makes a `Trial` of a key and its problem.
        path: the table.
    Raises:
        RuntimeError: no candidate of a key runs; says why the last one did not.
    """
    table = tuning.load(path)
    missing = [key for key in problems if key not in table or table[key].device != device]
    print(f"{device}: {len(missing)} of {len(problems)} kernels to tune; the rest is in {path.name}", flush=True)
    compilers = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    bar = tqdm(total=sum(len(tuning.candidates(key)) for key in missing), unit="candidate", dynamic_ncols=True)
    with compilers, bar:
        for key in missing:
            bar.set_description(f"{key.kernel} {key.kernel_size}^3 {key.in_channels}->{key.out_channels} {key.dtype}")
            tried, times, failure = trial(key, problems[key]), {}, None
            programs = {b: compilers.submit(tried.lower(b).compile) for b in tuning.candidates(key)}
            concurrent.futures.wait(programs.values())
            for blocks, program in programs.items():
                try:
                    times[blocks] = tried.seconds(program.result())
                except jax.errors.JaxRuntimeError as error:  # more registers or shared memory than there are
                    failure = error
                bar.update()
            if not times:
                raise RuntimeError(f"no candidate for {key} runs on {device}") from failure
            best = min(times, key=times.__getitem__)
            table[key] = Entry(best, round(1e6 * times[best], 2), device)
            tuning.save(table, path)
            bar.write(f"{key}: {best}, {1e6 * times[best]:.1f} us, {len(times)} candidates ran")


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        "python -m kernels.sparse_conv.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--voxels", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 96, 256])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--implementation", default=None, help="reference, xla, ...; the fastest by default")
    parser.add_argument(
        "--tune",
        nargs="*",
        choices=TUNED_DTYPES,
        metavar="DTYPE",
        help=f"time block sizes instead, for operands of these types (default: {', '.join(TUNED_DTYPES)}), and write "
        "them to kernels/sparse_conv/tuning.json; started again it goes on where it was stopped",
    )
    options = parser.parse_args()
    if options.tune is not None:
        obstacle = pallas_triton.unsupported("bfloat16")
        if obstacle:
            raise SystemExit(f"--tune times the Triton kernels, which do not run here: {obstacle}")
        arch, device = default_target(), f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
        problems: dict[Key, Problem] = {}
        for dtype in options.tune or TUNED_DTYPES:
            problems |= tuning_keys(network_problems(), dtype, arch)
        tune(problems, device)
        return
    peaks = measure_peaks(options.dtype)
    print(f"{jax.devices()[0].device_kind}: {peaks.operations / 1e9:.0f} GFLOP/s, {peaks.bytes / 1e9:.1f} GB/s")
    print(f"{'':44}{'forward':>10}{'roofline':>10}{'training':>11}{'roofline':>10}  (milliseconds)")
    for voxels in options.voxels:
        for channels in options.channels:
            problem = Problem(voxels, 3, channels, channels)
            row = time_convolution(voxels_of(problem), problem, options.dtype, peaks, options.implementation)
            times = 1e3 * np.array(row[1:])
            print(f"{row.problem:44}{times[0]:10.1f}{times[1]:10.1f}{times[2]:11.1f}{times[3]:10.1f}", flush=True)
    for voxels in options.voxels:
        coords = voxels_of(Problem(voxels, 3, 1, 1))
        print(f"pyramid of five levels, {voxels:,} voxels: {1e3 * timed(voxel_grid.build_pyramid, coords):.1f} ms")


if __name__ == "__main__":
    main()
