"""The network against MinkowskiEngine's own numbers (rules, tolerances: golden/README.md), and its laws."""

import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ggsd_jax import inference, minkunet, openscene
from ggsd_jax.losses import point_distillation_loss
from ggsd_jax.minkunet import BasicBlock, MaskedBatchNorm, MinkUNet, SparseConv, architecture
from kernels.voxel_grid import build_pyramid, next_bucket, repad

NARROW = MinkUNet((2,) * 8, (4, 8, 16, 32, 16, 16, 12, 12), out_channels=96, init_dim=4)
STAGE_LEVEL = {"conv0p1s1": 0} | {f"block{i}": min(i, 8 - i) for i in range(1, 9)}
SMALL_BUCKET, SMALL_OUT = next_bucket(3000), 768  # both small cases run in one compiled program


def rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def golden_state(shapes: dict[str, tuple[int, ...]], salt: str = "") -> dict[str, np.ndarray]:
    """The README's weights, by torch name."""
    state = {}
    for name, shape in shapes.items():
        generator = rng(salt + name)
        if name.endswith(".running_var"):
            value = 0.5 + generator.random(shape)
        elif name.endswith(".kernel"):
            volume = shape[0] if len(shape) == 3 else 1
            value = generator.standard_normal(shape) * (1.0 / (shape[-2] * volume ** (2 / 3))) ** 0.5
        else:
            value = name.endswith(".weight") + 0.1 * generator.standard_normal(shape)
        state[name] = value.astype(np.float32)
    return state


def golden_variables(shared, out_channels: int):
    names = json.loads((shared / "golden/state_dict_names.json").read_text())[f"out_{out_channels}"]
    shapes = {name: tuple(shape) for name, shape, _ in names if not name.endswith("num_batches_tracked")}
    return openscene.variables_from_state_dict(golden_state(shapes))


def by_torch_name(variables) -> dict[str, np.ndarray]:
    return {openscene._name(path): np.asarray(leaf) for path, leaf in flatten_dict(variables).items()}


def assert_close(actual, expected, tolerance, what="", scale=None):
    """Largest error relative to the largest magnitude (or to `scale`)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    error = np.abs(actual - expected)
    limit = tolerance * (np.abs(expected).max() if scale is None else scale)
    assert (error <= limit).all(), f"{what}: error {error.max():.3g}, allowed {np.max(limit):.3g}"


def probe(name: str, values: np.ndarray) -> np.ndarray:
    channels = values.shape[1]
    return values @ rng(f"probe:{name}").standard_normal((channels, 4)) / channels**0.5


# ------------------------------------------------------------------------------------------ whole networks


def padded(array: np.ndarray, *shape: int) -> np.ndarray:
    return np.pad(array, [(0, n - m) for n, m in zip(shape, array.shape, strict=True)])


def is_stage(module, method) -> bool:
    return method == "__call__" and (module.name == "conv0p1s1" or isinstance(module, BasicBlock))


@functools.partial(jax.jit, static_argnums=0)
def run_with_gradients(train, params, batch_stats, feats, targets, pyramid):
    model = MinkUNet(*architecture("MinkUNet18A")[:2], SMALL_OUT, dtype=jnp.float64)

    def loss(params, feats):
        out, updated = model.apply(
            {"params": params, "batch_stats": batch_stats}, feats, pyramid, train,
            mutable=["batch_stats", "intermediates"], capture_intermediates=is_stage,
        )  # fmt: skip
        total, count = point_distillation_loss(out, targets, pyramid.mask(0))
        return total / count, (out, updated)

    (value, (out, updated)), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, feats)
    return value, out, updated, *grads


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", ["net_small_768", "net_small_512"])
def test_float64_network_reproduces_minkowski_engine(shared, case, mode):
    """Output, stages, loss, gradients and running statistics."""
    golden = np.load(shared / f"golden/{case}.npz")
    coords, channels = golden["coords"], int(golden["out_channels"])
    variables = golden_variables(shared, channels)
    variables["params"]["final"]["kernel"] = padded(variables["params"]["final"]["kernel"], 96, SMALL_OUT)
    targets = rng(str(golden["salt"]) + "target").standard_normal((len(coords), channels), dtype=np.float32)
    pyramid = build_pyramid(coords, bucket=SMALL_BUCKET)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: x.astype(np.float64), variables)
        feats = padded(golden["feats"].astype(np.float64), SMALL_BUCKET, 3)
        loss, out, updated, grads, grad_feats = jax.device_get(
            run_with_gradients(
                mode == "train", double["params"], double["batch_stats"], feats,
                padded(targets.astype(np.float64), SMALL_BUCKET, SMALL_OUT), pyramid,
            )
        )  # fmt: skip
    g = {key.removeprefix(f"{mode}__"): golden[key] for key in golden.files if key.startswith(f"{mode}__")}

    assert not out[len(coords) :].any(), "padding rows of the output"
    out = out[: len(coords), :channels]
    assert_close(out[golden["rows"]], g["out_rows"], 1e-6, "out_rows")
    assert_close(probe("out", out), g["out_proj"], 1e-6, "out_proj")
    assert_close(np.linalg.norm(out, axis=1), g["out_row_norm"], 1e-6, "out_row_norm")
    assert_close(out.mean(0), g["out_mean"], 1e-6, "out_mean")
    assert_close(out.std(0), g["out_std"], 1e-6, "out_std")

    stages = {name: value["__call__"][0] for name, value in updated["intermediates"].items()}
    for stage, level in STAGE_LEVEL.items():
        if stage == "conv0p1s1" and mode == "eval":  # ends with its batch norm there
            continue
        values = stages[stage if stage == "conv0p1s1" else f"{stage}_1"][: pyramid.num_voxels[level]]
        if level:
            expected_coords = golden[f"stage_coords_ts{2**level}"]
            assert np.array_equal(pyramid.coords[level][: len(values)], expected_coords)
        assert_close(probe(stage, values), g[f"stage_{stage}_proj"], 1e-6, stage)
        assert_close(values.mean(0), g[f"stage_{stage}_mean"], 1e-6, stage)
        assert_close(values.std(0), g[f"stage_{stage}_std"], 1e-6, stage)

    if "loss" not in g:  # no gradients of this case in this mode
        return
    assert_close(loss, g["loss"], 1e-6, "loss")
    assert_close(grad_feats[: len(coords)], g["grad_feats"], 1e-6, "grad_feats")
    assert not grad_feats[len(coords) :].any(), "gradient of padding rows"
    grads["final"]["kernel"] = grads["final"]["kernel"][:, :channels]
    grads = by_torch_name({"params": grads})
    assert set(grads) == set(g["grad_names"])
    for name, norm, value in zip(g["grad_names"], g["grad_norm"], g["grad_probe"], strict=True):
        grad = grads[name]
        assert_close(np.linalg.norm(grad), norm, 1e-6, name)
        assert_close(np.sum(grad * rng(f"probe:{name}").standard_normal(grad.shape)), value, 1e-6, name, norm)
        if f"grad_{name}" in g:
            assert_close(grad, g[f"grad_{name}"], 1e-6, name)

    if mode == "eval":
        return
    statistics = by_torch_name({"batch_stats": updated["batch_stats"]})
    assert set(statistics) == set(g["bn_names"])
    for name, total, value in zip(g["bn_names"], g["bn_sum"], g["bn_probe"], strict=True):
        new = statistics[name]
        scale = np.abs(new).sum()
        assert_close(new.sum(), total, 1e-6, name, scale)
        assert_close(np.sum(new * rng(f"probe:{name}").standard_normal(new.shape)), value, 1e-6, name, scale)
        if f"new_{name}" in g:
            assert_close(new, g[f"new_{name}"], 1e-6, name)


@pytest.mark.parametrize(
    ("case", "mode", "tolerance"),
    [
        ("net_room20k_768", "eval", 2e-5),
        ("net_room20k_768", "train", 1e-4),
    ],
)
def test_float32_features_are_minkowski_engines(shared, case, mode, tolerance):
    """Through `encode_voxels`, from shuffled rows."""
    golden = np.load(shared / f"golden/{case}.npz")
    variables = golden_variables(shared, int(golden["out_channels"]))
    order = np.random.default_rng(0).permutation(len(golden["coords"]))
    out = np.empty((len(order), int(golden["out_channels"])), np.float32)
    out[order] = inference.encode_voxels(
        variables, golden["coords"][order], golden["feats"][order], train=mode == "train"
    )
    rows, expected = out[golden["rows"]], golden[f"{mode}__out_rows"]
    assert_close(rows, expected, tolerance, "out_rows")
    assert_close(probe("out", out), golden[f"{mode}__out_proj"], tolerance, "out_proj")
    rows, expected = rows.astype(np.float64), expected.astype(np.float64)
    cosine = (rows * expected).sum(1) / (np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1))
    assert cosine.min() > 1 - 1e-10


@pytest.mark.parametrize(
    ("mode", "dtype", "tolerance"),
    [("eval", "float64", 1e-6), ("train", "float64", 1e-6), ("eval", "float32", 2e-5)],
)
@pytest.mark.parametrize("name", ["narrow_ckpt", "narrow_ckpt_ddp"])
def test_narrow_checkpoints_give_minkowski_engines_features(shared, name, mode, dtype, tolerance):
    variables, _ = openscene.load_checkpoint(shared / f"golden/{name}.pth.tar")
    golden = np.load(shared / f"golden/{name}_golden.npz")
    out = inference.encode_voxels(variables, golden["coords"], golden["feats"], train=mode == "train", dtype=dtype)
    assert out.dtype == dtype
    assert_close(out, golden[f"{mode}__out"], tolerance)


# ------------------------------------------------------------------------------------------ six steps of Adam


@functools.partial(jax.jit, static_argnums=(0, 1))
def adam_step(model, rates, params, batch_stats, opt_state, pyramid, targets, supervised):
    feats = jnp.ones((pyramid.bucket, 3), targets.dtype)

    def loss(params):
        variables = {"params": params, "batch_stats": batch_stats}
        out, updated = model.apply(variables, feats, pyramid, train=True, mutable=["batch_stats"])
        total, count = point_distillation_loss(out, targets, supervised)
        return total / count, updated["batch_stats"]

    (value, batch_stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    optimizer = optax.adam(lambda step: jnp.asarray(rates)[step])
    updates, opt_state = optimizer.update(grads, opt_state)
    return value, optax.apply_updates(params, updates), batch_stats, opt_state


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["narrow_ckpt", "narrow_ckpt_ddp"])
def test_six_adam_steps_follow_the_golden_trajectory(shared, name, dtype):
    golden = np.load(shared / f"golden/{name}_golden.npz")
    stored, _ = openscene.load_checkpoint(shared / f"golden/{name}.pth.tar")
    salt = str(golden["traj_salt"])
    shapes = {key: value.shape for key, value in by_torch_name(stored).items()}
    start = openscene.variables_from_state_dict(golden_state(shapes, salt))
    pyramids = [build_pyramid(golden[f"traj_coords{i}"]) for i in (0, 1)]
    losses = []
    with jax.enable_x64(dtype == "float64"):
        params, stats = (jax.tree.map(lambda x: jnp.asarray(x, dtype), start[c]) for c in ("params", "batch_stats"))
        opt_state = optax.adam(0.0).init(params)
        opt_state = (opt_state[0], optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)))
        for it in range(1, 7):
            pyramid = pyramids[(it - 1) % 2]
            n = int(pyramid.num_voxels[0])
            targets = rng(f"{salt}traj{it}").standard_normal((n, 96), dtype=np.float32)
            supervised = np.zeros(pyramid.bucket, bool)
            supervised[:n] = rng(f"{salt}mask{it}").random(n) < 0.6
            loss, params, stats, opt_state = adam_step(
                NARROW.clone(dtype=dtype), tuple(golden["traj_lr_used"].tolist()), params, stats, opt_state,
                pyramid, padded(targets.astype(dtype), pyramid.bucket, 96), supervised,
            )  # fmt: skip
            losses.append(float(loss))
        final = by_torch_name(jax.device_get({"params": params, "batch_stats": stats}))

    assert_close(losses, golden["traj_losses_f64"], 1e-6, "losses")
    # float32: Adam divides by gradients that nearly vanish; MinkowskiEngine's own run is 2 % off for some tensors
    tolerance = 1e-6 if dtype == "float64" else 5e-2
    first = by_torch_name(start)
    norms = dict(zip(golden["traj_param_names"], golden["traj_update_norm"], strict=True))
    for key, value in zip(golden["traj_param_names"], golden["traj_update_probe"], strict=True):
        update = final[key].astype(np.float64) - first[key]
        assert_close(np.linalg.norm(update), norms[key], tolerance, key)
        generator = rng(f"probe:{key}")
        assert_close(np.sum(update * generator.standard_normal(update.shape)), value, tolerance, key, norms[key])
    for key in golden.files:
        if key.startswith("traj_f64__"):
            name, expected = key.removeprefix("traj_f64__"), golden[key]
            error = np.linalg.norm(final[name] - expected)
            assert error <= tolerance * norms.get(name, np.linalg.norm(expected)), name


# ------------------------------------------------------------------------------------------ laws


def surface(seed: int, n: int) -> np.ndarray:
    """Distinct voxels of three planes, negative coordinates included."""
    generator = np.random.default_rng(seed)
    coords = np.zeros((4 * n, 4), np.int32)
    coords[:, 1:] = generator.integers(-12, 25, (4 * n, 3))
    coords[np.arange(4 * n), generator.integers(1, 4, 4 * n)] = generator.integers(-1, 1, 4 * n)
    return generator.permutation(np.unique(coords, axis=0))[:n]


def random_variables(model: MinkUNet, in_channels: int):
    generator = np.random.default_rng(1)
    return unflatten_dict(
        {
            path: generator.uniform(-0.5 if path[-1] == "kernel" else 0.5, 1.0, shape).astype(np.float32)
            for path, shape in minkunet._variable_shapes(model, in_channels).items()
        }
    )


def test_padding_never_changes_a_valid_row():
    model = MinkUNet((1, 0, 0, 0, 0, 0, 0, 1), (6,) * 8, out_channels=5, init_dim=4)
    variables = random_variables(model, 2)
    coords = surface(3, 700)
    pyramid = build_pyramid(coords)
    apply = jax.jit(lambda feats, pyramid: model.apply(variables, feats, pyramid, True, mutable=["batch_stats"]))
    feats = np.random.default_rng(4).standard_normal((pyramid.bucket, 2)).astype(np.float32)
    out, updated = apply(feats, pyramid)
    assert not np.asarray(out[700:]).any()

    feats[700:] = np.nan
    with_garbage, garbage_updated = apply(feats, pyramid)
    assert np.array_equal(out, with_garbage)
    jax.tree.map(np.testing.assert_array_equal, updated, garbage_updated)

    larger = next_bucket(pyramid.bucket + 1)
    out_larger, updated_larger = apply(padded(feats[:700], larger, 2), repad(pyramid, larger))
    assert_close(out_larger[:700], np.asarray(out[:700]), 1e-5)
    assert not np.asarray(out_larger[700:]).any()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), updated, updated_larger)


@pytest.mark.parametrize("name", ["MinkUNet14C", "MinkUNet18D", "MinkUNet34B"])
def test_architecture_names_its_blocks_and_widths(name):
    layers, planes, init_dim = architecture(name)
    model = MinkUNet(layers, planes, 7, init_dim)
    shapes = minkunet._variable_shapes(model, 3)
    for i, (blocks, width) in enumerate(zip(layers, planes, strict=True), start=1):
        for j in range(blocks):
            assert shapes["params", f"block{i}_{j}", "conv2", "kernel"] == (27, width, width)
        assert ("params", f"block{i}_{blocks}", "conv2", "kernel") not in shapes
    assert ("params", "block1_0", "downsample_0", "kernel") not in shapes
    assert shapes["params", "block5_0", "downsample_0", "kernel"] == (planes[4] + planes[2], planes[4])
    assert shapes["params", "final", "kernel"] == (planes[7], 7)
    assert minkunet.from_shapes(shapes, layers) == model


def test_recomputed_blocks_have_the_gradients_of_kept_ones_and_keep_less():
    coords = np.unique(rng("remat").integers(0, 20, (1500, 4)) // [1500, 1, 1, 1], axis=0).astype(np.int32)
    pyramid = build_pyramid(coords)
    feats = np.ones((pyramid.bucket, 3), np.float32)
    plain = MinkUNet((0,) * 7 + (3,), (4,) * 8, out_channels=4, init_dim=4)  # three blocks on the finest level
    variables = plain.init(jax.random.key(0), feats, pyramid, train=False)
    gradients, kept = [], []
    for model in (plain, plain.clone(remat=1)):

        def loss(params, model=model):
            state = {"params": params, "batch_stats": variables["batch_stats"]}
            features, updated = model.apply(state, feats, pyramid, train=True, mutable=["batch_stats"])
            return jnp.sum(features**2), updated

        gradients.append(jax.jit(jax.grad(loss, has_aux=True))(variables["params"]))
        backward = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params, has_aux=True)[1], variables["params"])
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(backward) if leaf.shape[:1] == feats.shape[:1]))
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert_close(b, a, 1e-5)
    assert kept[1] < 0.6 * kept[0]


def test_unknown_architecture_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="MinkUNet18a.*did you mean 'MinkUNet18A'"):
        architecture("MinkUNet18a")


def test_initial_weights_have_minkowski_engines_spread():
    pyramid = build_pyramid(surface(7, 20))

    def initial(module, channels, *inputs):
        feats = jnp.ones((inputs[0].num_out if module.transposed else inputs[0].num_in, channels))
        return np.asarray(module.init(jax.random.key(0), feats, *inputs)["params"]["kernel"])

    assert initial(SparseConv(16), 3, pyramid.stem).std() == pytest.approx((2 / (125 * 16)) ** 0.5, rel=0.05)
    assert initial(SparseConv(32), 24, pyramid.down[0]).std() == pytest.approx((2 / (8 * 32)) ** 0.5, rel=0.05)
    up, limit = initial(SparseConv(32, transposed=True), 24, pyramid.down[0]), (8 * 32) ** -0.5
    assert 0.99 * limit < np.abs(up).max() <= limit and np.abs(up).mean() == pytest.approx(limit / 2, rel=0.05)
    pointwise = minkunet._pointwise(96, jnp.float32, "final").init(jax.random.key(0), jnp.ones((1, 48)))
    assert pointwise["params"]["kernel"].std() == pytest.approx((2 / 48) ** 0.5, rel=0.05)


# ------------------------------------------------------------------------------------------ batch norm


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-6)])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("file", ["ops_a", "ops_b"])
def test_batch_norm_is_minkowski_engines(shared, file, train, dtype, tolerance):
    golden = np.load(shared / f"golden/{file}.npz")
    before = {key.removeprefix("bn__"): golden[key] for key in golden.files if key.startswith("bn__")}
    prefix = "bn_train__" if train else "bn_eval__"
    expected = {key.removeprefix(prefix): golden[key] for key in golden.files if key.startswith(prefix)}
    n, channels = before["in_feats"].shape
    norm = MaskedBatchNorm(channels, dtype=dtype)
    mask = np.arange(n + 37) < n
    with jax.enable_x64(dtype == "float64"):
        x, cotangent = (padded(before[k].astype(dtype), n + 37, before[k].shape[1]) for k in ("in_feats", "grad_out"))
        x[n:] = 1e3
        params = {"scale": before["weight"].astype(dtype), "bias": before["bias"].astype(dtype)}
        stats = {"mean": before["running_mean"].astype(dtype), "var": before["running_var"].astype(dtype)}

        def apply(params, x):
            variables = {"params": params, "batch_stats": stats}
            return norm.apply(variables, x, mask, train, mutable=["batch_stats"])

        out, vjp, updated = jax.vjp(apply, params, x, has_aux=True)
        grads, grad_in = vjp(cotangent)
    assert not np.asarray(out[n:]).any() and not np.asarray(grad_in[n:]).any()
    assert_close(out[:n], expected["out"], tolerance, "out")
    assert_close(grad_in[:n], expected["grad_in"], tolerance, "grad_in")
    assert_close(grads["scale"], expected["grad_weight"], tolerance, "grad_weight")
    assert_close(grads["bias"], expected["grad_bias"], tolerance, "grad_bias")
    assert_close(updated["batch_stats"]["mean"], expected["new_running_mean"], tolerance, "running_mean")
    assert_close(updated["batch_stats"]["var"], expected["new_running_var"], tolerance, "running_var")


@pytest.mark.parametrize("first, valid", [(1000.0, True), (1030.0, True), (np.nan, False)])
def test_statistics_of_channels_far_from_zero_do_not_cancel(first, valid):
    """Whatever the first row is: ordinary, 30 deviations off, or padding."""
    n = 20_000
    x = (1000 + np.random.default_rng(0).standard_normal((n, 3))).astype(np.float32)
    x[0], mask = first, np.arange(n) > -1
    mask[0] = valid
    norm, given = MaskedBatchNorm(3, momentum=1.0), jnp.asarray(x)
    variables = norm.init(jax.random.key(0), given, mask, True)
    out, updated = norm.apply(variables, given, mask, True, mutable=["batch_stats"])
    rows = x[mask].astype(np.float64)
    np.testing.assert_allclose(updated["batch_stats"]["var"], rows.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(out)[mask], (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5), atol=2e-4)
    assert not np.asarray(out)[~mask].any()


def test_four_replicas_with_unequal_counts_normalise_as_one_batch():
    """Output, gradients and running statistics, in float64 to rounding."""
    if jax.local_device_count() < 4:
        pytest.skip("needs four devices")
    generator = np.random.default_rng(8)
    counts, capacity, channels = (1, 17, 60, 0), 64, 5
    mask = np.arange(capacity) < np.array(counts)[:, None]

    def apply(params, x, mask, cotangent, axis_name):
        norm = MaskedBatchNorm(channels, axis_name, dtype="float64")
        stats = {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}

        def loss(params, x):
            variables = {"params": params, "batch_stats": stats}
            out, updated = norm.apply(variables, x, mask, True, mutable=["batch_stats"])
            return jnp.sum(out * cotangent), (out, updated["batch_stats"])

        (grads, grad_x), (out, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return (jax.lax.psum(grads, axis_name) if axis_name else grads), grad_x, out, stats

    with jax.enable_x64(True):
        x = 100 + generator.standard_normal((4, capacity, channels))
        cotangent = generator.standard_normal(x.shape)
        params = {"scale": generator.standard_normal(channels), "bias": generator.standard_normal(channels)}
        grads, grad_x, out, stats = jax.pmap(
            functools.partial(apply, axis_name="data"),
            "data",
            in_axes=(None, 0, 0, 0),
            devices=jax.devices()[:4],
        )(params, x, mask, cotangent)
        one = apply(params, x[mask], np.ones(mask.sum(), bool), cotangent[mask], None)
    assert_close(np.asarray(out)[mask], one[2], 1e-12, "out")
    assert_close(np.asarray(grad_x)[mask], one[1], 1e-12, "gradient in x")
    for replica in range(4):
        for part, expected in ((grads, one[0]), (stats, one[3])):
            jax.tree.map(lambda a, b, i=replica: assert_close(a[i], np.asarray(b), 1e-12), part, expected)


# ------------------------------------------------------------------------------------------ bad input


TINY = MinkUNet(architecture("MinkUNet14A").layers, (4, 4, 6, 8, 6, 4, 4, 4), out_channels=5, init_dim=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coords": np.zeros((3, 3), np.int32)}, r"coords is int32 \[3, 3\]: expected int32 \[N, 4\]"),
        ({"coords": np.zeros((3, 4), np.int64)}, r"coords is int64"),
        ({"coords": np.array([[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 3]], np.int32)}, "rows 0 and 2"),
        ({"coords": np.zeros((0, 4), np.int32), "feats": np.zeros((0, 2))}, "empty cloud"),
        ({"feats": np.ones((2, 2))}, r"feats has shape \[2, 2\]: expected \[3, 2\]"),
        ({"feats": np.ones((3, 3))}, r"the network's 2 input channels"),
        ({"feats": np.array([[1, 1], [1, np.nan], [1, 1]])}, "feats row 1"),
        ({"arch": "MinkUNet"}, "unknown architecture 'MinkUNet'"),
        ({"arch": "MinkUNet18A"}, "not those of a MinkUNet18A: .*block1_1/norm1/.* is missing"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"variables": {"params": {}}}, "params/conv0p1s1/kernel is missing"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "variables": random_variables(TINY, 2),
        "coords": np.array([[0, 1, 2, 3], [0, 1, 2, 4], [1, 1, 2, 3]], np.int32),
        "feats": np.ones((3, 2), np.float32),
        "arch": "MinkUNet14A",
    }
    with pytest.raises(ValueError, match=message):
        inference.encode_voxels(**(arguments | change))


def test_variables_of_another_width_are_named():
    flat = flatten_dict(random_variables(TINY, 2))
    flat["params", "bn0", "scale"] = np.ones(9, np.float32)
    coords = np.array([[0, 0, 0, 0]], np.int32)
    with pytest.raises(ValueError, match=r"params/bn0/scale has shape \(9,\), expected \(4,\)"):
        inference.encode_voxels(unflatten_dict(flat), coords, np.ones((1, 2)), arch="MinkUNet14A")
