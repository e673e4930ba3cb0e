"""Training: the two stages of GGSD, one step, and the loop that survives being killed."""

import functools
import math
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging
from flax import jax_utils
from jaxtyping import Array, Float, PyTree
from tqdm import tqdm

from ggsd_jax import checkpoint, input_pipeline, prepare
from ggsd_jax.losses import (
    point_distillation_loss,
    self_distillation_loss,
    superpoint_distillation_loss,
)
from ggsd_jax.metric_log import MetricLog
from ggsd_jax.minkunet import MinkUNet, architecture
from ggsd_jax.self_distillation import pseudo_labels, update_teacher, vote
from ggsd_jax.vision_language import text

AXIS = "data"  # replicas: one per local device


@flax.struct.dataclass
class TrainState:
    """Everything a run is made of: saved whole, restored whole."""

    step: Any  # int32 []; every leaf has a leading axis of replicas while training
    params: PyTree
    batch_stats: PyTree
    teacher: PyTree  # {"params", "batch_stats"}: the EMA of the network since the first step
    opt_state: PyTree


class NonFiniteError(RuntimeError):
    """A loss or a gradient stopped being a number."""


def make_model(config: ml_collections.ConfigDict, out_channels: int, axis_name: str | None = None) -> MinkUNet:
    """The network of `config.model` with `out_channels` features per voxel."""
    arch = architecture(config.model.arch)
    width = config.model.width
    return MinkUNet(
        layers=arch.layers,
        planes=tuple(max(1, round(width * p)) for p in arch.planes),
        init_dim=max(1, round(width * arch.init_dim)),
        out_channels=out_channels,
        dtype=jnp.dtype(config.model.dtype),
        axis_name=axis_name,
    )


def learning_rate_schedule(config: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
    """Poly decay over the whole run, lr * (1 - step / total) ** power.

    With `optimizer.openscene_lr_quirk` every step but the first runs at ten times that, as OpenScene's training
    script does (it sets all its parameter groups to 10 x the polynomial after each step).
    """
    base, power = config.optimizer.learning_rate, config.optimizer.power

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

    Stage 1 minimises Eq. 4; stage 2 adds Eq. 6 on labels by `loss.label_source`, voted if `loss.voting`.
    Every loss is divided by its global count, so replicas of unequal size add up to the one-device result.
    """

    def mean(total_and_count):
        total, count = total_and_count
        return total / jnp.maximum(jax.lax.psum(count, AXIS), 1.0)

    pyramid = batch.pyramid
    rows, supervised = jnp.maximum(batch.target_index, 0), batch.target_index >= 0
    targets = batch.targets.astype(jnp.float32)
    labels = voted = None
    if stage == 2:
        if loss.label_source == "fixed_2d":
            nearest = jnp.where(supervised, pseudo_labels(targets, class_text), -1)
            labels = jnp.full(batch.superpoints.shape, -1).at[rows].max(nearest)
        else:
            features = model.apply(state.teacher, batch.feats, pyramid, train=False)
            labels = jnp.where(pyramid.mask(0), pseudo_labels(features, class_text), -1)
        voted = vote(labels, batch.superpoints, batch.num_superpoints, class_text.shape[0])

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        features, updated = model.apply(variables, batch.feats, pyramid, train=True, mutable=["batch_stats"])
        features = features.astype(jnp.float32)
        terms = {
            "L_p": mean(point_distillation_loss(features[rows], targets, supervised)),
            "L_sp": mean(
                superpoint_distillation_loss(
                    features[rows], targets, batch.superpoints[rows], batch.num_superpoints, supervised
                )
            ),
        }
        total = loss.distill_weight * (terms["L_p"] + loss.superpoint_weight * terms["L_sp"])
        if stage == 2:
            learned = voted if loss.voting else labels
            terms["L_sd"] = mean(self_distillation_loss(features, class_text, learned, learned >= 0, loss.temperature))
            total += loss.self_weight * terms["L_sd"]
            student = pseudo_labels(features, class_text)
            labelled, taken = labels >= 0, voted >= 0
            count = labelled.sum(dtype=jnp.float32)
            terms["agreement_before_vote"] = mean(((labelled & (student == labels)).sum(dtype=jnp.float32), count))
            terms["agreement_after_vote"] = mean(
                ((taken & (student == voted)).sum(dtype=jnp.float32), taken.sum(dtype=jnp.float32))
            )
            terms["changed_by_vote"] = mean(((labelled & (voted != labels)).sum(dtype=jnp.float32), count))
        return total, (terms | {"loss": total}, updated["batch_stats"])

    grads, (terms, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    grads, terms = jax.lax.psum((grads, terms), AXIS)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    teacher = state.teacher
    if stage == 1 or loss.label_source == "ema":
        student = {"params": params, "batch_stats": batch_stats}
        teacher = update_teacher(teacher, student, state.step, loss.ema_momentum)
    terms["gradient_norm"] = optax.tree.norm(grads)
    return TrainState(state.step + 1, params, batch_stats, teacher, opt_state), terms


def initial_state(
    model: MinkUNet, optimizer: optax.GradientTransformation, batch: input_pipeline.Batch, seed: int
) -> TrainState:
    """Freshly initialised parameters; `batch` (of one replica) only lends its shapes."""
    init = jax.jit(functools.partial(model.clone(axis_name=None).init, train=False))
    variables = init(jax.random.key(seed), batch.feats, batch.pyramid)
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
    moments = jax_utils.replicate(fresh, jax.local_devices())
    if loss.label_source == "fixed_3d":
        student = {"params": state.params, "batch_stats": state.batch_stats}
        state = state.replace(teacher=jax.tree.map(jnp.copy, student))
    return state.replace(opt_state=(moments, schedule_state))


def train(config: ml_collections.ConfigDict, workdir: Path, data_dir: Path) -> None:
    """Trains both stages into `workdir`, going on from its last checkpoint if there is one.

    Leaves `checkpoints/` (the newest states and the end of stage 1), `metrics.jsonl`, TensorBoard events, and the
    networks (parameters only) `stage1/` and `model/`.

    Raises:
        NonFiniteError: a loss or gradient became NaN or infinite; names the step and the term. The last good
            checkpoint stays.
    """
    source = prepare.load_split(data_dir, "train")
    replicas = jax.local_device_count()
    epoch_steps = input_pipeline.steps_per_epoch(config, source)
    stage1_steps = config.stage1_epochs * epoch_steps
    total_steps = stage1_steps + config.stage2_epochs * epoch_steps

    labels = prepare.label_set(config)
    class_text = text.embed(list(labels.classes), encoder=config.text.encoder, prompt=config.text.prompt)
    model = make_model(config, out_channels=class_text.shape[1], axis_name=AXIS)
    schedule = learning_rate_schedule(config, total_steps)
    optimizer = optax.adam(schedule)

    manager = checkpoint.manager(workdir / "checkpoints", keep=stage1_steps)
    start = manager.latest_step()
    batches = input_pipeline.train_iterator(source, config, num_replicas=replicas, start_step=start or 0)
    first = next(batches)
    state = initial_state(model, optimizer, jax.tree.map(lambda x: x[0], first), config.seed)
    if start is not None:
        logging.info("going on from step %d of %d", start, total_steps)
        state = checkpoint.restore(manager, start, state)
    elif config.stage1_from:
        state = checkpoint.restore_end_of_stage1(Path(config.stage1_from) / "checkpoints", stage1_steps, state)
        start = stage1_steps
        batches = input_pipeline.train_iterator(source, config, num_replicas=replicas, start_step=start)
        first = next(batches)
    start = start or 0
    info = {
        "arch": config.model.arch,
        "voxel_size": config.data.voxel_size,
        "input_color": config.data.input_color,
        "text_encoder": config.text.encoder,
        "prompt": config.text.prompt,
        "label_set": config.data.label_set,
        "classes": list(labels.classes),
        "trained_on": {"dataset": config.data.name, "teacher": config.teacher.name, "scenes": len(source)},
    }

    compiled: set[tuple[int, int]] = set()
    steps = {
        stage: jax.pmap(
            functools.partial(train_step, model=model, optimizer=optimizer, loss=config.loss, stage=stage),
            axis_name=AXIS,
            in_axes=(0, 0, None),
            donate_argnums=0,
        )
        for stage in (1, 2)
    }
    state = jax_utils.replicate(state)
    log = MetricLog(workdir, start)
    pending: list[dict] = []
    bar = tqdm(total=total_steps, initial=start, unit="step", desc="stage 1", dynamic_ncols=True, mininterval=1.0)
    clock, waited, voxels = time.monotonic(), 0.0, 0
    for step in range(start, total_steps):
        stage = 1 if step < stage1_steps else 2
        if step == stage1_steps:
            bar.set_description("stage 2")
            student = {"params": state.params, "batch_stats": state.batch_stats}
            checkpoint.save_model(workdir / "stage1", jax.device_get(jax_utils.unreplicate(student)), info)
            state = start_stage2(state, optimizer, config.loss)
        waiting = time.monotonic()
        batch = first if step == start else next(batches)
        waited += time.monotonic() - waiting
        capacity = batch.feats.shape[1]
        if (stage, capacity) not in compiled:
            compiled.add((stage, capacity))
            logging.info("compiling the step of stage %d for up to %d voxels per device", stage, capacity)
        state, terms = steps[stage](state, batch, class_text)
        pending.append(terms)
        occupied = int(batch.pyramid.num_voxels[:, 0].sum())
        voxels += occupied
        bar.update()

        done = step + 1
        last = done in (stage1_steps, total_steps)
        if done % config.log_every == 0 or last:
            values = _finite(jax.device_get(pending), first_step=done - len(pending))
            pending = []
            now = time.monotonic()
            seconds = max(now - clock, 1e-9)
            log.write(
                done,
                values
                | {
                    "stage": stage,
                    "epoch": done / epoch_steps,
                    "learning_rate": float(schedule(step)),
                    "voxels_per_second": voxels / seconds,
                    "data_wait_share": waited / seconds,
                    "padding_share": 1.0 - occupied / (replicas * capacity),
                    "compilations": len(compiled),
                },
            )
            bar.set_postfix(loss=f"{values['loss']:.3f}", wait=f"{waited / seconds:.0%}")
            clock, waited, voxels = now, 0.0, 0
            if done % config.checkpoint_every < config.log_every or last:
                checkpoint.save(manager, done, jax.device_get(jax_utils.unreplicate(state)))
    bar.close()
    log.close()
    final = jax.device_get(jax_utils.unreplicate({"params": state.params, "batch_stats": state.batch_stats}))
    if stage1_steps == total_steps:
        checkpoint.save_model(workdir / "stage1", final, info)
    checkpoint.save_model(workdir / "model", final, info)
    manager.wait_until_finished()
    manager.close()


def _finite(steps: list[dict], first_step: int) -> dict[str, float]:
    """Means of the logged terms [R], equal on all replicas; raises at the first one that is not a number."""
    for offset, terms in enumerate(steps):
        for name, values in terms.items():
            if not math.isfinite(values[0]):
                raise NonFiniteError(
                    f"step {first_step + offset + 1}: {name} is {values[0]}; training stopped, the last checkpoint is "
                    "good. Try a lower optimizer.learning_rate, or look at this step's input features"
                )
    return {name: float(np.mean([terms[name][0] for terms in steps])) for name in steps[0]}
