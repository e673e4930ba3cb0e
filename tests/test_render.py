import numpy as np
import pytest
from PIL import Image

from ggsd_jax.render import bounding_box, distinct_colors, heat, render, side_by_side


def test_a_near_point_covers_a_far_one_and_the_ceiling_is_taken_off():
    red, blue, green = np.eye(3, dtype=np.uint8) * 255
    corners = np.array([[-1, -1, 0], [1, -1, 0], [-1, 1, 0], [1, 1, 0], [0, 0, 2.5]], np.float64)
    column = np.stack([np.zeros(20), np.zeros(20), np.linspace(0, 1.9, 20)], 1)
    points = np.concatenate([corners, column])
    colors = np.concatenate([np.tile(blue, (4, 1)), green[None], np.tile(red, (20, 1))]).astype(np.uint8)
    image = render(points, colors, elevation=np.pi / 2 - 1e-3)
    seen = {tuple(pixel) for pixel in image.reshape(-1, 3)}
    assert tuple(red) in seen and tuple(blue) in seen and tuple(green) not in seen


@pytest.mark.parametrize("stray", [[0, 0, -300], [0, 0, 4], [300, 0, 0]])
def test_a_stray_point_does_not_move_the_picture(stray):
    points = np.random.default_rng(0).uniform(0, [4, 3, 2.4], (3000, 3))
    colors = np.full((3000, 3), 90, np.uint8)
    others = points[1:], colors[1:]
    points[0] = stray
    np.testing.assert_array_equal(bounding_box(points), bounding_box(others[0]))
    np.testing.assert_array_equal(render(points, colors), render(*others))


def test_panels_stand_side_by_side_over_a_legend(tmp_path):
    points = np.random.default_rng(0).random((500, 3))
    panels = {name: np.full((500, 3), 120, np.uint8) for name in ("input", "ground_truth")}
    side_by_side(tmp_path / "a.png", points, panels, {"wall": np.array([1, 2, 3], np.uint8)})
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 2 * 480 and image.height > 420


def test_long_names_have_room_in_the_legend_and_long_titles_stay_over_their_panel(tmp_path):
    points = np.random.default_rng(0).random((500, 3))
    grey, black = np.full((500, 3), 120, np.uint8), np.zeros(3, np.uint8)
    side_by_side(tmp_path / "short.png", points, {"a": grey}, {f"{i}": black for i in range(8)})
    side_by_side(tmp_path / "long.png", points, {"a" * 300: grey, "b": grey}, {f"{i}" * 30: black for i in range(8)})
    with Image.open(tmp_path / "short.png") as short, Image.open(tmp_path / "long.png") as long:
        assert long.height > short.height  # fewer names in a row
        title = np.asarray(long.convert("L"))[:27]
    assert (title[:, 460:490] == 255).all() and (title[:, 12:440] < 128).any()


def test_heat_grows_brighter_and_distinct_colors_differ():
    assert (np.diff(heat(np.linspace(0, 1, 50)).sum(axis=1).astype(int)) > 0).all()
    assert len(np.unique(distinct_colors(60), axis=0)) == 60 and distinct_colors(0).shape == (0, 3)
