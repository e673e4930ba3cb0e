"""What 2D features lose by being stored in a quarter of their bytes (data/feature_codes.py), on a real ScanNet scan.

  python -m experiments.feature_codes --scan=scene0000_00 --text=clip_scannet20_vitb32_512.npz

The scan's real frames are fused with the features of a simulated 2D teacher, since those of a network need weights; the
words are CLIP's. Noise of full rank is added to see that the codes do not live on features being few. With --steps a
small network then learns the scan from the features as they are, and one from the coded ones. Prints tables.
"""

import argparse
import contextlib
from pathlib import Path
from unittest import mock

import ml_collections
import numpy as np
from absl import logging

from data import feature_codes, scannet
from data.labels import LABEL_SETS
from data.projection import fuse
from experiments import configs, published, scannet_sample
from ggsd_jax import inference, metrics, run
from ggsd_jax.evaluate import half_scores
from ggsd_jax.vision_language import teachers

NOISE = {
    "as the teacher gives them": 0.0,
    "+ noise of 0.3 of each row's length": 0.3,
    "+ noise of each row's length": 1.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m experiments.feature_codes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scan", type=Path, required=True, help="folder of a scan with labels and frames")
    parser.add_argument("--text", required=True, help="CLIP embeddings of the 20 class names, .npz, or CLIP's folder")
    parser.add_argument("--draws", type=int, default=2, help="of each noise (%(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="of training, e.g. 360: minutes a run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs from each kind of features (%(default)s)")
    parser.add_argument("--workdir", type=Path, default=Path("out/feature_codes"), help="for the runs (%(default)s)")
    given = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    config = configs.load("scannet")
    config.teacher.name, config.text.encoder = teachers.SIMULATED, given.text
    scene = scannet.read_scene(given.scan)
    teacher = teachers.make(config, LABEL_SETS["scannet20"].classes)
    views, features_of = teachers.look(teacher, scene, scannet.read_views(given.scan))
    features, feature_index = fuse(scene.points, views, features_of, border=scannet.BORDER)
    labels, words = scene.labels[feature_index], teacher.class_text
    print(f"{len(features):,} of {len(scene.points):,} points, {features.shape[1]} channels\n")
    print("| features | bytes, of float16 | mIoU in float16 | coded | points whose class changes |")
    print("| --- | --- | --- | --- | --- |")
    for name, strength in NOISE.items():
        for draw in range(given.draws if strength else 1):
            spoiled = _with_noise(features, strength, np.random.default_rng(draw))
            coded = feature_codes.quantize(spoiled)
            size = feature_codes.compress(coded.codes).nbytes + coded.steps.nbytes + coded.mean.nbytes
            exact, lossy = (
                half_scores(rows, words).argmax(axis=1) for rows in (spoiled, feature_codes.dequantize(coded))
            )
            before, after = (
                100 * metrics.scores(metrics.confusion_matrix(classes, labels, len(words)))["miou"]
                for classes in (exact, lossy)
            )
            changed = 100 * (exact != lossy).mean()
            print(f"| {name} | {size / spoiled.nbytes:.3f} | {before:.2f} | {after - before:+.2f} | {changed:.1f} % |")
    if given.steps:
        print("\n| learned from | cosine with the float16 features, for each seed |\n| --- | --- |")
        for stored in ("float16", "coded"):
            folders = [train(given, config, stored, seed) for seed in range(given.seeds)]
            models = (inference.load(folder / "model") for folder in folders)
            learned = (inference.unit(model.encode(scene.points)[feature_index]) for model in models)
            exact = inference.unit(features.astype(np.float32))
            print(f"| {stored} | {', '.join(f'{(rows * exact).sum(axis=1).mean():.3f}' for rows in learned)} |")


def train(given: argparse.Namespace, config: ml_collections.ConfigDict, stored: str, seed: int) -> Path:
    """The work directory of a first stage on the scan alone, from features stored as "float16" or "coded"."""
    root = given.workdir / "root"
    (root / "scans").mkdir(parents=True, exist_ok=True)
    link = root / "scans" / given.scan.name
    link.unlink(missing_ok=True)
    link.symlink_to(given.scan.resolve())
    for split in ("train", "val"):
        (root / f"scannetv2_{split}.txt").write_text(given.scan.name)
    config = ml_collections.ConfigDict(config.to_dict())
    config.update_from_flattened_dict(
        scannet_sample.OVERRIDES
        | {"data.root": str(root.resolve()), "data.prepared": str((given.workdir / stored).resolve())}
        | {"data.prepare_workers": 0, "data.min_voxels": 0, "data.loop": 1, "batch_size": 1, "cpu_devices": 1}
        | {"seed": seed, "stage1_epochs": given.steps, "stage2_epochs": 0}
    )
    folder = given.workdir / f"{stored}_{seed}"
    as_they_are = {
        "quantize": lambda rows: feature_codes.FeatureCodes(
            np.zeros(rows.shape[1], np.float16), np.ones(len(rows), np.float16), rows
        ),
        "compress": lambda rows: np.frombuffer(rows.tobytes(), np.uint8),
        "decompress": lambda stream, channels: np.frombuffer(stream, np.float16).reshape(-1, channels),
    }
    run.use_cpu_devices(config)
    with mock.patch.multiple(feature_codes, **as_they_are) if stored == "float16" else contextlib.nullcontext():
        for mode in ("prepare", "train"):
            run.run(config, folder, mode)
    return folder


def _with_noise(features: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Rows with Gaussian noise of `strength` times their length."""
    if not strength:
        return features
    length = np.linalg.norm(features.astype(np.float32), axis=1, keepdims=True)
    noise = rng.standard_normal(features.shape, np.float32) / np.sqrt(features.shape[1])
    return (features + strength * length * noise).astype(np.float16)


if __name__ == "__main__":
    published.call(main)
