"""A point cloud in the browser that turns without waiting, whatever draws it.

While the camera moves, as many points are drawn as the browser draws in time, spread evenly over the scan; once it
rests, step by step all of them again. A browser with a GPU draws half a million at every moment, one that draws on the
CPU some ten thousand. Which it is shows in the camera: a browser reports it with the frames in which it moved.
"""

import asyncio
import math
import threading
import time
from collections import deque
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

FEWEST = 20_000  # points that are never thinned; of a larger cloud at least half as many are drawn
SLOW, FAST = 0.06, 0.025  # seconds between reports: fewer points above, more below; a browser waits at least 0.02
PAUSE = 5.0  # seconds without a report that are no frame's time any more
REST = 0.4  # seconds without a report until twice the points are drawn; twice as long until twice those, at most PAUSE


class Pace:
    """How many parts of a cloud to draw at a time, in seconds; each part has as many points as all before it.

    Attributes:
        shown: parts to draw now.
        moving: parts to draw while the camera moves, as far as is known.
        due: when to draw the next part, if the camera does not move until then.
    """

    def __init__(self, parts: int):
        self.parts = self.shown = parts
        self.moving = max(1, parts - 2)  # a guess: a quarter of the points
        self._rest, self._last, self._gaps = REST, -math.inf, deque(maxlen=16)

    def moved(self, now: float) -> None:
        """The browser reports that the camera moved."""
        gap, self._last = now - self._last, now
        self._gaps.append(gap)
        if gap > PAUSE:
            self._gaps.clear()
        recent = sorted(list(self._gaps)[-4:])[-2:]  # the longest may be a hand's pause, the one before is a frame's
        if len(recent) == 2 and recent[0] > SLOW and self.moving > 1:
            self.moving = max(1, self.moving - math.ceil(math.log2(recent[0] / SLOW)))
            self._gaps.clear()
        elif len(self._gaps) == 16 and sorted(self._gaps)[-2] < FAST and self.moving < self.parts:
            self.moving += 1
            self._gaps.clear()
        self.shown, self._rest = self.moving, REST
        self.due = now + REST

    def rests(self, now: float) -> None:
        """The camera has not moved until `due`."""
        self.shown = min(self.shown + 1, self.parts)
        self._rest = min(2 * self._rest, PAUSE)
        self.due = now + self._rest
        self._last = -math.inf  # until it moves again is no frame's time


class Cloud:
    """The points that one browser sees.

    Args:
        client: viser's handle of the browser.
    """

    def __init__(self, client: Any):
        self._scene, self._parts, self._rows, self._pace = client.scene, [], [], Pace(0)
        self._lock = threading.Lock()  # viser calls `_moved` in its event loop, the rest comes from other threads
        self._timer: asyncio.TimerHandle | None = None
        client.camera.on_update(self._moved)

    def draw(self, points: Float[np.ndarray, "N 3"], size: float) -> None:
        """Draws other points, grey until they are painted; `size` of each in metres."""
        ends = [len(points)]
        while ends[-1] > FEWEST:
            ends.append(ends[-1] // 2)
        look = {"point_size": size, "point_shape": "circle", "precision": "float32"}
        with self._lock:
            for part in self._parts:
                part.remove()
            self._rows = np.split(np.random.default_rng(0).permutation(len(points)), ends[:0:-1])
            self._parts = [
                self._scene.add_point_cloud(f"/scan/{i}", points[rows], np.full((len(rows), 3), 128, np.uint8), **look)
                for i, rows in enumerate(self._rows)
            ]
            self._pace = Pace(len(ends))

    def paint(self, colors: UInt8[np.ndarray, "N 3"]) -> None:
        for part, rows in zip(self._parts, self._rows, strict=True):
            part.colors = colors[rows]

    def resize(self, size: float) -> None:
        for part in self._parts:
            part.point_size = size

    def close(self) -> None:
        """Draws nothing more, since nobody looks; in the event loop."""
        with self._lock:
            self._parts = []
            self._pace = Pace(0)
            self._show()

    async def _moved(self, _: Any) -> None:
        with self._lock:
            self._pace.moved(time.monotonic())
            self._show()

    def _rests(self) -> None:
        with self._lock:
            self._pace.rests(time.monotonic())
            self._show()

    def _show(self) -> None:
        """Shows what the pace says, and more when it is due; in the event loop."""
        for i, part in enumerate(self._parts):
            part.visible = i < self._pace.shown
        if self._timer is not None:
            self._timer.cancel()
        if self._pace.shown < self._pace.parts:
            wait = self._pace.due - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(wait, self._rests)
