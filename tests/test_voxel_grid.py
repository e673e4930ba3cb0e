"""Voxel grids and kernel maps: laws that hold for any cloud, and MinkowskiEngine's conventions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sparse_conv.shapes import AWKWARD
from kernels.voxel_grid import (
    BATCH_LIMIT,
    COORDINATE_LIMIT,
    CapacityError,
    build_pyramid,
    common_spread,
    kernel_map,
    next_bucket,
    repad,
    voxelize,
)

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)
kernels = st.sampled_from([(3, 1), (5, 1), (2, 2)])


def offsets(kernel_size: int) -> np.ndarray:
    """MinkowskiEngine's order: x fastest; odd kernels centred."""
    low = -(kernel_size // 2) if kernel_size % 2 else 0
    axis = range(low, low + kernel_size)
    return np.array([(x, y, z) for z, y, x in itertools.product(axis, axis, axis)], np.int32)


def cloud(seed: int, most: int = 300, reach: int = 6, scenes: int = 3) -> np.ndarray:
    """Distinct voxels in random order, some alone, some crowded, on both sides of zero: a block, a tower or a beam."""
    rng = np.random.default_rng(seed)
    n = rng.integers(1, most + 1)
    extent = rng.choice([[reach, reach, reach], [1, 2, 16 * reach], [2, 16 * reach, 1]])
    coords = np.column_stack([rng.integers(0, scenes, n), rng.integers(-extent, extent, (n, 3))])
    return rng.permutation(np.unique(coords.astype(np.int32), axis=0))


def surface(n: int, seed: int = 0) -> np.ndarray:
    return AWKWARD["odd channels"]._replace(voxels=n).coords(seed)


def pairs(m) -> np.ndarray:
    """Rows (offset, in, out) of a map, and a check of how it is laid out."""
    k = np.broadcast_to(m.offset_index[:, None], m.in_index.shape)
    live = m.in_index < m.num_in
    assert (live == (m.out_index < m.num_out)).all()
    assert (m.in_index[~live] == m.num_in).all() and (m.out_index[~live] == m.num_out).all()
    assert not live[m.num_tiles :].any()
    assert (np.diff(m.offset_index[: m.num_tiles]) >= 0).all()
    return np.column_stack([k[live], m.in_index[live], m.out_index[live]])


def rows(array: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, array.tolist()))


# ------------------------------------------------------------------------------------------------- voxelize


@few
@given(seeds, st.sampled_from([0.02, 0.3, 1.0]), st.sampled_from([np.float32, np.float64]))
def test_every_point_lies_in_its_voxel_and_the_first_of_a_voxel_is_its_lowest(seed, size, dtype):
    points = np.random.default_rng(seed).normal(size=(200, 3)).astype(dtype)
    voxels = voxelize(points, size)
    expected = np.floor(points.astype(np.float64) / size).astype(np.int32)
    np.testing.assert_array_equal(voxels.coords[voxels.inverse], expected)
    np.testing.assert_array_equal(voxels.coords, np.unique(expected, axis=0))
    _, first = np.unique(voxels.inverse, return_index=True)
    np.testing.assert_array_equal(voxels.first, first)


def test_negative_coordinates_are_floored_and_not_truncated():
    points = np.array([[-0.01, -1.0, -1.01], [0.0, 0.99, 1.0]], np.float32)
    assert voxelize(points, 1.0).coords.tolist() == [[-1, -1, -2], [0, 0, 1]]


def test_a_point_of_jax_lies_in_the_voxel_of_the_same_point_of_numpy():
    points = np.float32([[0.7, 0, 0]])
    np.testing.assert_array_equal(voxelize(jnp.asarray(points), 0.1).coords, voxelize(points, 0.1).coords)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6, -1e30])
def test_a_point_that_has_no_voxel_is_named(bad):
    points = np.zeros((5, 3), np.float32)
    points[3, 1] = bad
    with pytest.raises(ValueError, match="points row 3 .*finite coordinates whose voxels of size 1.0"):
        voxelize(points, 1.0)


def test_an_empty_cloud_and_a_voxel_without_size_are_refused():
    with pytest.raises(ValueError, match="empty cloud"):
        voxelize(np.zeros((0, 3), np.float32), 0.1)
    with pytest.raises(ValueError, match="voxel_size is -0.1"):
        voxelize(np.zeros((1, 3), np.float32), -0.1)


# ----------------------------------------------------------------------------------------------- kernel_map


@few
@given(seeds, kernels, st.sampled_from([1, 2, 8]))
def test_a_map_holds_exactly_the_pairs_that_obey_the_law(seed, kernel, tensor_stride):
    """in[i] == stride * out[j] + offset[k] in units of the tensor stride, for these pairs and no others."""
    size, stride = kernel
    coords = cloud(seed) * np.array([1, *[tensor_stride] * 3], np.int32)
    m, out = kernel_map(coords, kernel_size=size, stride=stride, tensor_stride=tensor_stride)
    assert (m.num_in, m.num_out, m.kernel_volume) == (len(coords), len(out), size**3)
    found = pairs(m)
    assert len(found) == len(rows(found))
    reach = np.column_stack([np.zeros(size**3, np.int32), offsets(size) * tensor_stride])
    row_of = {tuple(c): i for i, c in enumerate(coords.tolist())}
    expected = {
        (k, row_of[voxel], j)
        for j, voxels in enumerate((out[:, None] + reach).tolist())
        for k, voxel in enumerate(map(tuple, voxels))
        if voxel in row_of
    }
    assert rows(found) == expected


@few
@given(seeds, st.sampled_from([1, 4]))
def test_strided_voxels_are_the_floored_ones_each_once_in_order(seed, tensor_stride):
    coords = cloud(seed) * np.array([1, *[tensor_stride] * 3], np.int32)
    _, out = kernel_map(coords, kernel_size=2, stride=2, tensor_stride=tensor_stride)
    coarse = 2 * tensor_stride
    parents = np.column_stack([coords[:, 0], np.floor(coords[:, 1:] / coarse).astype(np.int32) * coarse])
    np.testing.assert_array_equal(out, np.unique(parents, axis=0))


@few
@given(seeds, kernels)
def test_order_of_the_rows_changes_their_numbers_and_nothing_else(seed, kernel):
    size, stride = kernel
    coords = cloud(seed)
    order = np.random.default_rng(seed).permutation(len(coords))
    m, out = kernel_map(coords, kernel_size=size, stride=stride)
    shuffled, shuffled_out = kernel_map(coords[order], kernel_size=size, stride=stride)
    renamed = pairs(shuffled)
    renamed[:, 1] = order[renamed[:, 1]]
    if stride == 1:
        renamed[:, 2] = order[renamed[:, 2]]
    else:
        np.testing.assert_array_equal(out, shuffled_out)
    assert rows(renamed) == rows(pairs(m))


def test_the_law_holds_on_a_large_surface_and_all_offsets_are_met():
    coords = surface(60_000)
    for size, stride in ((3, 1), (5, 1), (2, 2)):
        m, out = kernel_map(coords, kernel_size=size, stride=stride)
        k, i, j = pairs(m).T
        np.testing.assert_array_equal(coords[i, 1:], out[j, 1:] + offsets(size)[k])
        np.testing.assert_array_equal(coords[i, 0], out[j, 0])
        flat = size**2 * min(size, 3)  # offsets that reach further than the surface is thick stay empty
        assert len(np.unique(k)) == flat


def test_voxels_at_the_ends_of_the_range_meet_nobody_across_them():
    low, high = -COORDINATE_LIMIT, COORDINATE_LIMIT - 1
    corners = np.array(list(itertools.product((0, BATCH_LIMIT - 1), *[(low, high)] * 3)), np.int32)
    # the end of an axis beside the start of the next row, slab or scene, which follows it in order
    seams = np.zeros((6, 4), np.int32)
    for axis in (1, 2, 3):
        seams[2 * axis - 2, axis], seams[2 * axis - 1, axis], seams[2 * axis - 1, axis - 1] = high, low, 1
    for size in (3, 5):
        for alone in (corners, seams):
            m, _ = kernel_map(alone, kernel_size=size)
            assert rows(pairs(m)) == {(size**3 // 2, i, i) for i in range(len(alone))}
    parents = build_pyramid(corners).coords[4][: len(corners)]
    np.testing.assert_array_equal(parents[:, 1:], np.unique(corners, axis=0)[:, 1:] // 16 * 16)


@pytest.mark.parametrize(
    "row, message",
    [
        ([-1, 0, 0, 0], "coords row 2 is .*batch index in 0.."),
        ([BATCH_LIMIT, 0, 0, 0], "coords row 2 is .*batch index in 0.."),
        ([0, 0, COORDINATE_LIMIT, 0], "coords row 2 is .*centre the cloud"),
        ([0, 0, 0, -COORDINATE_LIMIT - 1], "coords row 2 is .*centre the cloud"),
        ([0, 0, 0, -(2**31)], "coords row 2 is .*centre the cloud"),
        ([0, 4, 4, 4], "rows 1 and 2 are the same voxel|rows 2 and 1 are the same voxel"),
    ],
)
def test_a_row_that_cannot_be_packed_or_repeats_is_named(row, message):
    coords = np.array([[0, 2, 2, 2], [0, 4, 4, 4], row], np.int32)
    for make in (lambda: kernel_map(coords, kernel_size=3), lambda: build_pyramid(coords)):
        with pytest.raises(ValueError, match=message):
            make()


def test_parents_at_the_edge_of_the_range_are_coarsened_again():
    coords = np.array([[0, -COORDINATE_LIMIT, 0, 0], [0, COORDINATE_LIMIT - 1, 0, 0]], np.int32)
    for tensor_stride in (1, 2, 4, 8):
        _, coords = kernel_map(coords, kernel_size=2, stride=2, tensor_stride=tensor_stride)
    np.testing.assert_array_equal(coords[:, 1], [-131072, 131056])


def test_other_bad_input_says_what_was_expected():
    one = np.array([[0, 2, 3, 2]], np.int32)
    with pytest.raises(ValueError, match="row 0 .*multiples of tensor_stride 2"):
        kernel_map(one, kernel_size=3, tensor_stride=2)
    with pytest.raises(ValueError, match="tensor_stride is 0: expected 1 to"):
        kernel_map(one, kernel_size=3, tensor_stride=0)
    with pytest.raises(ValueError, match="tensor_stride is 65536: expected 1 to"):
        kernel_map(one, kernel_size=2, stride=2, tensor_stride=65536)
    with pytest.raises(ValueError, match="kernel_size 4 with stride 1: expected"):
        kernel_map(one, kernel_size=4)
    with pytest.raises(ValueError, match="empty cloud"):
        build_pyramid(one[:0])


# -------------------------------------------------------------------------------------------------- pyramid


def all_maps(pyramid):
    return [pyramid.stem, *pyramid.submanifold, *pyramid.down]


@settings(max_examples=8, deadline=None)
@given(seeds)
def test_every_level_of_a_pyramid_has_the_maps_of_its_voxels(seed):
    coords = cloud(seed, most=500, reach=20)
    pyramid = build_pyramid(coords)
    np.testing.assert_array_equal(pyramid.coords[0][: len(coords)], coords)
    for level in range(5):
        stride = 2**level
        n = pyramid.num_voxels[level]
        assert (pyramid.mask(level) == (np.arange(len(pyramid.coords[level])) < n)).all()
        level_coords = pyramid.coords[level][:n]
        m, _ = kernel_map(level_coords, kernel_size=3, tensor_stride=stride)
        assert rows(pairs(pyramid.submanifold[level])) == rows(pairs(m))
        if level == 0:
            assert rows(pairs(pyramid.stem)) == rows(pairs(kernel_map(coords, kernel_size=5)[0]))
        if level < 4:
            m, out = kernel_map(level_coords, kernel_size=2, stride=2, tensor_stride=stride)
            np.testing.assert_array_equal(pyramid.coords[level + 1][: len(out)], out)
            assert pyramid.num_voxels[level + 1] == len(out)
            assert rows(pairs(pyramid.down[level])) == rows(pairs(m))


@pytest.mark.parametrize("spread", range(5))
def test_shapes_depend_on_bucket_and_spread_alone(spread):
    def shapes(pyramid):
        return jax.tree.map(np.shape, pyramid)

    bucket = next_bucket(4000)
    clouds = [surface(3000), surface(3400, 1), surface(2), np.zeros((1, 4), np.int32)]
    pyramids = [build_pyramid(c, bucket=bucket, spread=spread) for c in clouds]
    assert all(shapes(p) == shapes(pyramids[0]) for p in pyramids)
    assert all((p.bucket, p.spread) == (bucket, spread) for p in pyramids)
    assert shapes(repad(build_pyramid(clouds[2]), bucket, spread)) == shapes(pyramids[0])
    replicas = jax.tree.map(lambda *leaves: np.stack(leaves), *pyramids)
    assert (replicas.bucket, replicas.spread) == (bucket, spread)


def test_sparser_clouds_get_more_coarse_rows_before_they_get_a_larger_bucket():
    def far_apart(n):  # no two in one voxel of level 2
        return surface(n) * np.array([1, 4, 4, 4], np.int32)

    pyramid = build_pyramid(far_apart(2000))
    assert pyramid.spread == 2 and pyramid.num_voxels[2] == 2000 and pyramid.bucket > 2000 / 0.6
    closed = AWKWARD["every neighbour"]._replace(voxels=2000).coords()
    holey = AWKWARD["every neighbour"]._replace(voxels=2000, fill=0.25).coords()
    both = np.concatenate([closed[:1600], far_apart(400) + np.array([0, 10_000, 0, 0], np.int32)])
    shapes = [(p.bucket, p.spread) for p in map(build_pyramid, (closed, holey, both))]
    assert shapes == [(2048, 0), (2048, 1), (2048, 3)]


@pytest.mark.parametrize("spreads", list(itertools.combinations(range(5), 2)))
def test_what_fits_one_of_two_spreads_fits_their_common_one(spreads):
    def shapes(spread):
        return [max(leaf.shape, default=0) for leaf in jax.tree.leaves(build_pyramid(one, bucket=2048, spread=spread))]

    one = np.zeros((1, 4), np.int32)
    common = shapes(common_spread(spreads))
    assert all(c >= s for spread in spreads for c, s in zip(common, shapes(spread), strict=True))


@pytest.mark.parametrize("n", [1, 700, 7000])
def test_a_repadded_pyramid_is_the_one_built_in_that_bucket(n):
    pyramid = build_pyramid(surface(n))
    for bucket in (next_bucket(pyramid.bucket + 1), next_bucket(12_000)):
        jax.tree.map(np.testing.assert_array_equal, repad(pyramid, bucket), build_pyramid(surface(n), bucket=bucket))


def test_the_bucket_taken_is_the_smallest_that_fits():
    lonely = np.zeros((1500, 4), np.int32)  # every voxel has its own parent on all levels
    lonely[:, 1] = 32 * np.arange(1500)
    pyramid = build_pyramid(lonely)
    assert pyramid.num_voxels.tolist() == [1500] * 5
    below = max(b for b in map(next_bucket, range(1, pyramid.bucket, 128)) if b < pyramid.bucket)
    with pytest.raises(CapacityError, match=f"1500 voxels do not fit bucket {below}: level 4 has 1500"):
        build_pyramid(lonely, bucket=below)
    with pytest.raises(CapacityError, match="take a larger bucket or crop"):
        repad(pyramid, below)
    solid = np.zeros((16**3, 4), np.int32)
    solid[:, 1:] = list(itertools.product(range(16), repeat=3))
    with pytest.raises(CapacityError, match="pairs of neighbours"):
        build_pyramid(solid, bucket=next_bucket(len(solid)))
    assert build_pyramid(solid).num_voxels.tolist() == [4096, 512, 64, 8, 1]


def test_buckets_are_a_geometric_series_of_multiples_of_128():
    series = [next_bucket(1)]
    while series[-1] < 500_000:
        series.append(next_bucket(series[-1] + 1))
    assert series[0] == 2048 and all(b % 128 == 0 for b in series)
    assert all(1.2 < b / a < 1.32 for a, b in itertools.pairwise(series))
    assert all(next_bucket(b) == b for b in series)


def test_shifting_a_cloud_by_the_coarsest_stride_shifts_coordinates_and_leaves_the_maps():
    coords = cloud(5, reach=30)
    shift = np.array([0, 16, -32, 160], np.int32)
    here, there = build_pyramid(coords), build_pyramid(coords + shift)
    for level, n in enumerate(here.num_voxels):
        np.testing.assert_array_equal(here.coords[level][:n] + shift, there.coords[level][:n])
    jax.tree.map(np.testing.assert_array_equal, all_maps(here), all_maps(there))


def test_a_scene_has_the_same_pairs_alone_and_in_a_batch():
    scenes = [surface(300, seed) for seed in range(3)]
    batch = np.concatenate([s + np.array([b, 0, 0, 0], np.int32) for b, s in enumerate(scenes)])
    for size in (3, 5):
        together = rows(pairs(kernel_map(batch, kernel_size=size)[0]))
        alone = [
            pairs(kernel_map(s, kernel_size=size)[0]) + np.array([0, 300 * b, 300 * b]) for b, s in enumerate(scenes)
        ]
        assert together == set().union(*map(rows, alone))


def test_a_pyramid_passes_through_jit_and_its_masks_work_there():
    pyramid = build_pyramid(surface(900))
    valid = jax.jit(lambda p: [p.mask(level).sum() for level in range(5)])(pyramid)
    assert [int(n) for n in valid] == pyramid.num_voxels.tolist()


# ------------------------------------------------------------------------------------------- MinkowskiEngine


def test_offsets_are_minkowski_engines(shared):
    golden = np.load(shared / "golden" / "kernel_offsets.npz")
    for size, stride in ((3, 1), (5, 1), (2, 2)):
        np.testing.assert_array_equal(offsets(size), golden[f"offsets_k{size}"])
        solid = np.zeros((512, 4), np.int32)
        solid[:, 1:] = list(itertools.product(range(8), repeat=3))
        m, out = kernel_map(solid, kernel_size=size, stride=stride)
        k, i, j = pairs(m).T
        np.testing.assert_array_equal(solid[i, 1:] - out[j, 1:], golden[f"offsets_k{size}"][k])
        assert len(np.unique(k)) == size**3
    np.testing.assert_array_equal(golden["offsets_k2"], golden["offsets_k2_transposed"])


def test_strided_coordinates_are_minkowski_engines(shared):
    golden = np.load(shared / "golden" / "stride_quantization.npz")
    coords = golden["in_coords"]
    pyramid = build_pyramid(coords)
    parent = np.arange(len(coords))
    for level, stride in enumerate((2, 4, 8, 16)):
        fine = pyramid.coords[level][: pyramid.num_voxels[level]]
        coarse = pyramid.coords[level + 1][: pyramid.num_voxels[level + 1]]
        _, out = kernel_map(fine, kernel_size=2, stride=2, tensor_stride=stride // 2)
        for found in (coarse, out):
            np.testing.assert_array_equal(found, golden[f"coords_ts{stride}_sorted"])
        _, i, j = pairs(pyramid.down[level]).T
        parent = j[np.argsort(i)][parent]
        np.testing.assert_array_equal(coarse[parent], golden[f"parent_ts{stride}"])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"levels": 0}, "levels is 0: expected 1 to 5"),
        ({"levels": 6}, "levels is 6: expected 1 to 5"),
        ({"bucket": 2050}, "bucket is 2050 .*expected a positive multiple of 128"),
        ({"bucket": 2048, "spread": 9}, "spread 9: expected"),
    ],
)
def test_a_pyramid_of_no_such_shape_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        build_pyramid(np.zeros((1, 4), np.int32), **shape)


@pytest.mark.parametrize("shape", [(2100, 0), (2048, 7), (2048, -1)])
def test_a_pyramid_is_not_padded_to_no_such_shape(shape):
    with pytest.raises(ValueError, match="expected a positive multiple of 128, and 0 to"):
        repad(build_pyramid(np.zeros((1, 4), np.int32)), *shape)
