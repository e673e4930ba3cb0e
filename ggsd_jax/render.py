"""Pictures of point clouds with NumPy and PIL: an orthographic look from above into the opened room."""

import colorsys
import contextlib
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from data.ply import replacing

BACKGROUND = 255
_OPEN_ABOVE = 0.75  # of the height; what is higher, such as a ceiling, is left out
_HEAT = np.array([[80, 18, 123], [182, 54, 121], [251, 136, 97], [252, 253, 191]], np.float64)  # dark to bright


def heat(values: Float[np.ndarray, " N"]) -> UInt8[np.ndarray, "N 3"]:
    """Colours of 0..1, from dark purple over orange to pale yellow; values outside take the nearest end's."""
    stops = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(values, stops, channel) for channel in _HEAT.T], axis=1).round().astype(np.uint8)


def distinct_colors(count: int) -> UInt8[np.ndarray, "count 3"]:
    """Colours as unlike as may be: hues a golden angle apart, in three strengths."""
    number = np.arange(count)
    hues = number * 0.618034 % 1
    saturation, value = np.array([[0.75, 0.95], [0.9, 0.7], [0.5, 0.85]])[number % 3].T
    rgb = [colorsys.hsv_to_rgb(*hsv) for hsv in zip(hues, saturation, value, strict=True)]
    return np.round(255 * np.array(rgb).reshape(-1, 3)).astype(np.uint8)


def bounding_box(points: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "2 3"]:
    """Lowest and highest corner of a scan without strays, such as mirrors make: far outside what holds 99 of 100."""
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    margin = np.maximum(0.25 * (high - low), 0.5)
    inside = points[((points >= low - margin) & (points <= high + margin)).all(axis=1)]
    return np.stack([inside.min(axis=0), inside.max(axis=0)])


def render(
    points: Float[np.ndarray, "N 3"],
    colors: UInt8[np.ndarray, "N 3"],
    width: int = 480,
    height: int = 420,
    azimuth: float = 0.6,
    elevation: float = 1.15,
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws points as small squares, nearer ones over farther ones, without strays and without a ceiling.

    Args:
        points: metres, z up.
        colors: RGB.
        azimuth: viewing direction around z, radians.
        elevation: above the horizon, radians.
    """
    low, high = bounding_box(points)
    high[2] = low[2] + _OPEN_ABOVE * (high[2] - low[2])
    keep = ((points >= low) & (points <= high)).all(axis=1)
    points, colors = points[keep] - points[keep].mean(axis=0), colors[keep]
    forward = -np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    right = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
    down = np.cross(forward, right)
    x, y, depth = points @ right, points @ down, points @ forward
    scale = 0.96 * min(width / max(np.ptp(x), 1e-6), height / max(np.ptp(y), 1e-6))
    column = np.round((x - (x.max() + x.min()) / 2) * scale + width / 2).astype(int)
    row = np.round((y - (y.max() + y.min()) / 2) * scale + height / 2).astype(int)
    size = int(np.clip(np.ceil(1.2 * np.sqrt(width * height / len(points))), 1, 6))
    image = np.full((height + 2 * size, width + 2 * size, 3), BACKGROUND, np.uint8)
    far_to_near = np.argsort(-depth, kind="stable")
    column, row, colors = column[far_to_near] + size, row[far_to_near] + size, colors[far_to_near]
    # All pixels of a point before those of the next, or far points would cover near ones.
    offsets = np.arange(size) - size // 2
    dy, dx = (o.ravel() for o in np.meshgrid(offsets, offsets, indexing="ij"))
    rows = np.clip((row[:, None] + dy).ravel(), 0, image.shape[0] - 1)
    columns = np.clip((column[:, None] + dx).ravel(), 0, image.shape[1] - 1)
    image[rows, columns] = np.repeat(colors, len(dx), axis=0)
    return image[size : size + height, size : size + width]


def side_by_side(
    path: Path,
    points: Float[np.ndarray, "N 3"],
    panels: dict[str, UInt8[np.ndarray, "N 3"]],
    legend: dict[str, UInt8[np.ndarray, "3"]],
) -> None:
    """Writes one PNG with a titled panel per colouring and a legend below."""
    font = _font("".join([*panels, *legend]))
    width, height, margin = 480, 420, 28
    canvas_width = width * len(panels)
    legend = {_shortened(name, font, canvas_width - 44): color for name, color in legend.items()}
    longest = max((font.getlength(name) for name in legend), default=0)
    per_row = int(np.clip(canvas_width // (longest + 44), 1, 8))
    legend_rows = -(-len(legend) // per_row)
    canvas = Image.new("RGB", (canvas_width, margin + height + 26 * legend_rows + 8), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (title, colors) in enumerate(panels.items()):
        canvas.paste(Image.fromarray(render(points, colors, width, height)), (i * width, margin))
        title = _shortened(title.replace("_", " "), font, width - 24)
        draw.text((i * width + 12, 5), title, fill="black", font=font)
    step = canvas_width // per_row
    for i, (name, color) in enumerate(legend.items()):
        x, y = (i % per_row) * step + 12, margin + height + 26 * (i // per_row) + 4
        draw.rectangle((x, y, x + 16, y + 16), fill=tuple(int(c) for c in color))
        draw.text((x + 24, y - 2), name, fill="black", font=font)
    with replacing(path) as file:
        canvas.save(file, "PNG")


def _font(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, which has the letters of English; for others one of the machine's, if there is one."""
    if not text.isascii():
        for name in ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"):
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, 16)
    return ImageFont.load_default(size=16)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A text that fits into some pixels, its end cut off if need be."""
    text = text if len(text) <= 200 else text[:200] + "…"
    while font.getlength(text) > width:
        text = text[:-4] + "…"
    return text
