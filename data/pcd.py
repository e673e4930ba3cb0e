"""PCD files of the Point Cloud Library in NumPy: ascii, binary and binary_compressed.

Format: pointclouds.org, "The PCD (Point Cloud Data) file format", version 0.7; compression: LZF as in liblzf.
"""

import os
import re
from pathlib import Path
from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Shaped

_KINDS = {"F": "f", "I": "i", "U": "u"}
_PARTS = ("fields", "size", "type", "count", "width", "height", "points", "data")


def read_pcd_columns(path: str | os.PathLike) -> dict[str, Shaped[np.ndarray, "N *_"]]:
    """The fields of a PCD file, each a column [N], or [N, count] where a field has several values per point.

    The packed field `rgb` (or `rgba`) becomes the columns red, green and blue, 0..255; normal_x, normal_y and
    normal_z become nx, ny and nz.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no PCD file, its header makes no sense, or it ends early.
    """
    path = Path(path)
    content = path.read_bytes()
    header, dtype, count, start = _parse_header(path, content)
    body = content[start:]
    if header["data"] == ["ascii"]:
        columns = _parse_ascii(path, body, dtype, count)
    else:
        if header["data"] == ["binary_compressed"]:
            columns = _parse_compressed(path, body, dtype, count)
        else:
            if len(body) < count * dtype.itemsize:
                raise _truncated(path, len(body) // max(dtype.itemsize, 1), count)
            table = np.frombuffer(body, dtype, count)
            columns = {name: table[name] for name in dtype.names}
    for packed in ("rgb", "rgba"):
        if packed in columns:
            bits = np.ascontiguousarray(columns.pop(packed)).view(np.uint32)
            columns |= {name: (bits >> shift & 255).astype(np.uint8) for name, shift in _SHIFTS.items()}
    for axis in "xyz":
        if f"normal_{axis}" in columns:
            columns[f"n{axis}"] = columns.pop(f"normal_{axis}")
    return {name: column for name, column in columns.items() if not name.startswith("_")}


_SHIFTS = {"red": 16, "green": 8, "blue": 0}


def _parse_header(path: Path, content: bytes) -> tuple[dict[str, list[str]], np.dtype, int, int]:
    """The lines of the header, the type of a point, the number of points, and where the body starts."""
    end = re.search(rb"(?:^|\n)DATA[ \t]+\w+[ \t]*\r?\n", content[:10_000])
    if end is None:
        raise ValueError(f"{path}: not a PCD file, its beginning has no line 'DATA ascii', 'binary' or the like")
    lines = [line.split() for line in content[: end.end()].decode("latin-1").splitlines()]
    header = {line[0].lower(): line[1:] for line in lines if line and not line[0].startswith("#")}
    header.setdefault("count", ["1"] * len(header.get("fields", [])))
    missing = [part.upper() for part in _PARTS if part not in header]
    if missing:
        raise ValueError(f"{path}: the PCD header has no line {', '.join(missing)}")
    if header["data"] not in (["ascii"], ["binary"], ["binary_compressed"]):
        raise ValueError(f"{path}: DATA is {header['data']}, expected ascii, binary or binary_compressed")
    try:
        fields = []
        for i, (name, size, kind, count) in enumerate(
            zip(*(header[part] for part in ("fields", "size", "type", "count")), strict=True)
        ):
            name = f"_{i}" if name == "_" else name  # padding
            if name in ("rgb", "rgba") and (int(size), int(count)) != (4, 1):
                raise ValueError(f"the packed colour {name} has {count} x {size} bytes, expected 1 x 4")
            fields.append((name, f"<{_KINDS[kind]}{int(size)}", (int(count),) if int(count) > 1 else ()))
        count = int(header["points"][0])
        if int(header["width"][0]) * int(header["height"][0]) != count:
            raise ValueError("WIDTH x HEIGHT is not POINTS")
        return header, np.dtype(fields), count, end.end()
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: corrupt PCD header: {error}") from None


def _parse_ascii(path: Path, body: bytes, dtype: np.dtype, count: int) -> dict[str, np.ndarray]:
    width = sum(int(np.prod(dtype[name].shape, dtype=int)) for name in dtype.names)
    tokens = body.split()
    if len(tokens) < count * width:
        raise _truncated(path, len(tokens) // width, count)
    if len(tokens) > count * width:
        raise ValueError(
            f"{path}: {len(tokens) - count * width} numbers more than its header has fields and points for"
        )
    try:
        table = np.array(tokens[: count * width], np.bytes_).astype(np.float64).reshape(count, width)
    except ValueError as error:
        raise ValueError(f"{path}: corrupt, {error}") from None
    columns, at = {}, 0
    for name in dtype.names:
        base, shape = dtype[name].base, dtype[name].shape
        length = int(np.prod(shape, dtype=int))
        values = table[:, at : at + length].reshape(count, *shape)
        # a packed colour of type F may be written as the integer of its bits
        packed = name in ("rgb", "rgba") and base.kind == "f" and (values >= 1).any()
        columns[name] = values.astype(np.uint32) if packed else values.astype(base)
        at += length
    return columns


def _parse_compressed(path: Path, body: bytes, dtype: np.dtype, count: int) -> dict[str, np.ndarray]:
    """Column after column, compressed as one."""
    if len(body) < 8:
        raise _truncated(path, 0, count)
    packed, size = np.frombuffer(body, "<u4", 2).tolist()
    if len(body) < 8 + packed:
        raise _truncated(path, count * (len(body) - 8) // max(packed, 1), count)
    unpacked = np.empty(size, np.uint8)
    if size != count * dtype.itemsize or _decompress(np.frombuffer(body, np.uint8, packed, 8), unpacked) != size:
        raise ValueError(f"{path}: corrupt, the compressed points do not unpack to {count} of them")
    columns, at = {}, 0
    for name in dtype.names:
        stop = at + count * dtype[name].itemsize
        columns[name] = np.frombuffer(unpacked[at:stop].tobytes(), dtype[name].base).reshape(count, *dtype[name].shape)
        at = stop
    return columns


@numba.njit(cache=True)
@no_type_check
def _decompress(packed, unpacked):
    """LZF: runs of literal bytes, and references back into what is already there.  Returns the bytes written."""
    i, out = 0, 0
    while i < len(packed):
        control = np.int64(packed[i])
        i += 1
        if control < 32:
            length = control + 1
            if i + length > len(packed) or out + length > len(unpacked):
                return -1
            unpacked[out : out + length] = packed[i : i + length]
            i += length
            out += length
            continue
        length = control >> 5
        if length == 7:
            if i >= len(packed):
                return -1
            length += packed[i]
            i += 1
        length += 2
        if i >= len(packed):
            return -1
        source = out - ((control & 31) << 8) - packed[i] - 1
        i += 1
        if source < 0 or out + length > len(unpacked):
            return -1
        for _ in range(length):  # byte by byte: a reference may overlap what it writes
            unpacked[out] = unpacked[source]
            source += 1
            out += 1
    return out


def _truncated(path: Path, row: int, count: int) -> ValueError:
    return ValueError(f"{path}: truncated, the file ends in point {row} of {count}; copy or download it again")
