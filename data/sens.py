"""ScanNet's .sens streams: compressed colour and depth frames with poses, one after the other in one file.

Format: ScanNet/ScanNet, SensReader/c++/src/sensorData.h, version 4, little-endian.
"""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from PIL import Image

_HEAD = struct.Struct("<256x ii 4I f Q")  # behind the name: four matrices, compressions, sizes, depth shift, frames
_FRAME = struct.Struct("<16f 4Q")  # pose, two time stamps, bytes of colour and of depth
_JPEG_OR_PNG, _ZLIB_USHORT = (1, 2), 1


class Frame(NamedTuple):
    """Where a frame lies in its file, and its camera-to-world pose, -inf where tracking was lost."""

    number: int
    pose: Float64[np.ndarray, "4 4"]
    color: slice
    depth: slice


class Stream(NamedTuple):
    """A .sens file; depth_size is (w, h), depth_units is how many units of a depth image make a metre."""

    path: Path
    depth_size: tuple[int, int]
    depth_units: float


def read_stream(path: str | os.PathLike, every: int = 1) -> tuple[Stream, list[Frame]]:
    """Finds each every-th frame of the stream, from the first on; no image is decoded yet.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no .sens file of version 4, is compressed in a way ScanNet's are not, or ends early.
    """
    path = Path(path)
    end = path.stat().st_size
    with path.open("rb") as file:
        version, name_length = _unpack(path, file, struct.Struct("<IQ"))
        if version != 4 or name_length > 1000:
            raise ValueError(f"{path}: not a .sens file of version 4, it starts with the number {version}")
        file.seek(name_length, os.SEEK_CUR)
        color, depth, _, _, width, height, units, count = _unpack(path, file, _HEAD)
        if color not in _JPEG_OR_PNG or depth != _ZLIB_USHORT:
            raise ValueError(
                f"{path}: color compression {color} and depth compression {depth}, expected 2 (JPEG; or 1, PNG) and "
                "1 (zlib), as ScanNet publishes them"
            )
        if not 0 < units < float("inf"):
            raise ValueError(f"{path}: corrupt, {units:g} units of depth to the metre; download it again")
        frames = []
        for number in range(count):
            *pose, _, _, color_bytes, depth_bytes = _unpack(path, file, _FRAME, number, count)
            start = file.tell()
            middle, stop = start + color_bytes, start + color_bytes + depth_bytes
            if stop > end:
                raise _truncated(path, number, count)
            if number % every == 0:
                matrix = np.array(pose, np.float64).reshape(4, 4)
                frames.append(Frame(number, matrix, slice(start, middle), slice(middle, stop)))
            file.seek(stop)
    return Stream(path, (width, height), units), frames


def _unpack(path: Path, file, layout: struct.Struct, frame: int = 0, frames: int = 0) -> tuple:
    content = file.read(layout.size)
    if len(content) < layout.size:
        raise _truncated(path, frame, frames)
    return layout.unpack(content)


def _truncated(path: Path, frame: int, frames: int) -> ValueError:
    return ValueError(f"{path}: truncated, the file ends in frame {frame} of {frames}; download it again")


def read_color(stream: Stream, frame: Frame) -> UInt8[np.ndarray, "H W 3"]:
    """The colour image of a frame.

    Raises:
      ValueError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(_read_bytes(stream, frame.color))) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{stream.path}: color of frame {frame.number} is corrupt ({error})") from error


def read_depth(stream: Stream, frame: Frame) -> Float32[np.ndarray, "h w"]:
    """The depth of a frame in metres, 0 = no reading.

    Raises:
      ValueError: it cannot be decompressed, or is not of the stream's size.
    """
    width, height = stream.depth_size
    try:
        units = np.frombuffer(zlib.decompress(_read_bytes(stream, frame.depth)), "<u2").reshape(height, width)
    except (zlib.error, ValueError) as error:
        raise ValueError(f"{stream.path}: depth of frame {frame.number} is corrupt ({error})") from error
    return (units / stream.depth_units).astype(np.float32)


def _read_bytes(stream: Stream, where: slice) -> bytes:
    with stream.path.open("rb") as file:
        file.seek(where.start)
        return file.read(where.stop - where.start)
