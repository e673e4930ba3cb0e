"""PLY files: every column of any format is read exactly, what is written comes back, bad files are named."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.scene import read_ply, read_ply_columns, write_ply

SCALARS = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2",
    "int": "i4", "uint": "u4", "float": "f4", "double": "f8",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip
FORMATS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}


def encode_ply(file_format: str, elements: list, newline: str = "\n") -> bytes:
    """A PLY file from [(element, [(property, type or (count type, item type))], rows)], value by value."""
    lines = ["ply", f"format {file_format} 1.0", "comment made by a test"]
    body = b""
    for element, properties, rows in elements:
        lines.append(f"element {element} {len(rows)}")
        for name, kind in properties:
            lines.append(f"property {kind if isinstance(kind, str) else 'list ' + ' '.join(kind)} {name}")
        for row in rows:
            cells = []
            for (_, kind), value in zip(properties, row, strict=True):
                if isinstance(kind, str):
                    cells.append((kind, value))
                else:
                    cells += [(kind[0], len(value)), *((kind[1], v) for v in value)]
            if file_format == "ascii":
                body += (" ".join(repr(np.dtype(SCALARS[k]).type(v).item()) for k, v in cells) + newline).encode()
            else:
                body += b"".join(np.array(v, FORMATS[file_format] + SCALARS[k]).tobytes() for k, v in cells)
    return newline.join([*lines, "end_header", ""]).encode() + body


def values_of(kind: str) -> st.SearchStrategy:
    if kind.startswith(("float", "double")):
        return st.floats(-1e6, 1e6, width=32)
    limits = np.iinfo(SCALARS[kind])
    return st.integers(int(limits.min), int(limits.max))


@st.composite
def ply_elements(draw):
    """Vertices with columns of any type, and faces before or behind them with lists of any length."""
    kinds = draw(st.lists(st.sampled_from(sorted(SCALARS)), min_size=1, max_size=4))
    vertex = [(f"p{i}", kind) for i, kind in enumerate(kinds)]
    rows = draw(st.lists(st.tuples(*(values_of(kind) for kind in kinds)), max_size=5))
    count_kind, item_kind = (
        draw(st.sampled_from(["uchar", "ushort", "int"])),
        draw(st.sampled_from(["int", "short"])),
    )
    face = [("quality", "short"), ("vertex_indices", (count_kind, item_kind)), ("flags", "uchar")]
    length = st.integers(0, 4) if draw(st.booleans()) else st.just(3)
    items = length.flatmap(lambda n: st.lists(st.integers(0, 100), min_size=n, max_size=n))
    faces = draw(st.lists(st.tuples(st.integers(-9, 9), items, st.integers(0, 255)), max_size=4))
    elements = [("vertex", vertex, rows), ("face", face, faces)]
    return elements if draw(st.booleans()) else elements[::-1]


@settings(max_examples=60, deadline=None)
@given(ply_elements(), st.sampled_from(sorted(FORMATS)), st.sampled_from(["\n", "\r\n"]))
def test_every_column_of_any_format_type_and_order_of_elements_is_read_exactly(
    tmp_path_factory, elements, fmt, newline
):
    path = tmp_path_factory.mktemp("ply") / "a.ply"
    path.write_bytes(encode_ply(fmt, elements, newline))
    for element, properties, rows in elements:
        columns = read_ply_columns(path, element)
        assert list(columns) == [name for name, kind in properties if isinstance(kind, str)]
        for i, (name, kind) in enumerate(properties):
            if isinstance(kind, str):
                expected = np.array([row[i] for row in rows], SCALARS[kind])
                assert columns[name].dtype == expected.dtype
                np.testing.assert_array_equal(columns[name], expected)
    faces = next(rows for element, _, rows in elements if element == "face")
    if len({len(items) for _, items, _ in faces}) == 1:
        columns = read_ply_columns(path, "face", lists=["vertex_indices"])
        assert list(columns) == ["quality", "vertex_indices", "flags"]
        np.testing.assert_array_equal(columns["vertex_indices"], [items for _, items, _ in faces])
    elif faces:
        with pytest.raises(ValueError, match="element 'face' has no list 'vertex_indices' of one length"):
            read_ply_columns(path, "face", lists=["vertex_indices"])


@settings(max_examples=40, deadline=None)
@given(ply_elements(), st.sampled_from(sorted(FORMATS)), st.floats(0, 0.999))
def test_a_ply_file_cut_off_anywhere_is_refused_by_name(tmp_path_factory, elements, fmt, share):
    path = tmp_path_factory.mktemp("ply") / "cut.ply"
    content = encode_ply(fmt, elements).rstrip(b"\n") if fmt == "ascii" else encode_ply(fmt, elements)
    header = content.index(b"end_header") + len(b"end_header\n")
    size = int(len(content) * share)
    if fmt == "ascii" and size > header:  # half a number is a number: cut between them
        size = max(content.rfind(b" ", 0, size), content.rfind(b"\n", 0, size))
    path.write_bytes(content[:size])
    if size == len(content) or size == header == len(content):
        return
    with pytest.raises(ValueError, match=r"cut\.ply: (truncated|not a PLY file)"):
        read_ply_columns(path)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["f4", "f8"]), st.integers(1, 7))
def test_points_colors_and_fields_are_the_same_after_write_and_read(tmp_path_factory, seed, dtype, n):
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("ply") / "a.ply"
    points = rng.normal(size=(n, 3)).astype(dtype)
    colors = rng.integers(0, 256, (n, 3)).astype(np.uint8)
    label = rng.integers(-1, 1000, n)
    confidence = rng.random(n).astype(np.float16)
    seen = rng.random(n) < 0.5
    write_ply(path, points, colors, label=label, confidence=confidence, seen=seen, nx=points[:, 0])
    scene, columns = read_ply(path), read_ply_columns(path)
    np.testing.assert_array_equal(scene.points, points.astype(np.float32))
    np.testing.assert_array_equal(scene.colors, colors)
    assert scene.normals is None and scene.labels is None and scene.name == "a"
    np.testing.assert_array_equal(np.stack([columns[a] for a in "xyz"], 1), points)
    for name, values in {"label": label, "confidence": confidence, "seen": seen}.items():
        np.testing.assert_array_equal(columns[name], values)


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("uchar", [0, 128, 255], [0, 128, 255]),
        ("int", [0, 128, 255], [0, 128, 255]),
        ("float", [0, 0.5, 1], [0, 128, 255]),
        ("double", [0, 0.2, 1], [0, 51, 255]),
        ("float", [0, 128, 255], [0, 128, 255]),
    ],
)
def test_colors_of_any_type_become_bytes(tmp_path, kind, values, expected):
    properties = [
        *((a, "double") for a in "xyz"),
        ("alpha", "uchar"),
        *((c, kind) for c in ("red", "green", "blue")),
    ]
    path = tmp_path / "a.ply"
    path.write_bytes(encode_ply("binary_big_endian", [("vertex", properties, [(1, 2, 3, 7, *values)])]))
    scene = read_ply(path)
    assert scene.colors.tolist() == [expected] and scene.points.tolist() == [[1, 2, 3]]


def test_normals_are_read_and_unknown_properties_are_kept_out_of_the_way(tmp_path):
    properties = [(name, "float") for name in ("nx", "curvature", "x", "ny", "y", "label", "nz", "z")]
    path = tmp_path / "a.ply"
    path.write_bytes(encode_ply("ascii", [("vertex", properties, [(1, 9, 2, 3, 4, 9, 5, 6)])]))
    scene = read_ply(path)
    assert scene.points.tolist() == [[2, 4, 6]] and scene.normals.tolist() == [[1, 3, 5]]
    assert scene.colors is None and scene.labels is None


VERTEX = [(axis, "float") for axis in "xyz"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a PLY file"),
        (b"\x89PNG\r\n\x1a\n", "not a PLY file"),
        (
            b"ply\nformat ascii 1.0\nelement vertex 1\n",
            "truncated or corrupt, the PLY header has no 'end_header'",
        ),
        (b"ply\nelement vertex 0\nend_header\n", "no 'format' line"),
        (
            b"ply\nformat ascii 1.0\nelement vertex 2\nproperty int x\nend_header\n1 9\n2 9\n",
            "2 numbers more than its header has room for",
        ),
        (b"ply\nformat ebcdic 1.0\nend_header\n", "corrupt PLY header, line 2 is 'format ebcdic 1.0'"),
        (b"ply\nformat ascii 1.0\nelement vertex many\nend_header\n", "line 3 is 'element vertex many'"),
        (b"ply\nformat ascii 1.0\nproperty float x\nend_header\n", "line 3"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty complex x\nend_header\n", "line 4"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty int x\nproperty int x\nend_header\n", "line 5"),
        (
            b"ply\nformat ascii 1.0\nelement face 0\nend_header\n",
            r"no element 'vertex'; the file has \['face'\]",
        ),
        (encode_ply("ascii", [("vertex", VERTEX[:2], [])]), "no property z; found: x, y"),
        (encode_ply("ascii", [("vertex", VERTEX, [])]), "points is empty"),
        (encode_ply("ascii", [("vertex", VERTEX, [(0, 1, 2), (3, np.nan, 5)])]), "points row 1"),
        (
            encode_ply("ascii", [("vertex", VERTEX, [(0, 1, 2)])]).replace(b"1.0 2.0", b"1.0 zwei"),
            "property 'z'.*zwei",
        ),
        (
            encode_ply("ascii", [("vertex", VERTEX, [(0, 1, 2)])])[:-8],
            "file ends in row 0 of 1 of element 'vertex'",
        ),
        (
            encode_ply("binary_little_endian", [("vertex", VERTEX, [(0, 1, 2)] * 3)])[:-13],
            "truncated, the file ends in row 1 of 3 of element 'vertex'; copy or download it again",
        ),
        (
            encode_ply("binary_big_endian", [("vertex", VERTEX, []), ("face", [("i", ("char", "int"))], [([],)])])[:-1]
            + b"\xff",
            "corrupt, list 'i' in row 0 of element 'face' has length -1",
        ),
        (
            encode_ply("ascii", [("vertex", [*VERTEX, ("label", "uchar")], [(0, 1, 2, 3)])]).replace(
                b" 3\n", b" 300\n"
            ),
            "property 'label' of element 'vertex': row 0 is '300', expected uint8",
        ),
        (
            encode_ply("ascii", [("vertex", [(a, "double") for a in "xyz"], [(0, 5e6 + 0.1, 2)])]),
            "subtract a local origin first",
        ),
        (
            encode_ply(
                "ascii",
                [
                    (
                        "vertex",
                        [*VERTEX, *((c, "int") for c in ("red", "green", "blue"))],
                        [(0, 1, 2, 3, 4, 256)],
                    )
                ],
            ),
            r"colors row 0 is \[.*256\], expected 0\.\.255",
        ),
    ],
)
def test_a_bad_ply_file_is_named_with_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "bad.ply"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.ply: .*{message}"):
        read_ply(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"points": np.full((2, 3), np.nan)}, "points row 0 is .*expected finite coordinates; drop the row"),
        ({"label": np.zeros(3)}, r"field 'label' must be \[2\], got \[3\]"),
        ({"x": np.zeros(2)}, "field name 'x' is taken"),
        ({"two words": np.zeros(2)}, "field name 'two words'"),
        ({"big": np.array([0, 2**40])}, "field 'big' of type int64 fits no PLY type"),
    ],
)
def test_what_ply_cannot_hold_is_refused_before_anything_is_written(tmp_path, fields, message):
    with pytest.raises(ValueError, match=f"a.ply: {message}"):
        write_ply(tmp_path / "a.ply", **({"points": np.zeros((2, 3))} | fields))
    assert list(tmp_path.iterdir()) == []


def test_faces_of_a_real_mesh_do_not_disturb_its_vertices(shared):
    path = shared / "data/scannet/scene0000_00/scene0000_00_vh_clean_2.ply"
    scene = read_ply(path)
    assert len(scene.points) == 81369
    np.testing.assert_allclose(np.ptp(scene.points, axis=0), [8.42, 8.74, 3.03], atol=0.01)
    first = struct.unpack_from("<3f3B", path.read_bytes(), path.read_bytes().index(b"end_header\n") + 11)
    assert (*scene.points[0].tolist(), *scene.colors[0].tolist()) == first


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.ply"
    write_ply(path, np.eye(6, 3))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a.ply: field 'name' of type"):
        write_ply(path, np.eye(6, 3), name=np.array(list("abcdef")))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_may_have_the_longest_name_the_file_system_takes(tmp_path):
    path = tmp_path / ("x" * 251 + ".ply")
    write_ply(path, np.eye(6, 3))
    np.testing.assert_array_equal(read_ply(path).points, np.eye(6, 3))
    assert list(tmp_path.iterdir()) == [path]


def test_a_comment_may_be_in_any_language(tmp_path):
    (tmp_path / "a.ply").write_text(
        "ply\nformat ascii 1.0\ncomment \u00c5ngstr\u00f6m \u0445\nelement vertex 1\nproperty int x\nend_header\n7\n",
        encoding="utf-8",
    )
    assert read_ply_columns(tmp_path / "a.ply")["x"].tolist() == [7]
