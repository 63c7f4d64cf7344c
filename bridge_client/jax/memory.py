"""Arrays and the session's memory: inputs placed in it, outputs made of it.

Code for callbacks calls no jax function: that could wait for the computation that waits for the
callback.
"""

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bridge_client.arguments import NUMBERS, Values
from bridge_client.jax.gpu import DONATION_ENDS_PROCESS, OnGpu
from bridge_client.jax.x64 import check_range, converted, extremes
from bridge_client.programs import Program
from bridge_client.session import Placed
from bridge_wire.dtypes import BY_NAME, NARROWED, NEEDS_X64, DType
from bridge_wire.errors import DTypeError, SpecError
from bridge_wire.memory.copying import copy
from bridge_wire.memory.dlpack import Exporter, keep_owners_by
from bridge_wire.memory.pool import Block
from bridge_wire.specs import Spec

JAX_DTYPES: Mapping[DType, np.dtype] = {
    dtype: jnp.dtype(name) for name, dtype in BY_NAME.items()
}
DTYPES: Mapping[np.dtype, DType] = {dtype: ours for ours, dtype in JAX_DTYPES.items()}
keep_owners_by(lambda buffer: np.frombuffer(buffer, np.uint8).__dlpack__())


class Source(NamedTuple):
    """Row-major memory that holds an input. Without an owner it is valid during the call only."""

    pointer: int
    dtype: np.dtype
    owner: Any = None
    gpu: OnGpu | None = None  # the GPU with this memory; None: the host


# The blocks of arrays by address: a callback learns an input's address only.
_blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()


class _InSlab(NamedTuple):
    """An input that lies in the session's memory already."""

    address: int
    owner: Any


def place(
    program: Program, sources: Sequence[Source], *, lasting: bool = False
) -> tuple[list[Placed], int]:
    """Return each input in the session's memory, in the program's types, and the number of bytes
    copied.

    `lasting`: the inputs must outlive the call, since a residual may alias them.
    """
    pool = program.session.pool
    placed: list[Placed] = []
    copied = 0
    for i, (source, spec) in enumerate(zip(sources, program.inputs, strict=True)):
        pointer, dtype, owner, gpu = source
        nbytes = spec.nbytes
        if gpu is not None:
            block, nbytes = _placed_on(gpu, pointer, nbytes, owner, lasting)
            placed.append(block)
            copied += nbytes
            continue
        if DTYPES[dtype] is spec.dtype:
            address = pool.address_of(pointer, nbytes) if nbytes else None
            if address is not None:
                owner = _blocks.get(pointer) if owner is None else owner
                if owner is not None or not lasting:
                    placed.append(_InSlab(address, owner))
                    continue
            block = pool.lease(nbytes)
            if nbytes:
                copy(block.pointer, pointer, nbytes, block, owner)
        else:
            block = pool.lease(nbytes)
            if nbytes:
                elements = _view(pointer, dtype, spec.shape)
                _convert(elements, _of_block(block, spec), program.labels[i])
        placed.append(block)
        copied += nbytes
    return placed, copied


def _placed_on(
    gpu: OnGpu, pointer: int, nbytes: int, owner: Any, lasting: bool
) -> tuple[Placed, int]:
    """Return an input on the GPU in the shared memory there, and the number of bytes copied."""
    assert gpu.pool is not None, "inputs on other GPUs are brought to the host"
    address = gpu.pool.address_of(pointer, nbytes) if nbytes else None
    if address is not None:
        block = _blocks.get(pointer, owner)
        if not lasting:
            return _InSlab(address, block), 0
        # XLA must not write into memory that the residual aliases. It would if the array were
        # donated while nobody refers to its memory, and within compiled code nobody can refer to
        # it.
        if owner is not None:
            return _InSlab(address, (block, gpu.reference_to(owner))), 0
        if block is not None and DONATION_ENDS_PROCESS:  # so it is never donated
            return _InSlab(address, block), 0
    block = gpu.lease(nbytes)
    if nbytes:
        gpu.copy(block.pointer, pointer, nbytes)
    return block, nbytes


def write(block: Block, spec: Spec, pointer: int, dtype: np.dtype, label: str) -> None:
    """Copy an output to memory of a dtype, which may be narrower than its own; see dtype_of."""
    if block.nbytes == 0:
        return
    if DTYPES[dtype] is spec.dtype:
        copy(pointer, block.pointer, block.nbytes)
    else:
        _convert(_of_block(block, spec), _view(pointer, dtype, spec.shape), label)


def source_of(value: Any, gpu: OnGpu | None = None) -> Source:
    """Return the memory of a concrete array or a Python number. Arrays on this GPU stay there;
    others are brought to the host."""
    if gpu is not None and gpu.holds(value) and _is_row_major(value):
        return Source(gpu.pointer_of(value), value.dtype, value, gpu)
    if isinstance(value, jax.Array) and _is_plain(value):
        value.block_until_ready()
        return Source(value.unsafe_buffer_pointer(), value.dtype, value)
    spec = NUMBERS.get(type(value))
    name = None if spec is None else spec.dtype.name
    array = np.asarray(value, dtype=name, order="C")
    return Source(array.ctypes.data, array.dtype, array)


def bytes_of(value: Any, spec: Spec) -> bytes:
    """Return the elements of an array with values or of a Python number, row-major, as a type."""
    return np.asarray(value).astype(JAX_DTYPES[spec.dtype]).tobytes()


def from_block(
    block: Block, spec: Spec, label: str, home: jax.Device | None = None
) -> jax.Array:
    """Return the array over the block, whose lease ends with it. That is on the host, if the host
    is the only device or `home`.

    On any other device, or if jax has only a narrower type, return a copy.
    """
    dtype = dtype_of(spec, label)
    # An imported array is committed to its device; beside other devices, jax would then refuse to
    # combine it with their arrays.
    is_imported = (
        block.nbytes
        and dtype == JAX_DTYPES[spec.dtype]
        and (has_one_cpu() or (home is not None and home is _host()))
    )
    if is_imported and is_importable(dtype):
        _blocks[block.pointer] = block
        imported: jax.Array = jax.dlpack.from_dlpack(
            Exporter(block.pointer, spec, block)
        )
        return imported
    array = np.empty(spec.shape, dtype)
    write(block, spec, array.ctypes.data, dtype, label)
    copied: jax.Array = jax.device_put(array, home)
    return copied


def from_block_on(
    gpu: OnGpu, block: Block, spec: Spec, label: str, device: jax.Device
) -> jax.Array:
    """Return the array over a block on the GPU, whose lease ends with it.

    If jax has only a narrower type, return a copy there, after the host has checked its range.
    """
    dtype, wide = dtype_of(spec, label), JAX_DTYPES[spec.dtype]
    if not block.nbytes or not is_importable(wide):
        (values,) = gpu.to_host([block.pointer], [wide], [spec.shape])
        copied: jax.Array = jax.device_put(values.astype(dtype), device)
        return copied
    if dtype == wide:
        _blocks[block.pointer] = block
        return gpu.array_over(block, spec)
    with jax.enable_x64(True):
        array = gpu.array_over(block, spec)
    check_range(np.asarray(extremes(array)), wide, dtype, label)
    narrow: jax.Array = converted(array, dtype)
    return narrow


def home_of(inputs: Values) -> jax.Device | None:
    """Return the device that an input is committed to, where outputs belong; else None."""
    for value in inputs:
        if isinstance(value, jax.Array) and getattr(value, "committed", True):
            devices = value.devices()
            if len(devices) == 1:
                return next(iter(devices))
    return None


def dtype_of(spec: Spec, label: str) -> np.dtype:
    """Return the dtype of arrays of the spec in jax.

    Integers are 32-bit if jax has no wider ones, provided their values fit.

    Raises:
      DTypeError: jax can hold it only with less precision.
    """
    if spec.dtype.name not in NEEDS_X64 or has_x64():
        return JAX_DTYPES[spec.dtype]
    narrowed = NARROWED.get(spec.dtype.name)
    if narrowed is None:
        raise DTypeError(
            f"{label} has dtype {spec.dtype.name}, but jax runs without x64: set jax_enable_x64, or"
            " let the model compute and return 32-bit types"
        )
    return JAX_DTYPES[narrowed]


def spec_of(
    shape: Sequence[int], dtype: np.dtype, path: str, framework: str, worker_x64: bool
) -> Spec:
    """Return the type of an array on the worker.

    Without x64, jax has 32-bit integers only; torch code expects 64-bit ones, for labels and
    indices above all. So an int32 goes to a torch model as an int64 then.

    Raises:
      DTypeError: the worker cannot hold it without loss.
      SpecError: its shape is not known.
    """
    if not all(isinstance(size, int) for size in shape):
        raise SpecError(
            f"input `{path}` has the symbolic shape {tuple(shape)}; calls are prepared for known"
            " sizes"
        )
    ours = DTYPES.get(dtype)
    if ours is None:
        raise DTypeError(
            f"input `{path}` has dtype {dtype}, which has no counterpart in {framework}; cast it"
        )
    if framework == "torch" and ours.name == "int32" and not has_x64():
        ours = BY_NAME["int64"]
    if ours.name in NEEDS_X64 and not worker_x64:
        narrowed = NARROWED.get(ours.name)
        if narrowed is None:
            raise DTypeError(
                f"input `{path}` has dtype {ours.name}, but the worker runs without x64; cast it to"
                " a 32-bit type or start the worker with --x64"
            )
        ours = narrowed
    return Spec(ours, tuple(shape))


def as_array(leaf: Any, path: str) -> jax.Array:
    """Return an array of another library as an array of jax.

    Raises:
      DTypeError: jax runs without x64 and would lose precision, or an integer.
      TypeError: it is no array, or jax has no such dtype.
    """
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError("its mask would be lost; fill it with .filled(...)")
    array = np.asarray(leaf)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.name in NEEDS_X64 and not has_x64():
        narrowed = NARROWED.get(array.dtype.name)
        if narrowed is None:
            raise DTypeError(
                f"`{path}` has dtype {array.dtype}, but jax runs without x64 and would make it a"
                " 32-bit one: cast it, or set jax_enable_x64"
            )
        into = np.empty(array.shape, narrowed.name)
        _convert(array, into, f"`{path}`")
        array = into
    try:
        return jnp.asarray(array)
    except (TypeError, ValueError) as error:
        raise TypeError(f"it has dtype {array.dtype}") from error


def has_x64() -> bool:
    """Whether jax has 64-bit types now."""
    return bool(jax.config.read("jax_enable_x64"))


@functools.cache
def has_one_cpu() -> bool:
    """Whether the only device is the host's."""
    return jax.default_backend() == "cpu" and jax.local_device_count() == 1


@functools.cache
def has_cpu() -> bool:
    """Whether jax has a backend for the host; with JAX_PLATFORMS=cuda it has none."""
    try:
        return bool(jax.local_devices(backend="cpu"))
    except RuntimeError:
        return False


@functools.cache
def _host() -> jax.Device | None:
    return jax.local_devices(backend="cpu")[0] if has_cpu() else None


def _is_plain(array: Any) -> bool:
    """Whether an array's elements lie row-major in the memory of the host."""
    if not has_one_cpu():
        device, *others = array.devices()
        if others or device.platform != "cpu":
            return False
    return _is_row_major(array)


def _is_row_major(array: Any) -> bool:
    layout = array.format.layout
    return layout is not None and layout.major_to_minor == tuple(range(array.ndim))


@functools.cache
def is_importable(dtype: np.dtype) -> bool:
    """Whether jax imports arrays of the dtype through DLPack."""
    memory = np.zeros(64, np.uint8)
    if not has_cpu():  # no backend to try it with: DLPack has a code for each dtype
        return True
    spec = Spec(DTYPES[dtype], (1,))
    try:
        jax.dlpack.from_dlpack(Exporter(memory.ctypes.data, spec, memory))
    except Exception:
        return False
    return True


def _convert(source: np.ndarray, into: np.ndarray, label: str) -> None:
    """Write elements as another type of their kind.

    Raises:
      DTypeError: an integer does not fit.
    """
    wide, narrow = source.dtype, into.dtype
    if narrow.kind in "iu" and narrow.itemsize < wide.itemsize and source.size:
        check_range((source.min(), source.max()), wide, narrow, label)
    into[...] = source


def _of_block(block: Block, spec: Spec) -> np.ndarray:
    return _view(block.pointer, JAX_DTYPES[spec.dtype], spec.shape)


class _Memory:
    """Memory in the form of NumPy's array interface. The caller keeps it alive."""

    def __init__(self, pointer: int, dtype: np.dtype, shape: Sequence[int]) -> None:
        # As raw bytes: NumPy's protocol has no name for bfloat16 and similar types.
        typestr = f"|V{dtype.itemsize}"
        self.__array_interface__ = {
            "version": 3,
            "data": (pointer, False),
            "shape": tuple(shape),
            "typestr": typestr,
        }


def _view(pointer: int, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    return np.asarray(_Memory(pointer, dtype, shape)).view(dtype)
