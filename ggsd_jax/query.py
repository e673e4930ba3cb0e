"""Finds what you name in scans, or labels all their points; prints and saves the result.

  python -m ggsd_jax.query --model=out/demo --scene=room.ply "chair" "soft seat"
  python -m ggsd_jax.query --model=out/demo --scene=scans/ "bathtub"       # which room has one?
  python -m ggsd_jax.query --model=out/demo --scene=room.ply --without=stool "chair"
  python -m ggsd_jax.query --model=out/demo --scene=room.ply --labels=nyu40       # or --labels=words.txt

A scan is a .ply, .pcd, .npz or .xyz file (data/folder.py) in metres, z up (of a folder without one, each of its
folders that holds one); it needs no images, labels or colours. Of each scan the folder --out then holds a coloured
PLY, the scores (.npz) and a picture (PNG).

A score is between 0 and 1, and over 0.5 where a point is nearer to the words than to "anything" (the mean of the
classes the network was trained for) and to the words of --without. A region has at least 20 points. Regions are
ordered by area times (mean score - threshold), scenes by their best region. Points without a finite x, y, z are left
out of the answer.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int32, UInt8
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data.folder import CLOUD_SUFFIXES, UNITS, read_cloud
from data.labels import LABEL_SETS, LabelSet, unknown_label_set
from data.ply import replacing, write_ply
from data.scene import Scene
from data.synthetic import SYNTHETIC
from ggsd_jax import inference, render
from ggsd_jax.inference import Model
from kernels.voxel_grid import kernel_map, voxelize

THRESHOLD = 0.5
MIN_POINTS = 20  # a region of fewer is a speck
_KNOWN_LABELS = {SYNTHETIC.name: SYNTHETIC, **LABEL_SETS}

# ------------------------------------------------------------------------------------------------- the answer


class Region(NamedTuple):
    """A connected part of a scan that was found."""

    points: Int[np.ndarray, " R"]
    """Ascending rows of the scan."""
    centre: Float[np.ndarray, "3"]
    extent: Float[np.ndarray, "3"]
    """Metres: middle and edges of its box along x, y, z."""
    score: float
    """Mean of its points."""
    evidence: float
    """Square metres times how far the score is over the threshold."""


def regions(
    points: Float[np.ndarray, "N 3"], scores: Float[np.ndarray, " N"], threshold: float, cell: float
) -> list[Region]:
    """Connected regions of the points with a score over `threshold`, most evidence first; none of under `MIN_POINTS`.

    Args:
        points: metres.
        scores: of one query, 0..1.
        cell: metres; points are connected where the cells of this size that hold them touch, if only at a corner.
    """
    found = np.flatnonzero(scores > threshold)
    if not found.size:
        return []
    voxels = voxelize(points[found], cell)
    pairs, _ = kernel_map(np.pad(voxels.coords, ((0, 0), (1, 0))), kernel_size=3)
    real = pairs.in_index < pairs.num_in
    links = (np.ones(real.sum(), bool), (pairs.in_index[real], pairs.out_index[real]))
    _, part = connected_components(coo_array(links, shape=(pairs.num_in, pairs.num_out)), directed=False)
    cells = np.bincount(part)
    part = part[voxels.inverse]
    order = np.argsort(part, kind="stable")
    result = []
    for index, rows in enumerate(np.split(found[order], np.cumsum(np.bincount(part))[:-1])):
        if len(rows) >= MIN_POINTS:
            low, high = points[rows].min(axis=0), points[rows].max(axis=0)
            score = float(scores[rows].mean())
            evidence = float(cells[index]) * cell**2 * (score - threshold)
            result.append(Region(rows, (low + high) / 2, high - low, score, evidence))
    return sorted(result, key=lambda region: -region.evidence)


def winners(scores: Float[np.ndarray, "N Q"], threshold: float) -> Int32[np.ndarray, " N"]:
    """The query with the highest score over `threshold` at each point, -1 = none."""
    best = scores.argmax(axis=1)
    return np.where(scores.max(axis=1) > threshold, best, -1).astype(np.int32)


# --------------------------------------------------------------------------------------------------- the scan


def scene_files(paths: Sequence[str | Path]) -> dict[str, Path]:
    """The scans that some files and folders name, those of a folder in alphabetical order, each by its name.

    That is the name of the file, or of its folder where a folder holds a folder for each scan (configs/folder.py).

    Raises:
        FileNotFoundError: there is no such file, or no scan in a folder.
        ValueError: a file of another kind, or two scans whose results would have the same name.
    """
    kinds = " or ".join(CLOUD_SUFFIXES)
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            named = [(file.stem, file) for file in _scans_in(path)]
            folders = () if named else sorted(folder for folder in path.iterdir() if folder.is_dir())
            named += [(folder.name, scans[0]) for folder in folders if len(scans := _scans_in(folder)) == 1]
            if not named:
                raise FileNotFoundError(f"{path}: no {kinds} file in this folder, nor one in each of its folders")
        elif not path.is_file():
            raise FileNotFoundError(f"{path}: no such scan")
        elif path.suffix.lower() not in CLOUD_SUFFIXES:
            raise ValueError(f"{path}: expected a {kinds} file; convert it, e.g. with CloudCompare")
        else:
            named = [(path.stem, path)]
        for name, file in named:
            other = found.setdefault(name, file)
            if other is not file:
                raise ValueError(f"{other} and {file}: results are named after scans, and these have the same name")
    return found


def _scans_in(folder: Path) -> list[Path]:
    there = (file for file in folder.iterdir() if file.is_file() or file.is_symlink())
    seen = (file for file in there if not file.name.startswith("."))  # macOS puts ._room.ply beside room.ply
    return sorted(file for file in seen if file.suffix.lower() in CLOUD_SUFFIXES)


def read_scene(path: Path, unit: str | None = None) -> Scene:
    """Reads a scan and converts it to metres; `unit` None takes it for metres where that is plausible.

    Raises:
        ValueError: the file is not as its reader wants it, or its size says that it is not in metres.
    """
    return read_cloud(path, None if unit is None else UNITS[unit], labels=False, say="--unit={unit}")


def word_list(name: str) -> LabelSet:
    """A label set of `data.labels` by name, or a text file's lines with colours of their own; # begins a comment.

    A label that is said twice counts once.

    Raises:
        ValueError: neither; the nearest name is suggested. Or a file without words.
        FileNotFoundError: a `.txt` that is not there.
    """
    path = Path(name)
    if path.suffix == ".txt" or path.is_file():
        try:
            lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such list of labels") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text file in UTF-8, one label per line: {error}") from error
        words = tuple(dict.fromkeys(filter(None, lines)))
        if not words:
            raise ValueError(f"{path}: no label in it; write one per line")
        return LabelSet(path.stem, words, render.distinct_colors(len(words)))
    if name not in _KNOWN_LABELS:
        raise ValueError(unknown_label_set(name, _KNOWN_LABELS))
    return _KNOWN_LABELS[name]


def labels_of(model: Model) -> LabelSet:
    """The classes a network was trained for, in the colours of their label set."""
    name, classes = model.info["label_set"], tuple(model.info["classes"])
    known = _KNOWN_LABELS.get(name)
    if known is not None and known.classes == classes:
        return known
    return LabelSet(name, classes, render.distinct_colors(len(classes)))


# ---------------------------------------------------------------------------------------------- paint and store


def greyed(scene: Scene) -> UInt8[np.ndarray, "N 3"]:
    """The scan in dim shades of grey, on which found things stand out."""
    if scene.colors is None:
        return np.full(scene.points.shape, 150, np.uint8)
    grey = 70 + 0.45 * scene.colors.mean(axis=1, keepdims=True)
    return np.broadcast_to(grey, scene.points.shape).astype(np.uint8)


def heat_map(
    scores: Float[np.ndarray, " N"], threshold: float, background: UInt8[np.ndarray, "N 3"]
) -> UInt8[np.ndarray, "N 3"]:
    """Points over the threshold in the colours of heat, up to the highest score; the others keep the background."""
    found = scores > threshold
    top = max(float(scores.max()) - threshold, 1e-6)
    painted = background.copy()
    painted[found] = render.heat((scores[found] - threshold) / top)
    return painted


def _store(
    out: Path, scene: Scene, colors: np.ndarray, ids: np.ndarray, words: Sequence[str], scores: np.ndarray
) -> None:
    of_words = {f"score_{i}": column for i, column in enumerate(scores.T)} if scores.shape[1] <= 16 else {}
    write_ply(out / f"{scene.name}.ply", scene.points, colors=colors, label=ids, **of_words)
    with replacing(out / f"{scene.name}.npz") as file:
        np.savez(file, points=scene.points, words=np.array(words), scores=scores, ids=ids)


def _legend(words: Sequence[str], palette: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(words, palette, strict=True))


def answer(model: Model, scene: Scene, args: argparse.Namespace) -> tuple[list[list[Region]], list[str]]:
    """Stores what was found of every query in a scene; returns the regions of each, and the lines to print."""
    words = args.words
    scores = model.query(scene.points, words, args.without, scene.colors)
    ids = winners(scores, args.threshold)
    palette, grey = render.distinct_colors(len(words)), greyed(scene)
    painted = np.where(ids[:, None] >= 0, palette[ids], grey)
    _store(args.out, scene, painted, ids, words, scores)
    panels = {"input": grey if scene.colors is None else scene.colors, "found": painted}
    if len(words) <= 4:
        panels |= {f'"{word}"': heat_map(scores[:, i], args.threshold, grey) for i, word in enumerate(words)}
    render.side_by_side(args.out / f"{scene.name}.png", scene.points, panels, _legend(words, palette))

    lines = [f"\n{scene.name}: {len(scene.points):,} points"]
    cell = 2 * model.info["voxel_size"]
    found = [regions(scene.points, column, args.threshold, cell) for column in scores.T]
    for word, column, parts in zip(words, scores.T, found, strict=True):
        share, best = (column > args.threshold).mean(), column.max()
        lines.append(f'  "{word}": {share:.1%} of the points, {_count(len(parts), "region")}, best score {best:.2f}')
        for part in parts[: args.top]:
            where = f"centre {_metres(part.centre, ', ')}  extent {_metres(part.extent, ' x ')}"
            lines.append(f"    score {part.score:.2f}  {where}  {len(part.points):,} points")
        if len(parts) > args.top:
            lines.append(f"    and {len(parts) - args.top} more (--top)")
    return found, lines


def label(model: Model, scene: Scene, labels: LabelSet, args: argparse.Namespace) -> list[str]:
    """Labels every point of a scene and stores the outcome; returns the lines to print."""
    ids, scores = model.segment(scene.points, labels.classes, scene.colors)
    painted = labels.colorize(ids)
    _store(args.out, scene, painted, ids, labels.classes, scores)
    counts = np.bincount(ids, minlength=len(labels.classes))
    seen = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    panels = {"input": greyed(scene) if scene.colors is None else scene.colors, labels.name: painted}
    legend = {labels.classes[i]: labels.palette[i] for i in seen[:24]}
    render.side_by_side(args.out / f"{scene.name}.png", scene.points, panels, legend)
    shares = [f"  {counts[i] / len(ids):7.2%}  {labels.classes[i]}" for i in seen]
    return [f"\n{scene.name}: {len(scene.points):,} points", *shares]


def rank(found: dict[str, list[list[Region]]], words: Sequence[str], top: int) -> None:
    """Prints the scenes in which each query was found, best first."""
    for i, word in enumerate(words):
        best = {name: parts[i][0] for name, parts in found.items() if parts[i]}
        print(f'\n"{word}" is in {len(best)} of {_count(len(found), "scene")}')
        for name in sorted(best, key=lambda name: -best[name].evidence)[:top]:
            print(f"  {name}: score {best[name].score:.2f}, extent {_metres(best[name].extent, ' x ')}")


def _metres(values: np.ndarray, separator: str) -> str:
    return separator.join(f"{value:.2f}" for value in values) + " m"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# -------------------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_intermixed_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def run(args: argparse.Namespace) -> None:
    args.words, args.without = (
        list(dict.fromkeys(" ".join(word.split()) for word in words)) for words in (args.words, args.without)
    )
    if bool(args.words) == bool(args.labels):
        raise ValueError('say what to look for, e.g. "chair" "soft seat", or --labels=nyu40 (one of the two)')
    if args.labels and args.without:
        raise ValueError("--without is held against a query: it says nothing about --labels")
    for argument, words in (("a query", args.words), ("--without", args.without)):
        if not all(words):
            raise ValueError(f"{argument} is empty: name a thing")
        if broken := [word for word in words if not word.isascii() and "\\ud" in ascii(word)]:
            raise ValueError(f"{argument} {ascii(broken[0])} is not UTF-8; if you typed letters, set LC_ALL=C.UTF-8")
    if not 0 < args.threshold < 1:
        raise ValueError(f"--threshold={args.threshold}: scores are between 0 and 1, 0.5 is as near as to anything")
    if args.top < 1:
        raise ValueError(f"--top={args.top}: list at least one region")
    labels = word_list(args.labels) if args.labels else None
    files = scene_files(args.scene)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out={args.out} is a file: name a folder")
    for file in files.values():
        if os.path.realpath(args.out) in (os.path.realpath(file.parent), os.path.dirname(os.path.realpath(file))):
            raise ValueError(f"--out={args.out} is the folder of {file}, which would be overwritten: name another")
    inference.keep_compiled_programs()
    model = inference.load(args.model)
    words = list(labels.classes) if labels else [*args.words, *args.without]
    if unknown := model.without_meaning(words):
        some = ", ".join(f'"{word}"' for word in unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        print(f"note: the stand-in for CLIP that this model was trained with knows no word of {some}")
    model.embed(words)  # what is wrong with them is no scan's fault
    with contextlib.suppress(PermissionError):
        args.out.mkdir(parents=True, exist_ok=True)
    if not os.access(args.out, os.W_OK | os.X_OK):
        raise PermissionError(f"--out={args.out} cannot be written: name another folder")
    found, left_out = {}, []
    for name, file in files.items():
        try:
            scene = dataclasses.replace(read_scene(file, args.unit), name=name)
            if labels is None:
                found[name], lines = answer(model, scene, args)
            else:
                lines = label(model, scene, labels, args)
        except (ValueError, OSError) as error:  # one bad scan does not end a search through many
            left_out.append(str(error) if str(file) in str(error) else f"{file}: {error}")
            continue
        print("\n".join(lines), flush=True)
    if len(found) > 1:
        rank(found, args.words, args.top)
    if left_out:
        if len(files) == 1:
            raise ValueError(left_out[0])
        problems = "\n".join(left_out)
        raise ValueError(f"{len(left_out)} of {len(files)} scans left out:\n{problems}")
    print(f"\nwritten: {args.out}/  (.ply coloured, .npz scores, .png picture of each scan)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m ggsd_jax.query", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sets = ", ".join(_KNOWN_LABELS)
    add = parser.add_argument
    add("words", nargs="*", metavar="WORDS", help="what to look for; quote each query")
    add("--model", required=True, type=Path, help="work directory of a run, or an exported model")
    add("--scene", required=True, action="append", help="a scan, or a folder of scans; can be repeated")
    add("--without", action="append", default=[], metavar="WORDS", help="words to tell it apart from; can be repeated")
    add("--labels", help=f"label every point: {sets}, or a .txt file with a label per line")
    add("--threshold", type=float, default=THRESHOLD, help="score over which a point is found (%(default)s)")
    add("--top", type=int, default=5, help="regions and scenes to list (%(default)s)")
    add("--unit", choices=UNITS, help="of the scan; metres unless said otherwise")
    add("--out", type=Path, default=Path("out/query"), help="folder for the results (%(default)s)")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
