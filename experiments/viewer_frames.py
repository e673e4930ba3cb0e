"""How long the viewer's page takes for a frame while a scan is turned, in a headless Chromium that draws on the CPU.

  .venv/bin/pip install playwright
  .venv/bin/python -m experiments.viewer_frames --model=out/demo --points 20000 100000 500000

The scan is the shell of a room of so many points. It is dragged twice, with a rest between: the first time the page
learns how many points the browser can draw in time. With a GPU the browser needs no such help; none was at hand.
"""

import argparse
import re
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from data.scene import Scene
from ggsd_jax import inference, query, viewer

DRAG, REST = 4.0, 3.0  # seconds
_RECORD = """() => {
  window.frames_at = []; window.on = true;
  const seen = t => {frames_at.push(t); if (on) requestAnimationFrame(seen)};
  requestAnimationFrame(seen)}"""


def shell(count: int) -> Scene:
    """Points on floor, ceiling and walls of a room of 8 by 6 by 2.5 metres."""
    rng, size = np.random.default_rng(0), np.array([8, 6, 2.5])
    points = rng.uniform(size=(count, 3))
    rows, side = np.arange(count), rng.integers(0, 3, count)
    points[rows, side] = points[rows, side].round()
    return Scene("shell", (points * size).astype(np.float32), colors=rng.integers(0, 255, (count, 3), np.uint8))


def drag(page: Any) -> np.ndarray:
    """Milliseconds of each frame while the mouse turns the scan."""
    page.evaluate(_RECORD)
    page.mouse.move(200, 350)
    page.mouse.down()
    start = time.monotonic()
    while (now := time.monotonic() - start) < DRAG:
        page.mouse.move(300 + 100 * np.sin(2 * now), 350 + 5 * np.cos(3 * now))
        time.sleep(0.02)
    page.mouse.up()
    return np.diff(page.evaluate("() => {window.on = false; return frames_at}"))


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m experiments.viewer_frames", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--points", type=int, nargs="+", default=[500_000])
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    model = inference.load(args.model)
    print("| points | drag | frames | median ms | 90 % | longest |\n|---|---|---|---|---|---|")
    for count in args.points:
        with tempfile.TemporaryDirectory() as folder, socket.socket() as free, sync_playwright() as running:
            shell(count).save_npz(Path(folder) / "shell.npz")
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            labels = query.labels_of(model)
            files = query.scene_files([folder])
            server = viewer.serve(model, files, labels, host="127.0.0.1", port=port, unit=None, max_sent=count)
            flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
            page = running.chromium.launch(executable_path=chromium, args=flags).new_page()
            page.goto(f"http://127.0.0.1:{port}")
            page.get_by_text(re.compile("Type what you look for")).wait_for(timeout=600_000)
            time.sleep(4 * REST)
            for name in ("first", "second"):
                frames = drag(page)
                print(f"| {count:,} | {name} | {len(frames)} | {np.median(frames):.0f} | "
                      f"{np.percentile(frames, 90):.0f} | {frames.max():.0f} |", flush=True)  # fmt: skip
                time.sleep(REST)
            server.stop()


if __name__ == "__main__":
    main()
