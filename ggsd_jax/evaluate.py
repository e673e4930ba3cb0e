"""mIoU and mAcc of the 2D fusion, of the pure 3D network after each stage, and of their ensemble."""

import importlib.metadata
from pathlib import Path

import jax
import ml_collections
import numpy as np
from jaxtyping import Float, Float16, Int
from tqdm import tqdm

from data import scene as scene_io
from data.labels import LabelSet
from data.scene import Scene
from ggsd_jax import checkpoint, hosts, inference, input_pipeline, metrics, prepare, render
from ggsd_jax.vision_language import text

ROWS = {
    "fusion_2d": "2D fusion (the teacher)",
    "stage1": "after stage 1",
    "stage2": "after stage 2",
    "ensemble": "2D-3D ensemble",
}
PACKAGES = ["jax", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "tensorflow-datasets"]


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


def evaluate(config: ml_collections.ConfigDict, workdir: Path, data_dir: Path, split: str = "val") -> dict:
    """Scores the run in `workdir` on the scenes of a split by OpenScene's protocol; writes `pictures/`.

    The 3D network sees points only. Each scene is voxelised `eval.repeats` times with a random rotation and scale,
    the half-precision scores of the repeats are added up per point. Ignored points are left out; points without a
    2D feature are predicted "unknown" by the 2D fusion and drop out of its IoU (see `metrics.scores`).
    Several processes share the scenes, and each returns the scores of all.
    """
    labels = prepare.label_set(config)
    class_text = text.embed(list(labels.classes), encoder=config.text.encoder, prompt=config.text.prompt)
    folders = {"stage1": "stage1", "stage2": "model"}
    networks = {row: checkpoint.load_model(workdir / folder)[0] for row, folder in folders.items()}
    scenes = prepare.load_split(data_dir, split)
    counts = {row: np.zeros((len(labels.classes) + 1, len(labels.classes)), np.int64) for row in ROWS}
    points = 0
    mine = hosts.share(len(scenes))
    for index in tqdm(mine, unit="scene", desc="evaluate", dynamic_ncols=True, disable=not hosts.is_first()):
        scene = scenes[index]
        predictions = predict(scene, networks, class_text, config, index)
        for row, predicted in predictions.items():
            counts[row] += metrics.confusion_matrix(predicted, scene.labels, len(labels.classes))
        points += scene.points.shape[0]
        if hosts.is_first() and index < config.eval.pictures:
            picture(scene, predictions, labels, workdir / "pictures")
    points = sum(hosts.gather(points))
    rows = {}
    for row in ROWS:
        scores = metrics.scores(np.sum(hosts.gather(counts[row].tolist()), axis=0))
        by_class = {k: dict(zip(labels.classes, scores[k], strict=True)) for k in ("iou", "acc")}
        rows[row] = {"miou": scores["miou"], "macc": scores["macc"]} | by_class
    return {
        "dataset": config.data.name,
        "split": split,
        "protocol": {
            "scenes": len(scenes),
            "points": points,
            "label_set": config.data.label_set,
            "teacher": prepare.teacher_name(config),
            "text_encoder": config.text.encoder,
            "prompt": config.text.prompt,
            "repeats": config.eval.repeats,
            "augmentation": "random rotation and scale per repeat, summed half-precision scores (OpenScene)",
            "ignored_points": "ground truth 255 left out",
            "points_without_2d_feature": "unknown: left out of the IoU of fusion_2d, kept in its accuracy",
            "absent_classes": "count as 0 in the means",
        },
        "rows": rows,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"device": jax.devices()[0].device_kind},
    }


def predict(
    scene: Scene, networks: dict, class_text: Float[np.ndarray, "L C"], config: ml_collections.ConfigDict, index: int
) -> dict[str, Int[np.ndarray, "N"]]:
    """Predicted class of each point by every row of `ROWS` (`metrics.UNKNOWN` = no 2D feature)."""
    count = scene.points.shape[0]
    seen = np.zeros(count, bool)
    fused = np.zeros((count, class_text.shape[1]), np.float32)
    if scene.features is not None:
        seen[scene.feature_index] = True
        fused[scene.feature_index] = scene.features
    totals = {row: np.zeros((count, len(class_text)), np.float16) for row in (*networks, "ensemble")}
    for repeat in range(config.eval.repeats):
        rng = np.random.default_rng([config.seed, index, repeat])
        voxels = input_pipeline.random_view(scene, config.data.voxel_size, rng, config.data.max_voxels)
        coords = np.pad(voxels.coords, ((0, 0), (1, 0)))
        feats = inference.input_features(voxels, scene.colors, config.data.input_color)
        for row, variables in networks.items():
            features = inference.encode_voxels(variables, coords, feats, arch=config.model.arch)[voxels.inverse]
            totals[row] += half_scores(features, class_text)
            if row == "stage2":
                totals["ensemble"] += ensemble_scores(features, fused, class_text)
    predictions = {row: total.argmax(axis=1) for row, total in totals.items()}
    return {"fusion_2d": np.where(seen, half_scores(fused, class_text).argmax(axis=1), metrics.UNKNOWN)} | predictions


def picture(scene: Scene, predictions: dict, labels: LabelSet, directory: Path) -> None:
    """Writes the input, 2D fusion, prediction and ground truth as coloured PLY files and side by side as one PNG."""
    directory.mkdir(parents=True, exist_ok=True)
    palette = np.full((metrics.UNKNOWN + 1, 3), 40, np.uint8)  # dark grey: unknown and ignored
    palette[: len(labels.classes)] = labels.palette
    colors = scene.colors if scene.colors is not None else np.full(scene.points.shape, 160, np.uint8)
    shown = {
        "input": colors,
        "fusion_2d": palette[predictions["fusion_2d"]],
        "prediction": palette[predictions["stage2"]],
        "ground_truth": palette[scene.labels],
    }
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
    fusion = results["rows"]["fusion_2d"]["miou"]
    lines = [f"{'':28}{'mIoU':>8}{'mAcc':>8}{'over 2D':>10}"]
    for row, title in ROWS.items():
        values = results["rows"][row]
        gain = f"{100 * (values['miou'] - fusion):+10.1f}" if row != "fusion_2d" else ""
        lines.append(f"{title:28}{100 * values['miou']:8.1f}{100 * values['macc']:8.1f}{gain}")
    protocol = results["protocol"]
    lines.append(
        f"{protocol['scenes']} {results['dataset']} scenes ({results['split']}), teacher: {protocol['teacher']}"
    )
    return "\n".join(lines)
