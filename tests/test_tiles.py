import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggsd_jax.tiles import tiles


def cloud(seed: int, count: int, shape=(60, 40, 5)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.unique(rng.integers(-np.array(shape), shape, (count, 3)), axis=0).astype(np.int32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 600), st.integers(2, 300), st.integers(0, 80))
def test_every_voxel_is_in_one_core_and_no_tile_is_over_the_bound(seed, count, max_voxels, halo):
    coords = cloud(seed, count)
    cut = list(tiles(coords, max_voxels, halo))
    cores = np.sort(np.concatenate([tile.rows[tile.core] for tile in cut]))
    np.testing.assert_array_equal(cores, np.arange(len(coords)))
    for tile in cut:
        assert len(tile.rows) <= max_voxels and (np.diff(tile.rows) > 0).all()


def test_a_core_is_shown_with_all_within_the_halo_where_the_bound_leaves_room():
    coords = cloud(0, 3000, (200, 20, 2))
    cut = list(tiles(coords, 1200, 10))
    assert len(cut) > 2
    for tile in cut:
        low, high = coords[tile.rows[tile.core]].min(0) - 10, coords[tile.rows[tile.core]].max(0) + 10
        np.testing.assert_array_equal(tile.rows, np.flatnonzero(((coords >= low) & (coords <= high)).all(1)))


@pytest.mark.parametrize("count", [1, 500])
def test_a_cloud_within_the_bound_is_one_tile(count):
    coords = cloud(1, count)
    (tile,) = tiles(coords, 500, 4)
    assert tile.core.all() and len(tile.rows) == len(coords)
