"""The simulated teacher: each failure mode by itself, what stays random, how its 2D fusion scores."""

import dataclasses

import numpy as np
import pytest

from data.labels import IGNORE, LABEL_SETS, NYU40_TO_SCANNET20
from data.projection import fuse
from data.scene import Scene
from data.synthetic import SYNTHETIC, generate_room, room_seeds
from data.virtual_camera import look_around_views
from ggsd_jax import metrics
from ggsd_jax.vision_language.simulated import SimulatedTeacher
from ggsd_jax.vision_language.text import embed

TEXT = embed(SYNTHETIC.classes)
PERFECT = dict(fragment_mistakes=0.0, view_mistakes=0.0, ambiguity=0.0, bleeding=0.0, lighting=0.0, pixel_noise=0.0)


@pytest.fixture(scope="module")
def rooms():
    return [generate_room(seed) for seed in room_seeds("val", 16)]


def fused_labels(room, teacher, text=TEXT, tolerance=0.25):
    """int64 [N]: class whose text is most like the fused feature, `UNKNOWN` where there is none."""
    features, index = fuse(room.scene.points, room.views, teacher(room.scene), tolerance=tolerance)
    labels = np.full(len(room.scene.points), metrics.UNKNOWN)
    labels[index] = (features.astype(np.float32) @ text.T).argmax(axis=1)
    return labels


def miou(rooms, teacher):
    pred = np.concatenate([fused_labels(room, teacher) for room in rooms])
    return metrics.evaluate(pred, np.concatenate([room.scene.labels for room in rooms]), len(TEXT))["miou"]


def view_labels(teacher, room, number=0, text=TEXT):
    return (teacher(room.scene)(room.views[number]) @ text.T).argmax(axis=-1)


def test_two_dimensional_fusion_of_the_validation_rooms_scores_about_fifty(rooms):
    assert 0.48 < miou(rooms, SimulatedTeacher(TEXT)) < 0.52


def test_a_teacher_without_errors_knows_every_label(rooms):
    room = rooms[0]
    pred = fused_labels(room, SimulatedTeacher(TEXT, **PERFECT), tolerance=0.05)
    judged = (pred != metrics.UNKNOWN) & (room.scene.labels != IGNORE)
    assert 0.7 < np.mean(pred != metrics.UNKNOWN) < 1
    assert np.mean(pred[judged] == room.scene.labels[judged]) > 0.99


@pytest.mark.parametrize("error", ["fragment_mistakes", "view_mistakes", "bleeding"])
def test_every_kind_of_mistake_costs_accuracy(rooms, error):
    rate = 0.03 if error == "bleeding" else 0.3
    assert miou(rooms[:3], SimulatedTeacher(TEXT, **{**PERFECT, error: rate})) < miou(
        rooms[:3], SimulatedTeacher(TEXT, **PERFECT)
    )


def test_the_same_view_gets_the_same_features_in_any_order(rooms):
    room, teacher = rooms[0], SimulatedTeacher(TEXT)
    one, two = teacher(room.scene), SimulatedTeacher(TEXT)(room.scene)
    first = one(room.views[0])
    assert first.dtype == np.float32 and first.shape == (90, 120, 64)
    two(room.views[1])
    np.testing.assert_array_equal(two(room.views[0]), first)
    other = SimulatedTeacher(TEXT, seed=1)(room.scene)(room.views[0])
    assert not np.array_equal(other, first)


def test_errors_depend_on_the_name_of_the_scene_and_of_the_view(rooms):
    room, teacher = rooms[0], SimulatedTeacher(TEXT)
    first = teacher(room.scene)(room.views[0])
    renamed = dataclasses.replace(room.views[0], name="another")
    assert not np.array_equal(teacher(room.scene)(renamed), first)
    elsewhere = dataclasses.replace(room.scene, name="another")
    assert not np.array_equal(teacher(elsewhere)(room.views[0]), first)


def test_fragments_are_mistaken_alike_in_every_view(rooms):
    """A cube's worth of a class, seen in two views, has one apparent class."""
    room = rooms[0]
    teacher = SimulatedTeacher(TEXT, **{**PERFECT, "fragment_mistakes": 0.5})
    alone = np.full((len(room.views), len(room.scene.points)), -1)
    for row, view in zip(alone, room.views, strict=True):
        features, index = fuse(room.scene.points, [view], teacher(room.scene), tolerance=0.02)
        row[index] = (features.astype(np.float32) @ TEXT.T).argmax(axis=1)
    labelled = room.scene.labels != IGNORE
    a, b = alone[:-1, labelled], alone[1:, labelled]
    both = (a >= 0) & (b >= 0)
    assert both.sum() > 5000 and np.mean(a[both] == b[both]) > 0.95
    mistaken = (alone.max(axis=0) != room.scene.labels)[labelled & (alone.max(axis=0) >= 0)]
    assert 0.25 < mistaken.mean() < 0.75


def test_views_make_their_mistakes_independently(rooms):
    room = rooms[0]
    teacher = SimulatedTeacher(TEXT, **{**PERFECT, "view_mistakes": 0.5})
    right = [view_labels(SimulatedTeacher(TEXT, **PERFECT), room, i) for i in range(len(room.views))]
    wrong = [view_labels(teacher, room, i) != right[i] for i in range(len(room.views))]
    shares = [w.mean() for w in wrong]
    assert 0.1 < np.mean(shares) < 0.8 and np.std(shares) > 0.05


def test_mistakes_prefer_similar_classes():
    """Chairs: more often stools than bathtubs, as the text says."""
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform(0, 60, (40_000, 2)), np.zeros(40_000)]).astype(np.float32)
    names = list(SYNTHETIC.classes)
    chairs = Scene("chairs", points, labels=np.full(len(points), names.index("chair"), np.int32))
    teacher = SimulatedTeacher(TEXT, **{**PERFECT, "fragment_mistakes": 0.6})
    apparent = teacher._mistake_fragments(np.random.default_rng(1), chairs)
    share = np.bincount(apparent, minlength=len(names)) / len(points)
    assert abs(1 - share[names.index("chair")] - 0.6) < 0.04
    assert share[names.index("stool")] > share[names.index("sofa")] > share[names.index("bathtub")]


def test_points_of_no_class_get_a_direction_as_far_from_every_class_as_classes_are_from_each_other(rooms):
    room = rooms[0]
    nothing = dataclasses.replace(room.scene, labels=np.full_like(room.scene.labels, IGNORE))
    features = SimulatedTeacher(TEXT, **PERFECT)(nothing)(room.views[0])
    assert np.ptp(features.reshape(-1, 64), axis=0).max() == 0
    direction = features[0, 0]
    np.testing.assert_allclose(np.linalg.norm(direction), 1, atol=1e-5)
    between = (TEXT @ TEXT.T)[~np.eye(len(TEXT), dtype=bool)]
    assert (TEXT @ direction).max() < 0.4 and abs((TEXT @ direction).mean() - between.mean()) < 0.15


def test_noise_has_the_length_it_is_given(rooms):
    clean = SimulatedTeacher(TEXT, **PERFECT)(rooms[0].scene)(rooms[0].views[0])
    spread = np.sqrt(np.mean(np.sum((TEXT - TEXT.mean(axis=0)) ** 2, axis=1)))
    noisy = SimulatedTeacher(TEXT, **{**PERFECT, "pixel_noise": 0.7})(rooms[0].scene)(rooms[0].views[0])
    np.testing.assert_allclose(np.linalg.norm(noisy - clean, axis=-1).mean(), 0.7 * spread, rtol=0.02)
    glared = SimulatedTeacher(TEXT, **{**PERFECT, "lighting": 0.4})(rooms[0].scene)(rooms[0].views[0])
    glare = (glared - clean).reshape(-1, 64)
    assert np.ptp(glare, axis=0).max() < 1e-5 and 0.2 * spread < np.linalg.norm(glare[0]) < 0.6 * spread


def test_wrong_rates_and_labels_are_refused(rooms):
    with pytest.raises(ValueError, match=r"view_mistakes is 1.5, expected a share in 0\.\.1"):
        SimulatedTeacher(TEXT, view_mistakes=1.5)
    with pytest.raises(ValueError, match="temperature is 0.0, expected more than 0"):
        SimulatedTeacher(TEXT, temperature=0.0)
    with pytest.raises(ValueError, match="labels row"):
        SimulatedTeacher(TEXT[:5])(rooms[0].scene)
    with pytest.raises(ValueError, match="labels is missing"):
        SimulatedTeacher(TEXT)(dataclasses.replace(rooms[0].scene, labels=None))


def test_it_serves_real_labelled_clouds_with_real_text(shared):
    """A ScanNet scan, views simulated inside it, CLIP's own text: errors of the same size as in the rooms."""
    classes = LABEL_SETS["scannet20"].classes
    text = embed(classes, encoder=shared / "data/text_embeddings/clip_scannet20_vitb32_512.npz")
    archive = np.load(shared / "data/scannet/labelled_50k/scene0001_00.npz")
    labels = NYU40_TO_SCANNET20[archive["nyu40"]].astype(np.int32)
    scene = Scene("scene0001_00", archive["xyz_aligned"].astype(np.float32), labels=labels)
    views = look_around_views(scene.points, count=6)
    features, index = fuse(scene.points, views, SimulatedTeacher(text)(scene))
    pred = (features.astype(np.float32) @ text.T).argmax(axis=1)
    judged = labels[index] != IGNORE
    assert len(index) > 0.6 * len(labels)
    assert 0.5 < np.mean(pred[judged] == labels[index][judged]) < 0.95
