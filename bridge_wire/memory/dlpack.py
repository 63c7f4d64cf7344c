"""DLPack, the one adapter between raw memory and the frameworks' arrays, in both directions.

Structures and codes are those of dlpack.h 1.1; the unversioned capsule is exported, since every
consumer takes it.
"""

import ctypes
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from bridge_wire.dtypes import BY_NAME, DType
from bridge_wire.errors import CallerError, StructureError
from bridge_wire.specs import Spec

CPU = (1, 0)  # kDLCPU, device 0
_NO_ORDER = -1  # the stream of a consumer that takes care of the order itself


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]
_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype = ctypes.c_int
_capsule_is.argtypes = [ctypes.py_object, ctypes.c_char_p]
_CODES: Mapping[tuple[int, int], DType] = MappingProxyType(
    {(dtype.dlpack_code, dtype.dlpack_bits): dtype for dtype in BY_NAME.values()}
)

# Makes a capsule of an array over a buffer, which that array keeps alive; see keep_owners_by.
_carrier: Callable[[Any], Any] | None = None


def keep_owners_by(carrier: Callable[[Any], Any]) -> None:
    """Have what an exporter's owner is kept by be made by `carrier`: the DLPack capsule of some
    library's array over a buffer. For whoever imports such a library, before anything is exported
    with an owner.

    A consumer may let go of an array anywhere: without the GIL, at the interpreter's end, and above
    all while an exception is being raised, as when `[f(x), 1 / 0]` drops its first item. A deleter
    written in Python, a callback of ctypes, would clear that exception, and the interpreter crash.
    The libraries' own deleters, in C, know all that.
    """
    global _carrier
    _carrier = carrier


class Exporter:
    """An array over raw memory that any DLPack consumer can import without a copy.

    With an `owner`, that object lives until the consumer's array dies. Without one, the memory's
    lifetime is the caller's business.
    """

    __slots__ = ("_owner", "pointer", "spec")

    def __init__(self, pointer: int, spec: Spec, owner: Any = None) -> None:
        self.pointer = pointer
        self.spec = spec
        self._owner = owner

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        return self._alone() if self._owner is None else self._carried()

    def _alone(self) -> Any:
        """Return a capsule whose deleter frees no more than the description."""
        shape = self.spec.shape
        header = ctypes.sizeof(_DLManagedTensor)
        managed = _libc.malloc(header + 8 * len(shape))
        if not managed:
            raise MemoryError("no memory for a DLPack header")
        (ctypes.c_int64 * len(shape)).from_address(managed + header)[:] = list(shape)
        made = _DLManagedTensor.from_address(managed)
        made.tensor = self._described(managed + header)
        made.context = None
        made.deleter = _FREE
        return _new_capsule(managed, b"dltensor", None)

    def _carried(self) -> Any:
        """Return a capsule whose deleter, a library's own, also drops the owner."""
        if _carrier is None:
            raise CallerError(
                "import bridge_client.torch or bridge_client.jax first, which know how to keep an"
                " array"
            )
        shape = self.spec.shape
        kept = (ctypes.c_int64 * max(1, len(shape)))(*shape)
        kept.owner = self._owner  # type: ignore[attr-defined]
        capsule = _carrier(kept)
        managed = _DLManagedTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
        managed.tensor = self._described(ctypes.addressof(kept))
        return capsule

    def _described(self, shape: int) -> _DLTensor:
        """Return the description of the array; `shape` is where its sizes lie, which outlive it."""
        dtype = self.spec.dtype
        # Consumers take a null pointer only for an empty array, and some do not take it even then.
        pointer, ndim = self.pointer or shape, len(self.spec.shape)
        device = self.__dlpack_device__()
        return _DLTensor(
            pointer, *device, ndim, dtype.dlpack_code, dtype.dlpack_bits, 1, shape, None, 0
        )


class DeviceExporter(Exporter):
    """An array over a device's raw memory. `wait` lets a consumer's stream wait until the memory
    may be read, or waits itself when it is given None.

    Streams are named as in the array API standard: a consumer that names none is kept waiting, and
      -1 asks for nothing.
    """

    __slots__ = ("_device", "_wait")

    def __init__(
        self,
        pointer: int,
        spec: Spec,
        owner: Any,
        device: tuple[int, int],
        wait: Callable[[int | None], None],
    ) -> None:
        super().__init__(pointer, spec, owner)
        self._device = device
        self._wait = wait

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        if stream != _NO_ORDER:
            self._wait(stream)
        return super().__dlpack__()


class Borrowed(NamedTuple):
    """A view of a producer's memory: valid while `capsule` lives.

    Strides are in elements; None means row-major.
    """

    pointer: int
    spec: Spec
    strides: tuple[int, ...] | None
    capsule: Any

    @property
    def is_row_major(self) -> bool:
        if self.strides is None or 0 in self.spec.shape:
            return True
        expected = 1
        for size, stride in zip(reversed(self.spec.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


def borrow(producer: Any) -> Borrowed:
    """Return where a DLPack producer's host memory lies and what it holds, without a copy.

    Raises:
      StructureError: it is no producer, its memory is not the host's, or its dtype is none of ours.
    """
    if not hasattr(producer, "__dlpack__"):
        raise StructureError(f"a {type(producer).__qualname__} has no __dlpack__; pass an array")
    device, _ = producer.__dlpack_device__()
    if device != CPU[0]:
        raise StructureError(
            f"the array is on DLPack device type {device}; expected host memory, type {CPU[0]}"
        )
    try:
        capsule = producer.__dlpack__()
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise StructureError(f"the array cannot be viewed: {error}") from error
    if not _capsule_is(capsule, b"dltensor"):
        raise StructureError("the producer returned no unversioned DLPack capsule")
    tensor = _DLManagedTensor.from_address(_capsule_pointer(capsule, b"dltensor")).tensor
    dtype = _CODES.get((tensor.code, tensor.bits))
    if dtype is None or tensor.lanes != 1:
        raise StructureError(
            f"DLPack type ({tensor.code}, {tensor.bits} bits, {tensor.lanes} lanes) is not"
            " supported"
        )
    sizes = ctypes.c_int64 * tensor.ndim
    shape = tuple(sizes.from_address(tensor.shape)) if tensor.ndim else ()
    strides = tuple(sizes.from_address(tensor.strides)) if tensor.ndim and tensor.strides else None
    return Borrowed((tensor.data or 0) + tensor.byte_offset, Spec(dtype, shape), strides, capsule)


def data_pointer(producer: Any) -> int:
    """Return where the first element of a DLPack producer's host memory lies.

    Valid while the producer lives.
    """
    tensor = _capsule_pointer(producer.__dlpack__(), b"dltensor")
    # `data` is the first field of the first field.
    return ctypes.c_void_p.from_address(tensor).value or 0
