import asyncio
import types

import numpy as np
import pytest

from ggsd_jax import level_of_detail
from ggsd_jax.level_of_detail import FAST, FEWEST, PAUSE, REST, SLOW, Cloud, Pace


def turn(pace: Pace, start: float, gaps) -> float:
    """The camera moves at `start` and after each gap; the time of the last report."""
    pace.moved(start)
    for gap in gaps:
        start += gap
        pace.moved(start)
    return start


@pytest.mark.parametrize("per_part", [0.0002, 0.002, 0.006, 0.03, 0.5])
def test_a_browser_gets_what_it_draws_in_time(per_part):
    pace, now = Pace(6), 10.0
    for _ in range(200):  # a slow browser reports twice in a frame
        pace.moved(now)
        pace.moved(now + 0.02)
        now += 0.02 + max(0.02, per_part * 2 ** (pace.shown - 1))
    between = per_part * 2 ** (pace.moving - 1)
    assert between <= SLOW or pace.moving == 1
    assert 2 * between >= FAST or pace.moving == 6


def test_slow_frames_are_noticed_within_two_and_a_pause_of_the_hand_is_none():
    pace = Pace(6)
    turn(pace, 0.0, [0.65, 0.65])
    assert pace.moving == 1
    steady = Pace(6)
    now = turn(steady, 0.0, [0.021] * 40)
    assert steady.moving == 6
    for pause in (0.07, 0.3, PAUSE - 1, PAUSE + 1):
        now = turn(steady, now + pause, [0.021] * 5)
        assert steady.moving == 6


def test_what_was_slow_once_is_tried_again_when_it_is_fast():
    pace = Pace(6)
    now = turn(pace, 0.0, [0.65, 0.65])
    turn(pace, now, [0.021] * 100)
    assert pace.moving == 6


def test_a_resting_camera_gets_twice_the_points_each_time_after_twice_the_wait():
    pace = Pace(4)
    now, waits = turn(pace, 0.0, [0.65, 0.65]), []
    assert pace.shown == 1
    while pace.shown < 4:
        waits.append(pace.due - now)
        now = pace.due
        pace.rests(now)
    np.testing.assert_allclose(waits, [REST, 2 * REST, 4 * REST])
    pace.moved(now + 0.1)  # and none of that time was a frame's
    pace.moved(now + 0.12)
    assert pace.shown == pace.moving == 1


class Part:
    def __init__(self, name, points, colors, point_size, **look):
        self.name, self.points, self.colors, self.point_size = name, points, colors, point_size
        self.visible, self.removed = True, False

    def remove(self):
        self.removed = True


@pytest.fixture
def client():
    parts: list[Part] = []

    def add(*args, **look):
        parts.append(Part(*args, **look))
        return parts[-1]

    def on_update(action):
        made.report = action

    made = types.SimpleNamespace(
        parts=parts, scene=types.SimpleNamespace(add_point_cloud=add), camera=types.SimpleNamespace(on_update=on_update)
    )
    return made


@pytest.mark.parametrize("count", [0, 1, FEWEST, FEWEST + 1, 100_003])
def test_the_parts_are_the_cloud_each_as_large_as_all_before_it(client, count):
    points = np.random.default_rng(0).uniform(size=(count, 3)).astype(np.float32)
    cloud = Cloud(client)
    cloud.draw(points, 0.03)
    sizes = [len(part.points) for part in client.parts]
    assert sum(sizes) == count and sizes[0] <= FEWEST
    for i, size in enumerate(sizes[1:], 1):
        assert 0 <= size - sum(sizes[:i]) <= 1
    drawn = np.concatenate([part.points for part in client.parts])
    np.testing.assert_array_equal(np.sort(drawn, axis=0), np.sort(points, axis=0))
    cloud.paint((points * 255).astype(np.uint8))
    cloud.resize(0.05)
    for part in client.parts:
        np.testing.assert_array_equal(part.colors, (part.points * 255).astype(np.uint8))
        assert part.visible and part.point_size == 0.05
    first = list(client.parts)
    cloud.draw(points[: count // 2], 0.03)
    assert all(part.removed for part in first)


def test_while_the_camera_moves_slowly_few_are_shown_and_all_once_it_rests(client, monkeypatch):
    monkeypatch.setattr(level_of_detail, "REST", 0.02)
    monkeypatch.setattr(level_of_detail, "SLOW", 0.001)
    cloud = Cloud(client)
    cloud.draw(np.zeros((100_000, 3), np.float32), 0.03)

    async def drag():
        for _ in range(6):
            await client.report(None)
            await asyncio.sleep(0.004)
        shown = [part.visible for part in client.parts]
        await asyncio.sleep(1.0)
        return shown

    assert asyncio.run(drag()) == [True, False, False, False]
    assert all(part.visible for part in client.parts)
