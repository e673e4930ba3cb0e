"""Training: the two stages of GGSD, one step, and the loop that survives being killed."""

import functools
import itertools
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import logging
from flax import jax_utils
from jaxtyping import Array, Float, PyTree

from ggsd_jax import checkpoint, hosts, input_pipeline, prepare
from ggsd_jax.losses import (
    cross_entropy_loss,
    point_distillation_loss,
    self_distillation_loss,
    superpoint_distillation_loss,
)
from ggsd_jax.metric_log import StepLog
from ggsd_jax.minkunet import MinkUNet, architecture
from ggsd_jax.profiling import StepTrace
from ggsd_jax.protocol import class_vectors
from ggsd_jax.self_distillation import pseudo_labels, update_teacher, vote

AXIS = "data"  # replicas: one per device, of all processes
MODES = ("ggsd", "supervised")
SUPERVISED = 0  # the "stage" of training with labels
_NAMES = ("training with labels", "stage 1", "stage 2")


@flax.struct.dataclass
class TrainState:
    """Everything a run is made of: saved whole, restored whole."""

    step: Any  # int32 []; every leaf has a leading axis of replicas while training
    params: PyTree
    batch_stats: PyTree
    teacher: PyTree  # {"params", "batch_stats"}: the EMA of the network since the first step
    opt_state: PyTree


def make_model(config: ml_collections.ConfigDict, out_channels: int, axis_name: str | None = None) -> MinkUNet:
    """The network of `config.model` with `out_channels` features per voxel.

    Raises:
        ValueError: unknown `model.arch` or `model.dtype`, or `model.remat` outside 0..5.
    """
    arch = architecture(config.model.arch)
    if config.model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype is {config.model.dtype!r}: expected 'float32' or 'bfloat16'")
    if not 0 <= config.model.remat <= 5:
        raise ValueError(f"model.remat is {config.model.remat}: expected 0 (keep everything) to 5 (all levels)")
    width = config.model.width
    return MinkUNet(
        layers=arch.layers,
        planes=tuple(max(1, round(width * p)) for p in arch.planes),
        init_dim=max(1, round(width * arch.init_dim)),
        out_channels=out_channels,
        dtype=jnp.dtype(config.model.dtype),
        axis_name=axis_name,
        remat=config.model.remat,
    )


def make_optimizer(config: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adam; for supervised training SGD with momentum, and weight decay that counts as gradient, as in torch."""
    if config.mode != "supervised":
        return optax.adam(schedule)
    settings = config.supervised
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay), optax.sgd(schedule, momentum=settings.momentum)
    )


def learning_rate_schedule(config: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
    """Poly decay over the whole run, lr * (1 - step / total) ** power.

    With `optimizer.openscene_lr_quirk` every step but the first runs at ten times that, as OpenScene's training
    script does (it sets all its parameter groups to 10 x the polynomial after each step).
    """
    settings = config.supervised if config.mode == "supervised" else config.optimizer
    base, power = settings.learning_rate, config.optimizer.power

    def schedule(step):
        rate = base * (1.0 - step / total_steps) ** power
        if config.optimizer.openscene_lr_quirk:
            rate = jnp.where(step == 0, rate, 10.0 * rate)
        return rate

    return schedule


def train_step(
    state: TrainState,
    batch: input_pipeline.Batch,
    class_text: Float[Array, "L C"],
    *,
    model: MinkUNet,
    optimizer: optax.GradientTransformation,
    loss: ml_collections.ConfigDict,
    stage: int,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One step of one replica; sums, statistics and gradients are reduced over the axis "data".

    Stage 1 minimises Eq. 4; stage 2 adds Eq. 6 on labels by `loss.label_source`, voted if `loss.voting`. Stage
    `SUPERVISED` minimises the cross-entropy of the features, as logits, against the true labels.
    Every loss is divided by its global count, so replicas of unequal size add up to the one-device result.
    """

    def mean(total_and_count):
        total, count = total_and_count
        return total / jnp.maximum(jax.lax.psum(count, AXIS), 1.0)

    pyramid = batch.pyramid
    supervised = batch.target_index >= 0
    past_end = batch.bucket + jnp.arange(supervised.size)  # where padding reads nothing and writes nothing
    rows = jnp.where(supervised, batch.target_index, past_end)

    def at_targets(values, nothing):
        """Rows of the voxels with a 2D feature: ascending and distinct, so their gradient is a copy and no sum."""
        given = values.at[rows]
        return given.get(mode="fill", fill_value=nothing, indices_are_sorted=True, unique_indices=True)

    labels = voted = None
    if stage == 2:
        if loss.label_source == "fixed_2d":
            labels = jnp.full(batch.superpoints.shape, -1).at[rows].set(pseudo_labels(batch.targets, class_text))
        else:
            features = model.apply(state.teacher, batch.feats, pyramid, train=False)
            labels = jnp.where(pyramid.mask(0), pseudo_labels(features, class_text), -1)
        voted = vote(labels, batch.superpoints, batch.num_superpoints, class_text.shape[0])

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        features, updated = model.apply(variables, batch.feats, pyramid, train=True, mutable=["batch_stats"])
        terms = {"voxels": pyramid.num_voxels[0].astype(jnp.float32)}
        if stage == SUPERVISED:
            total = terms["L_ce"] = mean(cross_entropy_loss(features, batch.labels))
            return total, (terms | {"loss": total}, updated["batch_stats"])
        student, targets, superpoints = at_targets(features, 0), batch.targets, at_targets(batch.superpoints, -1)
        terms["L_p"] = mean(point_distillation_loss(student, targets, supervised))
        terms["L_sp"] = mean(
            superpoint_distillation_loss(student, targets, superpoints, batch.num_superpoints, supervised)
        )
        total = loss.distill_weight * (terms["L_p"] + loss.superpoint_weight * terms["L_sp"])
        if stage == 2:
            learned = voted if loss.voting else labels
            terms["L_sd"] = mean(self_distillation_loss(features, class_text, learned, learned >= 0, loss.temperature))
            total += loss.self_weight * terms["L_sd"]
            own = pseudo_labels(features, class_text)
            labelled, taken = labels >= 0, voted >= 0
            count = labelled.sum(dtype=jnp.float32)
            terms["agreement_before_vote"] = mean(((labelled & (own == labels)).sum(dtype=jnp.float32), count))
            terms["agreement_after_vote"] = mean(
                ((taken & (own == voted)).sum(dtype=jnp.float32), taken.sum(dtype=jnp.float32))
            )
            terms["changed_by_vote"] = mean(((labelled & (voted != labels)).sum(dtype=jnp.float32), count))
        return total, (terms | {"loss": total}, updated["batch_stats"])

    grads, (terms, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    grads, terms = jax.lax.psum((grads, terms), AXIS)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    teacher = state.teacher
    if stage == 1 or (stage == 2 and loss.label_source == "ema"):
        student = {"params": params, "batch_stats": batch_stats}
        teacher = update_teacher(teacher, student, state.step, loss.ema_momentum)
    terms["gradient_norm"] = optax.tree.norm(grads)
    return TrainState(state.step + 1, params, batch_stats, teacher, opt_state), terms


def initial_state(
    model: MinkUNet, optimizer: optax.GradientTransformation, batch: input_pipeline.Batch, seed: int
) -> TrainState:
    """Freshly initialised parameters; `batch` (of one replica) only lends its shapes."""
    init = jax.jit(functools.partial(model.clone(axis_name=None).init, train=False))
    # "rbg" compiles in half the time that JAX's default generator takes for so many parameters
    variables = init(jax.random.key(seed, impl="rbg"), batch.feats, batch.pyramid)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        teacher=jax.tree.map(jnp.copy, dict(variables)),
        opt_state=optimizer.init(variables["params"]),
    )


def start_stage2(
    state: TrainState, optimizer: optax.GradientTransformation, loss: ml_collections.ConfigDict
) -> TrainState:
    """What changes between the stages, on the replicated state.

    Adam's moments start anew: Eq. 6 has gradients tens of times those of Eq. 4 (tau = 0.01), and divided by the old
    second moments its first steps would be several times too long, which is enough to make the labels collapse.
    The learning rate goes on. A fixed 3D teacher is the network as it is now.
    """
    fresh, schedule_state = optimizer.init(jax.tree.map(lambda x: x[0], state.params))[0], state.opt_state[1]
    moments = jax_utils.replicate(fresh, axis_name=AXIS)
    if loss.label_source == "fixed_3d":
        student = {"params": state.params, "batch_stats": state.batch_stats}
        state = state.replace(teacher=jax.tree.map(jnp.copy, student))
    return state.replace(opt_state=(moments, schedule_state))


def train(config: ml_collections.ConfigDict, workdir: Path, data_dir: Path, *, profile: bool = False) -> None:
    """Trains both stages into `workdir`, going on from its last checkpoint if there is one.

    With `mode` "supervised" all epochs are one stage of training with labels, and there is no `stage1/`.

    Leaves `checkpoints/` (the newest states and the end of stage 1), `metrics.jsonl`, TensorBoard events, the
    networks (parameters only) `stage1/` and `model/`, and with `profile` a trace of some steps.

    Raises:
        NonFiniteError: a loss or gradient became NaN or infinite; names the step and the term. The last good
            checkpoint stays.
        ValueError: a training scene without labels, where they are needed.
    """
    supervised = config.mode == "supervised"
    source = prepare.load_split(data_dir, "train")
    replicas, mine = hosts.replicas()
    epoch_steps = input_pipeline.steps_per_epoch(config, source)
    stage1_steps = config.stage1_epochs * epoch_steps
    total_steps = stage1_steps + config.stage2_epochs * epoch_steps
    if supervised:
        stage1_steps = total_steps

    labels = prepare.label_set(config)
    class_text = class_vectors(config, labels.classes)
    model = make_model(config, out_channels=class_text.shape[1], axis_name=AXIS)
    schedule = learning_rate_schedule(config, total_steps)
    optimizer = make_optimizer(config, schedule)

    manager = checkpoint.manager(workdir / "checkpoints", keep=stage1_steps)
    saved, *_ = hosts.gather(manager.latest_step())
    start = (stage1_steps if config.stage1_from and not supervised else 0) if saved is None else saved
    batches = input_pipeline.train_iterator(source, config, num_replicas=replicas, replicas=mine, start_step=start)
    batches = input_pipeline.on_devices(batches, config, replicas)
    first = next(batches)
    state = initial_state(model, optimizer, jax_utils.unreplicate(first), config.seed)
    if saved is not None:
        logging.info("going on from step %d of %d", start, total_steps)
        state = checkpoint.restore(manager, start, state)
    elif config.stage1_from and not supervised:
        state = checkpoint.restore_end_of_stage1(Path(config.stage1_from) / "checkpoints", stage1_steps, state)
    info = {
        "arch": config.model.arch,
        "voxel_size": config.data.voxel_size,
        "input_color": config.data.input_color,
        "text_encoder": "" if supervised else config.text.encoder,
        "prompt": config.text.prompt,
        "label_set": config.data.label_set,
        "classes": list(labels.classes),
        "trained_on": {
            "dataset": config.data.name,
            "teacher": prepare.teacher_name(config),
            "scenes": len(source) // source.chunks,
        },
    }

    compiled: set[tuple[int, int, int]] = set()
    steps = {
        stage: jax.pmap(
            functools.partial(train_step, model=model, optimizer=optimizer, loss=config.loss, stage=stage),
            axis_name=AXIS,
            in_axes=(0, 0, None),
            donate_argnums=0,
        )
        for stage in (SUPERVISED, 1, 2)
    }
    state = jax_utils.replicate(state, axis_name=AXIS)
    batches = itertools.chain([first], batches)
    log = StepLog(workdir, start, total_steps)
    trace = StepTrace(workdir / "profile" if profile and hosts.is_first() else None)
    previous = None
    for step in range(start, total_steps):
        stage = SUPERVISED if supervised else 1 if step < stage1_steps else 2
        if step == stage1_steps:
            checkpoint.save_model(workdir / "stage1", _variables(state), info)
            state = start_stage2(state, optimizer, config.loss)
        waiting = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - waiting
        program = (stage, batch.bucket, batch.pyramid.spread)
        if program not in compiled:
            compiled.add(program)
            of = (_NAMES[stage], *program[1:])
            logging.info("compiling the step of %s for up to %d voxels per device, spread %d", *of)
            steps[stage].lower(state, batch, class_text).compile()
            hosts.wait()  # gloo gives up on a process that is half a minute late for its first collective
        trace.before_step(state)
        state, terms = steps[stage](state, batch, class_text)
        log.add(_NAMES[stage], terms, rows=replicas * batch.bucket, waited=waited)
        jax.block_until_ready(previous)  # one step ahead of the devices: more would fill their memory with batches
        previous = terms

        done = step + 1
        last = done in (stage1_steps, total_steps)
        if done % config.log_every == 0 or last:
            log.write(
                done,
                {
                    "stage": stage,
                    "epoch": done / epoch_steps,
                    "learning_rate": float(schedule(step)),
                    "compilations": len(compiled),
                },
            )
            if done % config.checkpoint_every < config.log_every or last:
                checkpoint.save(manager, done, jax.device_get(jax_utils.unreplicate(state)))
    trace.close(state)
    log.close()
    if stage1_steps == total_steps and not supervised:
        checkpoint.save_model(workdir / "stage1", _variables(state), info)
    checkpoint.save_model(workdir / "model", _variables(state), info)
    manager.wait_until_finished()
    manager.close()


def _variables(state: TrainState) -> PyTree:
    """The student of a replicated state, on the host."""
    return jax.device_get(jax_utils.unreplicate({"params": state.params, "batch_stats": state.batch_stats}))
