"""PCD files, written here value by value in all three forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import pcd

POINT = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("rgb", "<f4"), ("label", "<u2"), ("n", "<f8", (2,))])
FORMS = ("ascii", "binary", "binary_compressed")


def compress(content: bytes) -> bytes:
    """LZF with the longest of a few references at each place."""
    out, literals, i = b"", b"", 0

    def flush():
        nonlocal out, literals
        for start in range(0, len(literals), 32):
            run = literals[start : start + 32]
            out += bytes([len(run) - 1]) + run
        literals = b""

    while i < len(content):
        best, offset = 0, 0
        for back in (b for b in (1, 2, 3, 4, 8, 40, 400) if b <= i):
            length = 0
            while length < 264 and i + length < len(content) and content[i - back + length] == content[i + length]:
                length += 1
            if length > best:
                best, offset = length, back - 1
        if best < 3:
            literals += content[i : i + 1]
            i += 1
            continue
        flush()
        coded = best - 2
        head = [min(coded, 7) << 5 | offset >> 8] + ([coded - 7] if coded >= 7 else [])
        out += bytes([*head, offset & 255])
        i += best
    flush()
    return out


def encode(table: np.ndarray, form: str) -> bytes:
    kinds = {"f": "F", "i": "I", "u": "U"}
    rows = [
        "# .PCD v0.7 - Point Cloud Data file format",
        "VERSION 0.7",
        "FIELDS " + " ".join(table.dtype.names),
        "SIZE " + " ".join(str(table.dtype[n].base.itemsize) for n in table.dtype.names),
        "TYPE " + " ".join(kinds[table.dtype[n].base.kind] for n in table.dtype.names),
        "COUNT " + " ".join(str(int(np.prod(table.dtype[n].shape, dtype=int))) for n in table.dtype.names),
        f"WIDTH {len(table)}",
        "HEIGHT 1",
        "VIEWPOINT 0 0 0 1 0 0 0",
        f"POINTS {len(table)}",
        f"DATA {form}",
        "",
    ]
    if form == "ascii":
        body = "\n".join(" ".join(repr(float(v)) for n in table.dtype.names for v in np.ravel(r[n])) for r in table)
        body = body.encode()
    elif form == "binary":
        body = table.tobytes()
    else:
        columns = b"".join(np.ascontiguousarray(table[name]).tobytes() for name in table.dtype.names)
        packed = compress(columns)
        body = np.array([len(packed), len(columns)], "<u4").tobytes() + packed
    return "\n".join(rows).encode() + body


def cloud(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    table = np.zeros(count, POINT)
    for name in "xyz":
        table[name] = rng.integers(-3, 3, count) / 4
    table["rgb"] = (rng.integers(0, 200, (count, 3)) @ [65536, 256, 1]).astype(np.uint32).view(np.float32)
    table["label"], table["n"] = rng.integers(0, 40000, count), rng.normal(size=(count, 2))
    return table


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 50])
def test_every_field_of_every_form_is_read_exactly(tmp_path, count, form):
    path = tmp_path / "a.pcd"
    table = cloud(count)
    path.write_bytes(encode(table, form))
    columns = pcd.read_pcd_columns(path)
    assert list(columns) == ["x", "y", "z", "label", "n", "red", "green", "blue"]
    for name in ("x", "y", "z", "label", "n"):
        np.testing.assert_array_equal(columns[name], table[name])
    bits = table["rgb"].view(np.uint32)
    for name, shift in (("red", 16), ("green", 8), ("blue", 0)):
        np.testing.assert_array_equal(columns[name], bits >> shift & 255)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.sampled_from([b"\0", b"ab", b"abcabc", b"\xff" * 300, bytes(range(40)), b"a" * 360 + bytes(range(40))]),
        max_size=6,
    )
)
def test_what_lzf_packed_is_unpacked(parts):
    content = b"".join(parts)
    unpacked = np.empty(len(content), np.uint8)
    assert pcd._decompress(np.frombuffer(compress(content), np.uint8), unpacked) == len(content)
    assert unpacked.tobytes() == content


def test_packed_colors_written_as_whole_numbers_are_understood(tmp_path):
    text = encode(cloud(1)[["x", "y", "z", "rgb"]].copy(), "ascii").decode()
    head = text[: text.index("DATA ascii\n") + len("DATA ascii\n")]
    (tmp_path / "a.pcd").write_text(head + f"1 2 3 {200 << 16 | 100 << 8 | 50}\n")
    columns = pcd.read_pcd_columns(tmp_path / "a.pcd")
    assert [int(columns[name][0]) for name in ("red", "green", "blue")] == [200, 100, 50]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_off_is_refused(tmp_path, form):
    path = tmp_path / "a.pcd"
    content = encode(cloud(20), form)
    path.write_bytes(content[: content.rindex(b" ") if form == "ascii" else -1])
    with pytest.raises(ValueError, match="a.pcd: truncated, the file ends in point 19 of 20"):
        pcd.read_pcd_columns(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"DATA binary\n", b"DATA zip\n", r"DATA is \['zip'\], expected ascii"),
        (b"DATA binary\n", b"", "not a PCD file"),
        (b"SIZE 4 4", b"SIZE 4", "corrupt PCD header"),
        (b"TYPE F", b"TYPE Q", "corrupt PCD header: 'Q'"),
        (b"WIDTH 20", b"WIDTH 21", "corrupt PCD header: WIDTH x HEIGHT is not POINTS"),
        (b"POINTS 20\n", b"", "header has no line POINTS"),
        (b"SIZE 4 4 4 4", b"SIZE 4 4 4 8", "the packed colour rgb has 1 x 8 bytes, expected 1 x 4"),
    ],
)
def test_a_bad_header_is_named(tmp_path, old, new, message):
    path = tmp_path / "a.pcd"
    path.write_bytes(encode(cloud(20), "binary").replace(old, new))
    with pytest.raises(ValueError, match=f"a.pcd: .*{message}"):
        pcd.read_pcd_columns(path)


def test_compressed_bytes_that_do_not_fit_are_refused(tmp_path):
    content = bytearray(encode(cloud(20), "binary_compressed"))
    start = content.index(b"DATA binary_compressed\n") + len(b"DATA binary_compressed\n") + 8
    content[start] = 0xFF  # a reference before the beginning
    (tmp_path / "a.pcd").write_bytes(content)
    with pytest.raises(ValueError, match="corrupt, the compressed points do not unpack to 20"):
        pcd.read_pcd_columns(tmp_path / "a.pcd")
