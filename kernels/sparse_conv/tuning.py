"""Block sizes of the Triton kernels: a committed table, the nearest entry for what it lacks, candidates to try."""

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("tuning.json")


class Key(NamedTuple):
    """What an entry is for."""

    kernel: str
    """"conv" (forward, and the gradient in the features with the channels exchanged) or "weight_gradient"."""
    in_channels: int
    out_channels: int
    kernel_size: int
    dtype: str
    """Of the operands; "tensorfloat32" for float32 that is multiplied as such."""
    arch: str
    """"sm_80", "sm_90", ..."""


class Blocks(NamedTuple):
    """How a kernel is cut up and compiled."""

    rows: int
    """Output rows of a tile, or pairs of a step of the weight gradient; a power of two from 16 to 128."""
    inputs: int
    """Most input channels of a step (conv) or a program (weight gradient); a multiple of 16."""
    outputs: int
    """Most output channels of a program; a multiple of 16."""
    warps: int
    stages: int
    """Depth of the software pipeline."""


_trial: dict[str, Blocks] = {}


@functools.cache
def _table() -> dict[Key, Blocks]:
    entries = json.loads(TABLE.read_text())["entries"]
    return {Key(*entry["key"]): Blocks(*entry["blocks"]) for entry in entries}


def lookup(key: Key) -> Blocks:
    """The blocks being tried, else those of the table's entry for this kernel that is nearest to `key`.

    Nearest in the width of the operands, then in architecture, then in channels and kernel size (as ratios).
    """
    if key.kernel in _trial:
        return _trial[key.kernel]

    def distance(entry: Key):
        sizes = zip(key[1:4], entry[1:4], strict=True)
        return (
            entry.dtype != key.dtype and {entry.dtype, key.dtype} != {"bfloat16", "float16"},
            abs(_capability(entry.arch) - _capability(key.arch)),
            sum(abs(math.log2(a / b)) for a, b in sizes),
            entry,
        )

    table = _table()
    return table[min((entry for entry in table if entry.kernel == key.kernel), key=distance)]


def _capability(arch: str) -> int:
    return int(arch[3:]) if arch.startswith("sm_") else 80


@contextlib.contextmanager
def trying(kernel: str, blocks: Blocks) -> Iterator[None]:
    """Use these blocks for one kernel in what is traced meanwhile; a jitted function keeps those it was traced with."""
    _trial[kernel] = blocks
    try:
        yield
    finally:
        del _trial[kernel]
