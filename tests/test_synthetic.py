"""Generated rooms and the virtual cameras that scan them: geometry that must agree, a data set's needs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.furniture import BOX, ELLIPSOID, FRUSTUM
from data.labels import IGNORE
from data.projection import fuse, project
from data.synthetic import SYNTHETIC, generate_room, room_seeds
from data.virtual_camera import Solids, intrinsics_of, look_around_views, look_at, pixel_rays, splat, trace


@pytest.fixture(scope="module")
def rooms():
    return [generate_room(seed) for seed in room_seeds("val", 8)]


def test_the_same_seed_gives_the_same_bits():
    one, two = generate_room(3), generate_room(3)
    for field in ("points", "colors", "labels"):
        np.testing.assert_array_equal(getattr(one.scene, field), getattr(two.scene, field))
    for a, b in zip(one.views, two.views, strict=True):
        np.testing.assert_array_equal(a.pose, b.pose)
        np.testing.assert_array_equal(a.depth, b.depth)
        np.testing.assert_array_equal(a.image, b.image)


def test_another_seed_gives_another_room(rooms):
    sizes = {room.scene.points.shape for room in rooms}
    assert len(sizes) == len(rooms)


def test_splits_never_share_a_room():
    train, val, test = (set(room_seeds(split, 500)) for split in ("train", "val", "test"))
    assert not (train & val or train & test or val & test)
    assert max(room_seeds("train", 1_000_000)) < min(room_seeds("val", 1))
    assert list(room_seeds("val", 3)) == list(room_seeds("val", 5))[:3]


def test_unknown_splits_and_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="'valid', expected one of train, val, test"):
        room_seeds("valid", 3)
    with pytest.raises(ValueError, match="1000001 rooms"):
        room_seeds("train", 1_000_001)
    with pytest.raises(ValueError, match=r"views is 13, expected 1\.\.12"):
        generate_room(0, views=13)


def test_rooms_have_the_size_of_a_small_furnished_room(rooms):
    for room in rooms:
        points = room.scene.points
        voxels = len(np.unique(np.floor(points / 0.08).astype(int), axis=0))
        assert 15_000 < len(points) < 60_000 and 3_000 < voxels < 12_000
        assert 1.9 < np.ptp(points[:, 2]) < 2.8
        assert len(np.unique(room.scene.labels)) >= 8


def test_every_class_is_in_every_handful_of_rooms(rooms):
    present = np.zeros(len(SYNTHETIC.classes), int)
    for room in rooms:
        counts = np.bincount(room.scene.labels, minlength=IGNORE + 1)
        assert counts[: len(present)].sum() + counts[IGNORE] == len(room.scene.points)
        present += counts[: len(present)] > 50
    assert dict(zip(SYNTHETIC.classes, present >= 2, strict=True)) == dict.fromkeys(SYNTHETIC.classes, True)


def test_the_scan_is_partial_and_points_keep_apart(rooms):
    for room in rooms:
        seen = np.zeros(len(room.scene.points), bool)
        for view in room.views:
            seen |= project(room.scene.points, view.pose, view.intrinsics, view.size, view.depth).visible
        assert 0.7 < seen.mean() < 0.99
        cells = np.floor(room.scene.points / np.float32(0.032)).astype(int)
        assert len(np.unique(cells, axis=0)) > 0.97 * len(cells)  # float32 may move a mean over a cell's rim


def test_depth_and_poses_of_the_views_lie_on_the_cloud(rooms):
    view, points = rooms[0].views[0], rooms[0].scene.points
    rays = pixel_rays(view.intrinsics, view.size)[::7, ::7].reshape(-1, 3)
    depth = view.depth[::7, ::7].reshape(-1)
    there = (rays * depth[:, None])[depth > 0] @ view.pose[:3, :3].T + view.pose[:3, 3]
    nearest = np.linalg.norm(there[:, None] - points[None], axis=2).min(axis=1)
    assert np.quantile(nearest, 0.98) < 0.035


def test_fusing_the_exact_labels_gives_the_labels_back(rooms):
    """Ray-traced depth, splatted labels and the projection's depth test agree on what is where."""
    room = rooms[1]
    one_hot = np.eye(IGNORE + 1, dtype=np.float32)

    def features_of(view):
        _, index = splat(room.scene.points, view.pose, view.intrinsics, view.size, 0.05, view.depth)
        return one_hot[np.where(index < 0, IGNORE, room.scene.labels[index])]

    features, index = fuse(room.scene.points, room.views, features_of, tolerance=0.05)
    assert np.mean(features.argmax(axis=1) == room.scene.labels[index]) > 0.99


def test_holes_and_noise_can_be_turned_off():
    clean = generate_room(0, depth_noise=0.0, holes=0.0).views[0]
    dirty = generate_room(0, depth_noise=3.0, holes=0.3).views[0]
    assert np.mean(clean.depth == 0) + 0.15 < np.mean(dirty.depth == 0)


def unit_solid(kind, taper=1.0):
    """One solid of unit size at the origin."""
    return Solids(
        np.eye(4)[None, :3],
        np.array([kind], np.int8),
        np.array([taper]),
        np.zeros(1, np.int32),
        np.array([[0, 0, 0, 2.0]]),
    )


def outside(kind, taper, p):
    """Signed implicit function of the unit solids, an independent statement of their shapes."""
    if kind == BOX:
        return np.abs(p).max(axis=-1) - 1
    if kind == ELLIPSOID:
        return np.linalg.norm(p, axis=-1) - 1
    radius = 1 + (taper - 1) * (p[..., 2] + 1) / 2
    return np.maximum(np.hypot(p[..., 0], p[..., 1]) - radius, np.abs(p[..., 2]) - 1)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([BOX, ELLIPSOID, FRUSTUM]), st.floats(0.2, 1.8), st.integers(0, 10**6))
def test_a_ray_stops_where_it_first_meets_the_surface(kind, taper, seed):
    """Against marching along the rays: nothing of the solid lies before the hit, and the hit lies on it."""
    rng = np.random.default_rng(seed)
    eye = rng.normal(size=3)
    eye *= rng.uniform(2.6, 4.0) / np.linalg.norm(eye)
    size = (9, 7)
    pose, intrinsics = look_at(eye, rng.normal(0, 0.3, 3)), intrinsics_of(size)
    depth, solid, normal = trace(unit_solid(kind, taper), pose, intrinsics, size)
    rays = pixel_rays(intrinsics, size) @ pose[:3, :3].T
    steps = np.linspace(0, 8, 4001)
    along = outside(kind, taper, eye + steps[:, None, None, None] * rays)
    inside_somewhere = (along < -1e-3).any(axis=0)
    assert np.all(np.isfinite(depth)[inside_somewhere]) and np.all((solid >= 0) == np.isfinite(depth))
    hit = np.isfinite(depth)
    first = steps[np.argmax(along < 0, axis=0)]
    met = hit & inside_somewhere
    np.testing.assert_allclose(depth[met], first[met], atol=0.05)
    place = eye + depth[hit][:, None] * rays[hit]
    np.testing.assert_allclose(outside(kind, taper, place), 0, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(normal[hit], axis=-1), 1)
    assert np.all(np.sum(normal[hit] * rays[hit], axis=-1) <= 1e-9)


def test_views_inside_a_cloud_see_much_of_it_and_agree_with_it(rooms):
    points = rooms[2].scene.points
    views = look_around_views(points, count=10, seed=1)
    again = look_around_views(points, count=10, seed=1)
    seen = np.zeros(len(points), bool)
    for view, same in zip(views, again, strict=True):
        np.testing.assert_array_equal(view.depth, same.depth)
        assert np.mean(view.depth > 0) > 0.1
        seen |= project(points, view.pose, view.intrinsics, view.size, view.depth, 0.05).visible
    assert 0.4 < seen.mean() < 1


def test_a_cloud_without_room_for_a_camera_says_so():
    grid = np.stack(np.meshgrid(*[np.arange(0, 0.9, 0.05)] * 2, np.arange(0, 2.5, 0.05)), axis=-1).reshape(-1, 3)
    with pytest.raises(ValueError, match="no place in this cloud is 0.3 m clear"):
        look_around_views(grid.astype(np.float32))


def test_a_splatted_point_hides_what_is_behind_it():
    points = np.array([[0, 2, 0], [0, 3, 0], [0.5, 3, 0]], np.float32)
    pose = look_at(np.zeros(3), np.array([0, 1.0, 0]))
    depth, index = splat(points, pose, intrinsics_of((31, 21)), (31, 21), 0.05)
    assert index[10, 15] == 0 and depth[10, 15] == 2
    assert set(np.unique(index)) == {-1, 0, 2} and np.all((depth > 0) == (index >= 0))
    reading = np.full((21, 31), 3, np.float32)  # a depth image knows better which of the two the pixel saw
    assert splat(points, pose, intrinsics_of((31, 21)), (31, 21), 0.05, reading)[1][10, 15] == 1
