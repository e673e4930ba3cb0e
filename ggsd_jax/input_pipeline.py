"""Prepared scenes -> augmentation -> voxels -> padded batches.

Training batches are a pure function of (config.seed, step): which scenes, which chunk of their feature
points, how they are turned, scaled, flipped and shifted. A run that starts again at any step sees what it
would have seen.

The augmentations are those that reach OpenScene's network in distillation: a random rotation and scale of
every cloud (also where `data.augment` is off, and in repeated evaluation), flips of the horizontal axes, and
one shift of the voxel grid per batch; and, for a network that reads colours, changes of contrast, tint, hue and
saturation and noise, which OpenScene's own networks (fed with ones) never see. Its elastic distortion is computed
but never used there; in supervised training it is.
"""

import collections
import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import ml_collections
import numpy as np
from absl import flags, logging
from jaxtyping import Float32, Float64, Int, Int32, UInt8
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from scipy import ndimage

from data.labels import IGNORE
from data.scene import Scene
from ggsd_jax import hosts
from ggsd_jax.inference import input_features
from ggsd_jax.workers import end_with_parent
from kernels.voxel_grid import Pyramid, Voxels, build_pyramid, common_spread, next_bucket, repad, voxelize

_MAX_SHIFT = 100  # voxels, as OpenScene; every alignment to the coarsest grid is seen
_PREFETCHED_BATCHES = 4


@runtime_checkable
class SceneSource(Protocol):
    """Random access to records: `chunks` consecutive ones per scene, alike but for their features."""

    chunks: int

    def __len__(self) -> int: ...

    def __getitem__(self, record: int) -> Scene: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Several scenes as one padded cloud; with a leading axis [R] on every array for R replicas.

    All shapes depend on the pyramid's bucket and spread and on the config alone. Leaves are NumPy arrays on the
    host, jax arrays in a step.
    """

    pyramid: Pyramid
    feats: Any  # float32 [V, 3]: network input; ones, or colours in [-1, 1]
    superpoints: Any  # int32 [V]: ids 0.. without gaps over the whole batch; -1 = in none, or padding
    targets: Any  # float16 [M, C]: fused 2D features
    target_index: Any  # int32 [M]: their voxel rows, ascending; -1 = padding, at the end
    labels: Any  # int32 [V]: true classes, -1 = ignored, or padding; None where training has no use for them
    num_superpoints: int = dataclasses.field(metadata={"static": True})  # capacity: every id is below it

    @property
    def bucket(self) -> int:
        """Row capacity V, with or without the replica axis."""
        return self.feats.shape[-2]


# ----------------------------------------------------------------------------------------------- augmentation


def random_transform(rng: np.random.Generator, *, flip: bool = False) -> Float64[np.ndarray, "3 3"]:
    """Random rotation and scale of a cloud about the origin, as OpenScene's voxelizer makes it.

    The angles about x and y are within pi/64, about z any, multiplied in random order; the scale is 0.9..1.1.

    With `flip`, x and y are mirrored as well: each with probability 1/2 in 95 of 100 cases.
    """
    bounds = (np.pi / 64, np.pi / 64, np.pi)
    rotations = [_rotation(axis, rng.uniform(-bound, bound)) for axis, bound in enumerate(bounds)]
    first, second, third = rng.permutation(3)
    transform = rotations[first] @ rotations[second] @ rotations[third] * rng.uniform(0.9, 1.1)
    if flip and rng.random() < 0.95:
        mirror = np.where(rng.random(2) < 0.5, -1.0, 1.0)
        transform = np.diag([*mirror, 1.0]) @ transform
    return transform


def random_colors(colors: UInt8[np.ndarray, "N 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "N 3"]:
    """The colours of a cloud as another camera in other light might see them, by OpenScene's rules.

    In this order: stretched to full contrast to a random degree (in 20 of 100 cases), tinted by up to 10 % per
    channel (95), noise of 5 % on every value (95); the hue turned by up to half the circle, the saturation scaled
    by 0.8..1.2 (always).
    """
    values = colors / 255.0
    if rng.random() < 0.2:
        low, high = values.min(0), values.max(0)
        stretched = np.where(high > low, (values - low) / np.maximum(high - low, 1 / 255), values)
        values += rng.random() * (stretched - values)
    if rng.random() < 0.95:
        values = np.clip(values + rng.uniform(-0.1, 0.1, 3), 0, 1)
    if rng.random() < 0.95:
        values = np.clip(values + rng.normal(0, 0.05, values.shape), 0, 1)
    hsv = rgb_to_hsv(values)
    hsv[:, 0] = (hsv[:, 0] + rng.uniform(-0.5, 0.5)) % 1
    hsv[:, 1] = np.minimum(hsv[:, 1] * rng.uniform(0.8, 1.2), 1)
    return np.round(hsv_to_rgb(hsv) * 255).astype(np.uint8)


def elastic(points: Float32[np.ndarray, "N 3"], rng: np.random.Generator) -> Float32[np.ndarray, "N 3"]:
    """The cloud bent smoothly at two scales in 95 of 100 cases, as OpenScene does before supervised training.

    A grid of Gaussian noise, smoothed twice by a box of three cells along each axis, moves the points: by 0.4 m times
    the noise on cells of 0.2 m, then by 1.6 m times that on cells of 0.8 m.
    """
    if rng.random() >= 0.95:
        return points
    for cell, magnitude in ((0.2, 0.4), (0.8, 1.6)):  # metres
        low = points.min(axis=0)
        noise = rng.standard_normal((3, *((points.max(axis=0) - low) // cell).astype(int) + 3), np.float32)
        for axis in (1, 2, 3, 1, 2, 3):
            noise = ndimage.uniform_filter1d(noise, 3, axis, mode="constant")
        place = ((points - low) / cell + 1).T  # a cell of margin on either side
        moved = [ndimage.map_coordinates(field, place, order=1, mode="nearest") for field in noise]
        points = points + np.float32(magnitude) * np.stack(moved, axis=1)
    return points


def _rotation(axis: int, angle: float) -> np.ndarray:
    a, b = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = np.cos(angle)
    matrix[b, a] = np.sin(angle)
    matrix[a, b] = -matrix[b, a]
    return matrix


def transformed_voxels(
    points: Float32[np.ndarray, "N 3"], voxel_size: float, transform: Float64[np.ndarray, "3 3"]
) -> Voxels:
    """Voxels of the transformed points, moved so that the smallest coordinate of each axis is 0."""
    voxels = voxelize(points.astype(np.float64) @ transform.T, voxel_size)
    return voxels._replace(coords=voxels.coords - voxels.coords.min(0))


def random_view(scene: Scene, voxel_size: float, rng: np.random.Generator, max_voxels: int) -> Voxels:
    """The voxels of a scene for evaluation: randomly rotated and scaled.

    Raises:
        ValueError: more than `max_voxels` voxels.
    """
    voxels = transformed_voxels(scene.points, voxel_size, random_transform(rng))
    if len(voxels.coords) > max_voxels:
        raise ValueError(
            f"scene {scene.name} has {len(voxels.coords)} voxels of {voxel_size} m, more than "
            f"data.max_voxels={max_voxels}: raise data.max_voxels or data.voxel_size, or split the scene"
        )
    return voxels


# ---------------------------------------------------------------------------------------- one replica's batch


def target_capacity(bucket: int, scenes: int, chunk_points: int) -> int:
    """Rows kept for 2D features: a scene has at most `chunk_points` of them, a voxel at most one."""
    return min(bucket, -(-scenes * chunk_points // 128) * 128)


def make_batch(scenes: Sequence[Scene], voxels: Sequence[Voxels], config: ml_collections.ConfigDict) -> Batch:
    """Concatenates voxelised scenes and pads them to the smallest bucket that holds them and `data.min_voxels`.

    A voxel stands for its first point: it has that point's superpoint, colour and 2D feature, or none. In supervised
    training it has the point's label, and no 2D feature.
    `inverse` of the voxels is not used, so rows may have been taken out of `coords` and `first`.

    Raises:
        ValueError: supervised training meets a scene without labels.
    """
    supervised = config.mode == "supervised"
    coords = [np.pad(v.coords, ((0, 0), (1, 0)), constant_values=i) for i, v in enumerate(voxels)]
    feats = [input_features(v, s.colors, config.data.input_color) for s, v in zip(scenes, voxels, strict=True)]
    superpoints, num_superpoints = _compact_superpoints(scenes, voxels)
    pyramid = build_pyramid(np.concatenate(coords))
    bucket = max(pyramid.bucket, next_bucket(config.data.min_voxels))
    while num_superpoints > bucket // 4:
        bucket = next_bucket(bucket + 1)
    num_targets = target_capacity(bucket, len(scenes), config.data.chunk_points)
    if supervised:
        targets, target_index = np.zeros((num_targets, 0), np.float16), np.full(num_targets, -1, np.int32)
    else:
        targets, target_index = _targets(scenes, voxels, num_targets)
    batch = Batch(
        pyramid=pyramid,
        feats=np.concatenate(feats),
        superpoints=superpoints,
        targets=targets,
        target_index=target_index,
        labels=_labels(scenes, voxels) if supervised else None,
        num_superpoints=num_superpoints,
    )
    return pad_batch(batch, bucket, pyramid.spread, num_targets)


def _targets(scenes: Sequence[Scene], voxels: Sequence[Voxels], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """2D features of the voxels that have one, and the rows of these voxels, padded to `capacity`."""
    targets = np.zeros((capacity, scenes[0].features.shape[1]), np.float16)
    index = np.full(capacity, -1, np.int32)
    start = filled = 0
    for scene, scene_voxels in zip(scenes, voxels, strict=True):
        row_of_point = np.full(len(scene.points), -1, np.int32)
        row_of_point[scene.feature_index] = np.arange(len(scene.feature_index), dtype=np.int32)
        row = row_of_point[scene_voxels.first]
        seen = np.flatnonzero(row >= 0)
        targets[filled : filled + len(seen)] = scene.features[row[seen]]
        index[filled : filled + len(seen)] = start + seen
        start, filled = start + len(row), filled + len(seen)
    return targets, index


def _labels(scenes: Sequence[Scene], voxels: Sequence[Voxels]) -> Int32[np.ndarray, " V"]:
    for scene in scenes:
        if scene.labels is None:
            raise ValueError(f"scene '{scene.name}' has no labels, which --config.mode=supervised learns from")
    labels = np.concatenate([s.labels[v.first] for s, v in zip(scenes, voxels, strict=True)])
    return np.where(labels == IGNORE, -1, labels).astype(np.int32)


def pad_batch(batch: Batch, bucket: int, spread: int, num_targets: int) -> Batch:
    """The same batch with the capacities of a bucket and a spread (`Pyramid.spread`) at least as large."""

    def pad(rows: np.ndarray, capacity: int, value: int) -> np.ndarray:
        if len(rows) == capacity:
            return rows
        padded = np.full((capacity, *rows.shape[1:]), value, rows.dtype)
        padded[: len(rows)] = rows
        return padded

    same = (bucket, spread) == (batch.pyramid.bucket, batch.pyramid.spread)
    return Batch(
        pyramid=batch.pyramid if same else repad(batch.pyramid, bucket, spread),
        feats=pad(batch.feats, bucket, 0),
        superpoints=pad(batch.superpoints, bucket, -1),
        targets=pad(batch.targets, num_targets, 0),
        target_index=pad(batch.target_index, num_targets, -1),
        labels=None if batch.labels is None else pad(batch.labels, bucket, -1),
        num_superpoints=bucket // 4,
    )


def _compact_superpoints(scenes: Sequence[Scene], voxels: Sequence[Voxels]) -> tuple[np.ndarray, int]:
    """Superpoint of each voxel with ids 0.. over all scenes, and how many there are."""
    parts, count = [], 0
    for scene, scene_voxels in zip(scenes, voxels, strict=True):
        of_voxel = scene.superpoints[scene_voxels.first]
        compact = np.full(len(of_voxel), -1, np.int32)
        ids, compact[of_voxel >= 0] = np.unique(of_voxel[of_voxel >= 0], return_inverse=True)
        parts.append(np.where(compact >= 0, compact + count, -1).astype(np.int32))
        count += len(ids)
    return np.concatenate(parts), count


# --------------------------------------------------------------------------------------------------- cropping


def crop_shares(sizes: Int[np.ndarray, "S"], budget: int) -> Int[np.ndarray, "S"]:
    """Voxels each scene may keep to fit `budget`: small scenes stay whole, the others share what is left."""
    shares = np.empty(len(sizes), np.int64)
    for rank, scene in enumerate(np.argsort(sizes, kind="stable")):
        shares[scene] = min(sizes[scene], budget // (len(sizes) - rank))
        budget -= shares[scene]
    return shares


def crop(voxels: Voxels, keep: int, centre: Int[np.ndarray, "3"]) -> Voxels:
    """The `keep` voxels nearest to `centre`, in their order; `inverse` does not belong to them."""
    distance = ((voxels.coords.astype(np.int64) - centre) ** 2).sum(1)
    rows = np.sort(np.argsort(distance, kind="stable")[:keep])
    return voxels._replace(coords=voxels.coords[rows], first=voxels.first[rows])


# --------------------------------------------------------------------------------------------------- training


def steps_per_epoch(config: ml_collections.ConfigDict, source: SceneSource) -> int:
    """Whole batches in one epoch, which visits every scene `data.loop` times."""
    visits = len(source) // source.chunks * config.data.loop
    if visits < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} is more than the {visits} scenes an epoch visits "
            "(training scenes x data.loop): lower batch_size, or raise data.loop"
        )
    return visits // config.batch_size


def train_iterator(
    source: SceneSource,
    config: ml_collections.ConfigDict,
    *,
    num_replicas: int,
    replicas: range | None = None,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Endless training batches from `start_step` on, each with a leading replica axis.

    Of the `num_replicas` parts of each batch only `replicas` are read and made (default: all).
    To resume, ask for the step to go on from: nothing else needs to be saved. Batches are made ahead of time
    in threads, or in `data.workers` processes where that is not 0.

    Raises:
        ValueError: `batch_size` does not divide among the replicas, or is more than an epoch visits.
    """
    if config.batch_size % num_replicas:
        raise ValueError(
            f"batch_size={config.batch_size} does not divide among {num_replicas} devices: make it a multiple"
        )
    steps_per_epoch(config, source)
    visits = len(source) // source.chunks * config.data.loop
    batches = (
        grain.MapDataset.range(visits)
        .seed(config.seed)
        .shuffle()
        .batch(config.batch_size, drop_remainder=True)
        .repeat()
        .random_map(_GlobalBatch(source, config, num_replicas, replicas or range(num_replicas)))
    )[start_step:]
    threads = grain.ReadOptions(num_threads=2, prefetch_buffer_size=_PREFETCHED_BATCHES)
    iterable = batches.to_iter_dataset(threads)
    if config.data.workers:
        if not flags.FLAGS.is_parsed():  # as in a notebook; grain's worker processes read absl flags
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=config.data.workers, per_worker_buffer_size=2)
        return _with_reason(iter(iterable.mp_prefetch(options, end_with_parent)))
    return iter(iterable)


def _with_reason(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, but says why a worker may have died."""
    try:
        yield from batches
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise OSError(
            "a process of data.workers died: memory, or shared memory (/dev/shm), is full. Take fewer, or give more; "
            f"in a container docker run --shm-size=8g ({error})"
        ) from error


def on_devices(batches: Iterator[Batch], config: ml_collections.ConfigDict, num_replicas: int) -> Iterator[Batch]:
    """The batches of `train_iterator` on the local devices (axis "data"), sent there while the ones before compute.

    All processes pad to the largest of their buckets and the spread that suits all, so that they run the same program.
    """
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    ahead = collections.deque()
    for batch in batches:
        mine = [batch.bucket, batch.pyramid.spread]
        buckets, spreads = zip(*hosts.gather(mine), strict=True)
        bucket, spread = max(buckets), common_spread(spreads)
        if [bucket, spread] != mine:
            parts = [jax.tree.map(operator.itemgetter(i), batch) for i in range(len(batch.feats))]
            batch = _stacked(parts, bucket, spread, config.batch_size // num_replicas, config.data.chunk_points)
        ahead.append(jax.device_put(batch, sharding))
        if len(ahead) > 1:
            yield ahead.popleft()


def _stacked(replicas: list[Batch], bucket: int, spread: int, scenes: int, chunk_points: int) -> Batch:
    """The batches of several replicas, of so many scenes each, as one with a leading replica axis."""
    num_targets = target_capacity(bucket, scenes, chunk_points)
    alike = [pad_batch(replica, bucket, spread, num_targets) for replica in replicas]
    if len(alike) == 1:
        return jax.tree.map(lambda leaf: leaf[np.newaxis], alike[0])  # nothing is copied
    return jax.tree.map(lambda *leaves: np.stack(leaves), *alike)


class _GlobalBatch:
    """Makes some replicas' parts of the batch of one step from its scenes and its random numbers."""

    def __init__(self, source: SceneSource, config: ml_collections.ConfigDict, num_replicas: int, replicas: range):
        self.source = source
        self.config = config
        self.num_replicas = num_replicas
        self.replicas = replicas
        self.cropped: set[str] = set()

    def __call__(self, visits: Int[np.ndarray, "B"], rng: np.random.Generator) -> Batch:
        shift = rng.integers(_MAX_SHIFT, size=3, dtype=np.int32)
        seeds = rng.integers(2**63, size=len(visits))  # so that no visit hangs on scenes that others read
        share = len(visits) // self.num_replicas
        replicas = []
        for replica in self.replicas:
            part = slice(replica * share, (replica + 1) * share)
            scenes, voxels, centres = zip(*map(self._visit, visits[part].tolist(), seeds[part].tolist()), strict=True)
            voxels = [v._replace(coords=v.coords + shift) for v in voxels]
            replicas.append(self._fit(scenes, voxels, [c + shift for c in centres]))
        bucket = max(replica.bucket for replica in replicas)
        spread = common_spread(replica.pyramid.spread for replica in replicas)
        return _stacked(replicas, bucket, spread, share, self.config.data.chunk_points)

    def _visit(self, visit: int, seed: int) -> tuple[Scene, Voxels, np.ndarray]:
        """A scene with some of its features, its voxels as they are seen this time, and where to crop them."""
        rng, data = np.random.default_rng(seed), self.config.data
        num_scenes = len(self.source) // self.source.chunks
        chunk = rng.integers(self.source.chunks)
        scene = self.source[int(visit % num_scenes * self.source.chunks + chunk)]
        if data.augment and self.config.mode == "supervised":
            scene = dataclasses.replace(scene, points=elastic(scene.points, rng))
        view = transformed_voxels(scene.points, data.voxel_size, random_transform(rng, flip=data.augment))
        centre = view.coords[rng.integers(len(view.coords))]
        if data.augment and data.input_color and scene.colors is not None:
            scene = dataclasses.replace(scene, colors=random_colors(scene.colors, rng))
        return scene, view, centre

    def _fit(self, scenes: Sequence[Scene], voxels: list[Voxels], centres: list[np.ndarray]) -> Batch:
        """A batch within the largest bucket; scenes are cropped around their centres until it is."""
        largest = next_bucket(self.config.data.max_voxels)
        sizes = np.array([len(v.coords) for v in voxels])
        budget = self.config.data.max_voxels
        while True:
            shares = crop_shares(sizes, budget)
            kept = [
                crop(v, int(share), centre) if share < len(v.coords) else v
                for v, share, centre in zip(voxels, shares, centres, strict=True)
            ]
            batch = make_batch(scenes, kept, self.config)
            if batch.bucket <= largest:
                break
            budget = min(budget, int(sizes.sum())) * 9 // 10  # its neighbours or superpoints did not fit
        for scene, size, share in zip(scenes, sizes, shares, strict=True):
            if share < size and scene.name not in self.cropped:
                self.cropped.add(scene.name)
                logging.warning(
                    "scene %s cropped from %d to %d voxels to fit data.max_voxels=%d (said once per scene)",
                    scene.name, size, share, self.config.data.max_voxels,
                )  # fmt: skip
        return batch
