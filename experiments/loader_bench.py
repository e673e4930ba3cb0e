"""How many loader workers keep up with a fast device: a consumer that computes nothing asks for batches at a rate.

  python -m experiments.loader_bench --workers 0 1 2

The scenes are empty rooms of configs/scannet.py's kind (points as far apart as ScanNet's vertices, voxels of 2 cm,
20,000 points with 512 channels), encoded as in a prepared data set and kept in memory, so reading from a disk is left
out. Everything else a step waits for is in: decoding, augmentation, voxels, kernel maps, padding, and the way from the
worker.
"""

import argparse
import math
import os
import time

import ml_collections
import numpy as np

from data.scene import Scene
from experiments import configs
from ggsd_jax import prepare
from ggsd_jax.input_pipeline import train_iterator

CHANNELS = 512
HEIGHT = 2.4  # metres
SPACING = 1.9  # voxels from point to point: as many neighbours, and voxels on coarse levels, as ScanNet's vertices have


class Rooms:
    """`count` rooms of about `voxels` voxels each, a new one of these at every visit."""

    chunks = 1

    def __init__(self, count: int, voxels: int, voxel_size: float, feature_points: int):
        self._features = prepare.record_features(CHANNELS)
        rooms = [room(seed, voxels, voxel_size, feature_points) for seed in range(count)]
        self._records = [self._features.serialize_example(prepare.encode(scene)) for scene in rooms]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, record: int) -> Scene:
        return prepare.decode(self._features.deserialize_example_np(self._records[record]))


def room(seed: int, voxels: int, voxel_size: float, feature_points: int) -> Scene:
    """A square floor and four walls, a point somewhere in each cell of a grid on them."""
    rng = np.random.default_rng(seed)
    spacing = SPACING * voxel_size
    area = voxels * spacing**2
    side = np.sqrt(4 * HEIGHT**2 + area) - 2 * HEIGHT  # side^2 + 4 side HEIGHT = area
    across, up = np.arange(0, side, spacing), np.arange(0, HEIGHT, spacing)
    floor = np.stack([*np.meshgrid(across, across), np.zeros((len(across), len(across)))], axis=-1).reshape(-1, 3)
    along, height = (grid.ravel() for grid in np.meshgrid(across, up))
    walls = [
        np.column_stack(columns)
        for end in (np.zeros_like(along), np.full_like(along, side))
        for columns in ((along, end, height), (end, along, height))
    ]
    points = np.concatenate([floor, *walls])
    points += rng.uniform(0, spacing / 2, points.shape)
    cells = (points / 0.5).astype(np.int64)
    superpoints = np.unique(cells @ [1, 1000, 1_000_000], return_inverse=True)[1].astype(np.int32)
    chosen = np.sort(rng.choice(len(points), min(feature_points, len(points)), replace=False)).astype(np.int32)
    features = rng.standard_normal((len(chosen), CHANNELS)).astype(np.float16)
    return Scene(f"room{seed}", points.astype(np.float32), None, None, None, superpoints, features, chosen)


def measure(
    source: Rooms, config: ml_collections.ConfigDict, rate: float, seconds: float
) -> tuple[float, float, float]:
    """Steps per second that a consumer of at most `rate` reaches, the share of its time it waits, voxels per step."""
    batches = train_iterator(source, config, num_replicas=1)
    for _ in range(config.data.workers + 1):  # every worker compiles
        next(batches)
    steps, waited, voxels = 0, 0.0, 0
    start = due = time.monotonic()
    while (now := time.monotonic()) < start + seconds:
        batch = next(batches)
        steps, voxels = steps + 1, voxels + int(batch.pyramid.num_voxels[:, 0].sum())
        arrived = time.monotonic()
        waited += arrived - now
        due = max(due + 1 / rate, arrived)
        time.sleep(due - arrived)
    seconds = time.monotonic() - start
    batches.close()
    return steps / seconds, waited / seconds, voxels / steps


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m experiments.loader_bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of processes; 0: threads")
    parser.add_argument("--rate", type=float, default=10.0, help="steps per second the consumer would take")
    parser.add_argument("--batch_size", type=int, default=8, help="scenes per step")
    parser.add_argument("--voxels", type=int, default=100_000, help="voxels per scene, about")
    parser.add_argument("--seconds", type=float, default=60.0, help="to measure for, per number of workers")
    options = parser.parse_args()
    config = configs.load("scannet")
    config.batch_size = options.batch_size
    source = Rooms(options.batch_size, options.voxels, config.data.voxel_size, config.data.chunk_points)
    print(f"{os.cpu_count()} cores, {options.batch_size} scenes per step, at most {options.rate:g} steps/s\n")
    print("| workers | steps/s | time spent waiting | voxels per step |\n| --- | --- | --- | --- |")
    per_core = []
    for workers in options.workers:
        config.data.workers = workers
        rate, waited, voxels = measure(source, config, options.rate, options.seconds)
        print(f"| {workers or 'threads'} | {rate:.2f} | {waited:.0%} | {voxels:,.0f} |", flush=True)
        if workers:
            per_core.append(rate / min(workers, os.cpu_count()))
    if per_core:
        needed = math.ceil(options.rate / max(per_core))
        print(
            f"\nExtrapolated: a worker with a core of its own makes {max(per_core):.2f} steps/s, so {options.rate:g} "
            f"would take {needed} of them, if reading and memory keep up."
        )


if __name__ == "__main__":
    main()
