"""The torch reader: what it reads and what it refuses. Files are made here with pickle and zipfile alone."""

import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict, UserList
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data import torch_file

STORAGES = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage",
    "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage", "uint8": "ByteStorage",
    "bool": "BoolStorage", "complex64": "ComplexFloatStorage", "complex128": "ComplexDoubleStorage",
}  # fmt: skip


@dataclass
class Tensor:
    """What torch.save writes of a tensor: a storage, and where in it the values lie."""

    storage: np.ndarray
    size: tuple
    stride: tuple
    offset: int = 0
    location: str = "cuda:0"
    claimed: int | None = None
    """Length the pickle claims for the storage, its real one if None."""

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        array = np.ascontiguousarray(array)
        return cls(array.ravel(), array.shape, tuple(step // array.itemsize for step in array.strides))


@dataclass
class Stored:
    tensor: Tensor


@pytest.fixture
def save(tmp_path, monkeypatch):
    """torch.save, in the zip format, of objects that hold `Tensor`s."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    utils._rebuild_tensor_v2 = lambda *_: None
    utils._rebuild_tensor_v2.__module__, utils._rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    def save(value, name="file.pth", byteorder="little", drop=()):
        storages: list[np.ndarray] = []

        class Pickler(pickle.Pickler):
            def reducer_override(self, item):
                if not isinstance(item, Tensor):
                    return NotImplemented
                arguments = (Stored(item), item.offset, item.size, item.stride, False, OrderedDict())
                return utils._rebuild_tensor_v2, arguments

            def persistent_id(self, item):
                if not isinstance(item, Stored):
                    return None
                tensor = item.tensor
                key = next((i for i, known in enumerate(storages) if known is tensor.storage), len(storages))
                if key == len(storages):
                    storages.append(tensor.storage)
                claimed = tensor.storage.size if tensor.claimed is None else tensor.claimed
                kind = getattr(torch, STORAGES[tensor.storage.dtype.name])
                return ("storage", kind, str(key), tensor.location, claimed)

        pickled = io.BytesIO()
        Pickler(pickled, protocol=2).dump(value)
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            entries = {"data.pkl": pickled.getvalue(), "byteorder": byteorder.encode(), "version": b"3\n"}
            order = {"little": "<", "big": ">"}[byteorder]
            for i, storage in enumerate(storages):
                entries[f"data/{i}"] = storage.astype(storage.dtype.newbyteorder(order)).tobytes()
            for entry, content in entries.items():
                if entry not in drop:
                    archive.writestr(f"archive/{entry}", content)
        return path

    return save


array_dtypes = st.sampled_from(sorted(STORAGES))
arrays = array_dtypes.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(array=arrays, byteorder=st.sampled_from(["little", "big"]))
def test_tensors_and_numpy_arrays_come_back_as_saved(save, array, byteorder):
    for saved in (Tensor.of(array), array, array[()] if array.ndim == 0 else np.asfortranarray(array)):
        loaded = torch_file.load(save(saved, byteorder=byteorder))
        assert loaded.dtype == array.dtype and loaded.dtype.isnative
        np.testing.assert_array_equal(loaded, array)


def test_containers_scalars_and_views_of_one_storage_come_back(save):
    storage = np.arange(12, dtype=np.float32)
    value = {
        "epoch": 3,
        "best": np.float32(0.5),
        "state_dict": OrderedDict(a=Tensor(storage, (3, 4), (4, 1)), b=Tensor(storage, (2, 3), (1, 4), offset=1)),
        "rest": [None, True, ("text", 2.5, b"bytes")],
        "big endian": np.arange(3, dtype=">i4"),
    }
    loaded = torch_file.load(save(value))
    assert loaded["epoch"] == 3 and loaded["best"] == np.float32(0.5)
    assert loaded["rest"] == [None, True, ("text", 2.5, b"bytes")]
    grid = storage.reshape(3, 4)
    assert np.array_equal(loaded["state_dict"]["a"], grid)
    assert np.array_equal(loaded["state_dict"]["b"], grid[:, 1:3].T)
    assert loaded["big endian"].dtype == np.int32 and loaded["big endian"].tolist() == [0, 1, 2]
    loaded["state_dict"]["a"][:] = 0  # a copy of its own
    assert loaded["state_dict"]["b"].any()


def test_names_of_numpy_1_and_numpy_2_are_both_read(save, tmp_path):
    path = save({"a": np.arange(3), "b": np.float64(2)})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("archive/data.pkl")
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        changed = pickled.replace(b"numpy._core.multiarray", module).replace(b"numpy.core.multiarray", module)
        with zipfile.ZipFile(tmp_path / "renamed.pth", "w") as archive:
            archive.writestr("archive/data.pkl", changed)
        loaded = torch_file.load(tmp_path / "renamed.pth")
        assert loaded["a"].tolist() == [0, 1, 2] and loaded["b"] == 2


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refuses(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        torch_file.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("function", [os.system, os.unlink, eval, getattr, __import__, print, np.frombuffer])
def test_no_function_a_pickle_names_is_called(save, tmp_path, function):
    witness = tmp_path / "witness"
    witness.write_text("still here")
    argument = {os.system: f"rm {witness}", os.unlink: str(witness)}.get(
        function, f"__import__('os').unlink('{witness}')"
    )
    refuses(save({"state_dict": Call(function, argument)}), rf"it asks for \w+\.{function.__name__}, which is refused")
    assert witness.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Call(np.dtype, "O"), "type object are refused"),
        (Call(np.dtype, "f4,i4"), "are refused"),
        (np.array([{}], dtype=object), "type object are refused"),
        (Call(np.ndarray, 10**12), "not callable"),
        (Tensor(np.arange(4.0), (5,), (1,)), r"shape \(5,\).*storage of 4 values"),
        (Tensor(np.arange(4.0), (2, 2), (3, 1)), "storage of 4 values"),
        (Tensor(np.arange(4.0), (2,), (1,), offset=3), "storage of 4 values"),
        (Tensor(np.arange(4.0), (2,), (-1,), offset=3), "storage of 4 values"),
        (Tensor(np.arange(4.0), (2,), (1,), offset=-1), "storage of 4 values"),
        (Tensor(np.arange(4.0), (10**9, 10**9), (0, 0)), "storage of 4 values"),
        (Tensor(np.arange(4.0), (2, 2), (2,)), "shorter"),
        (Tensor(np.arange(4.0), (8,), (1,), claimed=8), "storage 0 has 32 bytes, expected 8 values of float64"),
        (Tensor(np.arange(4.0), (4,), (1,), claimed=-1), "expected -1 values"),
    ],
)
def test_objects_and_values_outside_their_storage_are_refused(save, value, message):
    refuses(save({"value": value}), message)


@dataclass
class Config:
    """Of a class the reader does not know, as in a Lightning checkpoint."""

    rate: float
    tensor: Tensor


class Settings(dict):
    pass


def test_unknown_classes_become_inert_objects_on_request(save):
    array = np.arange(4.0, dtype=np.float32)
    callbacks = {Settings: Settings(a=1), "list": UserList([2])}
    path = save({"hyper_parameters": Config(0.1, Tensor.of(array)), "callbacks": callbacks, "weight": Tensor.of(array)})
    refuses(path, "which is refused")
    loaded = torch_file.load(path, inert=True)
    np.testing.assert_array_equal(loaded["weight"], array)
    config = loaded["hyper_parameters"]
    assert isinstance(config, torch_file.Inert) and config.state["rate"] == 0.1
    np.testing.assert_array_equal(config.state["tensor"], array)


def test_inert_objects_run_nothing(save, tmp_path):
    target = tmp_path / "made by the pickle"
    loaded = torch_file.load(save({"x": Call(os.mkdir, str(target)), "y": Call(eval, "1 + 1")}), inert=True)
    assert not target.exists() and all(isinstance(value, torch_file.Inert) for value in loaded.values())


def test_a_pickle_cannot_change_what_the_next_file_may_do(save, tmp_path):
    # BUILD with a pair sets attributes: here the defaults of the function that rebuilds tensors
    hostile = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00__name__X\x01\x00\x00\x00xs\x86b."
    with zipfile.ZipFile(tmp_path / "hostile.pth", "w") as archive:
        archive.writestr("archive/data.pkl", hostile)
    torch_file.load(tmp_path / "hostile.pth")
    assert torch_file.load(save(Tensor.of(np.arange(3)))).tolist() == [0, 1, 2]
    assert torch_file._names()["torch._utils", "_rebuild_tensor_v2"].__name__ == "rebuild_tensor"


def test_every_truncation_is_refused(save):
    path = save({"a": Tensor.of(np.arange(100.0)), "b": list(range(50))})
    whole = path.read_bytes()
    for length in {0, 1, 3, 30, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1}:
        path.write_bytes(whole[:length])
        refuses(path, "not a torch zip file|truncated or damaged")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_byte_is_refused_or_harmless(save, data):
    path = save({"a": Tensor.of(np.arange(100.0)), "b": np.arange(5), "c": [1, "two", 3.0]})
    damaged = bytearray(path.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        torch_file.load(path)
    except ValueError as error:
        assert str(path) in str(error)


def test_other_files_are_named_for_what_they_are(save, tmp_path):
    text = tmp_path / "notes.pth"
    text.write_text("PLY, not torch")
    refuses(text, "not a torch zip file, it starts with b'PLY,'")
    old = tmp_path / "old.pth"
    old.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
    refuses(old, "written by torch before 1.6")
    refuses(save([1], drop=["data.pkl"]), r"expected one <folder>/data.pkl in the zip, found 0")
    refuses(save({"a": Tensor.of(np.arange(3))}, drop=["data/0"]), "data/0")
    with pytest.raises(FileNotFoundError):
        torch_file.load(tmp_path / "absent.pth")


def test_real_files_are_read(shared):
    coords, colors, labels = torch_file.load(shared / "data/scannet/preprocessed/scene0000_01_vh_clean_2.pth")
    assert coords.shape == colors.shape == (80583, 3) and coords.dtype == np.float32
    assert labels.shape == (80583,) and labels.dtype == np.float64
    text = torch_file.load(shared / "data/text_embeddings/orig_pt/clip_scannet_labels_512.pt")
    assert text.shape == (20, 512) and text.dtype == np.float16
