"""Procedural furnished rooms, scanned by a simulated depth camera: labelled data, nothing to download.

A room is a rectangle with walls (some open, some with a door or window hole), sometimes a corner cut out, and
a random choice of `data.furniture`, at random places that do not overlap. It is seen as a hand-held scanner
sees it: ray-traced depth from a walk around the room, with range-dependent noise and holes, back-projected
and merged. Every class can be told from its shape at voxels of 8 cm; colours say little about the class.
"""

from typing import NamedTuple

import numpy as np

from data import furniture
from data.furniture import Solid, box
from data.labels import IGNORE, LabelSet
from data.scene import Scene, View
from data.virtual_camera import Solids, intrinsics_of, look_at, missing_blocks, pixel_rays, trace

SYNTHETIC = LabelSet(
    "synthetic",
    ("wall", "floor", "ceiling", "bed", "sofa", "chair", "stool", "table", "cabinet", "bookshelf", "lamp",
     "plant", "bathtub", "toilet", "monitor"),
    np.array(
        [[174, 199, 232], [152, 223, 138], [225, 225, 225], [255, 187, 120], [140, 86, 75], [188, 189, 34],
         [214, 39, 40], [255, 152, 150], [31, 119, 180], [148, 103, 189], [255, 221, 51], [44, 160, 44],
         [227, 119, 194], [23, 190, 207], [82, 84, 163]],
        np.uint8,
    ),
)  # fmt: skip

_SPLITS = ("train", "val", "test")
_ROOMS_PER_SPLIT = 1_000_000
_DISPARITY_STEPS = 800.0  # depth resolution z^2 / 800: 1 cm at 3 m

_ON_FLOOR = {  # builder, chance to be in a room, side: "wall" = back against a wall, "any" = anywhere
    "bed": (furniture.bed, 0.5, "wall"),
    "sofa": (furniture.sofa, 0.6, "wall"),
    "bathtub": (furniture.bathtub, 0.5, "wall"),
    "table": (furniture.table, 0.95, "any"),
    "cabinet": (furniture.cabinet, 0.75, "wall"),
    "bookshelf": (furniture.bookshelf, 0.75, "wall"),
    "toilet": (furniture.toilet, 0.9, "wall"),
    "plant": (furniture.plant, 0.8, "any"),
    "lamp": (furniture.lamp, 0.8, "any"),
    "stool": (furniture.stool, 0.9, "any"),
}


class Room(NamedTuple):
    """A scanned room (points, colors, labels of SYNTHETIC) and the frames that a 2D network gets to see."""

    scene: Scene
    views: list[View]


def room_seeds(split: str, count: int) -> range:
    """Seeds of the first `count` rooms of "train", "val" or "test"; no room is in two splits.

    Raises:
      ValueError: another split, or more rooms than a split has.
    """
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(_SPLITS)}")
    if not 0 <= count <= _ROOMS_PER_SPLIT:
        raise ValueError(f"{split}: {count} rooms asked for, a split has 0..{_ROOMS_PER_SPLIT}")
    first = _SPLITS.index(split) * _ROOMS_PER_SPLIT
    return range(first, first + count)


def generate_room(
    seed: int,
    *,
    scan_views: int = 12,
    views: int = 9,
    size: tuple[int, int] = (120, 90),
    spacing: float = 0.032,
    depth_noise: float = 1.0,
    holes: float = 0.03,
) -> Room:
    """Builds, furnishes and scans the room of a seed; the same seed and settings give the same bits.

    Args:
      scan_views: frames that the point cloud is made from.
      views: how many of them are handed out; what only the others saw has no 2D feature.
      size: (width, height) of the frames in pixels.
      spacing: points are merged within cells of this many metres.
      depth_noise: 1 = a structured-light camera's: sigma 1.2 mm + 1.9 mm/m^2 * (z - 0.4 m)^2 (Nguyen et al.
        2012).
      holes: share of each frame in blocks without a reading; edges and grazing surfaces lose theirs besides.

    Raises:
      ValueError: views is not in 1..scan_views.
    """
    if not 1 <= views <= scan_views:
        raise ValueError(f"views is {views}, expected 1..{scan_views} (scan_views)")
    rng = np.random.default_rng(seed)
    extent = np.array([*rng.uniform(2.5, 3.5, 2), rng.uniform(2.2, 2.5)])
    pieces = _shell(rng, extent)
    pieces += _furnish(rng, extent, pieces)
    solids, labels, colors = _assemble(pieces)
    # turned and moved at random, so that nothing hangs on a room's axes
    world = _placement(rng.uniform(0, 2 * np.pi), *rng.uniform(-2, 2, 2), 0)
    light = rng.normal(size=3) + [0, 0, 1.5]
    light /= np.linalg.norm(light)
    intrinsics = intrinsics_of(size)
    frames, clouds = [], []
    for i, pose in enumerate(_walk(rng, extent, pieces, scan_views)):
        exact, hit, normal = trace(solids, pose, intrinsics, size)
        depth = _sense(rng, exact, normal, pixel_rays(intrinsics, size) @ pose[:3, :3].T, depth_noise, holes)
        shade = (0.55 + 0.45 * np.abs(normal @ light)) * rng.uniform(0.75, 1.15)
        image = colors[hit] * shade[..., None] + rng.normal(0, 0.03, (*hit.shape, 1))
        image = (255 * np.where(hit[..., None] < 0, 0, image).clip(0, 1)).astype(np.uint8)
        frames.append(View(f"{i:02d}", world @ pose, intrinsics, size, depth, image))
        seen = depth > 0
        points = pixel_rays(intrinsics, size)[seen] * depth[seen, None]
        points = points @ frames[-1].pose[:3, :3].T + frames[-1].pose[:3, 3]
        clouds.append((points, image[seen], labels[hit[seen]]))
    points, image, label = (np.concatenate(part) for part in zip(*clouds, strict=True))
    points, image, label = _merge(points, image, label, spacing)
    scene = Scene(f"room{seed:07d}", points, image, labels=label)
    return Room(scene, [frames[i] for i in np.linspace(0, scan_views - 1, views).round().astype(int)])


def _sense(rng, exact, normal, rays, noise, holes):
    """What a depth camera reports of exact depths: noise, coarse steps, and 0 where it sees nothing."""
    z = np.where(np.isfinite(exact), exact, 0.0)
    z_noisy = z + noise * (0.0012 + 0.0019 * (z - 0.4) ** 2) * rng.normal(size=z.shape)
    disparity = np.round(_DISPARITY_STEPS / np.maximum(z_noisy, 0.1))
    depth = _DISPARITY_STEPS / np.maximum(disparity, 1.0)
    facing = np.abs(np.sum(normal * rays, axis=-1)) / np.linalg.norm(rays, axis=-1)
    lost = rng.random(z.shape) > facing / 0.2
    jump = np.zeros(z.shape, bool)
    jump[:, 1:] |= np.abs(np.diff(z, axis=1)) > 0.15
    jump[1:] |= np.abs(np.diff(z, axis=0)) > 0.15
    lost |= jump & (rng.random(z.shape) < 0.5)
    lost |= missing_blocks(rng, z.shape, holes) | (z < 0.3) | (z > 6.0)
    return np.where(lost, 0, depth).astype(np.float32)


def _merge(points, colors, labels, spacing):
    """One point per occupied cell: mean position and colour of what fell into it, most frequent label."""
    cells = np.floor(points / spacing).astype(np.int64)
    cells -= cells.min(axis=0)
    extent = cells.max(axis=0) + 1
    keys = (cells[:, 0] * extent[1] + cells[:, 1]) * extent[2] + cells[:, 2]
    counts = np.bincount(keys)  # of every cell of the bounding box: small, and faster than sorting
    inverse = np.cumsum(counts > 0)[keys] - 1
    counts = counts[counts > 0]

    def mean(values):
        sums = [np.bincount(inverse, column, len(counts)) for column in values.T]
        return np.stack(sums, axis=1) / counts[:, None]

    kinds = len(SYNTHETIC.classes) + 1
    votes = np.bincount(inverse * kinds + np.minimum(labels, kinds - 1), minlength=len(counts) * kinds)
    label = votes.reshape(-1, kinds).argmax(axis=1)
    label[label == kinds - 1] = IGNORE
    return mean(points).astype(np.float32), mean(colors).round().astype(np.uint8), label.astype(np.int32)


def _walk(rng, extent, pieces, count) -> list[np.ndarray]:
    """Poses of a camera carried around the middle of the room at 1.2-1.7 m, looking across, some upwards."""
    middle = extent[:2] / 2
    blocks = [piece.bounds() for piece in pieces if piece.name not in ("floor", "ceiling")]
    start, turn = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1])
    poses = []
    for i in range(count):
        angle = start + turn * 2 * np.pi * i / count
        for _ in range(30):
            around = angle + rng.normal(0, 0.3)
            eye = middle + rng.uniform(0.05, 0.33) * extent[:2] * [np.cos(around), np.sin(around)]
            eye = np.append(eye, rng.uniform(1.2, 1.7))
            if not any(np.all((eye > b[0] - 0.2) & (eye < b[1] + 0.2)) for b in blocks):
                break
        across = angle + np.pi + rng.normal(0, 0.5)
        target = middle + 0.45 * extent[:2] * [np.cos(across), np.sin(across)]
        height = rng.uniform(1.4, 2.0) if i % 6 == 2 else rng.uniform(0.0, 0.9)
        poses.append(look_at(eye, np.append(target, height)))
    return poses


def _assemble(pieces):
    """The tracer's solids of all pieces, and label [S] and color [S, 3] of each."""
    to_unit, spheres = [], []
    for piece in pieces:
        low, high = piece.bounds()
        # tilted parts reach a little out of the bounds
        spheres.append([*(low + high) / 2, np.linalg.norm(high - low) / 2 + 0.05])
        for solid in piece.solids:
            c, s = np.cos(solid.tilt), np.sin(solid.tilt)
            own = np.eye(4)
            own[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) * solid.half
            own[:3, 3] = solid.center
            to_unit.append(np.linalg.inv(piece.pose @ own)[:3])
    all_solids = [solid for piece in pieces for solid in piece.solids]
    owner = np.repeat(np.arange(len(pieces)), [len(piece.solids) for piece in pieces]).astype(np.int32)
    label_of = {name: i for i, name in enumerate(SYNTHETIC.classes)}
    labels = np.array([label_of.get(pieces[i].name, IGNORE) for i in owner], np.int32)
    solids = Solids(
        np.stack(to_unit),
        np.array([solid.kind for solid in all_solids], np.int8),
        np.array([solid.taper for solid in all_solids]),
        owner,
        np.array(spheres),
    )
    return solids, labels, np.stack([solid.color for solid in all_solids])


class _Piece(NamedTuple):
    """A piece of furniture, or of the room itself, and the 4 x 4 pose that puts it into the room."""

    name: str
    solids: list[Solid]
    pose: np.ndarray

    def bounds(self) -> np.ndarray:
        """[2, 3]: lowest and highest corner in the room, of the boxes around the solids (tilts left out)."""
        own = np.array([[np.subtract(s.center, s.half), np.add(s.center, s.half)] for s in self.solids])
        low, high = own[:, 0].min(0), own[:, 1].max(0)
        corners = np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])
        placed = corners @ self.pose[:3, :3].T + self.pose[:3, 3]
        return np.stack([placed.min(0), placed.max(0)])


def _placement(yaw, x, y, z) -> np.ndarray:
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, z], [0, 0, 0, 1.0]])


def _shell(rng, extent) -> list[_Piece]:
    """Floor, ceiling, two to four walls, up to one door and one window hole, perhaps a corner cut out."""
    w, d, h = extent
    paint, ground = (
        rng.uniform(0.55, 0.95) + rng.normal(0, 0.04, 3),
        rng.uniform(0.25, 0.75) + rng.normal(0, 0.08, 3),
    )
    here = np.eye(4)
    pieces = [
        _Piece("floor", [box(-0.1, w + 0.1, -0.1, d + 0.1, -0.1, 0, ground)], here),
        _Piece("ceiling", [box(-0.1, w + 0.1, -0.1, d + 0.1, h, h + 0.1, np.full(3, 0.9))], here),
    ]
    sides = rng.permutation(4)
    missing = sides[: rng.choice(3, p=[0.1, 0.5, 0.4])]
    for side in sorted(set(range(4)) - set(missing)):
        length = (w, d, w, d)[side]
        hole = None
        if side == sides[2]:  # door
            hole = (0.8, 0.0, 2.0)
        elif side == sides[3]:  # window
            hole = (rng.uniform(0.8, 1.4), 0.9, 2.0)
        pieces.append(_Piece("wall", _wall(rng, length, h, hole, paint), _along_wall(side, length / 2, 0, extent)))
    if rng.random() < 0.4:
        a, b = rng.uniform(0.3, 0.9, 2)
        x, y = rng.choice([0, w - a]), rng.choice([0, d - b])
        pieces.append(_Piece("wall", [box(x, x + a, y, y + b, 0, h, paint)], here))
    return pieces


def _wall(rng, length, height, hole, color) -> list[Solid]:
    """Wall of thickness 0.1 m behind y = 0, centred in x; hole = (width, bottom, top) somewhere in it."""
    half = length / 2
    if hole is None:
        return [box(-half, half, -0.1, 0, 0, height, color)]
    width, bottom, top = hole
    x = rng.uniform(-half + 0.1, half - 0.1 - width)
    solids = [
        box(-half, x, -0.1, 0, 0, height, color),
        box(x + width, half, -0.1, 0, 0, height, color),
        box(x, x + width, -0.1, 0, top, height, color),
    ]
    if bottom > 0:
        solids.append(box(x, x + width, -0.1, 0, 0, bottom, color))
    return solids


def _along_wall(side, along, away, extent) -> np.ndarray:
    """Pose of a piece whose back is `away` from wall `side`, `along` metres from the wall's left end."""
    w, d, _ = extent
    x, y = ((w - along, away), (w - away, d - along), (along, d - away), (away, along))[side]
    return _placement(side * np.pi / 2, x, y, 0)


def _furnish(rng, extent, shell) -> list[_Piece]:
    """Furniture that neither overlaps nor leaves the room, the largest first, and what stands on it."""
    chosen = [(name, build(rng), side) for name, (build, chance, side) in _ON_FLOOR.items() if rng.random() < chance]
    chosen += [("chair", furniture.chair(rng), "any") for _ in range(rng.integers(1, 4))]
    chosen += [("clutter", furniture.clutter(rng), "any") for _ in range(rng.integers(0, 4))]
    chosen.sort(key=lambda piece: -np.prod(_half_width(piece[1])))
    # walls stand outside; what of them is inside is a corner that was cut out
    taken = [bounds for bounds in (piece.bounds() for piece in shell[2:]) if _inside(bounds, extent)]
    pieces = []
    for name, solids, side in chosen:
        for _ in range(40):
            tables = [piece for piece in pieces if piece.name == "table"]
            if name == "chair" and tables and rng.random() < 0.6:
                pose = _at_table(rng, tables[rng.integers(len(tables))], _half_width(solids)[1])
            elif side == "wall" or rng.random() < 0.3:
                wall = rng.integers(4)
                along, back = (
                    rng.uniform(0, extent[wall % 2]),
                    _half_width(solids)[1] + rng.uniform(0.03, 0.1),
                )
                pose = _along_wall(wall, along, back, extent) @ _placement(rng.normal(0, 0.03), 0, 0, 0)
            else:
                pose = _placement(rng.uniform(0, 2 * np.pi), *rng.uniform(0, extent[:2]), 0)
            piece = _Piece(name, solids, pose)
            bounds = piece.bounds()
            if _inside(bounds, extent) and not any(_overlap(bounds, other) for other in taken):
                pieces.append(piece)
                taken.append(bounds)
                break
    return pieces + [thing for piece in pieces for thing in _on_top(rng, piece)]


def _on_top(rng, support) -> list[_Piece]:
    """A monitor, a lamp and clutter side by side on a table or a low cabinet."""
    top = support.bounds()[1, 2]
    if support.name not in ("table", "cabinet") or top > 1.1:
        return []
    things = [("monitor", furniture.monitor)] if rng.random() < 0.85 else []
    things += [("lamp", furniture.table_lamp)] if rng.random() < 0.4 else []
    things += [("clutter", furniture.clutter)] * rng.integers(0, 4)
    half = _half_width(support.solids)
    placed, occupied = [], []
    for name, build in things:
        solids = build(rng)
        reach = half[0] - 0.6 * _half_width(solids)[0]
        for _ in range(10):
            x, room = rng.uniform(-reach, reach), _half_width(solids)[0] + 0.02
            if all(abs(x - other) > room + other_room for other, other_room in occupied):
                spot = _placement(rng.normal(0, 0.2), x, rng.uniform(-0.5, 0.3) * half[1], top)
                placed.append(_Piece(name, solids, support.pose @ spot))
                occupied.append((x, room))
                break
    return placed


def _at_table(rng, table, half_depth) -> np.ndarray:
    """Pose of a chair that faces one of the four sides of a table."""
    side = rng.integers(4)
    away = _half_width(table.solids)[(side + 1) % 2] + half_depth + rng.uniform(0.0, 0.15)
    return table.pose @ _placement(side * np.pi / 2, 0, 0, 0) @ _placement(0, rng.uniform(-0.2, 0.2), -away, 0)


def _half_width(solids) -> np.ndarray:
    """Half of the extent in x and y of a piece that is centred on its origin."""
    return np.max([np.abs(s.center[:2]) + s.half[:2] for s in solids], axis=0)


def _inside(bounds, extent) -> bool:
    return bool(np.all(bounds[0, :2] >= -1e-6) and np.all(bounds[1, :2] <= extent[:2] + 1e-6))


def _overlap(a, b) -> bool:
    return bool(np.all(a[0, :2] < b[1, :2] + 0.02) and np.all(b[0, :2] < a[1, :2] + 0.02))
