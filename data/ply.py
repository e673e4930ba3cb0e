"""PLY files in NumPy: ascii and both binary byte orders, any scalar type, any elements in any order.

Format: Greg Turk, "The PLY Polygon File Format" (1994), and the sized type names used since (`float32`).
"""

import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped, UInt8

_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2",
    "int": "i4", "uint": "u4", "float": "f4", "double": "f8",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2",
    "int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8",
}  # fmt: skip
_TYPE_NAMES = {np.dtype(code): name for name, code in reversed(_TYPES.items())}
_BYTE_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


class _Property(NamedTuple):
    name: str
    dtype: np.dtype
    count_dtype: np.dtype | None  # of the length before a list's items; None: a scalar


class _Element(NamedTuple):
    name: str
    count: int
    properties: list[_Property]

    @property
    def scalars(self) -> list[_Property]:
        return [p for p in self.properties if p.count_dtype is None]

    @property
    def lists(self) -> list[_Property]:
        return [p for p in self.properties if p.count_dtype is not None]


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends well, and leaves no trace when it does not."""
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")  # not longer than a file's name may be
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_ply_columns(
    path: str | os.PathLike, element: str = "vertex", lists: Sequence[str] = ()
) -> dict[str, Shaped[np.ndarray, "N *_"]]:
    """The scalar properties of one element of a PLY file, each a column of N values in the file's own type.

    The whole file is checked, so that one cut off behind the wanted element is refused too.

    Args:
      path: the file.
      element: e.g. "face".
      lists: list properties to read as well, [N, L] where all lists have the length L (3: triangles); others
        are walked over and left out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no PLY file, its header makes no sense, it ends early, it has no such element, or no
        such list of one length; the message names the file, the element and the row.
    """
    content = Path(path).read_bytes()
    order, elements, start = _parse_header(path, content)
    if element not in (e.name for e in elements):
        raise ValueError(f"{path}: no element '{element}'; the file has {[e.name for e in elements]}")
    body = _BinaryBody(path, content, start) if order else _AsciiBody(path, content[start:])
    columns = {e.name: body.read(e) for e in elements if e.properties}.get(element, {})
    if not order:
        body.expect_end()
    (wanted,) = (e for e in elements if e.name == element)
    for name in lists:
        if name not in columns or name in (p.name for p in wanted.scalars):
            known = [p.name for p in wanted.lists]
            raise ValueError(
                f"{path}: element '{element}' has no list '{name}' of one length (its lists: {known}); "
                "triangulate the mesh"
            )
    return {name: column for name, column in columns.items() if column.ndim == 1 or name in lists}


def _parse_header(path, content: bytes) -> tuple[str, list[_Element], int]:
    """Byte order ('' for ascii), the elements, and where the body starts."""
    if re.match(rb"ply[ \t]*\r?\n", content) is None:
        raise ValueError(f"{path}: not a PLY file, it does not start with the line 'ply'")
    end = re.search(rb"\nend_header[ \t]*\r?\n", content)
    if end is None:
        raise ValueError(f"{path}: truncated or corrupt, the PLY header has no 'end_header'")
    order, elements = None, []
    for number, line in enumerate(re.split(r"\r?\n", content[: end.start()].decode("latin-1")), start=1):
        try:
            match line.split():
                case ["ply"] | ["comment" | "obj_info", *_] | []:
                    pass
                case ["format", name, _]:
                    order = _BYTE_ORDERS[name]
                case ["element", name, count] if count.isdigit() and name not in (e.name for e in elements):
                    elements.append(_Element(name, int(count), []))
                case ["property", *types, name] if name not in (p.name for p in elements[-1].properties):
                    elements[-1].properties.append(_parse_property(name, types, order))
                case _:
                    raise ValueError
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"{path}: corrupt PLY header, line {number} is {line.strip()!r}") from None
    if order is None:
        raise ValueError(f"{path}: the PLY header has no 'format' line")
    return order, elements, end.end()


def _parse_property(name: str, types: list[str], order: str) -> _Property:
    match types:
        case [value_type]:
            return _Property(name, np.dtype(order + _TYPES[value_type]), None)
        case ["list", count_type, value_type] if "float" not in count_type and count_type != "double":
            return _Property(name, np.dtype(order + _TYPES[value_type]), np.dtype(order + _TYPES[count_type]))
    raise ValueError(types)


class _BinaryBody:
    """Reads element after element; every read is checked against the end of the file."""

    def __init__(self, path, content: bytes, offset: int):
        self.path, self.content, self.offset = path, content, offset

    def read(self, element: _Element) -> dict[str, np.ndarray]:
        """The columns of the element, those of its lists only if all rows have lists of the same lengths."""
        # Nearly every mesh has lists of one length, and to walk its faces row by row would take longer than
        # all the rest: try whether the rows are as long as the first.
        lengths = self._walk(element._replace(count=min(element.count, 1)))[2] if element.lists else {}
        row = np.dtype([field for p in element.properties for field in _fields(p, lengths.get(p.name, 0))])
        size = element.count * row.itemsize
        if self.offset + size <= len(self.content):
            table = np.frombuffer(self.content, row, element.count, self.offset)
            if all((table[f"length of {name}"] == length).all() for name, length in lengths.items()):
                self.offset += size
                return {
                    p.name: _native(table[p.name if p.count_dtype is None else f"items of {p.name}"])
                    for p in element.properties
                }
        columns, self.offset, _ = self._walk(element)
        return columns

    def _walk(self, element: _Element) -> tuple[dict[str, np.ndarray], int, dict[str, int]]:
        """Row by row: the scalar columns, where the element ends, the length of each list in the last row."""
        cells: dict[str, list[bytes]] = {p.name: [] for p in element.scalars}
        lengths: dict[str, int] = {}
        position = self.offset
        for row in range(element.count):
            for p in element.properties:
                head_size = (p.count_dtype or p.dtype).itemsize
                head = self.content[position : position + head_size]
                position += head_size
                if position > len(self.content):
                    break
                if p.count_dtype is None:
                    cells[p.name].append(head)
                    continue
                lengths[p.name] = length = int(np.frombuffer(head, p.count_dtype)[0])
                if length < 0:
                    raise _corrupt_list(self.path, element, row, p, length)
                position += length * p.dtype.itemsize
            if position > len(self.content):
                raise _truncated(self.path, element, row)
        columns = {p.name: _native(np.frombuffer(b"".join(cells[p.name]), p.dtype)) for p in element.scalars}
        return columns, position, lengths


def _fields(p: _Property, length: int) -> list[tuple]:
    if p.count_dtype is None:
        return [(p.name, p.dtype)]
    return [(f"length of {p.name}", p.count_dtype), (f"items of {p.name}", p.dtype, (length,))]


def _native(column: np.ndarray) -> np.ndarray:
    return column.astype(column.dtype.newbyteorder("="))


class _AsciiBody:
    """The same for text: numbers separated by white space."""

    def __init__(self, path, body: bytes):
        self.path, self.tokens, self.position = path, body.split(), 0

    def read(self, element: _Element) -> dict[str, np.ndarray]:
        cells: dict[str, list[bytes]] = {p.name: [] for p in element.properties}
        lengths: dict[str, set[int]] = {p.name: set() for p in element.lists}
        if not element.lists:
            width = len(element.properties)
            tokens = self._take(element, 0, element.count * width)
            cells = {p.name: tokens[i::width] for i, p in enumerate(element.properties)}
        else:
            for row in range(element.count):
                for p in element.properties:
                    head = self._take(element, row, 1)
                    if p.count_dtype is None:
                        cells[p.name] += head
                    elif head[0].isdigit():
                        cells[p.name] += self._take(element, row, int(head[0]))
                        lengths[p.name].add(int(head[0]))
                    else:
                        raise _corrupt_list(self.path, element, row, p, head[0].decode("latin-1"))
        columns = {}
        for p in element.properties:
            if p.count_dtype is None:
                columns[p.name] = self._parse(element, p, cells[p.name])
            elif all(len(of_one) <= 1 for of_one in lengths.values()):
                items = self._parse(element, p, cells[p.name])
                columns[p.name] = items.reshape(element.count, max(lengths[p.name], default=0))
        return columns

    def expect_end(self) -> None:
        """Where lines have more numbers than the header has properties, all after the first line were misread."""
        extra = len(self.tokens) - self.position
        if extra:
            raise ValueError(
                f"{self.path}: {extra} numbers more than its header has room for; do lines have a column more?"
            )

    def _take(self, element: _Element, row: int, count: int) -> list[bytes]:
        tokens = self.tokens[self.position : self.position + count]
        if len(tokens) < count:
            raise _truncated(self.path, element, row + len(tokens) // len(element.properties))
        self.position += count
        return tokens

    def _parse(self, element: _Element, prop: _Property, tokens: list[bytes]) -> np.ndarray:
        where = f"{self.path}: property '{prop.name}' of element '{element.name}'"
        try:
            values = np.array(tokens, dtype=np.bytes_).astype(np.float64)  # holds every 32-bit integer exactly
        except ValueError as error:
            raise ValueError(f"{where}: {error}; the file is corrupt") from None
        if prop.dtype.kind != "f":
            limits = np.iinfo(prop.dtype)
            bad = ~((values == np.trunc(values)) & (values >= limits.min) & (values <= limits.max))
            if bad.any():
                row = np.flatnonzero(bad)[0]
                raise ValueError(f"{where}: row {row} is {tokens[row].decode()!r}, expected {prop.dtype}")
        return values.astype(prop.dtype)


def _truncated(path, element: _Element, row: int) -> ValueError:
    return ValueError(
        f"{path}: truncated, the file ends in row {row} of {element.count} of element '{element.name}'; "
        "copy or download it again"
    )


def _corrupt_list(path, element: _Element, row: int, prop: _Property, length: object) -> ValueError:
    return ValueError(
        f"{path}: corrupt, list '{prop.name}' in row {row} of element '{element.name}' has length {length!r}"
        "; copy or download it again"
    )


def write_ply(
    path: str | os.PathLike,
    points: Float[np.ndarray, "N 3"],
    colors: UInt8[np.ndarray, "N 3"] | None = None,
    **scalar_fields: Shaped[np.ndarray, " _"],
) -> None:
    """Writes points as the vertices of a binary little-endian PLY file, whole or not at all.

    Args:
      path: the file; one that exists is replaced.
      points: float32 or float64, metres, finite.
      colors: 0..255, as the properties red, green, blue.
      scalar_fields: one further property [N] per name, e.g. `label=labels, nx=normals[:, 0]`.  Types unknown
        to PLY are stored in one that holds every value (bool as uchar, int64 as int, float16 as float).

    Raises:
      ValueError: a field has another shape, a type or value PLY cannot hold, or the name of another property.
    """
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"{path}: points must have shape [N, 3], got {list(points.shape)}")
    if not np.isfinite(points).all():
        row = np.argwhere(~np.isfinite(points))[0, 0]
        raise ValueError(f"{path}: points row {row} is {points[row]}, expected finite coordinates; drop the row")
    columns = dict(zip("xyz", points.T, strict=True))
    if colors is not None:
        if colors.dtype != np.uint8 or colors.shape != points.shape:
            raise ValueError(
                f"{path}: colors must be uint8 {list(points.shape)}, got {colors.dtype} {list(colors.shape)}"
            )
        columns |= dict(zip(("red", "green", "blue"), colors.T, strict=True))
    for name, values in scalar_fields.items():
        if name in columns or not re.fullmatch(r"[!-~]+", name):
            raise ValueError(f"{path}: field name {name!r} is taken or is no plain ASCII word; rename it")
        if values.shape != points.shape[:1]:
            raise ValueError(f"{path}: field '{name}' must be [{len(points)}], got {list(values.shape)}")
        columns[name] = values
    columns = {name: _storable(path, name, values) for name, values in columns.items()}
    table = np.empty(len(points), [(name, values.dtype.newbyteorder("<")) for name, values in columns.items()])
    for name, values in columns.items():
        table[name] = values
    properties = "".join(f"property {_TYPE_NAMES[values.dtype]} {name}\n" for name, values in columns.items())
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{properties}end_header\n"
    with replacing(path) as file:
        file.write(header.encode("ascii"))
        file.write(table.tobytes())


def _storable(path, name: str, values: np.ndarray) -> np.ndarray:
    dtype = values.dtype.newbyteorder("=")
    if dtype in _TYPE_NAMES:
        return values.astype(dtype)
    wider = {"b": np.uint8, "f": np.float32, "i": np.int32, "u": np.uint32}.get(dtype.kind)
    stored = None if wider is None else values.astype(wider)
    if stored is None or not np.array_equal(stored, values, equal_nan=dtype.kind == "f"):
        raise ValueError(f"{path}: field '{name}' of type {dtype} fits no PLY type; convert it first")
    return stored
