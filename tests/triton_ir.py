"""What Pallas kernels are for a GPU, without one: their Triton IR, and an interpreter of it stricter than a GPU.

Reading or writing out of bounds, an index beyond 32 bits, an element of the result that is stored twice or never: each
is an error here.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax._src.interpreters.mlir import make_ir_context
from jax._src.lib.mlir import ir
from jax._src.lib.triton import dialect

from kernels.sparse_conv.target import targeting

_DTYPES = {"i1": np.bool_, "i32": np.int32, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


class Kernel(NamedTuple):
    """One launch of a kernel."""

    name: str
    code: bytes  # of an MLIR module in the Triton dialect
    grid: tuple[int, int, int]
    warps: int
    stages: int

    def text(self) -> str:
        """Its module, without places in source files: equal where the kernel is."""
        with _module(self.code) as module:
            return module.operation.get_asm(enable_debug_info=False)


@contextlib.contextmanager
def cuda(arch: str) -> Iterator[None]:
    """Lowering for a GPU that is not there; jax takes the device from an abstract mesh from 0.11 on."""
    kind, processors = {"sm_80": ("NVIDIA A100", 108), "sm_90": ("NVIDIA H100", 132)}[arch]
    device = jax.sharding.AbstractDevice(kind, processors, "gpu")
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), explicit, abstract_device=device)
    with targeting(arch), jax.sharding.use_abstract_mesh(mesh):
        yield


def lowered_kernels(function: Callable, *arguments: Any, arch: str) -> list[Kernel]:
    """The kernels that a function of arrays, or of their shapes, launches on a GPU of some architecture."""
    with cuda(arch):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    found = []

    def visit(operation):
        for block in (block for region in operation.regions for block in region):
            for child in block:
                target = child.attributes["call_target_name"] if "call_target_name" in child.attributes else None
                if "triton" in str(target):
                    config = child.attributes["mhlo.backend_config"]
                    grid = tuple(config[f"grid_{axis}"].value for axis in "xyz")
                    warps, stages = config["num_warps"].value, config["num_stages"].value
                    found.append(Kernel(config["name"].value, config["ir"].value_bytes, grid, warps, stages))
                visit(child.operation)

    visit(lowered.compiler_ir("stablehlo").operation)
    return found


# ----------------------------------------------------------------------------------------------- interpreter


def run(kernel: Kernel, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> None:
    """Fills the outputs, program by program."""
    with _module(kernel.code) as module:
        (function,) = module.body.operations
        (block,) = function.regions[0].blocks
        parameters, body = [_slot(a) for a in block.arguments], _compile(block)
    memories = [_Memory(array.reshape(-1), None) for array in inputs]
    memories += [_Memory(array.reshape(-1), np.zeros(array.size, bool)) for array in outputs]
    for place in np.ndindex(*kernel.grid):
        body({"place": place} | {slot: _Pointer(m, np.int64(0)) for slot, m in zip(parameters, memories, strict=True)})
    for memory in memories:
        assert memory.stored is None or memory.stored.all(), f"{kernel.name} leaves {(~memory.stored).sum()} elements"


@contextlib.contextmanager
def _module(code: bytes):
    context = make_ir_context()
    dialect.register_dialect(context)
    with context:
        yield ir.Module.parse(code)


@dataclasses.dataclass(frozen=True)
class _Memory:
    elements: np.ndarray
    stored: np.ndarray | None  # which elements of an output are; None for an input


class _Pointer(NamedTuple):
    memory: _Memory
    offset: np.ndarray  # int64

    def within(self, mask) -> tuple[np.ndarray, np.ndarray]:
        """Mask of the pointer's shape, and the offsets it leaves."""
        mask = np.broadcast_to(True if mask is None else mask, np.shape(self.offset))
        chosen = np.asarray(self.offset)[mask]
        assert ((chosen >= 0) & (chosen < self.memory.elements.size)).all(), "out of bounds"
        return mask, chosen


def _slot(value) -> int:
    return hash(value)


def _compile(block) -> Callable[[dict], tuple]:
    """A function of the values so far that runs a block and gives what it yields. It outlives the module."""
    steps, yielded = [], ()
    for operation in block.operations:
        operation = operation.operation
        operands = [_slot(operand) for operand in operation.operands]
        if operation.name in ("scf.yield", "tt.return"):
            yielded = operands
        else:
            steps.append((_function(operation), operands, [_slot(result) for result in operation.results]))

    def run_block(values):
        for function, operands, results in steps:
            values.update(zip(results, function(values, *(values[slot] for slot in operands)), strict=True))
        return tuple(values[slot] for slot in yielded)

    return run_block


def _function(operation) -> Callable[..., tuple]:
    """What an operation makes of the values so far and its operands: its results."""
    name, attributes = operation.name, operation.attributes
    shape, dtype = _shape_and_dtype(operation.results[0].type) if len(operation.results) else ((), None)

    def integer(key: str) -> int:
        return ir.IntegerAttr(attributes[key]).value

    def one(function):
        return lambda values, *operands: (function(*operands),)

    if name == "scf.for":
        (block,) = operation.regions[0].blocks
        counter, *carried = (_slot(argument) for argument in block.arguments)
        body = _compile(block)

        def loop(values, start, stop, step, *state):
            for i in range(start, stop, step):
                state = body(values | {counter: np.int32(i)} | dict(zip(carried, state, strict=True)))
            return tuple(state)

        return loop
    if name == "tt.get_program_id":
        axis = integer("axis")
        return lambda values: (np.int32(values["place"][axis]),)
    if name == "tt.load":
        _, masked, other = list(ir.DenseI32ArrayAttr(attributes["operandSegmentSizes"]))
        assert other or not masked, "what lanes that are masked out hold is not defined"
        return one(_load)
    if name == "tt.store":
        return lambda values, *operands: _store(*operands) or ()
    if name == "tt.dot":
        assert integer("inputPrecision") == 2, "expected IEEE arithmetic"  # 0: tensorfloat32
        return one(lambda a, b, sums: sums + a.astype(np.float32) @ b.astype(np.float32))
    if name == "arith.constant":
        value = dtype(attributes["value"].value)
        return one(lambda: value)
    if name == "arith.cmpi":
        return one({0: np.equal, 1: np.not_equal, 2: np.less, 3: np.less_equal}[integer("predicate")])
    if name == "arith.cmpf":
        return one({2: np.greater, 4: np.less}[integer("predicate")])
    if name == "tt.make_range":
        numbers = np.arange(integer("start"), integer("end"), dtype=np.int32)
        return one(lambda: numbers)
    if name == "tt.expand_dims":
        axis = integer("axis")
        return one(lambda x: np.expand_dims(x, axis))
    if name == "tt.trans":
        order = list(ir.DenseI32ArrayAttr(attributes["order"]))
        return one(lambda x: x.transpose(order))
    if name in ("tt.splat", "tt.broadcast"):
        return one(lambda x: _broadcast(x, shape))
    if name in ("arith.truncf", "arith.extf"):
        return one(lambda x: x.astype(dtype))
    return one(_ARITHMETIC[name])


def _shape_and_dtype(of: ir.Type) -> tuple[tuple[int, ...], Any]:
    """NumPy's of a type such as "tensor<64x32xf32>" or "f32"; dtype None of pointers."""
    *sizes, element = re.fullmatch(r"(?:tensor<)?((?:\d+x)*)([^>]*(?:<\w+>)?)>?", str(of)).groups()
    return tuple(int(size) for size in sizes[0].split("x")[:-1]), _DTYPES.get(element)


def _broadcast(x, shape):
    if isinstance(x, _Pointer):
        return _Pointer(x.memory, np.broadcast_to(x.offset, shape))
    return np.broadcast_to(x, shape)


def _load(pointer, mask=None, other=None):
    mask, chosen = pointer.within(mask)
    if other is None:
        return pointer.memory.elements[np.asarray(pointer.offset)]
    loaded = np.array(np.broadcast_to(other, mask.shape))
    loaded[mask] = pointer.memory.elements[chosen]
    return loaded


def _store(pointer, value, mask=None) -> None:
    mask, chosen = pointer.within(mask)
    stored = pointer.memory.stored
    assert stored is not None, "stores into an input"
    assert not stored[chosen].any() and len(np.unique(chosen)) == len(chosen), "stores an element twice"
    stored[chosen] = True
    pointer.memory.elements[chosen] = np.broadcast_to(value, mask.shape)[mask]


def _int32(wide):
    assert np.all(wide == np.asarray(wide).astype(np.int32)), "beyond 32 bits"
    return wide.astype(np.int32)


_ARITHMETIC = {
    "tt.addptr": lambda pointer, offset: _Pointer(pointer.memory, pointer.offset + np.int64(offset)),
    "arith.addi": lambda a, b: _int32(np.add(a, b, dtype=np.int64)),
    "arith.subi": lambda a, b: _int32(np.subtract(a, b, dtype=np.int64)),
    "arith.muli": lambda a, b: _int32(np.multiply(a, b, dtype=np.int64)),
    "arith.divsi": lambda a, b: np.trunc(a / b).astype(np.int32),
    "arith.remsi": lambda a, b: np.fmod(a, b).astype(np.int32),
    "arith.divui": lambda a, b: np.floor_divide(a, b),  # of program numbers: not negative
    "arith.remui": lambda a, b: np.remainder(a, b),
    "arith.andi": np.bitwise_and,
    "arith.addf": np.add,
    "arith.subf": np.subtract,
    "arith.mulf": np.multiply,
    "arith.select": np.where,
}
