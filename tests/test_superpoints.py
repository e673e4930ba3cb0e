"""Superpoints are PCL's: against its own output, and the laws that hold on any cloud."""

import hashlib
import importlib.util
import json

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from data import kd_tree
from data.octree import adjacency, centred_origin, occupied_cells
from data.superpoints import _golden_cloud, _room, main, select_seeds, vccs, voxelize

CLOUDS = [
    "room_living_100k",
    "room_living_300k",
    "street_a",
    "scannet_scene0000_00",
    "semantickitti_00_000000",
    "nuscenes_frame08",
    "osd_learn33",
    "osd_milk_tutorial",
]


@pytest.fixture(scope="session")
def golden(shared):
    return shared / "golden_vccs"


@pytest.fixture(scope="session")
def metrics(golden):
    spec = importlib.util.spec_from_file_location("golden_vccs_metrics", golden / "metrics.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def growsp_cells(points, colors):
    """GrowSP's input to VCCS: 5 cm cells, the colour of the first point in each, normals of the cells around."""
    cells, first, inverse = np.unique(
        np.floor((points - points.mean(axis=0)) / 0.05), axis=0, return_index=True, return_inverse=True
    )
    cells = cells.astype(np.float32)
    i, j = cKDTree(cells).query_pairs(2.999, output_type="ndarray").T  # nearer than 3, as FLANN has it
    i, j = np.concatenate([i, j, np.arange(len(cells))]), np.concatenate([j, i, np.arange(len(cells))])
    offset = (cells[j] - cells[i]).astype(np.float64)
    count = np.bincount(i)
    mean = np.stack([np.bincount(i, offset[:, a]) for a in range(3)], axis=1) / count[:, None]
    second = [[np.bincount(i, offset[:, a] * offset[:, b]) / count for a in range(3)] for b in range(3)]
    covariance = np.moveaxis(np.array(second), -1, 0) - mean[:, :, None] * mean[:, None, :]
    normals = np.linalg.eigh(covariance)[1][:, :, 0]
    normals[(normals * cells).sum(axis=1) > 0] *= -1
    normals[count < 3] = np.nan
    return cells, colors[first], normals, inverse.ravel()


def oracle(metrics, labels, classes):
    """ASA and mIoU of the majority class of each superpoint."""
    labelled = classes >= 0
    predicted = metrics.majority(labels, classes)[labelled]
    truth = classes[labelled]
    ious = [((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum() for c in np.unique(truth)]
    return (predicted == truth).mean(), np.mean(ious)


@pytest.mark.parametrize("name", CLOUDS)
def test_partitions_are_those_of_pcl_on_every_golden_setting(name, golden, metrics):
    entries = json.loads((golden / "results.json").read_text())[name]
    real = "_input" in entries
    points, colors = _golden_cloud(golden, name, entries["_input"]["source"] if real else None)
    if real:
        assert hashlib.sha256(points.tobytes()).hexdigest() == entries["_input"]["sha256_of_float32_xyz"]
    arrays = np.load(golden / ("labels_real.npz" if real else f"{name}.npz"))
    prefix = f"{name}__" if real else ""
    classes = arrays[f"{prefix}sem"].astype(np.int64) if f"{prefix}sem" in arrays else None
    for key, entry in entries.items():
        if not key.startswith("labels_"):
            continue
        options = {k: v for k, v in entry["params"].items() if k not in ("refine", "note")}
        options["refine_iterations"] = entry["params"]["refine"]
        if "growsp" in key:
            cells, cell_colors, normals, inverse = growsp_cells(points, colors)
            options |= {"voxel_resolution": 1.0, "seed_resolution": 10.0}
            labels = vccs(cells, cell_colors, normals, **options)[inverse]
        else:
            labels = vccs(points, colors, **options)
        ours, theirs = labels.astype(np.int64) + 1, arrays[prefix + key].astype(np.int64)

        assert metrics.partition_ari(ours, theirs) >= 0.999, key
        assert metrics.mean_best_overlap(ours, theirs) >= 0.97, key
        if "growsp" not in key:
            voxel, seed = (np.float32(options[f"{of}_resolution"]) for of in ("voxel", "seed"))
            positions = voxelize(points, None, None, float(voxel)).features[:, :3].copy()
            seeds = select_seeds(positions, kd_tree.build(positions), voxel, seed)
            assert (len(positions), len(seeds)) == (entry["n_voxels"], entry["n_seeds"]), key
        superpoints = entry["metrics"]["n_superpoints"]
        assert abs(ours.max() - superpoints) <= 0.02 * superpoints, key
        assert abs((ours > 0).mean() - (theirs > 0).mean()) <= 0.002, key
        if classes is not None:
            asa, miou = oracle(metrics, ours, classes)
            assert abs(asa - entry["metrics"]["asa"]) <= 0.003, key
            assert abs(miou - entry["metrics"]["oracle_miou"]) <= 0.01, key


@pytest.mark.parametrize(
    "name, voxel, seed", [("room_living_100k", 0.05, 0.5), ("street_a", 0.2, 1.0)], ids=["room", "street"]
)
def test_every_stage_is_that_of_pcl(name, voxel, seed, golden):
    points, colors = _golden_cloud(golden, name, None)
    stages = np.load(golden / f"stages_{name}_v{voxel:g}_s{seed:g}.npz")
    voxel, seed = np.float32(voxel), np.float32(seed)
    voxels = voxelize(points, colors, None, float(voxel))
    positions = voxels.features[:, :3].copy()
    np.testing.assert_allclose(voxels.cells.origin, stages["octree_box"][:3], atol=1e-9)
    np.testing.assert_array_equal(positions, stages["voxel_xyz"])
    np.testing.assert_array_equal(np.diff(voxels.cells.start), stages["voxel_points"])
    np.testing.assert_array_equal(np.diff(voxels.neighbor_start), stages["voxel_neighbours_with_self"])
    normals, theirs = voxels.features[:, 6:], stages["voxel_normal"].astype(np.float32)
    np.testing.assert_array_equal(np.isnan(normals), np.isnan(theirs))
    some = ~np.isnan(theirs[:, 0])
    close = np.isclose(normals[some], theirs[some], atol=2e-3).all(axis=1)  # they are stored in half precision
    assert close.mean() > 0.995  # along thin strips of voxels PCL's single-precision sums blur them
    seeds = select_seeds(positions, kd_tree.build(positions), voxel, seed)
    np.testing.assert_array_equal(seeds, stages["seeds"])


@pytest.mark.parametrize(
    "case",
    ["one_point", "two_far_points", "two_planes_1m", "l_corner", "two_planes_gap_one_voxel", "sphere_and_crumbs"],
)
def test_tiny_clouds_are_identical_up_to_label_names(case, golden):
    arrays = np.load(golden / "tiny_cases_v0.04_s0.3.npz")
    labels = vccs(arrays[f"{case}_xyz"], arrays[f"{case}_rgb"], voxel_resolution=0.04, seed_resolution=0.3)
    names, theirs = np.unique(arrays[f"{case}_labels"], return_inverse=True)
    np.testing.assert_array_equal(labels, theirs - (0 in names))  # in the order of PCL's labels, without its gaps


def test_shuffling_the_points_changes_nothing_but_rounding(golden, metrics):
    points, colors = _golden_cloud(golden, "room_living_100k", None)
    order = np.random.default_rng(1).permutation(len(points))
    options = {"voxel_resolution": 0.05, "seed_resolution": 0.5}
    labels = vccs(points, colors, **options)
    shuffled = vccs(points[order], colors[order], **options)
    assert metrics.partition_ari(labels[order] + 1, shuffled + 1) >= 0.9998
    labels = vccs(points, colors, **options, refine_iterations=2)
    shuffled = vccs(points[order], colors[order], **options, refine_iterations=2)
    assert metrics.partition_ari(labels[order] + 1, shuffled + 1) >= 0.99  # each refinement carries rounding on


# Multiples of 1/64 add up without rounding.
lattice_clouds = hnp.arrays(np.float32, st.tuples(st.integers(1, 60), st.just(3)), elements=st.integers(-96, 96)).map(
    lambda cloud: cloud / np.float32(64)
)


@settings(max_examples=30, deadline=None)
@given(lattice_clouds, st.randoms(use_true_random=False), st.integers(0, 2))
def test_labels_are_compact_constant_in_a_voxel_and_independent_of_point_order(cloud, random, refine_iterations):
    options = {"voxel_resolution": 0.25, "seed_resolution": 0.75, "refine_iterations": refine_iterations}
    labels = vccs(cloud, **options)
    assert labels.dtype == np.int32
    assert labels.shape == (len(cloud),)
    assert set(labels.tolist()) - {-1} == set(range(labels.max() + 1))
    cells = occupied_cells(cloud, centred_origin(cloud, 0.25), 0.25)
    assert len(np.unique(np.stack([cells.cell, labels]), axis=1).T) == len(cells.keys)
    order = random.sample(range(len(cloud)), len(cloud))
    np.testing.assert_array_equal(vccs(cloud[order], **options), labels[order])


def test_equal_input_gives_equal_output():
    points, colors = _room(20_000)
    options = {"voxel_resolution": 0.1, "seed_resolution": 0.8, "refine_iterations": 1}
    np.testing.assert_array_equal(vccs(points, colors, **options), vccs(points.copy(), colors.copy(), **options))


def test_double_and_integer_coordinates_and_strided_rows_are_taken():
    points, colors = _room(2_000)
    options = {"voxel_resolution": 0.2, "seed_resolution": 1.0}
    labels = vccs(points, colors, **options)
    wide = np.concatenate([points.astype(np.float64), np.ones((len(points), 1))], axis=1)
    np.testing.assert_array_equal(vccs(wide[:, :3], colors, **options), labels)
    assert vccs(np.arange(12).reshape(4, 3), voxel_resolution=1, seed_resolution=2).shape == (4,)


def test_without_colors_the_color_weight_has_no_effect():
    points, colors = _room(5_000)
    options = {"voxel_resolution": 0.2, "seed_resolution": 1.0}
    plain = vccs(points, **options)
    np.testing.assert_array_equal(vccs(points, color_importance=5.0, **options), plain)
    np.testing.assert_array_equal(vccs(points, colors, color_importance=0.0, **options), plain)
    assert (vccs(points, colors, **options) != plain).any()


@pytest.mark.parametrize("copies", [1, 40])
def test_one_place_is_one_superpoint_if_its_seed_needs_no_company(copies):
    points = np.full((copies, 3), 0.7)
    assert vccs(points, voxel_resolution=0.1, seed_resolution=0.2).tolist() == [0] * copies
    assert vccs(points, voxel_resolution=0.1, seed_resolution=1.0).tolist() == [-1] * copies


def test_where_no_seed_has_company_nothing_is_in_a_superpoint():
    points = np.random.default_rng(0).uniform(0, 1, (50, 3)).astype(np.float32)
    assert set(vccs(points, voxel_resolution=0.05, seed_resolution=1e6)) == {-1}


def test_points_in_a_line_are_grouped_into_stretches():
    points = [1, 2, 3] + np.arange(300)[:, None] * [0.1, 0.07, 0.03]
    labels = vccs(points, voxel_resolution=0.1, seed_resolution=1.0)
    assert (labels >= 0).mean() > 0.98
    assert 20 <= labels.max() + 1 <= 60
    assert max(np.ptp(points[labels == k, 0]) for k in range(labels.max() + 1)) <= 2


def test_a_line_along_an_axis_has_no_normals_so_only_seeds_get_labels():
    points = np.arange(300)[:, None] * [0.1, 0, 0]
    labels = vccs(points, voxel_resolution=0.1, seed_resolution=1.0)
    assert (labels >= 0).sum() == labels.max() + 1 == 30


def test_a_voxel_without_normal_is_not_taken():
    points = np.stack(np.meshgrid(np.arange(20.0), np.arange(20.0), [0.0]), axis=-1).reshape(-1, 3)
    normals = np.tile(np.array([0.0, 0.0, 1.0]), (400, 1))
    options = {"voxel_resolution": 1.0, "seed_resolution": 5.0}
    assert (vccs(points, None, normals, **options) >= 0).all()
    corner = np.flatnonzero((points[:, 0] == 19) & (points[:, 1] == 19))
    normals[corner] = np.nan
    assert np.flatnonzero(vccs(points, None, normals, **options) < 0).tolist() == corner.tolist()


def test_superpoints_do_not_cross_a_gap():
    points, _ = _room(20_000)
    both = np.concatenate([points, points + np.array([20, 0, 0], np.float32)])
    labels = vccs(both, voxel_resolution=0.1, seed_resolution=0.8)
    left, right = set(labels[: len(points)].tolist()), set(labels[len(points) :].tolist())
    assert left & right <= {-1}


def test_normals_of_a_plane_face_the_origin():
    grid = np.stack(np.meshgrid(np.arange(12.0), np.arange(12.0), [3.0]), axis=-1).reshape(-1, 3)
    voxels = voxelize(grid.astype(np.float32), None, None, 1.0)
    np.testing.assert_allclose(voxels.features[:, 6:], np.tile([0, 0, -1], (144, 1)), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 120), st.just(3)), elements=st.integers(-4, 4)),
    hnp.arrays(np.float32, (5, 3), elements=st.floats(-6, 6, width=32)),
    st.sampled_from([0.5, 1.0, 2.5]),
)
def test_tree_searches_agree_with_looking_at_every_point(points, queries, radius):
    tree = kd_tree.build(points)
    squared = ((queries[:, None] - points) ** 2).sum(axis=-1)
    found = kd_tree.nearest(tree, queries)
    np.testing.assert_allclose(squared[np.arange(5), found], squared.min(axis=1), rtol=1e-6)
    counts = kd_tree.count_within(tree, points[:1], np.float32(radius))
    assert counts[0] == (((points - points[0]) ** 2).sum(axis=1) < radius**2).sum()


@settings(max_examples=20, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 80), st.just(3)), elements=st.integers(0, 40)))
def test_cells_are_in_morton_order_and_know_their_26_neighbours(points):
    cells = occupied_cells(points, np.zeros(3), 1.0)
    np.testing.assert_array_equal(cells.keys[cells.cell], points)
    codes = [sum((int(k) >> b & 1) << 3 * b + 2 - a for b in range(8) for a, k in enumerate(key)) for key in cells.keys]
    assert codes == sorted(set(codes))
    start, neighbor = adjacency(cells.keys)
    touching = np.abs(cells.keys[:, None] - cells.keys).max(axis=-1) <= 1
    for v in range(len(cells.keys)):
        assert sorted(neighbor[start[v] : start[v + 1]]) == np.flatnonzero(touching[v]).tolist()


POINTS = np.random.default_rng(0).uniform(0, 1, (10, 3))
BAD_POINTS = np.where(np.arange(10)[:, None] == 7, np.nan, POINTS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"points": np.zeros((0, 3))}, "points is empty"),
        ({"points": np.zeros((4, 2))}, r"points must have shape \[N, 3\], got \[4, 2\]"),
        ({"points": np.zeros(3)}, r"points must have shape \[N, 3\], got \[3\]"),
        ({"points": BAD_POINTS}, r"points row 7 is \[nan, nan, nan\].*drop such rows first \(1 in all\)"),
        ({"points": POINTS * [1, np.inf, 1]}, r"points row 0 is \[.*inf.*\].*finite"),
        ({"points": POINTS * 1e60}, "points row 0 .*finite float32"),
        ({"points": POINTS * 1e38}, "along one axis, more than the 2097152 allowed"),
        ({"colors": np.zeros((9, 3), np.uint8)}, r"colors must have one row .*\[10, 3\], got \[9, 3\]"),
        ({"colors": np.zeros((10, 3))}, "colors must be uint8, 0..255, got float64"),
        ({"normals": np.zeros((10, 4))}, r"normals must have one row .*\[10, 3\], got \[10, 4\]"),
        ({"voxel_resolution": 0.0}, "voxel_resolution must be a positive length in metres, got 0.0"),
        ({"seed_resolution": -1.0}, "seed_resolution must be a positive length in metres, got -1.0"),
        ({"seed_resolution": np.nan}, "seed_resolution must be a positive length in metres, got nan"),
        ({"seed_resolution": 0.05}, r"seed_resolution \(0.05 m\) must not be below voxel_resolution \(0.1 m\)"),
        ({"color_importance": -0.1}, "color_importance must be a finite weight of at least 0, got -0.1"),
        ({"refine_iterations": -1}, "refine_iterations must be at least 0, got -1"),
        ({"points": POINTS * 1e9}, r"cells of 0.1 m over this cloud would number .*2097152 allowed: use a larger"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        vccs(**({"points": POINTS, "voxel_resolution": 0.1, "seed_resolution": 0.5} | arguments))


def test_bench_prints_its_table_and_help_explains_it(capsys, monkeypatch):
    monkeypatch.setattr("data.superpoints._room", lambda: _room(3_000))
    main(["--bench"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["cloud", "setting", "points", "ours", "s", "PCL", "s", "ratio"]
    assert len(lines) == 3
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "results.json" in capsys.readouterr().out
