"""Times the sparse convolution and its maps beside what the device could do at best.

  python -m kernels.sparse_conv.bench
  python -m kernels.sparse_conv.bench --voxels 20000 100000 --channels 32 96 256 --dtype bfloat16

Best is the roofline: the larger of useful operations / peak arithmetic and necessary bytes / peak bandwidth, both peaks
measured on the spot by a dense product and by a copy. The voxels lie on surfaces, about 9 of 27 neighbours occupied.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from kernels import voxel_grid
from kernels.sparse_conv.api import sparse_conv
from kernels.sparse_conv.shapes import Problem
from kernels.voxel_grid import KernelMap


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
    product = timed(jax.jit(jnp.matmul), square, square)
    vector = jnp.ones(rows // square.itemsize, dtype)
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


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voxels", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 96, 256])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--implementation", default=None, help="reference, xla, ...; the fastest by default")
    options = parser.parse_args()
    peaks = measure_peaks(options.dtype)
    print(f"{jax.devices()[0].device_kind}: {peaks.operations / 1e9:.0f} GFLOP/s, {peaks.bytes / 1e9:.1f} GB/s")
    print(f"{'':44}{'forward':>10}{'roofline':>10}{'training':>11}{'roofline':>10}  (milliseconds)")
    for voxels in options.voxels:
        for channels in options.channels:
            problem = Problem(voxels, 3, channels, channels)
            row = time_convolution(problem.coords(), problem, options.dtype, peaks, options.implementation)
            times = 1e3 * np.array(row[1:])
            print(f"{row.problem:44}{times[0]:10.1f}{times[1]:10.1f}{times[2]:11.1f}{times[3]:10.1f}", flush=True)
    for voxels in options.voxels:
        coords = Problem(voxels, 3, 1, 1).coords()
        print(f"pyramid of five levels, {voxels:,} voxels: {1e3 * timed(voxel_grid.build_pyramid, coords):.1f} ms")


if __name__ == "__main__":
    main()
