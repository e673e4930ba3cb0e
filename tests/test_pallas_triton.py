"""The Pallas kernels: their numbers in interpret mode, their compilation for GPUs without one, and both on a GPU."""

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_ir
from absl import logging
from flax.traverse_util import flatten_dict
from test_minkunet import golden_variables
from test_sparse_conv import assert_close, check_second_order_and_vmap, problem_data

from ggsd_jax import inference
from ggsd_jax.minkunet import MinkUNet, architecture
from kernels.sparse_conv import Epilogue, api, pallas_triton, sparse_conv, tuning
from kernels.sparse_conv.shapes import AWKWARD, NETWORK
from kernels.sparse_conv.target import INTERPRET, targeting
from kernels.sparse_conv.tuning import Blocks
from kernels.voxel_grid import KernelMap, build_pyramid, kernel_map

# Deprecated since jax 0.11 in favour of Mosaic, whose row gather needs a Blackwell GPU.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

# Of the largest magnitude. Half-precision results are rounded once, from sums of exact products.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}
INTERPRETED = {  # each takes seconds to compile; the others differ in how the map is made alone
    "one voxel": AWKWARD["one voxel"],
    "one voxel, transposed": AWKWARD["one voxel, transposed"],
    "odd channels": AWKWARD["odd channels"],
    "one channel in": AWKWARD["one channel in"],
    "one channel out": AWKWARD["one channel out"],
    "empty offsets": AWKWARD["empty offsets"],
    "no neighbours": AWKWARD["no neighbours"],
    "several scenes, 5^3": AWKWARD["several scenes, 5^3"],
    "several scenes, stride 2": AWKWARD["several scenes, stride 2"],
    "more than one tile per offset": AWKWARD["more than one tile per offset"],
    "level 0, after the skip": NETWORK["level 0, after the skip"]._replace(voxels=150),
    "up 4 to 3": NETWORK["up 4 to 3"]._replace(voxels=150),
}
QUICK = {"xla_backend_optimization_level": 0}  # compiling the interpreter's loops is most of the time


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def conv_and_gradients(x, w, grad_out, m, transposed=False, implementation="pallas_triton"):
    """Output and both gradients, traced anew: a jitted function would keep the kernels of an earlier target."""

    def compute(x, w, grad_out, m):
        conv = functools.partial(sparse_conv, kernel_map=m, transposed=transposed, implementation=implementation)
        out, pull_back = jax.vjp(conv, x, w)
        return out, *pull_back(grad_out)

    return jax.jit(compute, compiler_options=None if on_gpu() else QUICK)(x, w, grad_out, m)


def check_against_reference(problem, dtype="float32"):
    m, *arrays = problem_data(problem)
    arrays = [jnp.asarray(a, dtype) for a in arrays]
    with jax.enable_x64(True):
        double = [a.astype("float64") for a in arrays]
        expected = conv_and_gradients(*double, m, problem.transposed, "reference")
    for found, truth in zip(conv_and_gradients(*arrays, m, problem.transposed), expected, strict=True):
        assert found.dtype == dtype
        assert_close(found, truth, TOLERANCE[dtype])


# -------------------------------------------------------------------------------------------- interpret mode


@pytest.mark.parametrize("name", INTERPRETED)
def test_the_kernels_compute_what_the_reference_defines(name):
    with targeting(INTERPRET):
        check_against_reference(INTERPRETED[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once_at_the_end(dtype):
    with targeting(INTERPRET):
        check_against_reference(AWKWARD["several scenes"], dtype)


def test_blocks_change_no_result_beyond_rounding():
    problem = AWKWARD["odd channels"]._replace(in_channels=40, out_channels=72)
    conv, weight_gradient = Blocks(16, 16, 32, 4, 3), Blocks(32, 16, 48, 4, 3)
    with targeting(INTERPRET), tuning.trying("conv", conv), tuning.trying("weight_gradient", weight_gradient):
        check_against_reference(problem)


def test_the_kernels_are_traced_in_jaxs_wide_and_strict_modes():
    m, *arrays = problem_data(AWKWARD["odd channels"])
    arrays = [jnp.asarray(a, jnp.float32) for a in arrays]
    modes = jax.enable_x64(True), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    with targeting(INTERPRET), contextlib.ExitStack() as stack:
        expected = conv_and_gradients(*arrays, m)
        for mode in modes:
            stack.enter_context(mode)
        found = conv_and_gradients(*arrays, m)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_padding_rows_matter_to_nobody_and_come_out_zero():
    n = 130
    coords = AWKWARD["odd channels"]._replace(voxels=n).coords()
    pyramid = build_pyramid(coords)
    rng = np.random.default_rng(0)
    x, grad_out = (np.full((pyramid.bucket, c), np.nan, np.float32) for c in (3, 5))
    x[:n], grad_out[:n] = rng.normal(size=(n, 3)), rng.normal(size=(n, 5))
    w = jnp.asarray(rng.normal(size=(27, 3, 5)), jnp.float32)
    exact, _ = kernel_map(coords, kernel_size=3)
    with targeting(INTERPRET):
        out, grad_in, grad_w = conv_and_gradients(x, w, grad_out, pyramid.submanifold[0])
    expected = conv_and_gradients(x[:n], w, grad_out[:n], exact, implementation="reference")
    for found, truth in zip((out[:n], grad_in[:n], grad_w), expected, strict=True):
        assert_close(found, truth, TOLERANCE["float32"])
    assert not np.asarray(out[n:]).any() and not np.asarray(grad_in[n:]).any()


@pytest.mark.parametrize("voxels", [515, 512, 1])  # 512: row num_out begins a tile
def test_row_tiles_visit_every_pair_once_and_no_offset_in_vain(voxels):
    m, _ = kernel_map(AWKWARD["several scenes, 5^3"]._replace(voxels=voxels).coords(), kernel_size=5)
    pairs = (m.in_index, m.out_index, m.offset_index, m.num_tiles)
    sizes = dict(kernel_volume=125, num_in=m.num_in, num_out=m.num_out)
    tiles = jax.tree.map(np.asarray, pallas_triton._row_tiles(pairs, rows=32, **sizes))
    assert sorted(tiles.order[:voxels]) == list(range(voxels)) and (tiles.order[voxels:] >= voxels).all()
    visited = np.arange(125) < tiles.count[:, None]
    tile, slot, lane = np.nonzero((tiles.index < m.num_in) & visited[:, :, None])
    found = np.stack([tiles.index[tile, slot, lane], tiles.order[32 * tile + lane], tiles.offset[tile, slot]])
    valid = m.out_index < m.num_out
    k = np.broadcast_to(m.offset_index[:, None], valid.shape)
    expected = np.stack([m.in_index[valid], m.out_index[valid], k[valid]])
    np.testing.assert_array_equal(found[:, np.lexsort(found)], expected[:, np.lexsort(expected)])
    np.testing.assert_array_equal((tiles.index < m.num_in).any(2)[visited], True)


def test_sorting_rows_by_the_sides_of_their_neighbours_saves_visits():
    """On a scanned sphere; sorted by single offsets, the rare ones as high bits, tiles visit 0.70 of the unsorted."""
    on_sphere = np.random.default_rng(0).normal(size=(20_000, 3))
    on_sphere *= 40 / np.linalg.norm(on_sphere, axis=1, keepdims=True)
    coords = np.unique(np.floor(on_sphere).astype(np.int32), axis=0)
    m, _ = kernel_map(np.pad(coords, ((0, 0), (1, 0))), kernel_size=3)
    pairs = (m.in_index, m.out_index, m.offset_index, m.num_tiles)
    sizes = dict(kernel_volume=27, num_in=m.num_in, num_out=m.num_out)
    visits = int(pallas_triton._row_tiles(pairs, rows=64, **sizes).count.sum())
    unsorted = np.zeros((-(-m.num_out // 64), 27), bool)
    valid = m.out_index < m.num_out
    unsorted[m.out_index[valid] // 64, np.broadcast_to(m.offset_index[:, None], valid.shape)[valid]] = True
    assert valid.sum() <= 64 * visits < 0.65 * 64 * unsorted.sum()


@pytest.mark.parametrize("chunks", [[0, 0, 0], [1, 0, 0], [0, 1000, 3], [7, 0, 9000, 0, 7, 7], [5] * 27])
def test_programs_share_the_pairs_out_equally_and_each_has_one_offset(chunks):
    programs = 64 + len(chunks)
    begin, end, first, last = map(np.asarray, pallas_triton._shares(jnp.cumsum(jnp.array(chunks)), programs))
    taken = [range(b, e) for b, e in zip(begin, end, strict=True)]
    assert [chunk for some in taken for chunk in some] == list(range(sum(chunks)))
    of_offset = np.repeat(np.arange(len(chunks)), chunks)
    for k, (a, b) in enumerate(zip(first, last, strict=True)):
        assert all(of_offset[chunk] == k for some in taken[a:b] for chunk in some)
    assert last[-1] <= programs and max(map(len, taken)) <= -(-sum(chunks) // 64)


@pytest.mark.parametrize("name", ["several scenes", "several scenes, stride 2"])
def test_gradients_of_gradients_and_vmap_are_those_of_the_reference(name):
    with targeting(INTERPRET):
        check_second_order_and_vmap(AWKWARD[name]._replace(voxels=150), "pallas_triton")


def test_convolutions_over_one_map_share_its_row_tiles():
    m, x, w, _ = problem_data(AWKWARD["several scenes"]._replace(out_channels=5))
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)

    def sorts(function):
        with targeting(INTERPRET):
            return jax.jit(function, compiler_options=QUICK).lower(x, w, m).compile().as_text().count(" sort(")

    def one(x, w, m):
        return sparse_conv(x, w, m, implementation="pallas_triton")

    def two_and_gradients(x, w, m):
        return jax.grad(lambda x, w: one(one(x, w, m) ** 2, w, m).sum(), argnums=(0, 1))(x, w)

    assert sorts(two_and_gradients) == sorts(one) > 0


def test_a_network_has_the_loss_and_gradients_that_xla_gives_it():
    n = 200
    pyramid = build_pyramid(AWKWARD["several scenes"]._replace(voxels=n).coords())
    x = np.zeros((pyramid.bucket, 3), np.float32)
    x[:n] = np.random.default_rng(0).normal(size=(n, 3))
    model = MinkUNet((0,) * 8, (4,) * 8, out_channels=5, init_dim=4)
    variables = model.init(jax.random.key(0), x, pyramid, train=False)

    def loss_and_gradients():
        def loss(params, x, pyramid):
            out, _ = model.apply(variables | {"params": params}, x, pyramid, train=True, mutable=["batch_stats"])
            return jnp.square(out).sum()

        return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(variables["params"], x, pyramid)

    expected = loss_and_gradients()
    with targeting(INTERPRET):
        found = loss_and_gradients()
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), found, expected)  # batch norm of a few rows amplifies


def test_replicas_of_pmap_have_their_own_maps():
    problem = AWKWARD["several scenes"]._replace(out_channels=5)
    (m, *arrays), (other, *others) = (problem_data(problem, seed) for seed in (0, 1))
    tiles = max(len(m.in_index), len(other.in_index))
    m, other = (padded_tiles(each, tiles) for each in (m, other))
    stacked = jax.tree.map(lambda a, b: np.stack([a, b]), (m, *arrays), (other, *others))
    m, *arrays = jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == np.float64 else a, stacked)

    def gradients(implementation):
        def loss(x, w, grad_out, m):
            return (sparse_conv(x, w, m, implementation=implementation) * grad_out).sum()

        return jax.pmap(jax.grad(loss, argnums=(0, 1)))(*arrays, m)

    expected = gradients("xla")
    with targeting(INTERPRET):
        found = gradients("pallas_triton")
    for replica in range(2):
        jax.tree.map(lambda a, b, r=replica: assert_close(a[r], b[r], TOLERANCE["float32"]), found, expected)


def padded_tiles(m: KernelMap, tiles: int) -> KernelMap:
    """The map with room for so many tiles."""

    def pad(array, value):
        return np.pad(array, [(0, tiles - len(array))] + [(0, 0)] * (array.ndim - 1), constant_values=value)

    return dataclasses.replace(
        m,
        in_index=pad(m.in_index, m.num_in),
        out_index=pad(m.out_index, m.num_out),
        offset_index=pad(m.offset_index, 0),
    )


# ------------------------------------------------------------------------------------------ which one is run


class Device:
    """What the choice reads of a device."""

    def __init__(self, device_kind, compute_capability=None):
        self.device_kind = device_kind
        if compute_capability:
            self.compute_capability = compute_capability


@pytest.mark.parametrize(
    "device, obstacle",
    [
        (Device("NVIDIA A100-SXM4-40GB", "8.0"), None),
        (Device("NVIDIA H200", "9.0"), None),
        (Device("NVIDIA GeForce RTX 5090", "12.0"), None),
        (Device("Tesla T4", "7.5"), "8.0 or above, and the default device is sm_75"),
        (Device("AMD Instinct MI300X", "gfx942"), "the default device is AMD Instinct MI300X"),
        (Device("cpu"), "the default device is cpu"),
    ],
)
def test_the_kernels_are_for_nvidia_gpus_from_capability_8(monkeypatch, device, obstacle):
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [device])
    found = pallas_triton.unsupported("bfloat16")
    assert found is None if obstacle is None else obstacle in found


@pytest.mark.parametrize(
    "target, dtype, expected",
    [
        ("cpu", "float32", "cpu"),
        ("cpu", jnp.bfloat16, "xla"),
        ("sm_75", "float32", "xla"),
        ("sm_80", jnp.dtype("bfloat16"), "pallas_triton"),
        ("sm_90", "float64", "xla"),
    ],
)
def test_the_fastest_implementation_is_that_of_device_and_dtype(target, dtype, expected):
    with targeting(target):
        assert api.fastest(dtype) == expected


def test_only_what_is_not_supported_falls_through_and_one_line_says_so(monkeypatch):
    m, x, w, _ = problem_data(AWKWARD["one voxel"])
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *args: lines.append(text % args))
    api._announce.cache_clear()
    with targeting("sm_75"):
        for _ in range(3):
            sparse_conv(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), m)
    assert len(lines) == 1 and "runs on xla" in lines[0] and "default device is sm_75" in lines[0]

    def broken(*args):
        raise NotImplementedError("a bug in the kernels")

    monkeypatch.setitem(api._IMPLEMENTATIONS, "pallas_triton", broken)
    with targeting(INTERPRET), pytest.raises(NotImplementedError, match="a bug in the kernels"):
        sparse_conv(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), m)


@pytest.mark.skipif(on_gpu(), reason="a GPU is at hand")
def test_asking_for_the_kernels_on_a_cpu_says_what_they_need():
    m, x, w, _ = problem_data(AWKWARD["one voxel"])
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU .* default device is cpu; implementation=None"):
        sparse_conv(x, w, m, implementation="pallas_triton")


def test_asking_for_float64_says_which_dtypes_there_are():
    m, x, w, _ = problem_data(AWKWARD["one voxel"])
    with jax.enable_x64(True), targeting("sm_80"), pytest.raises(NotImplementedError, match="float16.*are float64"):
        sparse_conv(jnp.asarray(x), jnp.asarray(w), m, implementation="pallas_triton")


def test_arrays_beyond_the_reach_of_32_bits_are_refused():
    spec = jax.ShapeDtypeStruct
    rows = 2**31 // 256
    m, *_ = problem_data(AWKWARD["one voxel"])
    m = dataclasses.replace(m, num_in=rows, num_out=rows)
    conv = functools.partial(sparse_conv, kernel_map=m, implementation="pallas_triton")
    features, weights = spec((rows, 3), jnp.bfloat16), spec((27, 3, 256), jnp.bfloat16)
    with targeting("sm_80"), pytest.raises(ValueError, match=r"\[8388608, 256\].* fewer voxels"):
        jax.eval_shape(conv, features, weights)


# ------------------------------------------------------------------------------- compilation without a GPU


@functools.cache
def network_kernels() -> list[tuple[int, int, int]]:
    """(K, Cin, Cout) of the sparse convolutions of MinkUNet18A."""
    model = MinkUNet(*architecture("MinkUNet18A")[:2], out_channels=768)
    pyramid = build_pyramid(np.zeros((1, 4), np.int32))
    init = functools.partial(model.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), np.zeros((pyramid.bucket, 3), np.float32), pyramid)["params"]
    return sorted({p.shape for name, p in flatten_dict(params).items() if name[-1] == "kernel" and len(p.shape) == 3})


def kernels_of(volume, channels_in, channels_out, dtype, arch) -> list[triton_ir.Kernel]:
    """What forward, with an epilogue and without, and both gradients of a convolution launch."""
    rows, (tiles, tile) = 100_000, (1700, 1024)
    spec = jax.ShapeDtypeStruct
    num_out = rows if volume % 2 else rows // 4
    index = spec((tiles, tile), jnp.int32)
    m = KernelMap(index, index, spec((tiles,), jnp.int32), spec((), jnp.int32), rows, num_out, volume)

    def compute(x, w, grad_out, m):
        conv = functools.partial(sparse_conv, kernel_map=m, implementation="pallas_triton")
        out, pull_back = jax.vjp(conv, x, w)
        of_channel = jnp.ones(channels_out)
        end = Epilogue(of_channel, of_channel, of_channel, jnp.ones(num_out, bool), grad_out)
        return out, *pull_back(grad_out), conv(x, w, epilogue=end)

    x, w = spec((rows, channels_in), dtype), spec((volume, channels_in, channels_out), dtype)
    return triton_ir.lowered_kernels(compute, x, w, spec((num_out, channels_out), dtype), m, arch=arch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_convolution_of_the_network_lowers_for_cuda_without_atomics(dtype):
    for shape in network_kernels():
        kernels = kernels_of(*shape, dtype, "sm_80")
        assert len(kernels) == 5, shape  # the gradient in the weights is two
        assert not any(b"atomic" in kernel.code for kernel in kernels), shape


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32", "tensorfloat32"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_of_the_network_keep_sums_in_registers_and_operands_on_the_way(arch, precision, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason="the triton wheel compiles kernels without a GPU")
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    capability = int(arch[3:])
    ir_file, ptx_file = tmp_path / "kernel.ttir", tmp_path / "kernel.ptx"
    tf32 = precision == "tensorfloat32"
    dtype = "float32" if tf32 else precision
    compiled = set()  # with as many channels in as out, the gradient in the features is the forward pass
    for shape in network_kernels():
        with jax.default_matmul_precision(precision if tf32 else None):
            kernels = kernels_of(*shape, dtype, arch)
        for launched in kernels:
            text = launched.text()
            if text in compiled:
                continue
            compiled.add(text)
            ir_file.write_text(text)
            options = dict(num_warps=launched.warps, num_stages=launched.stages)
            kernel = triton.compile(str(ir_file), target=GPUTarget("cuda", capability, 32), options=options)
            ptx_file.write_text(kernel.asm["ptx"])
            target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)[1]
            command = [get_ptxas(capability).path, "-v", f"-arch={target}", ptx_file, "-o", tmp_path / "cubin"]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            registers = int(re.search(r"Used (\d+) registers", report)[1])
            spilled = int(re.search(r"(\d+) bytes spill stores", report)[1])
            shared = kernel.metadata.shared
            name = launched.name
            print(f"{arch} {precision} {shape} {name}: {registers} registers, {spilled} B spilled, {shared} B shared")
            assert spilled == 0, (shape, name)
            assert shared <= 99 * 1024, (shape, name)  # what a block may have on sm_86, sm_89 and sm_120, the least
            if name == "sparse_conv_weight_gradient_sum":
                continue
            # the pipeline has the gathers, 16 bytes at a time (Hopper wants tf32 transposed: 4); tensor cores multiply
            assert f"cp.async.{'c' if tf32 else 'cg'}" in kernel.asm["ptx"], (shape, name)
            assert ("mma" in kernel.asm["ptx"]) == (precision != "float32"), (shape, name)


# ------------------------------------------------------------------------------------------------- on a GPU


def on_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not on_gpu(), reason="no GPU")(test))


@on_a_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [*AWKWARD, *NETWORK])
def test_a_gpu_computes_what_the_reference_defines(name, dtype):
    check_against_reference((AWKWARD | NETWORK)[name], dtype)


@on_a_gpu
def test_compute_sanitizer_finds_no_access_out_of_bounds():
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer of the CUDA toolkit is not installed")
    cases = f"{__file__}::{test_a_gpu_computes_what_the_reference_defines.__name__}"
    pytest_of_some = [sys.executable, "-m", "pytest", "-q", cases, "-k", "bfloat16 and (odd or transposed or 5^3)"]
    command = [sanitizer, "--tool=memcheck", "--target-processes=all", "--error-exitcode=99", *pytest_of_some]
    environment = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}  # arrays apart, so that bounds are theirs
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, (done.stdout + done.stderr)[-5000:]


@on_a_gpu
def test_a_gpu_multiplies_in_tensorfloat32_on_request_alone():
    m, *arrays = problem_data(NETWORK["level 3"])
    arrays = [jnp.asarray(a, jnp.float32) for a in arrays]
    full = conv_and_gradients(*arrays, m)
    with jax.default_matmul_precision("tensorfloat32"):
        rounded = conv_and_gradients(*arrays, m)
    for found, truth in zip(rounded, full, strict=True):
        assert (found != truth).any()
        assert_close(found, truth, 2.0**-10)


@on_a_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["stem", "level 0", "down 0 to 1", "up 1 to 0"])
def test_a_gpu_gives_the_same_bits_every_time(name, dtype):
    m, *arrays = problem_data(NETWORK[name])
    arrays = [jnp.asarray(a, dtype) for a in arrays]
    first, *others = (conv_and_gradients(*arrays, m, NETWORK[name].transposed) for _ in range(4))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@on_a_gpu
@pytest.mark.parametrize("mode, tolerance", [("eval", 2e-5), ("train", 1e-4)])
def test_the_network_on_a_gpu_is_minkowski_engines(shared, mode, tolerance):
    golden = np.load(shared / "golden/net_room20k_768.npz")
    variables = golden_variables(shared, 768)
    assert pallas_triton.unsupported("float32") is None
    out = inference.encode_voxels(variables, golden["coords"], golden["feats"], train=mode == "train")
    assert_close(out[golden["rows"]], golden[f"{mode}__out_rows"], tolerance)
