"""Functions compiled by numba as XLA custom calls on a CPU: they read and write XLA's buffers, on XLA's threads.

A call is cut into chunks that may run in any order and at the same time. The thread that XLA calls takes chunks until
none is left; the others of XLA's pool help if they are free, so a pool that is busy, or of one thread, cannot block it.

Speaks the C interface of XLA's foreign functions, version 0.3, as jaxlib's include/xla/ffi/api/c_api.h lays it out:
every structure is read as 64-bit words.
"""

import ctypes
from typing import no_type_check

import jax
import llvmlite.ir
import numba
import numpy as np
from numba.core import cgutils, types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

# words of the structures that are read
_EXTENSION, _API, _CONTEXT, _ARGUMENTS, _RESULTS, _ATTRIBUTES = 1, 2, 3, 9, 14, 20  # XLA_FFI_CallFrame
_METADATA = 3  # XLA_FFI_Metadata_Extension
_VERSION = 3  # XLA_FFI_Metadata
_DATA, _SHAPE = 3, 5  # XLA_FFI_Buffer
_DESTROY_ERROR, _SCHEDULE = 8, 17  # XLA_FFI_Api
_MINOR_3 = 3 << 32  # version 0.3 as two 32-bit numbers
# words of what the threads of one call share
_NEXT, _DONE, _USERS, _CHUNKS, _FRAME, _RUN, _SHARED = range(7)

_INT64 = llvmlite.ir.IntType(64)


# ------------------------------------------------------------------------------------- what numba does not offer


@intrinsic
@no_type_check
def array_at(typingctx, address, shape, dtype):
    """Array of this shape and dtype over the memory at an address, which somebody else keeps alive."""
    pointer = types.CPointer(dtype.dtype)
    signature = types.Array(dtype.dtype, shape.count, "C")(types.intp, shape, dtype)

    def codegen(context, builder, signature, args):
        where = builder.inttoptr(args[0], context.get_value_type(pointer))
        view = types.Array(dtype.dtype, shape.count, "C")(pointer, shape)
        return context.compile_internal(builder, lambda p, s: numba.carray(p, s), view, (where, args[1]))

    return signature, codegen


@intrinsic
@no_type_check
def _fetch_and_add(typingctx, address, amount):
    """The word at an address, to which it adds, in one step no thread can come between."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _INT64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
@no_type_check
def _call(typingctx, function, arguments):
    """Call the C function at an address with integers or pointers; what it returns, which is nothing for a void one."""

    def codegen(context, builder, signature, args):
        function_type = llvmlite.ir.FunctionType(_INT64, [_INT64] * arguments.count)
        unpacked = cgutils.unpack_tuple(builder, args[1], arguments.count)
        return builder.call(builder.inttoptr(args[0], function_type.as_pointer()), unpacked)

    return types.intp(types.intp, arguments), codegen


@intrinsic
@no_type_check
def _allocate(typingctx, size):
    """Address of so many bytes, until `_free`."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(context.nrt.allocate(builder, args[0]), _INT64)

    return types.intp(types.intp), codegen


@intrinsic
@no_type_check
def _free(typingctx, address):
    def codegen(context, builder, signature, args):
        context.nrt.free(builder, builder.inttoptr(args[0], cgutils.voidptr_t))
        return context.get_dummy_value()

    return types.void(types.intp), codegen


# ------------------------------------------------------------------------------------------------- call frames


@numba.njit(cache=True)
@no_type_check
def _words(address, count):
    return array_at(address, (count,), np.int64)


@numba.njit(cache=True)
@no_type_check
def _buffer(frame, side, index):
    return _words(_words(_words(frame, 21)[side], index + 1)[index], 6)


@numba.njit(cache=True)
@no_type_check
def argument(frame, index):
    """Address of an argument's data, and its shape."""
    buffer = _buffer(frame, _ARGUMENTS, index)
    return buffer[_DATA], _words(buffer[_SHAPE], buffer[_SHAPE - 1])


@numba.njit(cache=True)
@no_type_check
def result(frame, index):
    """Address of a result's data, and its shape."""
    buffer = _buffer(frame, _RESULTS, index)
    return buffer[_DATA], _words(buffer[_SHAPE], buffer[_SHAPE - 1])


@numba.njit(cache=True)
@no_type_check
def _only_attribute(frame):
    """Value of a call's one attribute, an int64."""
    scalar = _words(_words(_words(frame, 21)[_ATTRIBUTES], 1)[0], 2)
    return _words(scalar[1], 1)[0]


# ----------------------------------------------------------------------------------------------------- chunks


@numba.njit(cache=True)
@no_type_check
def _work(shared):
    state = _words(shared, _SHARED)
    while True:
        chunk = _fetch_and_add(shared + 8 * _NEXT, 1)
        if chunk >= state[_CHUNKS]:
            break
        _call(state[_RUN], (state[_FRAME], chunk, state[_CHUNKS]))
        _fetch_and_add(shared + 8 * _DONE, 1)


@numba.njit(cache=True)
@no_type_check
def _leave(shared):
    if _fetch_and_add(shared + 8 * _USERS, -1) == 1:
        _free(shared)


@numba.cfunc("void(intp)", cache=True)
@no_type_check
def _help(shared):
    _work(shared)
    _leave(shared)


@numba.cfunc("intp(intp, intp, intp)", cache=True)
@no_type_check
def _handle(frame, run_address, help_address):
    words = _words(frame, 21)
    if words[_EXTENSION] != 0:  # XLA asks at registration what the function was built for
        metadata = _words(_words(words[_EXTENSION], _METADATA + 1)[_METADATA], _VERSION + 1)
        metadata[_VERSION] = _MINOR_3
        return 0
    chunks = _only_attribute(frame)
    shared = _allocate(8 * _SHARED)
    state = _words(shared, _SHARED)
    state[_NEXT], state[_DONE], state[_USERS] = 0, 0, chunks
    state[_CHUNKS], state[_FRAME], state[_RUN] = chunks, frame, run_address
    api = _words(words[_API], _SCHEDULE + 1)
    request = np.array([40, 0, words[_CONTEXT], help_address, shared])  # XLA_FFI_ThreadPool_Schedule_Args
    for _ in range(chunks - 1):
        error = _call(api[_SCHEDULE], (request.ctypes.data,))
        if error != 0:  # no pool: this thread does it all
            _call(api[_DESTROY_ERROR], (np.array([24, 0, error]).ctypes.data,))
            _leave(shared)
    _work(shared)
    while _fetch_and_add(shared + 8 * _DONE, 0) < chunks:
        pass
    _leave(shared)
    return 0


def register(name: str, run_chunk: CFunc) -> None:
    """Let `jax.ffi.ffi_call(name, ...)` call a function compiled by numba on CPUs.

    Args:
        name: of the custom call, with one attribute `chunks`, an int64: the parts it is cut into.
        run_chunk: `numba.cfunc` of the address of the call frame (for `argument` and `result`), a chunk and the number
            of chunks. It must outlive all calls.
    """
    handle_address, run_address, help_address = _handle.address, run_chunk.address, _help.address

    @numba.cfunc("intp(intp)")  # addresses change from process to process: this is compiled in each
    @no_type_check
    def handle(frame):
        return _call(handle_address, (frame, run_address, help_address))

    _handlers.append(handle)  # numba frees the code of a function that nobody holds
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(ctypes.c_void_p(handle.address)), platform="cpu")


_handlers: list = []
