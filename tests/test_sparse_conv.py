"""Sparse convolution: MinkowskiEngine's numbers, the reference, and the laws a convolution obeys."""

import functools
import inspect
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels.sparse_conv import cpu, sparse_conv
from kernels.sparse_conv.shapes import AWKWARD, NETWORK
from kernels.voxel_grid import build_pyramid, kernel_map, next_bucket, repad

IMPLEMENTATIONS = ("reference", "xla")  # in every dtype; "cpu" computes in float32
# golden/README.md: largest error by largest magnitude, of one op
TOLERANCE = {np.float32: 2e-6, np.float64: 1e-12}
CASES = ("conv_k3s1", "conv_k3s1_ts2", "conv_k2s2", "conv_k2s2_ts2", "conv_k5s1", "convtr_k2s2")


def assert_close(found, expected, tolerance):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@functools.partial(jax.jit, static_argnames=("transposed", "implementation"))
def conv_and_gradients(x, w, grad_out, m, transposed, implementation):
    """Output and both gradients."""
    conv = functools.partial(sparse_conv, kernel_map=m, transposed=transposed, implementation=implementation)
    out, pull_back = jax.vjp(conv, x, w)
    return out, *pull_back(grad_out)


def run(x, w, grad_out, m, transposed, implementation, dtype):
    with jax.enable_x64(True):
        arrays = (jnp.asarray(np.asarray(a), dtype) for a in (x, w, grad_out))
        results = conv_and_gradients(*arrays, m, transposed, implementation)
        assert all(r.dtype == dtype for r in results)
        return [np.asarray(r, np.float64) for r in results]


def problem_data(problem, seed=0):
    """Map, features, weights and an output gradient of a named problem."""
    m, _ = kernel_map(
        problem.coords(seed),
        kernel_size=problem.kernel_size,
        stride=problem.stride,
        tensor_stride=problem.tensor_stride,
    )
    rng = np.random.default_rng(seed)
    num_in, num_out = (m.num_out, m.num_in) if problem.transposed else (m.num_in, m.num_out)
    shapes = (
        (num_in, problem.in_channels),
        (m.kernel_volume, problem.in_channels, problem.out_channels),
        (num_out, problem.out_channels),
    )
    return m, *(rng.normal(size=shape) for shape in shapes)


# ------------------------------------------------------------------------------------------- MinkowskiEngine


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "cpu"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("file", ["ops_a", "ops_b"])
def test_forward_and_both_gradients_are_minkowski_engines(shared, file, case, implementation):
    golden = np.load(shared / "golden" / f"{file}.npz")

    def stored(name):
        return golden[f"{case}__{name}"]

    transposed = case.startswith("convtr")
    if transposed:
        m, out_coords = kernel_map(stored("fine_coords"), kernel_size=2, stride=2)
        x, expected_coords = stored("coarse_feats"), stored("coarse_coords")
    else:
        size, stride, tensor_stride = map(int, stored("meta"))
        m, out_coords = kernel_map(stored("in_coords"), kernel_size=size, stride=stride, tensor_stride=tensor_stride)
        x, expected_coords = stored("in_feats"), stored("out_coords")
    np.testing.assert_array_equal(out_coords, expected_coords)
    for dtype, tolerance in TOLERANCE.items():
        if implementation == "cpu" and dtype != np.float32:
            continue
        found = run(x, stored("kernel"), stored("grad_out"), m, transposed, implementation, dtype)
        for name, result in zip(("out", "grad_in", "grad_kernel"), found, strict=True):
            assert_close(result, stored(name), tolerance)


# ------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize("name", [*AWKWARD, *NETWORK])
def test_every_implementation_computes_what_the_reference_defines(name, implementation):
    awkward = name in AWKWARD
    problem = AWKWARD[name] if awkward else NETWORK[name]._replace(voxels=min(NETWORK[name].voxels, 700))
    dtype = np.float64 if awkward and implementation == "xla" else np.float32
    m, *arrays = problem_data(problem)
    arrays = [a.astype(dtype) for a in arrays]
    expected = run(*arrays, m, problem.transposed, "reference", np.float64)
    found = run(*arrays, m, problem.transposed, implementation, dtype)
    for result, truth in zip(found, expected, strict=True):
        assert_close(result, truth, TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_rounded_once_at_the_end(implementation):
    problem = AWKWARD["several scenes"]
    m, *arrays = problem_data(problem)
    x, w, grad_out = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in arrays)
    expected = run(x, w, grad_out, m, False, "reference", np.float64)
    found = run(x, w, grad_out, m, False, implementation, jnp.bfloat16)
    last_bit = 2.0**-8
    assert_close(found[0], expected[0], last_bit)
    if implementation == "xla":
        assert_close(found[1], expected[1], last_bit)
        assert_close(found[2], expected[2], last_bit)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kernel_size, transposed", [(3, False), (5, False), (2, False), (2, True)])
def test_gradients_are_those_of_finite_differences(kernel_size, transposed, implementation):
    problem = AWKWARD["several scenes"]._replace(voxels=60, kernel_size=kernel_size, transposed=transposed)
    m, x, w, _ = problem_data(problem)

    @jax.jit
    def conv(x, w):
        return sparse_conv(x, w, m, transposed=transposed, implementation=implementation)

    with jax.enable_x64(True):
        check_grads(conv, (jnp.asarray(x), jnp.asarray(w)), order=1, modes=("rev",), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize("name", ["several scenes", "several scenes, stride 2"])
def test_gradients_of_gradients_and_vmap_are_those_of_the_reference(name, implementation):
    check_second_order_and_vmap(AWKWARD[name], implementation)


def check_second_order_and_vmap(problem, implementation):
    m, x, w, _ = problem_data(problem)

    @functools.partial(jax.jit, static_argnums=0)
    def compute(implementation, x, w):
        conv = functools.partial(
            sparse_conv, kernel_map=m, transposed=problem.transposed, implementation=implementation
        )

        def penalty(x, w):  # every second derivative there is has a part in its gradients
            slopes = jax.grad(lambda x, w: jnp.sin(conv(x, w)).sum(), argnums=(0, 1))(x, w)
            return sum(jnp.square(slope).sum() for slope in slopes)

        stacked = jnp.stack([w, -2 * w])
        return *jax.grad(penalty, argnums=(0, 1))(x, w), jax.vmap(conv, (None, 0))(x, stacked)

    found = compute(implementation, jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
    with jax.enable_x64(True):
        expected = compute("reference", jnp.asarray(x), jnp.asarray(w))
    for one, truth in zip(found, expected, strict=True):
        assert one.dtype == jnp.float32
        assert_close(one, truth, 1e-5)


# ------------------------------------------------------------------------------------------ threads of a CPU


@pytest.mark.parametrize("name", ["odd channels", "several scenes, stride 2", "more than one tile per offset"])
def test_any_number_of_threads_gives_the_same_bits(monkeypatch, name):
    problem = AWKWARD[name]._replace(voxels=3000)
    m, *arrays = problem_data(problem)
    results = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(cpu, "_threads", lambda threads=threads: threads)
        jax.clear_caches()
        results.append(run(*arrays, m, problem.transposed, "cpu", np.float32))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_calls_that_run_at_the_same_time_do_not_disturb_each_other(monkeypatch):
    """More calls than threads, each cut into chunks that wait for the same threads."""
    monkeypatch.setattr(cpu, "_threads", lambda: 4)
    problem = AWKWARD["odd channels"]._replace(voxels=4000)
    m, x, w, _ = problem_data(problem)
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    conv = jax.jit(lambda x: sparse_conv(x, w, m, implementation="cpu"))
    expected = np.asarray(conv(x))
    with ThreadPoolExecutor(16) as pool:
        for found in pool.map(lambda _: np.asarray(conv(x)), range(200)):
            np.testing.assert_array_equal(found, expected)


# ------------------------------------------------------------------------------------------------------ laws


def test_transposed_is_the_adjoint():
    """<conv(x; W), y> == <x, conv_transposed(y; W^T)>."""
    m, x, w, y = problem_data(AWKWARD["several scenes, stride 2"])
    with jax.enable_x64(True):
        x, w, y = map(jnp.asarray, (x, w, y))
        there = jnp.vdot(sparse_conv(x, w, m), y)
        back = jnp.vdot(x, sparse_conv(y, w.swapaxes(1, 2), m, transposed=True))
        np.testing.assert_allclose(there, back, rtol=1e-12)


def test_permuted_voxels_give_permuted_outputs():
    problem = AWKWARD["several scenes, 5^3"]
    coords = problem.coords()
    _, x, w, _ = problem_data(problem)
    order = np.random.default_rng(1).permutation(len(coords))
    m, _ = kernel_map(coords, kernel_size=5)
    shuffled, _ = kernel_map(coords[order], kernel_size=5)
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    assert_close(sparse_conv(x[order], w, shuffled), sparse_conv(x, w, m)[order], 2e-6)


def unet(pyramid, x, weights):
    """One convolution of each kind, down one level and up again."""
    stem, level0, down, level1, up = weights
    x = sparse_conv(x, stem, pyramid.stem)
    y = sparse_conv(sparse_conv(x, level0, pyramid.submanifold[0]), down, pyramid.down[0])
    y = sparse_conv(y, level1, pyramid.submanifold[1])
    return sparse_conv(y, up, pyramid.down[0], transposed=True)


def unet_weights():
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.normal(size=shape) / 8, jnp.float32)
        for shape in ((125, 3, 4), (27, 4, 4), (8, 4, 5), (27, 5, 5), (8, 5, 2))
    ]


def padded(x, pyramid, fill=0.0):
    out = np.full((pyramid.bucket, x.shape[1]), fill, np.float32)
    out[: len(x)] = x
    return jnp.asarray(out)


@pytest.fixture(scope="module")
def scene():
    coords = AWKWARD["odd channels"]._replace(voxels=900).coords()
    return coords, np.random.default_rng(2).normal(size=(900, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def output(scene):
    coords, x = scene
    pyramid = build_pyramid(coords)
    return np.asarray(unet(pyramid, padded(x, pyramid), unet_weights()))


def test_padding_reaches_no_voxel_whatever_it_holds_and_stays_zero(scene, output):
    coords, x = scene
    pyramid = build_pyramid(coords)
    larger = repad(pyramid, next_bucket(pyramid.bucket + 1))
    for p in (pyramid, larger):
        out = np.asarray(unet(p, padded(x, p, fill=np.nan), unet_weights()))
        np.testing.assert_array_equal(out[: len(x)], output[: len(x)])
        assert not out[len(x) :].any()


def test_another_scene_in_the_batch_changes_nothing(scene, output):
    coords, x = scene
    other = AWKWARD["several scenes"].coords(7) + np.array([1, 0, 0, 0], np.int32)
    pyramid = build_pyramid(np.concatenate([other, coords]))
    both = np.concatenate([np.ones((len(other), 3), np.float32), x])
    out = np.asarray(unet(pyramid, padded(both, pyramid), unet_weights()))[len(other) : len(both)]
    assert_close(out, output[: len(x)], 2e-6)


def test_a_cloud_shifted_by_the_coarsest_stride_gives_the_same_output(scene, output):
    coords, x = scene
    pyramid = build_pyramid(coords + np.array([0, 16, -160, 48], np.int32))
    np.testing.assert_array_equal(unet(pyramid, padded(x, pyramid), unet_weights()), output)


def test_it_is_the_same_under_jit_and_on_each_replica_of_pmap(scene, output):
    coords, x = scene
    pyramid = build_pyramid(coords)
    weights = unet_weights()
    assert_close(jax.jit(unet)(pyramid, padded(x, pyramid), weights), output, 2e-6)
    replicas = jax.tree.map(lambda *leaves: np.stack(leaves), pyramid, repad(pyramid, pyramid.bucket, pyramid.spread))
    out = jax.pmap(unet, in_axes=(0, 0, None))(replicas, np.stack([padded(x, pyramid)] * 2), weights)
    for replica in np.asarray(out):
        assert_close(replica, output, 2e-6)


def test_numpy_arrays_are_taken_as_jax_takes_them():
    m, x, w, _ = problem_data(AWKWARD["odd channels"])
    assert x.dtype == np.float64
    out = sparse_conv(x, w, m)
    np.testing.assert_array_equal(out, sparse_conv(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), m))


# ----------------------------------------------------------------------------------------------------- errors


def test_errors_name_both_shapes_and_the_axis():
    m, x, w, _ = problem_data(AWKWARD["odd channels"])
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    with pytest.raises(ValueError, match=r"features \(300, 7\) and .* 301 input rows .*axis 0.*300 != 301"):
        sparse_conv(x[:-1], w, m)
    with pytest.raises(ValueError, match=r"weights \(26, 7, 13\) and .* 27 offsets .*axis 0.*26 != 27"):
        sparse_conv(x, w[1:], m)
    with pytest.raises(ValueError, match=r"\(301, 6\) and weights \(27, 7, 13\) .*input channels.*6 != 7"):
        sparse_conv(x[:, 1:], w, m)
    with pytest.raises(ValueError, match=r"weights \(27, 7, 0\) have no channels"):
        sparse_conv(x, w[:, :, :0], m)
    with pytest.raises(ValueError, match="features are bfloat16 and weights float32"):
        sparse_conv(x.astype(jnp.bfloat16), w, m)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), m)
    with pytest.raises(ValueError, match=r"kernel_map has arrays of shape \(2, .*where maps are stacked over devices"):
        sparse_conv(x, w, stacked)
    with jax.enable_x64(True), pytest.raises(ValueError, match="kernel_map has arrays of int64, .*: expected int32"):
        sparse_conv(x, w, jax.tree.map(lambda leaf: leaf.astype(np.int64), m))
    unannotated = inspect.unwrap(sparse_conv)  # its own checks, without pytest's of the annotations
    with pytest.raises(ValueError, match=r"kernel_map is a tuple: .*kernel_map\(\) returns \(map, coords\)"):
        unannotated(x, w, (m, None))
    with pytest.raises(ValueError, match="features are int8: expected floats"):
        unannotated(x.astype(jnp.int8), w.astype(jnp.int8), m)
    with pytest.raises(ValueError, match="'cuda': expected one of reference, xla, cpu, pallas_triton, or None"):
        sparse_conv(x, w, m, implementation="cuda")
