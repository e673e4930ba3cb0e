"""Looks at scans in the browser: type words and see where they are, click a point and see what it is.

  python -m ggsd_jax.viewer --model=out/demo --scene=room.ply
  python -m ggsd_jax.viewer --model=out/demo --scene=scans/ --labels=nyu40

prints the address of a page (on this machine only, unless --host says otherwise; whoever reaches the page can look at
the scans and download them). A scan is a .ply, .pcd, .npz or .xyz file in metres, z up; an .npz that has
superpoints, 2D features or labels (data/scene.py) can be seen by those too. Needs viser: pip install viser==1.1.1
(make setup does).
"""

import argparse
import functools
import html
import logging
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from data.labels import IGNORE, LabelSet
from data.ply import write_ply
from data.scene import Scene
from ggsd_jax import inference, query, render
from ggsd_jax.inference import Model, relevancy, unit
from ggsd_jax.level_of_detail import Cloud

MAX_SENT = 500_000  # points the browser draws; of a larger scan a random part is sent, and the page says so
MAX_QUERY = 200  # characters
MAX_WITHOUT = 20  # negatives
HEAT, SEGMENTATION, COLOUR = "heat map", "segmentation", "colour"
SUPERPOINTS, FUSION, TRUTH, DIFFERENCE = "superpoints", "2D fusion", "ground truth", "difference"
_RIGHT, _WRONG, _UNKNOWN = (60, 170, 90), (215, 50, 50), (60, 60, 60)
_HINT = "Type what you look for, or click a point."
_CLICK_ANGLE = 0.01  # radians between the ray of a click and the points it may mean

# ------------------------------------------------------------------------------------------------ what is known


class Answers:
    """A scan whose features are known: every question to it is one matrix product.

    Keeps the unit feature of each occupied voxel, 4 bytes per channel (3 kB per voxel at 768 channels).
    """

    def __init__(self, model: Model, scene: Scene, labels: LabelSet):
        self.model, self.scene, self.labels = model, scene, labels
        features, self._voxel = model.voxel_features(scene.points, scene.colors)
        self._features = unit(features)
        self._classes = model.embed(labels.classes)
        self._similarity = self._features @ self._classes.T
        self._anything = self._features @ model.contrast().T
        self.predicted = self._similarity.argmax(axis=1)[self._voxel]
        self._grey = query.greyed(scene)

    @property
    def modes(self) -> list[str]:
        """What the scan can be painted by."""
        scene, truth = self.scene, self._truth is not None
        there = {
            HEAT: True,
            SEGMENTATION: True,
            COLOUR: scene.colors is not None,
            SUPERPOINTS: scene.superpoints is not None,
            FUSION: scene.features is not None and scene.features.shape[1] == self._classes.shape[1],
            TRUTH: truth,
            DIFFERENCE: truth,
        }
        return [mode for mode, is_there in there.items() if is_there]

    def ask(self, words: str, without: Sequence[str] = ()) -> Float32[np.ndarray, " N"]:
        """Score of each point for a query, as `Model.query` gives it."""
        similarity = self._features @ self.model.embed([words, *without]).T  # at once: equal words score alike to a bit
        contrast = np.concatenate([self._anything, similarity[:, 1:]], axis=1)
        return relevancy(similarity[:, :1], contrast)[self._voxel, 0]

    def knows_nothing_of(self, words: Sequence[str]) -> list[str]:
        """Those of which the text encoder knows no word."""
        return self.model.without_meaning(words)

    def similar(self, point: int) -> Float32[np.ndarray, " N"]:
        """Score of each point for what a point is: over 1/2 where it is nearer to that point than to "anything"."""
        own = self._features[self._voxel[point]]
        return relevancy(self._features @ own[:, None], self._anything)[self._voxel, 0]

    def nearest_labels(self, point: int, count: int = 5) -> list[tuple[str, float]]:
        """The labels most similar to a point, with their cosines."""
        similarity = self._similarity[self._voxel[point]]
        return [(self.labels.classes[i], float(similarity[i])) for i in np.argsort(-similarity, kind="stable")[:count]]

    def paint(
        self, mode: str, scores: Float[np.ndarray, " N"] | None, threshold: float
    ) -> tuple[UInt8[np.ndarray, "N 3"], dict[str, Any]]:
        """Colours of the points in a mode, and the legend: names with their colours.

        Args:
            scores: of the last query or click, for the heat map; None if nothing was asked yet.
        """
        scene, palette = self.scene, self.labels.palette
        if mode == HEAT:
            if scores is None:
                return self._grey, {}
            low, high = render.heat(np.array([0.0, 1.0]))
            best = float(scores.max())
            legend = {f"score {threshold:.2f}": low, f"score {best:.2f}": high} if best > threshold else {}
            return query.heat_map(scores, threshold, self._grey), legend
        if mode == COLOUR:
            return scene.colors, {}
        if mode == SUPERPOINTS:
            ids = scene.superpoints
            colors = render.distinct_colors(1024)[ids % 1024]
            return np.where(ids[:, None] >= 0, colors, np.uint8(_UNKNOWN[0])), {}
        if mode == DIFFERENCE:
            truth = self._truth
            colors = np.where((self.predicted == truth)[:, None], np.uint8(_RIGHT), np.uint8(_WRONG))
            legend = {"as labelled": _RIGHT, "otherwise": _WRONG, "not labelled": _UNKNOWN}
            return np.where((truth < 0)[:, None], np.uint8(_UNKNOWN), colors), legend
        ids = {SEGMENTATION: lambda: self.predicted, FUSION: lambda: self._fused, TRUTH: lambda: self._truth}[mode]()
        counts = np.bincount(ids[ids >= 0], minlength=len(palette))
        seen = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
        legend = {f"{self.labels.classes[i]} {counts[i] / len(ids):.1%}": palette[i] for i in seen}
        return self.labels.colorize(ids), legend

    def ply(self, colors: UInt8[np.ndarray, "N 3"], scores: Float32[np.ndarray, " N"] | None) -> bytes:
        """All points as a PLY file with these colours, their labels and, where something was asked, scores."""
        fields = {"label": self.predicted.astype(np.int32)} | ({} if scores is None else {"score": scores})
        with tempfile.TemporaryDirectory() as folder:
            write_ply(Path(folder) / "scan.ply", self.scene.points, colors=colors, **fields)
            return (Path(folder) / "scan.ply").read_bytes()

    @functools.cached_property
    def _truth(self) -> Int[np.ndarray, " N"] | None:
        """Labels of the scan, -1 where there is none, if they can be of the label set that is looked at."""
        if self.scene.labels is None:
            return None
        labels = np.where(self.scene.labels == IGNORE, -1, self.scene.labels)
        return labels if labels.max() < len(self.labels.classes) else None

    @functools.cached_property
    def _fused(self) -> Int[np.ndarray, " N"]:
        ids = np.full(len(self.scene.points), -1)
        ids[self.scene.feature_index] = (self.scene.features.astype(np.float32) @ self._classes.T).argmax(axis=1)
        return ids


def clean(text: str, limit: int = MAX_QUERY) -> str:
    """A query as it may be used and shown: no control characters, single spaces, at most `limit` characters."""
    text = text[: 4 * limit]
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:limit].strip()


def picked_point(points: Float[np.ndarray, "N 3"], origin: Any, direction: Any) -> int | None:
    """The point a click means: of those near its ray, the first one it meets; None if it passes all of them by.

    Args:
        origin, direction: of the ray, three numbers each.
    """
    away = points - np.asarray(origin)
    direction = np.asarray(direction) / np.linalg.norm(direction)
    along = away @ direction
    beside = np.linalg.norm(away - along[:, None] * direction, axis=1)
    near = np.flatnonzero((along > 0) & (beside < _CLICK_ANGLE * along))
    return int(near[along[near].argmin()]) if near.size else None


def sample(count: int, limit: int) -> Int[np.ndarray, " S"]:
    """Ascending rows of at most `limit` of `count` points, drawn evenly."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, limit, replace=False))


def viewpoint(points: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, " 3"]:
    """Where a camera sees, from above, all of a scan centred on the origin except strays."""
    return np.array([0.3, -0.3, 0.55]) * max(float(np.linalg.norm(np.ptp(render.bounding_box(points), axis=0))), 1.0)


# ------------------------------------------------------------------------------------------------------ the page


class Page:
    """One browser's view: what it has asked, the panel it asks with, and the cloud it sees."""

    def __init__(
        self, client: Any, names: Sequence[str], first: str, answers_of: Callable[[str], Answers], max_sent: int
    ):
        self.client, self.answers_of, self.max_sent = client, answers_of, max_sent
        self.lock, self.acting = threading.Lock(), 0  # viser calls back from many threads
        self.cloud = Cloud(client)
        self.marker: Any = None  # of the clicked point
        self.scores: np.ndarray | None = None
        self.answers: Answers | None = None  # until a scan was opened
        self.asked = self.note = ""  # what the scores are of, and what to say about it
        gui = client.gui
        self.scan = gui.add_dropdown("Scan", tuple(names), initial_value=first)
        self.words = gui.add_text("Find", "", hint="any words")
        self.without = gui.add_text("Without", "", hint="what is not meant, separated by commas")
        self.threshold = gui.add_slider("Threshold", 0.0, 1.0, 0.01, query.THRESHOLD)
        self.mode = gui.add_dropdown("Show", (SEGMENTATION,), initial_value=SEGMENTATION)
        self.height = gui.add_slider("Height shown (%)", 5, 100, 5, 75, hint="less takes the ceiling off")
        self.size = gui.add_slider("Point size (cm)", 0.5, 10.0, 0.5, 3.0)
        self.download = gui.add_button("Download PLY")
        self.said = gui.add_html("")
        self.legend = gui.add_html("")
        self.scan.on_update(self._guarded(self.show_scan))
        self.words.on_update(self._guarded(self.ask))
        self.without.on_update(self._guarded(self.ask))
        self.threshold.on_update(self._guarded(self.set_threshold))
        self.mode.on_update(self._guarded(self.paint))
        self.height.on_update(self._guarded(self.draw))
        self.size.on_update(self._guarded(self.resize))
        self.download.on_click(self._guarded(self.send))
        client.scene.on_click()(self._guarded(self.click))
        self._guarded(self.show_scan)(None)

    def _guarded(self, action: Callable[[Any], None]) -> Callable[[Any], None]:
        """One action at a time, and none without a scan; what goes wrong is said on the page."""

        def act(event: Any) -> None:
            if self.acting == threading.get_ident():  # viser also calls back for what an action sets itself
                return
            with self.lock:
                if self.answers is None and action != self.show_scan:
                    return
                self.acting = threading.get_ident()
                try:
                    action(event)
                except (ValueError, OSError) as error:
                    self._say(str(error)[:400])
                except Exception as error:
                    logging.exception("an action on the page failed")
                    self._say(f"{type(error).__name__}: {error}"[:400])
                finally:
                    self.acting = 0

        return act

    def show_scan(self, _: Any) -> None:
        self._say("Reading and encoding the scan ...")
        before = self.answers
        try:
            answers = self.answers_of(self.scan.value)
        except Exception:
            if before is not None:  # go on with it
                self.scan.value = self.opened
            raise
        self.answers, self.opened = answers, self.scan.value
        points, self.scores = answers.scene.points, None
        self.sent = sample(len(points), self.max_sent)
        self.box = render.bounding_box(points)
        self.centre = self.box.mean(axis=0)
        self.mode.options = tuple(answers.modes)
        self.mode.value = COLOUR if COLOUR in answers.modes else SEGMENTATION
        self.draw(None)
        if before is not None:  # the first scan is where the camera already looks
            self.client.camera.position = viewpoint(points)
            self.client.camera.look_at = np.zeros(3)
        part = f", {len(self.sent):,} of them drawn" if len(self.sent) < len(points) else ""
        self._say(f"{len(points):,} points{part}. {_HINT}")
        if self.words.value:
            self.ask(None)

    def draw(self, _: Any) -> None:
        """Sends the points up to the height to be shown."""
        points = self.answers.scene.points[self.sent]
        bottom, top = self.box[:, 2]
        low = points[:, 2] <= (bottom + self.height.value / 100 * (top - bottom) if self.height.value < 100 else np.inf)
        self.shown, self.drawn = self.sent[low], points[low] - self.centre
        self._mark(None)
        self.cloud.draw(self.drawn, self._metres())
        self.paint(None)

    def ask(self, _: Any) -> None:
        words = clean(self.words.value)
        parts = [clean(part) for part in self.without.value[: MAX_WITHOUT * MAX_QUERY].split(",")]
        without = list(dict.fromkeys(filter(None, parts)))
        if words != " ".join(self.words.value.split()):  # a space that was typed stays, more words follow it
            self.words.value = words
        if not words:
            if self.asked:  # and not a click, which stands
                self.scores, self.asked = None, ""
                self._say(_HINT)
                self.paint(None)
            return
        self._mark(None)
        start = time.perf_counter()
        self.scores = self.answers.ask(words, without[:MAX_WITHOUT])
        self.asked, self.note = words, f"({1000 * (time.perf_counter() - start):.0f} ms)"
        if unknown := self.answers.knows_nothing_of([words, *without[:MAX_WITHOUT]]):
            self.note += f". This model's stand-in for CLIP knows no word of {', '.join(map(repr, unknown))}"
        if len(without) > MAX_WITHOUT:
            self.note += f". Only the first {MAX_WITHOUT} of Without are used"
        self._say_found()
        self._show(HEAT)

    def set_threshold(self, _: Any) -> None:
        within = min(max(float(self.threshold.value), 0.0), 1.0)  # the number beside the slider takes any
        if within != self.threshold.value:
            self.threshold.value = within
        if self.scores is not None and self.asked:
            self._say_found()
        self.paint(None)

    def click(self, event: Any) -> None:
        picked = picked_point(self.drawn, event.ray_origin, event.ray_direction)
        if picked is None:
            return
        point = int(self.shown[picked])
        labels = ", ".join(f"{name} {cosine:.2f}" for name, cosine in self.answers.nearest_labels(point))
        self.scores, self.asked = self.answers.similar(point), ""
        self.words.value = ""  # so that asking the same again is a change
        self._mark(self.drawn[picked])
        self._say(f"point {point}: {labels}. The heat map shows what is like it.")
        self._show(HEAT)

    def paint(self, _: Any) -> None:
        mode = self.mode.value
        if mode not in self.answers.modes:  # the browser is not believed
            raise ValueError(f"this scan cannot be shown by {clean(str(mode), 40)!r}")
        colors, legend = self.answers.paint(mode, self.scores, self.threshold.value)
        self.painted = colors
        self.cloud.paint(colors[self.shown])
        entries = "".join(
            f'<div><span style="display:inline-block;width:1em;height:1em;margin-right:.5em;vertical-align:middle;'
            f'background:rgb({r},{g},{b})"></span>{html.escape(name)}</div>'
            for name, (r, g, b) in legend.items()
        )
        self.legend.content = f'<div style="padding:0 1em">{entries}</div>'

    def resize(self, _: Any) -> None:
        self.cloud.resize(self._metres())

    def send(self, _: Any) -> None:
        content = self.answers.ply(self.painted, self.scores)
        self.client.send_file_download(f"{self.opened}.ply", content, save_immediately=True)

    def _show(self, mode: str) -> None:
        if self.mode.value != mode:
            self.mode.value = mode
        self.paint(None)

    def _mark(self, place: Float[np.ndarray, " 3"] | None) -> None:
        """Puts the mark of a click somewhere, or takes it away."""
        if self.marker is not None:
            self.marker.remove()
            self.marker = None
        if place is not None:
            self.marker = self.client.scene.add_icosphere("/picked", radius=0.04, color=(30, 90, 255), position=place)

    def _say_found(self) -> None:
        share = float((self.scores > self.threshold.value).mean())
        self._say(f'"{self.asked}": {share:.1%} of the points, best score {self.scores.max():.2f} {self.note}')

    def _say(self, text: str) -> None:
        self.said.content = f'<div style="padding:0 1em">{html.escape(text)}</div>'

    def _metres(self) -> float:
        return self.size.value / 100


def serve(
    model: Model, files: Mapping[str, Path], labels: LabelSet, *, host: str, port: int, unit: str | None, max_sent: int
) -> Any:
    """Starts the page in threads of its own and returns viser's server.

    A scan is read and encoded when it is first looked at, the last two stay in memory. A browser names scans as
    `files` does, never by a path.

    Raises:
        ImportError: viser is not installed.
        ValueError: there is no such address, or none of the scans can be read.
    """
    import viser

    try:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:  # viser waits for ever on an address that is not this machine's
            probe.bind(address)
    except OSError as error:
        raise ValueError(f"--host={host} is no address of this machine ({error}); 127.0.0.1 or 0.0.0.0?") from error

    lock = threading.Lock()

    @functools.lru_cache(maxsize=2)
    def encoded(name: str) -> Answers:
        return Answers(model, query.read_scene(files[name], unit), labels)

    def answers_of(name: str) -> Answers:
        if name not in files:
            raise ValueError(f"there is no scan {clean(str(name), 40)!r}")
        with lock:  # two browsers do not encode the same scan twice
            return encoded(name)

    server = viser.ViserServer(host=host, port=port, label="ggsd_jax", verbose=False)
    server.gui.configure_theme(show_share_button=False, show_logo=False)
    server.scene.set_up_direction("+z")

    # Every scan is moved to the origin. Set before a browser comes: its first messages would undo what comes after.
    first, points = _first_readable(files, unit)
    server.initial_camera.position, server.initial_camera.look_at = viewpoint(points), np.zeros(3)
    pages: dict[int, Page] = {}

    @server.on_client_connect
    def _(client: Any) -> None:
        page = Page(client, list(files), first, answers_of, max_sent)
        if client.client_id in server.get_clients():  # it may have left meanwhile
            pages[client.client_id] = page

    @server.on_client_disconnect
    async def _(client: Any) -> None:
        if client.client_id in pages:
            pages.pop(client.client_id).cloud.close()

    return server


def _first_readable(files: Mapping[str, Path], unit: str | None) -> tuple[str, np.ndarray]:
    """Name and points of the first scan that can be read; the page says what is wrong with the others."""
    for name, file in files.items():
        try:
            return name, query.read_scene(file, unit).points
        except (ValueError, OSError) as error:
            problem = error
    raise problem


# -------------------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    try:
        if not 0 < args.port < 65536:
            raise ValueError(f"--port={args.port}: ports are 1 to 65535")
        if args.points < 1:
            raise ValueError(f"--points={args.points}: draw at least one")
        files = query.scene_files(args.scene)
        model = inference.load(args.model)
        labels = query.word_list(args.labels) if args.labels else query.labels_of(model)
        inference.keep_compiled_programs()
        server = serve(model, files, labels, host=args.host, port=args.port, unit=args.unit, max_sent=args.points)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install viser==1.1.1 (make setup does)") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"open http://{host}:{server.get_port()}  (Ctrl+C ends it)", flush=True)
    try:
        server.sleep_forever()
    except KeyboardInterrupt:
        server.stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m ggsd_jax.viewer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, help="work directory of a run, or an exported model")
    add("--scene", required=True, action="append", help="a scan, or a folder of scans; can be repeated")
    add("--labels", help="of segmentation and legend: a name of data/labels.py or a .txt file; the model's by default")
    add("--unit", choices=query.UNITS, help="of the scans; metres unless said otherwise")
    add("--points", type=int, default=MAX_SENT, help="to draw at most (%(default)s)")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (%(default)s)")
    add("--port", type=int, default=8080, help="the next free one if it is taken (%(default)s)")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
