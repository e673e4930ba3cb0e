"""Cameras and fusion: against golden numbers of OpenScene, real frames, and the geometry itself."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import scannet
from data.projection import adjust_intrinsics, fuse, project
from data.scene import View

SIZE = (8, 6)  # w, h
INTRINSICS = np.array([[5.0, 0, 3.5], [0, 6.0, 2.5], [0, 0, 1]])


@pytest.fixture(scope="module")
def golden(shared):
    return dict(np.load(shared / "golden/extras_pipeline.npz"))


def random_pose(rng: np.random.Generator) -> np.ndarray:
    """A rotation by any angle about any axis, and a shift."""
    rotation, upper = np.linalg.qr(rng.normal(size=(3, 3)))
    rotation *= np.sign(np.diag(upper))
    rotation[:, 0] *= np.linalg.det(rotation)
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, rng.normal(size=3)
    return pose


def lift(pose: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """The point each pixel's centre shows at its depth, world frame, [h * w, 3]."""
    v, u = np.indices(depth.shape)
    rays = np.stack([(u - 3.5) / 5.0, (v - 2.5) / 6.0, np.ones(depth.shape)], axis=-1)
    camera = (rays * depth[..., None]).reshape(-1, 3)
    return camera @ pose[:3, :3].T + pose[:3, 3]


def a_view(name: str = "0", **fields) -> View:
    return View(name, **({"pose": np.eye(4), "intrinsics": INTRINSICS, "size": SIZE} | fields))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_a_point_lifted_from_a_pixel_falls_on_it_and_is_seen(seed):
    rng = np.random.default_rng(seed)
    pose, depth = random_pose(rng), rng.uniform(0.5, 5, (6, 8)).astype(np.float32)
    row, col, visible = project(lift(pose, depth), pose, INTRINSICS, SIZE, depth, tolerance=1e-4)
    assert visible.all()
    np.testing.assert_array_equal(np.stack([row, col]), np.indices(depth.shape).reshape(2, -1))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 0.5))
def test_a_point_is_seen_while_it_departs_from_the_reading_by_less_than_the_tolerance_of_the_reading(seed, tolerance):
    rng = np.random.default_rng(seed)
    pose, depth = random_pose(rng), rng.uniform(0.5, 5, (6, 8)).astype(np.float32)
    for factor, seen in ((0.99, True), (1.01, False)):
        for sign in (-1, 1):
            points = lift(pose, depth * (1 + sign * factor * tolerance))
            visible = project(points, pose, INTRINSICS, SIZE, depth, tolerance=tolerance).visible
            assert visible.all() if seen else not visible.any()


def test_the_tolerance_itself_is_still_within():
    depth = np.full((6, 8), 2, np.float32)
    points = np.array([[0, 0, 1.5], [0, 0, 2.5], [0, 0, 1.4999], [0, 0, 2.5001]])
    assert project(points, np.eye(4), INTRINSICS, SIZE, depth).visible.tolist() == [True, True, False, False]


def test_no_reading_sees_nothing_however_wide_the_tolerance():
    points = np.array([[0.0, 0, 1], [0, 0, 1e-9]])
    assert not project(points, np.eye(4), INTRINSICS, SIZE, np.zeros((6, 8), np.float32), tolerance=9.0).visible.any()


def test_points_behind_the_camera_or_in_its_plane_are_not_seen():
    points = np.array([[0.0, 0, -1], [0, 0, 0], [0.1, 0, 0], [0, 0, 1]], np.float32)
    projection = project(points, np.eye(4), INTRINSICS, SIZE)
    assert projection.visible.tolist() == [False, False, False, True]
    assert projection.row[:3].tolist() == projection.col[:3].tolist() == [0, 0, 0]


def test_halves_go_to_the_even_pixel():
    points = np.array([[u, v, 1.0] for u, v in ((0.5, 1.5), (1.5, 2.5), (2.5, 0.5), (-0.5, 5.5), (7.5, 0))])
    row, col, visible = project(points, np.eye(4), np.eye(3), SIZE)
    assert visible.tolist() == [True, True, True, False, False]  # 5.5 goes to 6, outside
    assert row[:3].tolist() == [2, 2, 0] and col[:3].tolist() == [0, 2, 2]
    assert project(np.array([[-0.5, 4.5, 1.0]]), np.eye(4), np.eye(3), SIZE).visible.all()  # to 0 and 4


@pytest.mark.parametrize("border", [0, 1, 2, 3])
def test_the_border_sees_nothing(border):
    points = lift(np.eye(4), np.ones((6, 8)))
    expected = np.zeros((6, 8), bool)
    expected[border : 6 - border, border : 8 - border] = True
    visible = project(points, np.eye(4), INTRINSICS, SIZE, border=border).visible
    np.testing.assert_array_equal(visible, expected.reshape(-1))


def test_moving_points_and_camera_together_changes_nothing():
    rng = np.random.default_rng(1)
    pose, motion = random_pose(rng), random_pose(rng)
    points = lift(pose, rng.uniform(1, 3, (6, 8)))
    moved = points @ motion[:3, :3].T + motion[:3, 3]
    for a, b in zip(
        project(points, pose, INTRINSICS, SIZE), project(moved, motion @ pose, INTRINSICS, SIZE), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_pose_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="pose or intrinsics that are not finite; leave this frame out"):
        project(np.zeros((1, 3)), np.full((4, 4), -np.inf), INTRINSICS, SIZE)


def test_depth_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"depth must have shape \[6, 8\] \(h, w\), got \[8, 6\]"):
        project(np.zeros((1, 3)), np.eye(4), INTRINSICS, SIZE, np.ones((8, 6), np.float32))


def test_projection_equals_openscenes(golden):
    size = tuple(golden["proj_image_dim"].tolist())
    for view in range(3):
        for key, depth, border in (
            ("depth", golden["proj_depths"][view].astype(np.float32), 2),
            ("nodepth", None, 1),
        ):
            projection = project(
                golden["proj_points"],
                golden["proj_poses"][view],
                golden["proj_K"][:3, :3],
                size,
                depth,
                border=border,
            )
            np.testing.assert_array_equal(np.stack(projection, axis=1), golden[f"proj_map_{key}"][view])


@pytest.mark.parametrize(
    ("case", "focal_x", "focal_y", "center", "old_size", "new_size"),
    [
        ("scannet_320x240", 577.870605, 577.870605, (319.5, 239.5), (640, 480), (320, 240)),
        ("matterport_like", 1075.1, 1075.8, (629.7, 522.3), (1280, 1024), (640, 512)),
        ("nuscenes_like", 1266.4, 1266.4, (816.3, 491.5), (1600, 900), (800, 450)),
        ("crop_case", 600, 600, (599.5, 339.5), (1200, 680), (640, 360)),
    ],
)
def test_adjusted_intrinsics_equal_openscenes(golden, case, focal_x, focal_y, center, old_size, new_size):
    intrinsics = np.array([[focal_x, 0, center[0]], [0, focal_y, center[1]], [0, 0, 1]])
    adjusted = adjust_intrinsics(intrinsics, old_size, new_size)
    np.testing.assert_allclose(adjusted, golden[f"adjust_{case}"][:3, :3], rtol=1e-14)
    np.testing.assert_array_equal(adjust_intrinsics(intrinsics, old_size, old_size), intrinsics)


@pytest.mark.parametrize("scene", ["scene0000_00", "scene0448_01"])
def test_real_frames_see_exactly_the_expected_points(shared, scene):
    folder = shared / "data/scannet" / scene
    if scene == "scene0000_00":
        points = scannet.read_scene(folder).points
    else:
        points = np.fromfile(folder / f"{scene}.points.bin", np.float32).reshape(-1, 6)[:, :3]
    expected = json.loads((folder / "projection_expected.json").read_text())["frames"]
    views = scannet.read_views(folder, size=(640, 480))
    assert [view.name for view in views] == [f"{scene}/{number}" for number in expected]
    for view, numbers in zip(views, expected.values(), strict=True):
        inside = project(points, view.pose, view.intrinsics, view.size).visible
        row, col, visible = project(points, view.pose, view.intrinsics, view.size, view.depth)
        assert numbers == {
            "inside": inside.sum(),
            "visible": visible.sum(),
            "sum_u": col[visible].sum(),
            "sum_v": row[visible].sum(),
            "sum_index": np.flatnonzero(visible).sum(),
        }


# Fusion


@pytest.mark.parametrize(("units", "times"), [(4000.0, "0.248"), (6553.5, "0.151")])
def test_real_depth_in_the_unit_of_another_data_set_is_noticed(shared, units, times):
    folder = shared / "data/scannet/scene0000_00"
    points = scannet.read_scene(folder).points
    views = [
        dataclasses.replace(view, depth=view.depth * np.float32(1000 / units))
        for view in scannet.read_views(folder, every=20)
    ]
    with pytest.raises(ValueError, match=f"almost nothing is visible: .* {times} times as far"):
        fuse(points, views, lambda view: np.ones((*view.depth.shape, 1), np.float32), border=scannet.BORDER)


def test_fusion_equals_openscenes(golden):
    size = tuple(golden["proj_image_dim"].tolist())
    views = [
        View(
            str(i),
            golden["proj_poses"][i],
            golden["proj_K"][:3, :3],
            size,
            golden["proj_depths"][i].astype(np.float32),
        )
        for i in range(3)
    ]
    maps = golden["fuse_feat2d"].transpose(0, 2, 3, 1)
    features, index = fuse(golden["proj_points"], iter(views), lambda view: maps[int(view.name)], border=2)
    np.testing.assert_array_equal(index, np.flatnonzero(golden["fuse_visible"]))
    np.testing.assert_array_equal(features, golden["fuse_bank"][index].astype(np.float16))
    np.testing.assert_array_equal(features, golden["fuse_feat_saved"])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_a_fused_feature_is_the_mean_of_the_pixels_that_see_the_point_in_any_order_of_views(seed, num_views):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(50, 3)).astype(np.float32)
    views = [
        a_view(str(i), pose=random_pose(rng), depth=rng.uniform(0.3, 2, (6, 8)).astype(np.float32))
        for i in range(num_views)
    ]
    maps = rng.normal(size=(num_views, 6, 8, 3)).astype(np.float16)
    seen = [[] for _ in points]
    for i, view in enumerate(views):
        row, col, visible = project(points, view.pose, INTRINSICS, SIZE, view.depth, 0.5, 1)
        for j in np.flatnonzero(visible):
            seen[j].append(maps[i, row[j], col[j]].astype(np.float64))
    for order in (views, views[::-1]):
        features, index = fuse(points, order, lambda view: maps[int(view.name)], tolerance=0.5, border=1)
        assert features.dtype == np.float16 and index.dtype == np.int32
        assert index.tolist() == [j for j, pixels in enumerate(seen) if pixels]
        for feature, j in zip(features, index, strict=True):
            np.testing.assert_allclose(feature, np.mean(seen[j], axis=0), rtol=1e-3, atol=1e-3)


def test_a_point_no_view_sees_has_no_feature():
    points = np.array([[0, 0, 1], [0, 0, -1]], np.float32)
    features, index = fuse(points, [a_view()], lambda view: np.ones((6, 8, 2), np.float32))
    assert index.tolist() == [0] and features.tolist() == [[1, 1]]
    features, index = fuse(points[1:], [a_view()], lambda view: np.ones((6, 8, 2), np.float32))
    assert features.shape == (0, 2) and index.shape == (0,)


@pytest.mark.parametrize(
    ("views", "feature_map", "message"),
    [
        ([], np.ones((6, 8, 2)), "no views to fuse"),
        (
            [a_view("a")],
            np.ones((8, 6, 2)),
            r"view 'a': features must be \[6, 8, 2\] \(h, w, C\), got \[8, 6, 2\]",
        ),
        ([a_view("a")], np.full((6, 8, 2), np.nan), "view 'a': features are not finite"),
    ],
)
def test_views_without_usable_features_are_named(views, feature_map, message):
    with pytest.raises(ValueError, match=message):
        fuse(np.array([[0, 0, 1]], np.float32), views, lambda view: feature_map)


@pytest.mark.parametrize("factor", [0.25, 1000 / 6553.5, 4.0])
def test_depth_in_the_unit_of_another_data_set_is_noticed(factor):
    rng = np.random.default_rng(0)
    size, intrinsics = (40, 30), np.array([[30.0, 0, 19.5], [0, 30.0, 14.5], [0, 0, 1]])
    row, col = np.indices((30, 40))
    depth = (2 + 0.05 * col + rng.uniform(0, 0.01, (30, 40))).astype(np.float32)
    points = np.stack([(col - 19.5) / 30 * depth, (row - 14.5) / 30 * depth, depth], axis=-1).reshape(-1, 3)
    hidden = points[::3] * 1.7  # behind the surface
    view = View("7", np.eye(4), intrinsics, size, depth)

    def features(view):
        return np.ones((30, 40, 2), np.float32)

    cloud = np.concatenate([points, hidden])
    assert len(fuse(cloud, [view], features)[1]) == 1200
    scaled = View("7", np.eye(4), intrinsics, size, (depth * factor).astype(np.float32))
    with pytest.raises(ValueError, match=f"almost nothing is visible: .* {factor:.3g} times as far as their points"):
        fuse(cloud, [scaled], features)
    far_behind = View("7", np.eye(4), intrinsics, size, rng.uniform(0.05, 1.2, (30, 40)).astype(np.float32))
    assert len(fuse(cloud, [far_behind], features)[1]) == 0  # the camera looks at a wall before it: no mistake
