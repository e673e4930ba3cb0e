"""What XLA makes of training step and inference for a GPU that is not at hand: memory, and bytes moved, by part.

  V=$(.venv/bin/python -c 'import jax; print(jax.__version__)')
  .venv/bin/pip install --target=cuda --no-deps jax-cuda12-plugin==$V jax-cuda12-pjrt==$V nvidia-cuda-nvcc-cu12
  PYTHONPATH=cuda .venv/bin/python -m experiments.gpu_program --gpu h100 a100 --dtype bfloat16

The step of configs/scannet.py, and its network alone, are compiled whole by the compiler a GPU would use, and nothing
is run. Memory is what a program allocates beside the next batch. Bytes count every array once where an instruction
reads or writes it; a convolution's rows that are read again for other neighbours are expected in the cache. Bytes over
bandwidth is the least time a program can take, not a measurement. What loops move is not counted: on a T4, the
convolutions.
"""

import argparse
import collections
import contextlib
import functools
import importlib.metadata
import itertools
import re
import types
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
from jax._src import xla_bridge
from jax.experimental import topologies

from experiments import loader_bench
from experiments.benchmark import CLASSES, scannet
from ggsd_jax.input_pipeline import pad_batch, train_iterator
from ggsd_jax.train import AXIS, initial_state, learning_rate_schedule, make_model, make_optimizer, train_step
from kernels.sparse_conv.target import targeting


class Gpu(NamedTuple):
    """What the compiler asks of a device."""

    name: str
    capability: tuple[int, int]
    processors: int
    lanes: int  # float32 units of a processor
    clock_ghz: float
    bandwidth: float  # bytes a second
    memory: int  # bytes
    cache: int  # bytes, level 2
    shared: int  # bytes of a processor's shared memory, of which a block may have all but one KiB


GPUS = {
    "t4": Gpu("Tesla T4", (7, 5), 40, 64, 1.59, 320e9, 15 << 30, 4 << 20, 64 << 10),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 2039e9, 79 << 30, 40 << 20, 164 << 10),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 3352e9, 79 << 30, 50 << 20, 228 << 10),
}
_APART = 2  # the spread of points far apart (kernels/voxel_grid.py)
_CONFIG = """
gpu_device_info {{
  name: "{gpu.name}" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  core_count: {gpu.processors} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock_ghz}
  memory_bandwidth: {gpu.bandwidth:.0f} device_memory_size: {gpu.memory} l2_cache_size: {gpu.cache}
  shared_memory_per_core: {gpu.shared} shared_memory_per_block: 49152 shared_memory_per_block_optin: {block}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {threads}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" device_description_str: "{gpu.name}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }} runtime_version {{ major: 12 minor: 8 patch: 0 }}
"""


def has_compiler() -> bool:
    """Whether jax's compiler for CUDA is installed, with a GPU or without."""
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    return not installed.isdisjoint({"jax-cuda12-pjrt", "jax-cuda13-pjrt"})


@contextlib.contextmanager
def absent(gpu: Gpu) -> Iterator[list[jax.Device]]:
    """A device to compile for alone. Where JAX asks which GPU is there, it is told of this one."""
    sm = 10 * gpu.capability[0] + gpu.capability[1]
    threads = 1024 if sm == 75 else 2048
    config = _CONFIG.format(gpu=gpu, block=gpu.shared - (0 if sm == 75 else 1024), threads=threads)
    canonical = xla_bridge.canonicalize_platform
    with contextlib.ExitStack() as stack:
        stack.enter_context(targeting(f"sm_{sm}"))
        renamed = lambda platform: "cuda" if platform in ("gpu", "cuda") else canonical(platform)  # noqa: E731
        stack.enter_context(mock.patch.object(xla_bridge, "canonicalize_platform", renamed))
        with contextlib.suppress(ImportError):  # jax 0.11 and later
            from jax._src.pallas.triton import gpu_info

            asked = types.SimpleNamespace(compute_capability=sm)
            stack.enter_context(mock.patch.object(gpu_info, "get_gpu_info", lambda: asked))
        yield topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1").devices


def compile_step(gpu: Gpu, voxels: int, dtype: str, stage: int, apart: bool = False):
    """The step of configs/scannet.py on one scene of about so many voxels: (compiled program, rows of level 0).

    The scene is of walls and a floor, as open a surface as ScanNet's vertices at 2 cm; with `apart` it is given the
    room for coarse rows that nuScenes' sweeps at 5 cm need. Stage 0 is inference.
    """
    config = scannet(1, dtype)
    text = np.zeros((CLASSES, loader_bench.CHANNELS), np.float32)
    model = make_model(config, loader_bench.CHANNELS, AXIS)
    optimizer = make_optimizer(config, learning_rate_schedule(config, 1_000_000))
    source = loader_bench.Rooms(1, voxels, config.data.voxel_size, config.data.chunk_points)
    batch = next(train_iterator(source, config, num_replicas=1))
    one = jax.tree.map(lambda leaf: leaf[0], batch)
    if apart:
        one = pad_batch(one, one.bucket, _APART, len(one.targets))
    state = jax.eval_shape(lambda batch: initial_state(model, optimizer, batch, 0), one)
    replicated = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), (state, one))
    with absent(gpu) as devices:
        if stage == 0:
            infer = jax.pmap(functools.partial(model.apply, train=False), devices=devices)
            network, scene = replicated
            lowered = infer.lower(network.teacher, scene.feats, scene.pyramid)
            return lowered.compile(), batch.bucket
        step = jax.pmap(
            functools.partial(train_step, model=model, optimizer=optimizer, loss=config.loss, stage=stage),
            axis_name=AXIS,
            in_axes=(0, 0, None),
            donate_argnums=0,
            devices=devices,
        )
        return step.lower(*replicated, text).compile(), batch.bucket


# ---------------------------------------------------------------------------------------- bytes of a program

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_SIZES |= {"f64": 8, "s64": 8, "u64": 8}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
PARTS = {  # the first pattern that the name of an instruction's operation matches
    "neighbours' tiles": r"_row_tiles",
    "sparse convolutions": r"sparse_conv",
    "batch norm, ReLU, residual": r"MinkUNet(.*(norm\d|/bn|downsample_1|/max|/add\b|_where)|\)*/(convert|select))",
    "dense layers, concatenation": r"MinkUNet",
    "losses": r"jvp\(",
    "optimizer, EMA, other": r"",
}


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    shape: str
    operation: str
    operands: list[str]
    origin: str
    """Where it comes from in the traced function."""
    called: str
    """The computation it runs, of a fusion."""
    number: int
    """Of a parameter."""


def computations(program: str) -> dict[str, dict[str, Instruction]]:
    """The instructions of every computation of an HLO text, by name; the entry's under ""."""
    found: dict[str, dict[str, Instruction]] = {}
    body: dict[str, Instruction] = {}
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line):
            body = found["" if head[1] else head[2]] = {}
        elif match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line):
            name, shape, operation, rest = match.groups()
            origin, called = re.search(r'op_name="([^"]*)"', rest), re.search(r"calls=%([\w.\-]+)", rest)
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            number = int(rest.split(")")[0]) if operation == "parameter" else -1
            body[name] = Instruction(
                name, shape, operation, operands, origin[1] if origin else "", called[1] if called else "", number
            )
    return found


def array_bytes(shape: str) -> int:
    """Of "bf16[118912,96]{1,0}", or of a tuple of such."""
    arrays = re.findall(r"\b(\w+)\[([\d,]*)\]", shape)
    return sum(_SIZES[dtype] * int(np.prod([int(n) for n in sizes.split(",") if n])) for dtype, sizes in arrays)


def traffic(program: str) -> collections.Counter:
    """Bytes that a program reads and writes, by part."""
    bodies = computations(program)
    entry = bodies[""]
    of_part: collections.Counter = collections.Counter()
    for instruction in entry.values():
        if instruction.operation in _FREE:
            continue
        body = bodies.get(instruction.called, {})
        written = array_bytes(instruction.shape)
        read = [array_bytes(entry[operand].shape) for operand in instruction.operands]
        for scatter in (i for i in body.values() if i.operation == "scatter"):  # in place: it writes its updates alone
            written += array_bytes(body[scatter.operands[-1]].shape) - array_bytes(scatter.shape)
        for parameter in (i for i in body.values() if i.operation == "parameter"):
            users = [user for user in body.values() if parameter.name in user.operands]
            partial = [_part_read(user, parameter.name, body) for user in users]
            if users and None not in partial:
                read[parameter.number] = sum(partial)
        part = next(part for part, pattern in PARTS.items() if re.search(pattern, instruction.origin))
        of_part[part] += written + sum(read)
    return of_part


def _part_read(user: Instruction, name: str, body: dict[str, Instruction]) -> int | None:
    """Bytes that an instruction reads of an operand of which it needs a part; None if it needs all."""
    if user.operation in ("slice", "dynamic-slice", "gather") and user.operands[0] == name:
        return array_bytes(user.shape)
    if user.operation == "scatter" and user.operands[0] == name:
        return array_bytes(body[user.operands[-1]].shape)
    return None


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        "python -m experiments.gpu_program", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["h100"], help="compiled for; default h100")
    parser.add_argument("--voxels", type=int, nargs="+", default=[100_000], help="of the scene; default 100000")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--stage", type=int, nargs="+", choices=[0, 1, 2], default=[0, 1, 2], help="0 is inference")
    parser.add_argument("--apart", action="store_true", help="with the coarse rows of points far apart, as nuScenes'")
    given = parser.parse_args()
    if min(given.voxels) < 1:
        parser.error(f"--voxels {min(given.voxels)}: a scene has at least one")
    jax.config.update("jax_platforms", "cpu")
    if not has_compiler():
        parser.error("the CUDA compiler of jax is not installed: see --help for the three wheels")
    print("| | rows | memory GB | " + " | ".join(f"{part} GB" for part in PARTS) + " | sum GB | least ms |")
    print("| --- |" + " ---: |" * (len(PARTS) + 4))
    for gpu, dtype, voxels, stage in itertools.product(given.gpu, given.dtype, given.voxels, given.stage):
        compiled, rows = compile_step(GPUS[gpu], voxels, dtype, stage, given.apart)
        plan = compiled.memory_analysis()
        memory = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        memory += plan.temp_size_in_bytes
        moved = traffic(compiled.as_text())
        total = sum(moved.values())
        cells = [f"{rows:,}", f"{memory / 1e9:.2f}", *(f"{moved[part] / 1e9:.2f}" for part in PARTS)]
        cells += [f"{total / 1e9:.1f}", f"{1e3 * total / GPUS[gpu].bandwidth:.1f}"]
        print(
            f"| {GPUS[gpu].name}, {dtype}, {f'stage {stage}' if stage else 'inference'} | " + " | ".join(cells) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
