"""Reads the zip files torch.save writes (.pth, .pth.tar, .pt) without torch and without trusting them.

Such a file is a zip archive: `data.pkl` describes the object, `data/<key>` are the raw tensor storages. A
pickle may name any function to call, so the names this reader answers are a short table: tensors,
OrderedDict, and NumPy arrays and scalars of plain types. Any other name is refused or, on request, answered
with an `Inert` object. That way TorchScript archives and Lightning checkpoints can be read too.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# torch's storage classes, as NumPy type codes without byte order
_STORAGES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "ComplexDoubleStorage": "c16",
    "ComplexFloatStorage": "c8", "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2",
    "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip
_PLAIN_KINDS = "biufcSU"  # bool, integers, floats, complex, bytes, text: no objects, no records
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")  # NumPy 1 and 2


class Inert:
    """Stands for an object of a class that is never loaded, e.g. a TorchScript module.

    Attributes:
      state: what the pickle says of it, for a module the dict of its attributes; None where it says nothing.
    """

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


def load(path: str | Path, *, inert: bool = False) -> Any:
    """The object saved in a torch zip file.

    Dicts (OrderedDict becomes dict), lists, tuples, numbers and text come back as they are; tensors and NumPy
    arrays as new NumPy arrays in native byte order, whatever device they were saved from.

    Args:
      inert: names outside the table stand for `Inert` objects instead of being refused; nothing of theirs is
        imported or run.

    Raises FileNotFoundError, or ValueError that names the file and what is wrong with it: not a torch zip
    file, truncated, a name outside the table, a tensor that reaches outside its storage.
    """
    path = Path(path)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic[:2] != b"PK":
        old = magic[:1] == b"\x80"  # a bare pickle
        hint = ": written by torch before 1.6; load and save it again with a newer torch" if old else ""
        raise ValueError(f"{path}: not a torch zip file, it starts with {magic!r}{hint}")
    try:
        with zipfile.ZipFile(path) as archive:
            return _plain(_Reader(archive, inert).load())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: truncated or damaged zip file ({error}); fetch it again") from error
    except Exception as error:  # hostile bytes can make the unpickler fail in any way
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: not a readable torch file: {reason}") from error


class _Reader(pickle.Unpickler):
    """Unpickles `data.pkl` with nothing but the names in `_names`, and `Inert` classes where they are allowed."""

    def __init__(self, archive: zipfile.ZipFile, inert: bool):
        pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise ValueError(f"expected one <folder>/data.pkl in the zip, found {len(pickles)}")
        super().__init__(io.BytesIO(archive.read(pickles[0])))
        self._archive = archive
        self._root = pickles[0].removesuffix("data.pkl")
        self._storages: dict[str, np.ndarray] = {}
        self._names = _names()
        self._inert = inert
        self._byte_order = "<"
        if f"{self._root}byteorder" in archive.namelist():
            self._byte_order = {b"little": "<", b"big": ">"}[archive.read(f"{self._root}byteorder")]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names and self._inert:
            self._names[module, name] = type(name, (Inert,), {})
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which is refused: save tensors alone, in float32 or float16"
            )
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, code, key, _location, size = pid
        if kind != "storage" or code not in _STORAGES.values() or not isinstance(key, str):
            raise pickle.UnpicklingError(f"unknown persistent object {pid!r}")
        if key not in self._storages:
            data = self._archive.read(f"{self._root}data/{key}")
            dtype = np.dtype(self._byte_order + code)
            if len(data) != size * dtype.itemsize:
                raise ValueError(f"storage {key} has {len(data)} bytes, expected {size} values of {dtype}")
            self._storages[key] = np.frombuffer(data, dtype)
        return self._storages[key]


def _names() -> dict[tuple[str, str], Any]:
    """What the pickle may name.

    New functions for every file: a pickle can set attributes on what it is given, and must not reach a later
    file through that.
    """

    def rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
        return _strided(storage, offset, size, stride)

    def dtype(code: str, *_: Any) -> _Dtype:
        return _Dtype(code)

    def array(*_: Any) -> _Array:
        return _Array()

    def scalar(dtype: _Dtype, data: bytes) -> np.generic:
        return np.frombuffer(data, dtype.numpy, count=1)[0]

    def encode(text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes written as {encoding!r}; expected latin1")
        return text.encode("latin1")

    def no_bytes() -> bytes:
        return b""

    names: dict[tuple[str, str], str | type | Callable] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("numpy", "dtype"): dtype,
        ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct
        ("_codecs", "encode"): encode,  # how protocol 2 writes bytes
        ("__builtin__", "bytes"): no_bytes,  # and how it writes none
    }
    for module in _MULTIARRAY:
        names[module, "_reconstruct"] = array
        names[module, "scalar"] = scalar
    return names | {("torch", name): code for name, code in _STORAGES.items()}


def _strided(storage: np.ndarray, offset: int, size: tuple, stride: tuple) -> np.ndarray:
    """A tensor's values, copied out of its storage; offset and strides count values."""
    native = storage.dtype.newbyteorder("=")
    if 0 in size:
        return np.empty(size, native)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or max(last + 1, math.prod(size)) > len(storage):
        tensor = f"a tensor of shape {size}, strides {stride}, offset {offset}"
        raise ValueError(f"{tensor} does not lie in its storage of {len(storage)} values")
    steps = tuple(step * storage.itemsize for step in stride)
    return np.array(np.lib.stride_tricks.as_strided(storage[offset:], size, steps), dtype=native, order="C")


class _Dtype:
    """Stands for numpy.dtype, whose own __setstate__ would take raw flags from the file."""

    __slots__ = ("numpy",)

    def __init__(self, code: str):
        self.numpy = np.dtype(code)
        if self.numpy.kind not in _PLAIN_KINDS:
            raise ValueError(f"NumPy arrays of type {self.numpy} are refused; plain numbers and text only")

    def __setstate__(self, state: tuple) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array:
    """Stands for a NumPy array until its state arrives."""

    __slots__ = ("numpy",)

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, fortran, data = state
        values = np.frombuffer(data, dtype.numpy).reshape(shape, order="F" if fortran else "C")
        self.numpy = values.astype(dtype.numpy.newbyteorder("="), order="C")


def _plain(value: Any) -> Any:
    """Stand-ins replaced by arrays, all mappings by dicts."""
    if isinstance(value, _Array):
        return value.numpy
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value
