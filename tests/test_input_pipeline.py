"""Augmentation and batches, and the laws a batch must keep."""

import functools
import itertools

import jax
import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.scene import Scene, read_ply
from ggsd_jax import hosts
from ggsd_jax.input_pipeline import (
    _MAX_SHIFT,
    _GlobalBatch,
    crop,
    crop_shares,
    elastic,
    make_batch,
    on_devices,
    pad_batch,
    random_colors,
    random_transform,
    random_view,
    steps_per_epoch,
    target_capacity,
    train_iterator,
    transformed_voxels,
)
from kernels.voxel_grid import Voxels, build_pyramid, common_spread, next_bucket

CHANNELS = 6
POINT_OF_FEATURE = np.array([0, 100, 1, 0, 0, 0], np.float32)  # features of box_scene @ this = their points


def box_scene(seed: int, num_points: int = 3000, num_features: int = 500, chunk: int = 0) -> Scene:
    """Points on the faces of a box; geometry by the seed, feature points by the chunk as well."""
    rng = np.random.default_rng(seed)
    points = rng.random((num_points, 3)).astype(np.float32) * np.array([2.0, 1.5, 1.0], np.float32)
    axis = rng.integers(0, 3, num_points)
    points[np.arange(num_points), axis] = rng.integers(0, 2, num_points)
    superpoints = rng.integers(-1, 40, num_points).astype(np.int32) * 7
    superpoints[superpoints < 0] = -1
    chosen = np.random.default_rng([seed, chunk]).choice(num_points, num_features, replace=False)
    index = np.sort(chosen).astype(np.int32)
    # a feature tells its scene and its point
    features = np.zeros((num_features, CHANNELS), np.float16)
    features[:, 0], features[:, 1], features[:, 2] = seed, index // 100, index % 100
    colors = rng.integers(0, 256, (num_points, 3)).astype(np.uint8)
    return Scene(f"box{seed}", points, colors, None, None, superpoints, features, index)


class Scenes:
    """Records as prepare.load_split gives them, made on the fly."""

    def __init__(self, num_scenes: int, chunks: int = 2, **knobs):
        self.num_scenes, self.chunks, self.knobs = num_scenes, chunks, knobs

    def __len__(self) -> int:
        return self.num_scenes * self.chunks

    def __getitem__(self, record: int) -> Scene:
        return box_scene(record // self.chunks, chunk=record % self.chunks, **self.knobs)


def make_config(**overrides) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(
        dict(
            seed=3,
            mode="ggsd",
            batch_size=4,
            data=dict(
                voxel_size=0.05,
                augment=True,
                input_color=False,
                loop=2,
                workers=0,
                chunk_points=500,
                min_voxels=0,
                max_voxels=50000,
            ),
        )
    )
    config.update_from_flattened_dict(overrides)
    return config


def take(n: int, source, config, **kwargs) -> list:
    return list(itertools.islice(train_iterator(source, config, **{"num_replicas": 1, **kwargs}), n))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def untouched(scene: Scene, voxel_size: float) -> Voxels:
    return transformed_voxels(scene.points, voxel_size, np.eye(3))


# ----------------------------------------------------------------------------------------------- augmentation


def test_elastic_distortion_moves_neighbours_together_and_mostly_happens():
    rng = np.random.default_rng(0)
    points = rng.uniform([-2, 1, 0], [3, 5, 2.5], (1000, 3))
    cloud = np.concatenate([points, points + rng.normal(0, 0.005, points.shape)]).astype(np.float32)
    unmoved = 0
    for seed in range(60):
        moved = elastic(cloud, np.random.default_rng(seed))
        assert moved.dtype == np.float32 and moved.shape == cloud.shape
        shift = moved - cloud
        if not shift.any():
            unmoved += 1
            continue
        mean = np.linalg.norm(shift, axis=1).mean()
        assert 0.05 < mean < 1.5
        assert np.linalg.norm(shift[:1000] - shift[1000:], axis=1).mean() < 0.1 * mean
    assert 0 < unmoved < 12


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_a_random_transform_is_a_scaled_rotation_that_stays_nearly_upright(seed, flip):
    transform = random_transform(np.random.default_rng(seed), flip=flip)
    scale = abs(np.linalg.det(transform)) ** (1 / 3)
    assert 0.9 <= scale <= 1.1
    np.testing.assert_allclose(transform @ transform.T, scale**2 * np.eye(3), atol=1e-12)
    assert transform[2, 2] / scale >= np.cos(2 * np.pi / 64) - 1e-12  # the two small angles may add up
    if not flip:
        assert np.linalg.det(transform) > 0


def test_flips_mirror_a_cloud_about_half_of_the_time_and_never_without_augmentation():
    mirrored = [np.linalg.det(random_transform(np.random.default_rng(i), flip=True)) < 0 for i in range(400)]
    assert 0.95 / 2 - 0.1 < np.mean(mirrored) < 0.95 / 2 + 0.1  # x or y, not both


def test_one_shift_of_the_grid_is_shared_by_the_scenes_of_a_batch():
    shifts = []
    for batch in take(8, Scenes(4), make_config()):
        coords = batch.pyramid.coords[0][0][: batch.pyramid.num_voxels[0, 0]]
        low = [coords[coords[:, 0] == b, 1:].min(0) for b in range(4)]
        assert all((x == low[0]).all() for x in low)
        shifts.append(low[0])
    assert np.all((np.array(shifts) >= 0) & (np.array(shifts) < _MAX_SHIFT))
    assert len(np.unique(shifts, axis=0)) == 8


def test_views_for_evaluation_are_random():
    first, again, other = (
        random_view(box_scene(1), 0.05, np.random.default_rng(seed), max_voxels=5000).coords for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or (first != other).any()


# ---------------------------------------------------------------------------------------------------- batches


def test_a_batch_holds_each_scene_with_its_features_superpoints_and_nothing_else():
    scenes = [box_scene(seed, num_points=n) for seed, n in ((0, 3000), (1, 700), (2, 1501))]
    voxels = [untouched(scene, 0.05) for scene in scenes]
    batch = make_batch(scenes, voxels, make_config())
    num_voxels = int(batch.pyramid.num_voxels[0])
    assert num_voxels == sum(len(v.coords) for v in voxels)
    start, seen = 0, set()
    for i, (scene, v) in enumerate(zip(scenes, voxels, strict=True)):
        rows = slice(start, start + len(v.coords))
        np.testing.assert_array_equal(batch.pyramid.coords[0][rows, 1:], v.coords)
        assert (batch.pyramid.coords[0][rows, 0] == i).all()
        ours, theirs = batch.superpoints[rows], scene.superpoints[v.first]
        np.testing.assert_array_equal(ours == -1, theirs == -1)
        pairs = {(a, b) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True) if a >= 0}
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert not seen & {a for a, _ in pairs}
        seen |= {a for a, _ in pairs}
        mine = (batch.target_index >= rows.start) & (batch.target_index < rows.stop)
        point = v.first[batch.target_index[mine] - start]
        np.testing.assert_array_equal(batch.targets[mine, 0], np.full(mine.sum(), i))
        np.testing.assert_array_equal(batch.targets[mine] @ POINT_OF_FEATURE, point)
        assert mine.sum() == np.isin(v.first, scene.feature_index).sum()
        start = rows.stop
    assert seen == set(range(len(seen))), "superpoint ids are compact over the batch"
    assert max(seen) < batch.num_superpoints
    assert (batch.superpoints[num_voxels:] == -1).all() and (batch.feats[num_voxels:] == 0).all()
    padding = batch.target_index == -1
    assert (np.diff(padding.astype(int)) >= 0).all() and not batch.targets[padding].any()


def test_shapes_depend_on_bucket_and_spread_alone():
    config = make_config(**{"data.chunk_points": 500})
    shapes = {}
    for seed, size in itertools.product(range(3), (400, 900, 1500)):
        scene = box_scene(seed, num_points=size, num_features=100 + seed)
        batch = make_batch([scene], [untouched(scene, 0.02)], config)
        assert len(batch.targets) == target_capacity(batch.bucket, 1, 500) == 512
        key = batch.bucket, batch.pyramid.spread
        shapes.setdefault(key, set()).add(str(jax.tree.map(np.shape, batch)))
    assert all(len(s) == 1 for s in shapes.values()), shapes


@given(st.integers(2048, 200_000), st.integers(1, 8), st.integers(1, 20_000))
@settings(max_examples=50, deadline=None)
def test_target_rows_suffice_for_every_chunk_and_never_exceed_the_voxels(size, scenes, chunk_points):
    bucket = next_bucket(size)
    rows = target_capacity(bucket, scenes, chunk_points)
    assert min(bucket, scenes * chunk_points) <= rows <= bucket


def test_many_superpoints_move_a_batch_up_a_bucket():
    scene = box_scene(0, num_points=20_000)
    singles = Scene("s", scene.points, superpoints=np.arange(20_000, dtype=np.int32), features=scene.features,
                    feature_index=scene.feature_index)  # fmt: skip
    voxels = untouched(scene, 0.05)
    few, many = make_batch([scene], [voxels], make_config()), make_batch([singles], [voxels], make_config())
    assert many.bucket > few.bucket
    assert few.superpoints.max() < few.num_superpoints and many.superpoints.max() < many.num_superpoints
    assert many.pyramid.bucket == many.bucket and len(many.pyramid.coords[0]) == many.bucket


def test_input_colours_are_those_of_the_representative_points_in_minus_one_to_one():
    scene = box_scene(0)
    voxels = untouched(scene, 0.05)
    batch = make_batch([scene], [voxels], make_config(**{"data.input_color": True}))
    expected = scene.colors[voxels.first] / 127.5 - 1
    np.testing.assert_allclose(batch.feats[: len(voxels.first)], expected, atol=1e-6)
    grey = Scene("grey", scene.points, superpoints=scene.superpoints, features=scene.features,
                 feature_index=scene.feature_index)  # fmt: skip
    with pytest.raises(ValueError, match="reads colours .data.input_color.*has none"):
        make_batch([grey], [voxels], make_config(**{"data.input_color": True}))


# ------------------------------------------------------------------------------------------- training batches


def test_training_batches_are_a_function_of_seed_and_step():
    source, config = Scenes(5), make_config()
    batches = take(7, source, config)
    for step, batch in enumerate(take(4, source, config, start_step=3)):
        assert_same(batch, batches[3 + step])
    other = take(1, source, make_config(seed=4))[0]
    assert (
        other.pyramid.coords[0].shape != batches[0].pyramid.coords[0].shape
        or (other.pyramid.coords[0] != batches[0].pyramid.coords[0]).any()
    )


def test_worker_processes_give_the_batches_of_threads():
    source = Scenes(3)
    expected = take(3, source, make_config(), start_step=1)
    for batch, reference in zip(
        take(3, source, make_config(**{"data.workers": 1}), start_step=1), expected, strict=True
    ):
        assert_same(batch, reference)


def scenes_of(batch) -> list[int]:
    """Scene numbers of a batch, read from the features."""
    replicas = zip(batch.targets, batch.target_index, strict=True)
    return [int(scene) for targets, index in replicas for scene in np.unique(targets[index >= 0, 0])]


def test_an_epoch_visits_every_scene_and_drops_what_fills_no_batch():
    source, config = Scenes(6), make_config(**{"data.loop": 1})  # 4 + 2 left over
    assert steps_per_epoch(config, source) == 1
    assert steps_per_epoch(make_config(**{"data.loop": 2}), source) == 3
    epochs = [scenes_of(b) for b in take(6, source, config)]
    assert all(len(set(epoch)) == 4 for epoch in epochs), "no scene twice in an epoch"
    assert len({tuple(sorted(epoch)) for epoch in epochs}) > 1, "every epoch has its own order"
    assert set().union(*epochs) == set(range(6))


def test_visits_of_a_scene_draw_their_chunk_at_random():
    chunks = set()
    for batch in take(8, Scenes(1, chunks=3, num_features=50), make_config(batch_size=1)):
        points = batch.targets[0][batch.target_index[0] >= 0] @ POINT_OF_FEATURE
        chunks |= {k for k in range(3) if np.isin(points, box_scene(0, chunk=k, num_features=50).feature_index).all()}
    assert chunks == {0, 1, 2}


def test_replicas_share_the_global_batch_evenly_in_one_bucket():
    source, config = Scenes(8), make_config(**{"data.loop": 1})
    one, two, four = (take(2, source, config, num_replicas=r) for r in (1, 2, 4))
    for whole, halves, quarters in zip(one, two, four, strict=True):
        assert halves.targets.shape[0] == 2 and quarters.feats.shape[:2] == (4, quarters.bucket)
        for parts in (halves, quarters):
            assert sorted(scenes_of(parts)) == sorted(scenes_of(whole))
            assert parts.pyramid.num_voxels[:, 0].sum() == whole.pyramid.num_voxels[0, 0]
            for r in range(len(parts.feats)):
                ids = np.unique(parts.superpoints[r])
                np.testing.assert_array_equal(ids[ids >= 0], np.arange((ids >= 0).sum()))
                n = parts.pyramid.num_voxels[r, 0]
                assert_same(
                    jax.tree.map(lambda x, r=r: x[r], parts.pyramid),
                    build_pyramid(parts.pyramid.coords[0][r][:n], bucket=parts.bucket, spread=parts.pyramid.spread),
                )
    with pytest.raises(ValueError, match="batch_size=4 does not divide among 3 devices"):
        train_iterator(source, config, num_replicas=3)


def test_a_process_makes_its_part_of_the_global_batch_and_reads_no_other_scene():
    class Noted(Scenes):
        def __getitem__(self, record: int) -> Scene:
            read.append(record // self.chunks)
            return super().__getitem__(record)

    read: list[int] = []
    config, rng = make_config(**{"data.min_voxels": 5000}), functools.partial(np.random.default_rng, 0)
    visits = np.array([3, 0, 2, 1])
    whole = _GlobalBatch(Scenes(4), config, 4, range(4))(visits, rng())
    part = _GlobalBatch(Noted(4), config, 4, range(2, 4))(visits, rng())
    assert read == [2, 1]
    assert_same(part, jax.tree.map(lambda x: x[2:], whole))


@pytest.mark.parametrize("rows, theirs", [(0, 0), (0, 4), (1, 1), (1, 2)])
def test_processes_pad_to_the_largest_of_their_buckets_and_their_common_spread(monkeypatch, rows, theirs):
    config = make_config()
    batches = take(3, Scenes(4), config, num_replicas=4)
    larger = next_bucket(batches[0].bucket + rows)
    wider = common_spread([batches[0].pyramid.spread, theirs])
    monkeypatch.setattr(hosts, "gather", lambda mine: [mine, [larger, theirs]])
    sent = next(on_devices(iter(batches), config, 4))
    assert (sent.bucket, sent.pyramid.spread) == (larger, wider)
    assert len(sent.feats.sharding.device_set) == 4
    for i in range(4):
        small, large = (jax.tree.map(lambda x, i=i: np.asarray(x)[i], batch) for batch in (batches[0], sent))
        assert_same(large, pad_batch(small, larger, wider, target_capacity(larger, 1, 500)))


class RealScenes(Scenes):
    """Clouds without features, each a scene."""

    def __init__(self, clouds: list[np.ndarray]):
        super().__init__(len(clouds), chunks=1)
        self.clouds = clouds

    def __getitem__(self, record: int) -> Scene:
        points = self.clouds[record].astype(np.float32)
        nothing = np.zeros((0, CHANNELS), np.float16), np.zeros(0, np.int32)
        cells = (points / 0.5).astype(np.int64) @ [1, 10**4, 10**8]
        superpoints = np.unique(cells, return_inverse=True)[1].astype(np.int32)
        return Scene(f"scene{record}", points, None, None, None, superpoints, *nothing)


@pytest.mark.parametrize(
    "name, voxel_size, scenes", [("scannet", 0.02, 8), ("scannet", 0.05, 8), ("nuscenes", 0.05, 16)]
)
def test_batches_of_real_scenes_are_padded_by_less_than_15_percent(shared, name, voxel_size, scenes):
    """Level 0, on average over the sizes that batches of 1 scene to `scenes` have on one device."""
    if name == "scannet":
        clouds = [read_ply(path).points for path in sorted((shared / "data/scannet").rglob("*_vh_clean_2.ply"))]
    else:
        frames = sorted((shared / "data/nuscenes/lidarseg_scene").glob("*/points.bin"))
        clouds = [np.fromfile(path, np.float32).reshape(-1, 5)[:, :3] for path in frames]
    rows = valid = 0
    for size in range(1, scenes + 1):
        config = make_config(
            batch_size=size, **{"data.voxel_size": voxel_size, "data.loop": 16, "data.max_voxels": 2_000_000}
        )
        for batch in take(1, RealScenes(clouds), config):
            rows += batch.bucket / size
            valid += batch.pyramid.num_voxels[0, 0] / size
    assert 1 - valid / rows < 0.15


def test_changed_colours_keep_their_shape_and_vary_between_visits_but_not_between_runs():
    colors = box_scene(0).colors
    first, again, other = (random_colors(colors, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first != colors).any()
    grey = np.full((1000, 3), 128, np.uint8)
    shown = np.stack([random_colors(grey, np.random.default_rng(seed)) for seed in range(50)]).astype(float)
    assert shown.mean() == pytest.approx(128, abs=5), "changes have no preferred direction"
    assert 5 < shown.std(axis=1).mean() < 15, "noise of about 5 % of 255"


def test_only_a_network_that_reads_colours_in_training_gets_them_changed():
    for augment, changed in ((True, True), (False, False)):
        config = make_config(**{"data.input_color": True, "data.augment": augment})
        seen = _GlobalBatch(Scenes(4), config, 1, range(1))._visit(0, seed=0)[0].colors
        assert (seen != box_scene(0).colors).any() == changed


def test_a_batch_larger_than_an_epoch_is_refused():
    with pytest.raises(ValueError, match="batch_size=4 is more than the 2 scenes"):
        train_iterator(Scenes(1), make_config(), num_replicas=1)


# --------------------------------------------------------------------------------------------------- oversize


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8), st.integers(100, 20_000))
@settings(max_examples=100, deadline=None)
def test_shares_fit_the_budget_and_small_scenes_stay_whole(sizes, budget):
    sizes = np.array(sizes)
    shares = crop_shares(sizes, budget)
    assert shares.sum() <= budget and (shares <= sizes).all()
    if sizes.sum() <= budget:
        np.testing.assert_array_equal(shares, sizes)
    cut = shares < sizes
    assert not cut.any() or shares.sum() > budget - len(sizes)
    assert not cut.any() or sizes[~cut].max(initial=0) <= shares[cut].max() + 1  # what division leaves goes to the last


def test_a_crop_is_the_neighbourhood_of_its_centre():
    voxels = untouched(box_scene(0), 0.05)
    centre = voxels.coords[17]
    kept = crop(voxels, 200, centre)
    radius = np.linalg.norm(kept.coords - centre, axis=1).max()
    assert len(kept.coords) == len(np.unique(kept.coords, axis=0)) == 200
    assert (np.linalg.norm(voxels.coords - centre, axis=1) < radius).sum() <= 200
    point_voxel = {int(f): tuple(c) for f, c in zip(voxels.first, voxels.coords, strict=True)}
    assert all(point_voxel[int(f)] == tuple(c) for f, c in zip(kept.first, kept.coords, strict=True))


def test_a_training_scene_that_does_not_fit_is_cropped_and_said_so_once(caplog):
    source = Scenes(1, num_points=9000)
    config = make_config(batch_size=1, **{"data.voxel_size": 0.01, "data.max_voxels": 3000})
    with caplog.at_level("WARNING"):
        batches = take(3, source, config)
    for batch in batches:
        assert batch.pyramid.num_voxels[0, 0] <= 3000 and batch.bucket <= next_bucket(3000)
    said = [r.getMessage() for r in caplog.records if "cropped" in r.getMessage()]
    assert len(said) == 1 and "scene box0" in said[0] and "data.max_voxels=3000" in said[0]


def test_an_evaluation_scene_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"box0 has \d+ voxels of 0.01 m, more than data.max_voxels=500"):
        random_view(box_scene(0), 0.01, np.random.default_rng(0), max_voxels=500)
