"""Block sizes of the Triton kernels: a committed table, the nearest entry for what it lacks, candidates to measure.

`python -m kernels.sparse_conv.bench --tune` measures on the GPU at hand and writes the table.
"""

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("tuning.json")
_ABOUT = (
    "Written by python -m kernels.sparse_conv.bench --tune. Entries that name no device are defaults, never timed; "
    "in float32, tensorfloat32 and bfloat16 they compile to sm_80 without register spills "
    "(tests/test_pallas_triton.py)."
)
MOST_ROWS = 128  # of a tile
_MOST_SUMS = 128  # float32 sums per thread of a candidate; with 255 registers there is no room for many more


class Key(NamedTuple):
    """What an entry of the table is for."""

    kernel: str  # "conv" (the feature gradient is one too, its channels exchanged) or "weight_gradient"
    in_channels: int
    out_channels: int
    kernel_size: int
    dtype: str  # of the operands; "tensorfloat32" for float32 multiplied as such
    arch: str  # "sm_80", "sm_90", ...


class Blocks(NamedTuple):
    """How a kernel is cut into programs, and compiled."""

    rows: int  # output rows of a tile (conv) or pairs of a step (weight gradient): 16, 32, 64 or 128
    inputs: int  # most input channels: of a step (conv; a power of two), of a program (weight gradient); from 16
    outputs: int  # most output channels of a program; from 16
    warps: int
    stages: int  # depth of the software pipeline


class Entry(NamedTuple):
    """What the table says for a key."""

    blocks: Blocks
    microseconds: float | None = None  # of one call; None: never timed
    device: str | None = None  # and software it was timed on


_trial: dict[str, Blocks] = {}


def lookup(key: Key) -> Blocks:
    """Blocks that are being tried, or those of the table's nearest entry for this kernel.

    Nearest by operands first, then by architecture, then by channels and kernel size as ratios.
    """
    if key.kernel in _trial:
        return _trial[key.kernel]

    def distance(entry: Key):
        alike = entry.dtype == key.dtype or {entry.dtype, key.dtype} == {"bfloat16", "float16"}
        sizes = zip(key[1:4], entry[1:4], strict=True)
        return (
            not alike,
            entry.dtype != key.dtype,
            [abs(a - b) for a, b in zip(_capability(entry.arch), _capability(key.arch), strict=True)],
            sum(abs(math.log2(a / b)) for a, b in sizes),
        )

    table = _table()
    return table[min((entry for entry in table if entry.kernel == key.kernel), key=distance)].blocks


def candidates(key: Key) -> list[Blocks]:
    """Blocks worth measuring for `key`, to be tried with `trying`."""
    conv = key.kernel == "conv"
    padded_in, padded_out = (-(-channels // 16) * 16 for channels in (key.in_channels, key.out_channels))
    choices = ((32, 64, 128), (16, 32, 64, 128), (64, 128, 256)) if conv else ((32, 64), (64, 128), (64, 128))
    found = set()
    for rows, inputs, outputs, warps, stages in itertools.product(*choices, (4, 8), (3, 5)):
        inputs = min(inputs, padded_in & -padded_in if conv else padded_in)
        outputs = min(outputs, padded_out)
        if (rows if conv else inputs) * outputs <= _MOST_SUMS * 32 * warps:
            found.add(Blocks(rows, inputs, outputs, warps, stages))
    return sorted(found)


@contextlib.contextmanager
def trying(kernel: str, blocks: Blocks) -> Iterator[None]:
    """Trace one kernel with these blocks. A jitted function keeps the blocks it was first traced with."""
    before = dict(_trial)
    _trial[kernel] = blocks
    try:
        yield
    finally:
        _trial.clear()
        _trial.update(before)


def save(table: dict[Key, Entry], path: Path = TABLE) -> None:
    """Write a table, whole or not at all."""
    rows = []
    for key, entry in sorted(table.items()):
        timing = {} if entry.device is None else {"microseconds": entry.microseconds, "device": entry.device}
        rows.append(json.dumps(key._asdict() | entry.blocks._asdict() | timing))
    text = ",\n".join(rows)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{"about": {json.dumps(_ABOUT)},\n"entries": [\n{text}\n]}}\n')
    partial.replace(path)


def load(path: Path = TABLE) -> dict[Key, Entry]:
    """The table that `save` wrote."""
    return {
        Key(*(row[field] for field in Key._fields)): Entry(
            Blocks(*(row[field] for field in Blocks._fields)), row.get("microseconds"), row.get("device")
        )
        for row in json.loads(path.read_text())["entries"]
    }


_table = functools.cache(load)


def _capability(arch: str) -> tuple[int, int]:
    """Major and minor; 0.0 for the interpreter."""
    return divmod(int(arch[3:]), 10) if arch.startswith("sm_") else (0, 0)
