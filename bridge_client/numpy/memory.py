"""Arrays and the session's memory: inputs placed in it, results made of it."""

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bridge_client.arguments import NUMBERS, Values, pack_number
from bridge_client.programs import Program
from bridge_client.session import Placed, Session
from bridge_wire import specs
from bridge_wire.dtypes import BY_NAME, NARROWED, NEEDS_X64, TURN_ON_X64, DType
from bridge_wire.errors import DTypeError, SpecError, StructureError
from bridge_wire.memory.copying import copy
from bridge_wire.memory.dlpack import keep_owners_by
from bridge_wire.memory.pool import MANY, Block, Parts
from bridge_wire.specs import Spec

Array = np.ndarray[Any, Any]

keep_owners_by(lambda buffer: np.frombuffer(buffer, np.uint8).__dlpack__())


class _InSlab(NamedTuple):
    """An array that lies in the session's memory already."""

    address: int
    array: Array


def empty(session: Session, shape: int | Sequence[int], dtype: Any = float) -> Array:
    """Return a writable array with undefined contents in memory shared with the worker.

    Calls pass it without a copy. The memory returns to the session with the last view.

    Raises:
      SpecError, DTypeError: the shape or the dtype is invalid.
      OutOfMemory: there is no memory for the array.
    """
    spec = specs.of(np.dtype(dtype), shape)
    return from_block(session.pool.lease(spec.nbytes), spec)


@functools.cache
def dtype_of(dtype: DType) -> np.dtype[Any]:
    """Return NumPy's dtype of an element type.

    Raises:
      DTypeError: NumPy lacks it, and ml_dtypes is not installed.
    """
    try:
        return np.dtype(dtype.name)
    except TypeError:
        pass
    try:
        extension = importlib.import_module("ml_dtypes")
    except ImportError as error:
        raise DTypeError(
            f"NumPy has no dtype {dtype.name}; install ml_dtypes, which adds it, or let the model"
            " take and return float32"
        ) from error
    added: np.dtype[Any] = np.dtype(getattr(extension, dtype.name))
    return added


def as_array(leaf: Any, path: str) -> Array:
    """Return an array, or an array of another library, as a plain NumPy array.

    Raises:
      StructureError: it is a masked array, or no array.
    """
    if isinstance(leaf, np.ma.MaskedArray):
        raise StructureError(
            f"`{path}` is a masked array, whose mask would be lost; fill it with .filled(...)"
        )
    kind = type(leaf)
    if isinstance(leaf, np.ndarray) and kind.__module__.partition(".")[0] != "numpy":
        raise StructureError(
            f"`{path}` is a {kind.__qualname__}, a subclass of ndarray whose further parts would"
            " be lost; pass np.asarray(...) of it"
        )
    try:
        return np.asarray(leaf)
    except (TypeError, ValueError, RuntimeError) as error:
        raise StructureError(
            f"`{path}` is a {type(leaf).__qualname__} that NumPy cannot read: {error}"
        ) from error


def spec_of(value: Any, path: str, x64: bool) -> Spec:
    """Return the type of an array or a Python number on the worker.

    Raises:
      DTypeError: the worker cannot hold it without loss.
    """
    if not isinstance(value, np.ndarray):
        return NUMBERS[type(value)]
    dtype = BY_NAME.get(value.dtype.name)
    if dtype is None:
        raise DTypeError(
            f"input `{path}` has dtype {value.dtype}, which workers do not have; cast it"
        )
    if dtype.name in NEEDS_X64 and not x64:
        narrowed = NARROWED.get(dtype.name)
        if narrowed is None:
            raise DTypeError(
                f"input `{path}` has dtype {dtype.name}, but JAX runs without x64 there; cast it to"
                f" a 32-bit type or {TURN_ON_X64}"
            )
        dtype = narrowed
    return Spec(dtype, value.shape)


def place(
    program: Program, inputs: Values, *, lasting: bool = False
) -> tuple[list[Placed], int]:
    """Return each input in the session's memory, in the program's types, and the number of bytes
    copied.

    `lasting`: a later change of the inputs must not be seen, since a residual may alias them.

    Raises:
      DTypeError, SpecError: an input has another type or shape than the program.
      OutOfMemory: there is no memory for the copies.
    """
    session = program.session
    pool = session.pool
    lease = pool.lease if len(inputs) < MANY else Parts(pool).lease
    placed: list[Placed] = []
    copied = 0
    for value, spec, label in zip(inputs, program.inputs, program.labels, strict=True):
        if spec.weak:
            block = lease(spec.nbytes)
            block.buffer[:] = pack_number(value, label, session.x64)
            placed.append(block)
            copied += block.nbytes
            continue
        _check(value, spec, label)
        pointer, nbytes = value.__array_interface__["data"][0], spec.nbytes
        is_as_sent = value.dtype == dtype_of(spec.dtype) and value.flags.c_contiguous
        if is_as_sent and nbytes and not lasting:
            address = pool.address_of(pointer, nbytes)
            if address is not None:
                placed.append(_InSlab(address, value))
                continue
        block = lease(nbytes)
        if is_as_sent:
            copy(block.pointer, pointer, nbytes, block, value)
        else:
            from_block(block, spec)[...] = value
        placed.append(block)
        copied += nbytes
    return placed, copied


def from_blocks(blocks: Sequence[Block], described: Sequence[Spec]) -> list[Array]:
    """Return the writable arrays over the blocks."""
    return list(map(from_block, blocks, described))


def from_block(block: Block, spec: Spec) -> Array:
    """Return the writable array over a block: the lease ends with the array's last view."""
    dtype = dtype_of(spec.dtype)
    if block.nbytes == 0:
        return np.empty(spec.shape, dtype)
    count = block.nbytes // dtype.itemsize
    flat = np.frombuffer(block.whole, dtype, count, block.offset)
    return flat if len(spec.shape) == 1 else flat.reshape(spec.shape)


def _check(value: Array, spec: Spec, label: str) -> None:
    """Raise unless the program takes this array: an integer may have a wider type if it fits."""
    if value.shape != spec.shape:
        raise SpecError(
            f"`{label}` has shape {list(value.shape)}; expected {list(spec.shape)}"
        )
    if value.dtype.name == spec.dtype.name:
        return
    if NARROWED.get(value.dtype.name) is not spec.dtype:
        raise DTypeError(
            f"`{label}` has dtype {value.dtype}; expected {spec.dtype.name}: cast it"
        )
    if value.size == 0:
        return
    low, high, bounds = value.min(), value.max(), np.iinfo(spec.dtype.name)
    if low < bounds.min or high > bounds.max:
        raise DTypeError(
            f"input `{label}` has dtype {value.dtype} and values from {low} to {high}; JAX runs"
            f" without x64 there and holds {spec.dtype.name} only: {TURN_ON_X64}"
        )
