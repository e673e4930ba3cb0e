"""Batch norm, shortcut and ReLU at the end of a convolution: one definition, fused or not."""

import contextlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pallas_triton import QUICK, on_a_gpu, on_gpu
from test_sparse_conv import assert_close, problem_data
from test_triton_ir import interpreted  # noqa: F401 - a fixture

from kernels.sparse_conv import Epilogue, sparse_conv
from kernels.sparse_conv.shapes import AWKWARD, NETWORK
from kernels.sparse_conv.target import INTERPRET, targeting

TOLERANCE = {"float32": 2e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}
CASES = ("one voxel", "odd channels", "one channel out", "several scenes, stride 2", "several scenes, transposed")


def of_problem(problem, dtype="float32"):
    """Map, features, weights, and an epilogue that keeps two rows in three."""
    m, x, w, grad_out = problem_data(problem)
    rng = np.random.default_rng(1)
    mean, scale, bias = (jnp.asarray(v, jnp.float32) for v in rng.normal(size=(3, problem.out_channels)))
    keep = jnp.arange(len(grad_out)) % 3 > 0 if len(grad_out) > 1 else jnp.ones(1, bool)
    x, w, residual = (jnp.asarray(v, dtype) for v in (x, w, rng.normal(size=grad_out.shape)))
    return m, x, w, Epilogue(mean, scale, bias, keep, residual)


def expected_of(problem, m, x, w, epilogue):
    """In float64, by the reference."""
    with jax.enable_x64(True):
        wide = lambda v: None if v is None else v if v.dtype == bool else jnp.asarray(v, jnp.float64)  # noqa: E731
        conv = sparse_conv(wide(x), wide(w), m, transposed=problem.transposed, implementation="reference")
        end = Epilogue(*map(wide, epilogue))
        y = (conv - end.mean) * end.scale + end.bias + (0 if end.residual is None else end.residual)
        return np.where(end.keep[:, None], np.maximum(y, 0), 0)


def check(problem, implementation, dtype="float32"):
    m, x, w, full = of_problem(problem, dtype)
    for epilogue in (full, full._replace(residual=None)):

        def conv(x, w, epilogue):
            options = dict(transposed=problem.transposed, implementation=implementation, epilogue=epilogue)
            return sparse_conv(x, w, m, **options)

        out = jax.jit(conv, compiler_options=None if on_gpu() else QUICK)(x, w, epilogue)
        assert out.dtype == dtype and not np.asarray(out)[~np.asarray(full.keep)].any()
        assert_close(out, expected_of(problem, m, x, w, epilogue), TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["xla", "cpu", "pallas_triton"])
@pytest.mark.parametrize("name", CASES)
def test_the_rows_are_normalised_added_to_and_cut_at_zero(name, implementation):
    with targeting(INTERPRET) if implementation == "pallas_triton" else contextlib.nullcontext():
        check(AWKWARD[name], implementation)


@pytest.mark.parametrize("implementation", ["xla", "cpu", "pallas_triton"])
def test_a_number_that_is_none_is_not_hidden(implementation):
    m, x, w, epilogue = of_problem(AWKWARD["several scenes, transposed"]._replace(voxels=150))
    x, keep = x.at[5].set(jnp.nan), np.asarray(epilogue.keep)
    with targeting(INTERPRET) if implementation == "pallas_triton" else contextlib.nullcontext():
        conv = jax.jit(lambda x: sparse_conv(x, w, m, transposed=True, implementation=implementation))
        fused = sparse_conv(x, w, m, transposed=True, implementation=implementation, epilogue=epilogue)
        np.testing.assert_array_equal(np.isnan(fused), np.isnan(conv(x)) & keep[:, None])
    assert np.isnan(fused).any()


def test_half_precision_is_rounded_after_the_epilogue():
    with targeting(INTERPRET):
        check(AWKWARD["several scenes"], "pallas_triton", "bfloat16")


@pytest.mark.parametrize("name", ["odd channels", "level 3", "up 4 to 3"])
def test_the_ir_of_the_fused_kernel_does_the_same_within_bounds(name, interpreted):  # noqa: F811
    check((AWKWARD | NETWORK)[name]._replace(voxels=150), "pallas_triton")


def test_gradients_through_the_fused_kernel_are_those_of_two_passes():
    problem = AWKWARD["several scenes, transposed"]._replace(voxels=150)
    m, x, w, epilogue = of_problem(problem)

    @jax.jit
    def loss(arrays):
        x, w, mean, scale, bias, residual = arrays
        end = Epilogue(mean, scale, bias, epilogue.keep, residual)
        return jnp.sin(sparse_conv(x, w, m, transposed=True, implementation=implementation, epilogue=end)).sum()

    arrays = (x, w, *epilogue[:3], epilogue.residual)
    implementation = "xla"
    expected = jax.grad(loss)(arrays)
    implementation = "pallas_triton"
    jax.clear_caches()
    with targeting(INTERPRET):
        found = jax.grad(loss)(arrays)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), found, expected)


def test_an_epilogue_of_other_rows_or_channels_is_refused():
    m, x, w, epilogue = of_problem(AWKWARD["odd channels"])
    for name, value in {"bias": epilogue.bias[:-1], "keep": epilogue.keep[1:], "residual": epilogue.residual.T}.items():
        with pytest.raises(ValueError, match=rf"epilogue.{name} has shape .*expected"):
            sparse_conv(x, w, m, epilogue=epilogue._replace(**{name: value}))
    with pytest.raises(ValueError, match=r"epilogue.mean has shape \(\): expected"):
        inspect.unwrap(sparse_conv)(x, w, m, epilogue=epilogue._replace(mean=None))


@on_a_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [*AWKWARD, *NETWORK])
def test_a_gpu_ends_a_convolution_as_defined(name, dtype):
    check((AWKWARD | NETWORK)[name], "pallas_triton", dtype)
