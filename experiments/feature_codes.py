"""What 2D features lose by being stored in a quarter of their bytes (data/feature_codes.py), on a real ScanNet scan.

  python -m experiments.feature_codes --scan=scene0000_00 --text=clip_scannet20_vitb32_512.npz

The scan's real frames are fused with the features of a simulated 2D teacher, since those of a network need weights; the
words are CLIP's. Noise of full rank is added to see that the codes do not live on features being few. Prints a table.
"""

import argparse
from pathlib import Path

import numpy as np

from data import feature_codes, scannet
from data.labels import LABEL_SETS
from data.projection import fuse
from experiments import published
from ggsd_jax import metrics
from ggsd_jax.evaluate import half_scores
from ggsd_jax.vision_language import teachers

NOISE = {
    "as the teacher gives them": 0.0,
    "+ noise of 0.3 of each row's length": 0.3,
    "+ noise of each row's length": 1.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, required=True, help="folder of a scan with labels and frames")
    parser.add_argument("--text", required=True, help="CLIP embeddings of the 20 class names, .npz, or CLIP's folder")
    parser.add_argument("--draws", type=int, default=2, help="of each noise (%(default)s)")
    given = parser.parse_args()
    config = published.load_config("scannet")
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


def _with_noise(features: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Rows with Gaussian noise of `strength` times their length."""
    if not strength:
        return features
    length = np.linalg.norm(features.astype(np.float32), axis=1, keepdims=True)
    noise = rng.standard_normal(features.shape, np.float32) / np.sqrt(features.shape[1])
    return (features + strength * length * noise).astype(np.float16)


if __name__ == "__main__":
    published.call(main)
