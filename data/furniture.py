"""Shape grammar of the synthetic rooms: one function per class builds a random piece from a few solids.

A piece stands on z = 0 around the origin, x is its width and +y the side it shows to the room; metres
throughout. The class of a solid is the name of the piece it belongs to, or "clutter" for things that belong
to no class.
"""

from typing import NamedTuple

import numpy as np

BOX, ELLIPSOID, FRUSTUM = range(3)


class Solid(NamedTuple):
    """One analytic solid: a box, an ellipsoid or an upright elliptic frustum.

    center, half: metres, in the frame of the piece; a frustum's half axes are those of its bottom, and its
    top is `taper` times as wide. tilt: rotation about x through the centre, radians. color: RGB in 0..1.
    """

    kind: int
    center: tuple[float, float, float]
    half: tuple[float, float, float]
    color: np.ndarray
    taper: float = 1.0
    tilt: float = 0.0


def box(x0, x1, y0, y1, z0, z1, color, tilt=0.0) -> Solid:
    """Box between two corners, tilted about its own centre."""
    center = ((x0 + x1) / 2, (y0 + y1) / 2, (z0 + z1) / 2)
    return Solid(BOX, center, ((x1 - x0) / 2, (y1 - y0) / 2, (z1 - z0) / 2), color, tilt=tilt)


def ellipsoid(x, y, z, a, b, c, color) -> Solid:
    """Ellipsoid around (x, y, z) with half axes a, b, c."""
    return Solid(ELLIPSOID, (x, y, z), (a, b, c), color)


def frustum(x, y, z0, z1, bottom, top, color, stretch=1.0) -> Solid:
    """Upright frustum from z0 to z1; bottom and top are its radii along x, stretch times that along y."""
    half = (bottom, bottom * stretch, (z1 - z0) / 2)
    return Solid(FRUSTUM, (x, y, (z0 + z1) / 2), half, color, taper=top / bottom)


def _wood(rng):
    return np.array([0.62, 0.44, 0.28]) * rng.uniform(0.5, 1.4) + rng.normal(0, 0.03, 3)


def _paint(rng):
    return np.full(3, rng.uniform(0.6, 0.95)) + rng.normal(0, 0.03, 3)


def _cloth(rng):
    return rng.uniform(0.15, 0.85, 3)


def _wood_or_paint(rng):
    return _wood(rng) if rng.random() < 0.6 else _paint(rng)


def _legs(w, d, top, thick, color) -> list[Solid]:
    """Four square legs under the corners of a w x d plate."""
    x, y = w / 2 - thick, d / 2 - thick
    return [
        box(sx * x - thick / 2, sx * x + thick / 2, sy * y - thick / 2, sy * y + thick / 2, 0, top, color)
        for sx in (-1, 1)
        for sy in (-1, 1)
    ]


def bed(rng) -> list[Solid]:
    w, d, top = rng.uniform(0.9, 1.5), rng.uniform(1.8, 2.0), rng.uniform(0.4, 0.55)
    frame, sheet = _wood_or_paint(rng), _cloth(rng)
    base = rng.choice([0.0, 0.12])
    solids = [
        box(-w / 2, w / 2, -d / 2, d / 2, base, top - 0.18, frame),
        box(-w / 2 + 0.03, w / 2 - 0.03, -d / 2 + 0.05, d / 2 - 0.03, top - 0.18, top, sheet),
        box(-w / 2, w / 2, -d / 2, -d / 2 + 0.06, 0, top + rng.uniform(0.2, 0.55), frame),
    ]
    if base:
        solids += _legs(w, d, base, 0.07, frame)
    pillow = _paint(rng)
    for x in (-w / 4, w / 4) if w > 1.15 else (0.0,):
        solids.append(ellipsoid(x, -d / 2 + 0.3, top + 0.05, 0.28, 0.19, 0.1, pillow))
    if rng.random() < 0.6:
        cover = rng.uniform(0.9, 1.3)
        solids.append(box(-w / 2 - 0.02, w / 2 + 0.02, d / 2 - cover, d / 2, top - 0.15, top + 0.06, _cloth(rng)))
    return solids


def sofa(rng) -> list[Solid]:
    w, d = rng.uniform(1.2, 1.9), rng.uniform(0.75, 0.9)
    seat, arm, back = rng.uniform(0.38, 0.46), rng.uniform(0.55, 0.65), rng.uniform(0.75, 0.9)
    color = _cloth(rng)
    side = rng.uniform(0.13, 0.2)
    solids = [
        box(-w / 2, w / 2, -d / 2, d / 2, 0.06, seat - 0.1, color),
        box(-w / 2, -w / 2 + side, -d / 2, d / 2, 0.06, arm, color),
        box(w / 2 - side, w / 2, -d / 2, d / 2, 0.06, arm, color),
        box(-w / 2, w / 2, -d / 2, -d / 2 + 0.2, 0.06, back, color, tilt=rng.uniform(0, 0.12)),
    ]
    cushions = 2 if w < 1.6 else 3
    edges = np.linspace(-w / 2 + side, w / 2 - side, cushions + 1)
    for x0, x1 in zip(edges[:-1], edges[1:], strict=True):
        solids.append(box(x0 + 0.01, x1 - 0.01, -d / 2 + 0.2, d / 2 + 0.02, seat - 0.1, seat, color * 1.1))
    if rng.random() < 0.5:
        x = rng.choice([-1, 1]) * (w / 2 - side - 0.2)
        solids.append(ellipsoid(x, -d / 2 + 0.3, seat + 0.17, 0.2, 0.1, 0.18, _cloth(rng)))
    return solids


def chair(rng) -> list[Solid]:
    w, d = rng.uniform(0.4, 0.5), rng.uniform(0.4, 0.5)
    seat, back = rng.uniform(0.42, 0.48), rng.uniform(0.82, 1.05)
    color = _cloth(rng) if rng.random() < 0.5 else _wood(rng)
    solids = [
        box(-w / 2, w / 2, -d / 2, d / 2, seat - 0.06, seat, color),
        box(-w / 2, w / 2, -d / 2 - 0.02, -d / 2 + 0.04, seat, back, color, tilt=rng.uniform(0, 0.15)),
    ]
    if rng.random() < 0.6:
        solids += _legs(w, d, seat - 0.06, 0.045, color)
    else:
        solids.append(frustum(0, 0, 0.05, seat - 0.06, 0.035, 0.035, color * 0.6))
        solids.append(frustum(0, 0, 0, 0.07, 0.27, 0.1, color * 0.6))
    if rng.random() < 0.35:
        for x in (-w / 2, w / 2):
            solids.append(box(x - 0.025, x + 0.025, -d / 2, d / 4, seat + 0.17, seat + 0.22, color))
            solids.append(box(x - 0.025, x + 0.025, d / 4 - 0.05, d / 4, seat, seat + 0.17, color))
    return solids


def stool(rng) -> list[Solid]:
    r, top = rng.uniform(0.15, 0.2), rng.uniform(0.4, 0.65)
    color = _wood_or_paint(rng) if rng.random() < 0.5 else _cloth(rng)
    style = rng.integers(3)
    if style == 0:
        return [
            frustum(0, 0, top - 0.06, top, r, r, color),
            *_legs(1.5 * r, 1.5 * r, top - 0.06, 0.045, color),
        ]
    if style == 1:
        foot = frustum(0, 0, 0, 0.04, r, r * 0.7, color * 0.6)
        return [
            frustum(0, 0, top - 0.08, top, r, r, color),
            frustum(0, 0, 0, top - 0.08, 0.04, 0.04, color),
            foot,
        ]
    return [frustum(0, 0, 0, top, r, r * rng.uniform(0.8, 1.1), color)]


def table(rng) -> list[Solid]:
    w, d = rng.uniform(0.9, 1.5), rng.uniform(0.6, 0.85)
    top, thick, color = rng.uniform(0.68, 0.78), rng.uniform(0.03, 0.06), _wood_or_paint(rng)
    if rng.random() < 0.25:
        r = rng.uniform(0.4, 0.55)
        pillar, foot = frustum(0, 0, 0, top, 0.05, 0.05, color), frustum(0, 0, 0, 0.05, 0.28, 0.22, color)
        return [frustum(0, 0, top - thick, top, r, r, color), pillar, foot]
    plate = box(-w / 2, w / 2, -d / 2, d / 2, top - thick, top, color)
    if rng.random() < 0.65:
        return [plate, *_legs(w, d, top - thick, rng.uniform(0.05, 0.08), color)]
    sides = [box(x - 0.03, x + 0.03, -d / 2, d / 2, 0, top - thick, color) for x in (0.04 - w / 2, w / 2 - 0.04)]
    return [plate, *sides]


def cabinet(rng) -> list[Solid]:
    w, d, h = (
        rng.uniform(0.5, 1.1),
        rng.uniform(0.42, 0.6),
        rng.choice([rng.uniform(0.7, 1.0), rng.uniform(1.3, 1.9)]),
    )
    color = _wood_or_paint(rng)
    solids = [
        box(-w / 2 + 0.02, w / 2 - 0.02, -d / 2, d / 2 - 0.05, 0, 0.08, color * 0.6),
        box(-w / 2, w / 2, -d / 2, d / 2, 0.08, h - 0.04, color),
        box(-w / 2 - 0.02, w / 2 + 0.02, -d / 2, d / 2 + 0.03, h - 0.04, h, color * 0.85),
    ]
    doors = 1 if w < 0.7 else 2
    for x in np.linspace(-w / 2, w / 2, 2 * doors + 1)[1::2]:
        solids.append(box(x - 0.02, x + 0.02, d / 2, d / 2 + 0.035, h * 0.4, h * 0.4 + 0.15, color * 0.4))
    return solids


def bookshelf(rng) -> list[Solid]:
    w, d, h = rng.uniform(0.7, 1.2), rng.uniform(0.28, 0.36), rng.uniform(1.3, 2.0)
    color = _wood_or_paint(rng)
    solids = [
        box(-w / 2, w / 2, -d / 2, -d / 2 + 0.02, 0, h, color * 0.9),
        box(-w / 2, -w / 2 + 0.03, -d / 2, d / 2, 0, h, color),
        box(w / 2 - 0.03, w / 2, -d / 2, d / 2, 0, h, color),
    ]
    levels = np.linspace(0.04, h - 0.02, round(h / 0.36) + 1)
    solids += [box(-w / 2, w / 2, -d / 2, d / 2, z - 0.015, z + 0.015, color) for z in levels]
    for z in levels[:-1]:
        if rng.random() < 0.75:
            start, length = -w / 2 + 0.04 + rng.uniform(0, 0.3), rng.uniform(0.15, 0.4)
            end = min(start + length, w / 2 - 0.04)
            depth = rng.uniform(0.1, 0.18)
            solids.append(box(start, end, -d / 2 + 0.02, -d / 2 + depth, z, z + rng.uniform(0.15, 0.26), _cloth(rng)))
    return solids


def lamp(rng) -> list[Solid]:
    h = rng.uniform(1.35, 1.75)
    return _lamp(rng, h, rng.uniform(0.16, 0.23), rng.uniform(0.25, 0.35))


def table_lamp(rng) -> list[Solid]:
    return _lamp(rng, rng.uniform(0.42, 0.6), rng.uniform(0.13, 0.17), rng.uniform(0.18, 0.24))


def _lamp(rng, h, r, shade) -> list[Solid]:
    metal = np.full(3, rng.uniform(0.1, 0.6))
    return [
        frustum(0, 0, 0, 0.04, 0.7 * r, 0.6 * r, metal),
        frustum(0, 0, 0.04, h - shade / 2, 0.025, 0.02, metal),
        frustum(0, 0, h - shade, h, r, r * rng.uniform(0.45, 0.85), _paint(rng) * [1.0, 0.95, 0.8]),
    ]


def plant(rng) -> list[Solid]:
    pot, r, h = rng.uniform(0.2, 0.38), rng.uniform(0.12, 0.19), rng.uniform(0.8, 1.5)
    green = np.array([0.2, 0.5, 0.2]) * rng.uniform(0.6, 1.3)
    solids = [frustum(0, 0, 0, pot, 0.75 * r, r, np.array([0.7, 0.4, 0.3]) * rng.uniform(0.5, 1.3))]
    solids.append(frustum(0, 0, pot, h - 0.15, 0.02, 0.015, green * [1.6, 0.8, 0.8]))
    for _ in range(rng.integers(7, 12)):
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.24)
        z = rng.uniform(pot + 0.12, h)
        leaf = rng.uniform(0.07, 0.15, 3) * [1, 1, 0.7]
        solids.append(ellipsoid(reach * np.cos(angle), reach * np.sin(angle), z, *leaf, green * rng.uniform(0.8, 1.2)))
    return solids


def bathtub(rng) -> list[Solid]:
    w, d, h = rng.uniform(1.4, 1.7), rng.uniform(0.65, 0.78), rng.uniform(0.48, 0.6)
    rim, floor, color = rng.uniform(0.06, 0.1), rng.uniform(0.1, 0.2), _paint(rng)
    return [
        box(-w / 2, w / 2, -d / 2, d / 2, 0, floor, color),
        box(-w / 2, w / 2, -d / 2, -d / 2 + rim, floor, h, color),
        box(-w / 2, w / 2, d / 2 - rim, d / 2, floor, h, color),
        box(-w / 2, -w / 2 + rim, -d / 2 + rim, d / 2 - rim, floor, h, color),
        box(w / 2 - 1.5 * rim, w / 2, -d / 2 + rim, d / 2 - rim, floor, h, color),
        box(-w / 2, -w / 2 + 0.04, -0.04, 0.04, h, h + 0.2, color * 0.6),
    ]


def toilet(rng) -> list[Solid]:
    seat, r = rng.uniform(0.38, 0.44), rng.uniform(0.17, 0.2)
    color = _paint(rng)
    solids = [
        frustum(0, 0.07, 0, seat - 0.04, 0.6 * r, r, color, stretch=1.35),
        frustum(0, 0.07, seat - 0.04, seat, 1.05 * r, 1.05 * r, color * 0.9, stretch=1.35),
        box(-0.09, 0.09, -0.3, -0.1, 0, seat - 0.05, color),
        box(-0.21, 0.21, -0.34, -0.16, seat - 0.06, seat + rng.uniform(0.32, 0.42), color),
    ]
    if rng.random() < 0.4:
        solids.append(box(-r, r, -0.16, -0.12, seat, seat + 0.38, color * 0.95, tilt=0.1))
    return solids


def monitor(rng) -> list[Solid]:
    w, gap = rng.uniform(0.5, 0.9), rng.uniform(0.06, 0.14)
    h, dark = w * rng.uniform(0.55, 0.65), np.full(3, rng.uniform(0.05, 0.25))
    return [
        box(-w / 2, w / 2, -0.025, 0.025, gap, gap + h, dark, tilt=rng.uniform(-0.1, 0.05)),
        box(-0.04, 0.04, -0.05, -0.01, 0, gap + h / 2, dark),
        box(-0.14, 0.14, -0.1, 0.1, 0, 0.02, dark),
    ]


def clutter(rng) -> list[Solid]:
    """A small thing of no class: a book, a box, a cup, a ball."""
    a, b, c = rng.uniform(0.04, 0.14, 3)
    color = rng.uniform(0.1, 0.9, 3)
    kind = rng.integers(3)
    if kind == 0:
        return [box(-a, a, -b, b, 0, 1.3 * c, color)]
    if kind == 1:
        return [frustum(0, 0, 0, 2 * c, 0.6 * a, 0.7 * a, color)]
    return [ellipsoid(0, 0, 0.7 * a, 0.7 * a, 0.7 * a, 0.7 * a, color)]
