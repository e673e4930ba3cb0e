"""mIoU and mAcc of the 2D fusion, of the pure 3D network after each stage, and of their ensemble."""

import importlib.metadata
from pathlib import Path

import jax
import ml_collections
import numpy as np
from absl import logging
from jaxtyping import Float, Float16, Int
from tqdm import tqdm

from data import scene as scene_io
from data.labels import LabelSet
from data.scene import Scene, check_labels
from ggsd_jax import checkpoint, datasets, hosts, inference, input_pipeline, metrics, prepare, render
from ggsd_jax.protocol import Words, class_vectors
from ggsd_jax.protocol import words as protocol_words
from ggsd_jax.vision_language import text

ROWS = {
    "fusion_2d": "2D fusion (the teacher)",
    "stage1": "after stage 1",
    "stage2": "after stage 2",
    "ensemble": "2D-3D ensemble",
}
SUPERVISED = {"supervised": "trained with labels"}  # the one row of a run with mode=supervised
FEATURE_TYPES = {"fusion_2d": "fusion", "ensemble": "ensemble"}  # OpenScene's names; all other rows are "distill"
_WITHOUT_2D = "unknown: left out of the IoU of fusion_2d, kept in its accuracy"
PACKAGES = ["jax", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "tensorflow-datasets"]


def check(config: ml_collections.ConfigDict) -> None:
    """Raises what `evaluate` would raise after the training for its words: ValueError, FileNotFoundError."""
    class_vectors(config, protocol_words(config).words)


def half_scores(features: Float[np.ndarray, "N C"], class_text: Float[np.ndarray, "L C"]) -> Float16[np.ndarray, "N L"]:
    """Dot products of half-precision features and text, rounded to half precision, as OpenScene scores."""
    half = [a.astype(np.float16).astype(np.float32) for a in (features, class_text)]
    return (half[0] @ half[1].T).astype(np.float16)


def ensemble_scores(
    features: Float[np.ndarray, "N C"], fused: Float[np.ndarray, "N C"], class_text: Float[np.ndarray, "L C"]
) -> Float16[np.ndarray, "N L"]:
    """`half_scores` of the 3D or the 2D feature of each point, whichever is surer of its best class.

    OpenScene's 2D-3D ensemble: features are normalised (norm + 1e-5) to compare their largest scores, 2D wins where
    strictly greater, and the winner is scored as it is. A point without 2D feature has a zero row.
    """
    best = [
        half_scores(rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5), class_text).max(axis=1)
        for rows in (features, fused)
    ]
    return half_scores(np.where((best[1] > best[0])[:, None], fused, features), class_text)


def evaluate(config: ml_collections.ConfigDict, workdir: Path, data_dir: Path | None, split: str = "val") -> dict:
    """Scores the run in `workdir` on the scenes of a split by OpenScene's protocol; writes `pictures/`.

    The 3D network sees points only. Each scene is voxelised `eval.repeats` times with a random rotation and scale,
    the half-precision scores of the repeats are added up per point. Ignored points are left out; points without a
    2D feature are predicted "unknown" by the 2D fusion and drop out of its IoU (see `metrics.scores`).
    Several processes share the scenes, and each returns the scores of all.

    Args:
        data_dir: a prepared dataset; None: the raw scenes that `config.data` names are read as they are. These have
            no 2D features, so the rows `fusion_2d` and `ensemble` are left out.
    """
    words = protocol_words(config)
    class_text = class_vectors(config, words.words)
    folders = {"supervised": "model"} if config.mode == "supervised" else {"stage1": "stage1", "stage2": "model"}
    if absent := [folder for folder in folders.values() if not (workdir / folder).is_dir()]:
        raise FileNotFoundError(f"{workdir / absent[0]} is missing, what training leaves: --mode=train, or all")
    networks = {row: checkpoint.load_model(workdir / folder)[0] for row, folder in folders.items()}
    scenes = prepare.load_split(data_dir, split) if data_dir else datasets.RawScenes(config, split)
    classes = words.classes
    with_2d = data_dir is not None and config.mode != "supervised"
    names = [row for row in ROWS | SUPERVISED if row in networks or (with_2d and row in FEATURE_TYPES)]
    counts = {row: np.zeros((len(classes) + 1, len(classes)), np.int64) for row in names}
    points = left_out = 0
    supervised = config.mode == "supervised"
    mine = hosts.share(len(scenes))
    for index in tqdm(mine, unit="scene", desc="evaluate", dynamic_ncols=True, disable=not hosts.is_first()):
        try:
            scene = scenes[index]
        except datasets.LeftOut as reason:
            logging.warning("a scene is left out: %s", reason)
            left_out += 1
            continue
        check_labels(scene, len(classes))
        predictions = predict(scene, networks, class_text, config, index, with_2d)
        for row, predicted in predictions.items():
            predictions[row] = words.class_of(predicted)
            counts[row] += metrics.confusion_matrix(predictions[row], scene.labels, len(classes))
        points += scene.points.shape[0]
        if hosts.is_first() and index < config.eval.pictures:
            picture(scene, predictions, prepare.label_set(config), workdir / "pictures")
    points, left_out = sum(hosts.gather(points)), sum(hosts.gather(left_out))
    rows = {}
    for row in names:
        counts[row] = np.sum(hosts.gather(counts[row].tolist()), axis=0)
        scores = metrics.scores(counts[row])
        by_class = {k: dict(zip(classes, scores[k], strict=True)) for k in ("iou", "acc")}
        rows[row] = {"miou": scores["miou"], "macc": scores["macc"]} | by_class
    return {
        "dataset": config.data.name,
        "split": split,
        "protocol": {
            "scenes": len(scenes) - left_out,
            "points": points,
            "points_of_class": dict(zip(classes, counts[names[0]].sum(axis=0).tolist(), strict=True)),
            "label_set": config.data.label_set,
            "teacher": "none" if supervised else prepare.teacher_name(config),
            "text_encoder": "none" if supervised else config.text.encoder,
            "prompt": "none" if supervised else text.prompt_of(config.text.encoder, config.text.prompt),
            "words": words.source,
            "feature_types": {row: FEATURE_TYPES.get(row, "distill") for row in names if row != "supervised"},
            "repeats": config.eval.repeats,
            "augmentation": "random rotation and scale per repeat, summed half-precision scores (OpenScene)",
            "ignored_points": "ground truth 255 left out",
            "absent_classes": "count as 0 in the means",
            "openscene_quirks": _quirks(config, words, with_2d),
        }
        | ({"points_without_2d_feature": _WITHOUT_2D} if with_2d else {}),
        "rows": rows,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"device": jax.devices()[0].device_kind},
    }


def _quirks(config: ml_collections.ConfigDict, words: Words, with_2d: bool) -> list[str]:
    """What OpenScene's scores hang on beyond the definition of mIoU and mAcc, as far as it is done here too."""
    found = ["absent classes count as 0", "every cloud is turned and scaled at random, also without augmentation"]
    if config.eval.repeats > 1:
        found.append("raw half-precision scores of the repeats are added, so that longer features weigh more")
    if words.quirk:
        found.append(words.quirk)
    if with_2d:
        found.append("points without a 2D feature drop out of the IoU of fusion_2d")
        found.append("ensemble: a point without 2D feature scores 0, which wins where all 3D scores are negative")
        if config.eval.fusion_by_voxel:
            found.append("a point has the 2D feature of its voxel's first point, or none")
    return found


def predict(
    scene: Scene,
    networks: dict,
    class_text: Float[np.ndarray, "L C"],
    config: ml_collections.ConfigDict,
    index: int,
    with_2d: bool = True,
) -> dict[str, Int[np.ndarray, "N"]]:
    """The best row of `class_text` for each point by every network (`metrics.UNKNOWN` = no 2D feature).

    With `with_2d` also by the 2D features, row "fusion_2d", and by those and network "stage2", row "ensemble".
    """
    count = scene.points.shape[0]
    seen = np.zeros(count, bool)
    fused = np.zeros((count, class_text.shape[1]), np.float32)
    if with_2d:
        seen[scene.feature_index] = True
        fused[scene.feature_index] = scene.features
    names = ["fusion_2d", *networks, "ensemble"] if with_2d else [*networks]
    totals = {row: np.zeros((count, len(class_text)), np.float16) for row in names}
    shown, known = fused, seen
    for repeat in range(config.eval.repeats):
        rng = np.random.default_rng([config.seed, index, repeat])
        voxels = input_pipeline.random_view(scene, config.data.voxel_size, rng, config.data.max_voxels)
        coords = np.pad(voxels.coords, ((0, 0), (1, 0)))
        feats = inference.input_features(voxels, scene.colors, config.data.input_color)
        if with_2d and config.eval.fusion_by_voxel:
            shown, known = (rows[voxels.first[voxels.inverse]] for rows in (fused, seen))
        if with_2d and (repeat == 0 or config.eval.fusion_by_voxel):
            totals["fusion_2d"] += half_scores(shown, class_text)
        for row, variables in networks.items():
            features = inference.encode_voxels(variables, coords, feats, arch=config.model.arch)[voxels.inverse]
            totals[row] += half_scores(features, class_text)
            if with_2d and row == "stage2":
                totals["ensemble"] += ensemble_scores(features, shown, class_text)
    predictions = {row: total.argmax(axis=1) for row, total in totals.items()}
    if with_2d:
        predictions["fusion_2d"][~known] = metrics.UNKNOWN
    return predictions


def picture(scene: Scene, predictions: dict, labels: LabelSet, directory: Path) -> None:
    """Writes input, ground truth, 2D fusion and prediction as coloured PLY files and side by side as one PNG."""
    directory.mkdir(parents=True, exist_ok=True)
    palette = np.full((metrics.UNKNOWN + 1, 3), 40, np.uint8)  # dark grey: unknown and ignored
    palette[: len(labels.classes)] = labels.palette
    colors = scene.colors if scene.colors is not None else np.full(scene.points.shape, 160, np.uint8)
    shown = {
        "input": colors,
        "ground_truth": palette[scene.labels],
    }
    for row, name in (("fusion_2d", "fusion_2d"), ("stage2", "prediction"), ("supervised", "prediction")):
        if row in predictions:
            shown[name] = palette[predictions[row]]
    for name, values in shown.items():
        scene_io.write_ply(directory / f"{scene.name}_{name}.ply", scene.points, colors=values)
    render.side_by_side(
        directory / f"{scene.name}.png",
        scene.points,
        shown,
        legend=dict(zip(labels.classes, labels.palette, strict=True)),
    )


def table(results: dict) -> str:
    """The rows of `results.json` as a text table, mIoU and mAcc in percent."""
    fusion = results["rows"].get("fusion_2d")
    lines = [f"{'':28}{'mIoU':>8}{'mAcc':>8}" + (f"{'over 2D':>10}" if fusion else "")]
    for row, values in results["rows"].items():
        gain = f"{100 * (values['miou'] - fusion['miou']):+10.1f}" if fusion and row != "fusion_2d" else ""
        lines.append(f"{(ROWS | SUPERVISED)[row]:28}{100 * values['miou']:8.1f}{100 * values['macc']:8.1f}{gain}")
    protocol = results["protocol"]
    lines.append(
        f"{protocol['scenes']} {results['dataset']} scenes ({results['split']}), teacher: {protocol['teacher']}"
    )
    return "\n".join(lines)
