"""float32 is multiplied in full wherever the network, its portable convolution and its losses multiply."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sparse_conv import problem_data

from ggsd_jax.losses import self_distillation_loss
from ggsd_jax.minkunet import MinkUNet
from ggsd_jax.self_distillation import pseudo_labels
from kernels.sparse_conv import sparse_conv
from kernels.sparse_conv.shapes import AWKWARD
from kernels.voxel_grid import build_pyramid


def convolution():
    m, *arrays = problem_data(AWKWARD["odd channels"])
    x, w, grad_out = (jnp.asarray(a, jnp.float32) for a in arrays)

    def compute(x, w, grad_out):
        out, pull_back = jax.vjp(lambda x, w: sparse_conv(x, w, m, implementation="xla"), x, w)
        return out, pull_back(grad_out)

    return compute, (x, w, grad_out)


def network():
    pyramid = build_pyramid(AWKWARD["odd channels"].coords())
    feats = jnp.ones((pyramid.bucket, 3))
    model = MinkUNet((1,) * 8, (4,) * 8, out_channels=5, init_dim=4, implementation="xla")
    variables = model.init(jax.random.key(0), feats, pyramid, train=False)

    def loss(params):
        out, _ = model.apply(variables | {"params": params}, feats, pyramid, train=True, mutable=["batch_stats"])
        return jnp.square(out).sum()

    return jax.value_and_grad(loss), (variables["params"],)


def stage_2():
    features, text, labels = jnp.ones((9, 4)), jnp.ones((3, 4)), jnp.zeros(9, jnp.int32)

    def compute(features, text):
        labelled = pseudo_labels(features, text)
        loss = jax.value_and_grad(lambda x: self_distillation_loss(x, text, labels, labels >= 0, 0.01)[0])(features)
        return labelled, loss

    return compute, (features, text)


@pytest.mark.parametrize("make", [convolution, network, stage_2])
def test_gpus_are_told_to_multiply_float32_in_full_and_to_round_on_request_alone(make):
    compute, arguments = make()

    def precisions():
        program = jax.jit(lambda *a: compute(*a)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        products = re.findall(r"stablehlo\.dot_general .*", program)
        return {re.search(r"precision = \[(\w+), (\w+)\]|$", product).groups() for product in products}

    assert precisions() == {("HIGHEST", "HIGHEST")}
    with jax.default_matmul_precision("tensorfloat32"):
        assert precisions() == {("HIGH", "HIGH")}


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
def test_a_gpu_multiplies_in_full():
    compute, arguments = convolution()
    found = jax.jit(compute)(*arguments)
    with jax.enable_x64(True):
        double = [np.asarray(a, np.float64) for a in arguments]
        expected = jax.jit(compute)(*double)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max()), found, expected)
