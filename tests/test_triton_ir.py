"""The Triton IR that GPUs are given, interpreted: its numbers, its bounds, and the labels of a network through it."""

import functools

import jax
import numpy as np
import pytest
import triton_ir
from test_minkunet import assert_close, golden_variables
from test_pallas_triton import check_against_reference

from ggsd_jax import inference
from kernels.sparse_conv import pallas_triton
from kernels.sparse_conv.shapes import AWKWARD, NETWORK
from kernels.sparse_conv.target import targeting

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
    pytest.mark.skipif(jax.default_backend() == "gpu", reason="test_pallas_triton.py runs the kernels themselves"),
]

SMALL = {name: problem._replace(voxels=150) for name, problem in NETWORK.items()}
CASES = [(name, "float32") for name in AWKWARD | SMALL] + [(name, "bfloat16") for name in SMALL]


@pytest.fixture
def interpreted(monkeypatch):
    """Convolutions are traced for an A100, and their kernels' Triton IR is run in place of the GPU's."""
    compiled = pallas_triton._call

    def call(kernel, grid, out, plan, name, *arguments):
        launch = functools.partial(compiled, kernel, grid, out, plan, name)
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments]
        (lowered,) = triton_ir.lowered_kernels(launch, *shapes, arch="sm_80")

        def on_the_host(*arrays):
            result = np.empty(out.shape, out.dtype)
            triton_ir.run(lowered, [np.asarray(a) for a in arrays], [result])
            return result

        return jax.pure_callback(on_the_host, out, *arguments)

    monkeypatch.setattr(pallas_triton, "_call", call)
    with targeting("sm_80"):
        yield


@pytest.mark.parametrize("name, dtype", CASES)
def test_the_ir_computes_what_the_reference_defines_within_bounds_and_stores_everything_once(name, dtype, interpreted):
    check_against_reference((AWKWARD | SMALL)[name], dtype)


def test_the_network_through_the_ir_is_minkowski_engines_and_gives_the_labels_of_a_cpu(shared, interpreted):
    golden = np.load(shared / "golden/net_small_768.npz")
    variables = golden_variables(shared, 768)
    words = np.random.default_rng(0).normal(size=(768, 20))
    jax.clear_caches()
    out = inference.encode_voxels(variables, golden["coords"], golden["feats"])
    jax.clear_caches()
    assert_close(out[golden["rows"]], golden["eval__out_rows"], 2e-5)
    with targeting("cpu"):
        on_cpu = inference.encode_voxels(variables, golden["coords"], golden["feats"])
    jax.clear_caches()
    np.testing.assert_array_equal((out @ words).argmax(1), (on_cpu @ words).argmax(1))
    assert len(np.unique((out @ words).argmax(1))) > 10
