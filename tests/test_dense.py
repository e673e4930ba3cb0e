"""2D networks as teachers: batches of views in, features of single views out."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from data.projection import fuse
from data.scene import View
from ggsd_jax.vision_language.dense import DenseTeacher


def make_views(sizes) -> list[View]:
    """Views of a camera that looks along z; each image has one brightness of its own."""
    views = []
    for i, (width, height) in enumerate(sizes):
        intrinsics = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
        image = np.full((height, width, 3), i + 1, np.uint8)
        views.append(View(f"view {i}", np.eye(4), intrinsics, (width, height), image=image))
    return views


class Recorder:
    """A network whose feature is the brightness, at half the resolution."""

    def __init__(self):
        self.shapes = []

    def __call__(self, images):
        self.shapes.append(images.shape)
        return jnp.asarray(images[:, ::2, ::2, :2], jnp.bfloat16)


def test_every_view_gets_its_own_features_whatever_its_batch():
    network = Recorder()
    teacher = DenseTeacher("space", 2, View.full_pixels, network, batch_size=2)
    given = make_views([(8, 6)] * 3 + [(10, 4)] * 2)
    views, features_of = teacher.look(iter(given))
    for number, view in enumerate(views):
        features = features_of(view)
        assert view is given[number]
        assert features.dtype == np.float32 and features.shape == (view.size[1], view.size[0], 2)
        np.testing.assert_array_equal(features, number + 1)
    assert network.shapes == [(2, 6, 8, 3), (2, 6, 8, 3), (2, 4, 10, 3)]  # filled up: two programs in all


def test_views_are_read_no_more_than_a_batch_ahead():
    taken = []

    def stream():
        for view in make_views([(8, 6)] * 9):
            taken.append(view.name)
            yield view

    views, features_of = DenseTeacher("space", 2, View.full_pixels, Recorder(), batch_size=3).look(stream())
    for used, view in enumerate(views, start=1):
        assert len(taken) <= used + 3
        last = view
    with pytest.raises(KeyError):  # features of past batches are gone
        features_of(make_views([(8, 6)])[0])
    assert features_of(last) is not None and len(taken) == 9


def test_fusion_takes_the_views_and_their_features():
    points = np.array([[0, 0, 2.0], [0.1, 0.1, 2.0]], np.float32)
    teacher = DenseTeacher("space", 2, View.full_pixels, Recorder(), batch_size=2)
    features, index = fuse(points, *teacher.look(make_views([(8, 6)] * 3)))
    assert index.tolist() == [0, 1]
    np.testing.assert_array_equal(features, 2)  # the mean of 1, 2, 3


def test_many_views_take_no_more_memory_than_a_few():
    points = np.random.default_rng(0).uniform([-1, -1, 1], [1, 1, 3], (20_000, 3)).astype(np.float32)

    def views(count: int):
        intrinsics = np.array([[40.0, 0, 40], [0, 40.0, 30], [0, 0, 1]])
        for i in range(count):  # as from disk: made when asked for
            image = np.full((60, 80, 3), i % 250, np.uint8)
            yield View(f"view {i}", np.eye(4), intrinsics, (80, 60), np.full((60, 80), 2, np.float32), image)

    def peak(count: int) -> int:
        tracemalloc.start()
        fuse(points, *DenseTeacher("space", 2, View.full_pixels, Recorder(), batch_size=2).look(views(count)))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)  # compiles
    assert peak(60) < 1.2 * peak(6)
