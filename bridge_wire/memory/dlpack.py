"""DLPack adapter between raw memory and the frameworks' arrays, in both directions.

Structures and codes follow dlpack.h 1.1. Exports use the unversioned capsule, which every consumer
accepts.
"""

import ctypes
from collections.abc import Callable
from typing import Any

from bridge_wire.errors import CallerError
from bridge_wire.specs import Spec

CPU = (1, 0)  # kDLCPU, device 0
_NO_ORDER = -1  # stream argument of a consumer that synchronises itself


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
    _fields_ = (
        ("tensor", _DLTensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


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

# Returns the capsule of an array over a buffer. The array keeps the buffer alive; see
# keep_owners_by.
_carrier: Callable[[Any], Any] | None = None


def keep_owners_by(carrier: Callable[[Any], Any]) -> None:
    """Set the function that makes capsules which keep an exporter's owner alive.

    `carrier` returns the DLPack capsule of a library's array over a buffer. The module that imports
    the library calls this function before any export with an owner.

    A consumer may delete an array anywhere: without the GIL, at interpreter shutdown, and while an
    exception is raised, as in `[f(x), 1 / 0]`. A Python deleter, a ctypes callback, would clear the
    exception and crash the interpreter. The libraries' C deleters handle these cases.
    """
    global _carrier
    _carrier = carrier


class Exporter:
    """Array over raw memory, for any DLPack consumer to import without a copy.

    The consumer's array keeps the `owner` alive. Without an owner, the caller must keep the memory
    alive.
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
        """Return a capsule whose deleter frees only the description."""
        shape = self.spec.shape
        header = ctypes.sizeof(_DLManagedTensor)
        managed = _libc.malloc(header + 8 * len(shape))
        if not managed:
            raise MemoryError("cannot allocate memory for a DLPack header")
        (ctypes.c_int64 * len(shape)).from_address(managed + header)[:] = list(shape)
        made = _DLManagedTensor.from_address(managed)
        made.tensor = self._described(managed + header)
        made.context = None
        made.deleter = _FREE
        return _new_capsule(managed, b"dltensor", None)

    def _carried(self) -> Any:
        """Return a capsule with a library's deleter, which also releases the owner."""
        if _carrier is None:
            raise CallerError(
                "no framework module is imported to keep the array alive; import"
                " bridge_client.torch or bridge_client.jax first"
            )
        shape = self.spec.shape
        kept = (ctypes.c_int64 * max(1, len(shape)))(*shape)
        kept.owner = self._owner  # type: ignore[attr-defined]
        capsule = _carrier(kept)
        managed = _DLManagedTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
        managed.tensor = self._described(ctypes.addressof(kept))
        return capsule

    def _described(self, shape: int) -> _DLTensor:
        """Return the array's description; `shape` points to its sizes, which must outlive it."""
        dtype = self.spec.dtype
        # Consumers accept a null pointer only for an empty array, and some never accept it.
        pointer, ndim = self.pointer or shape, len(self.spec.shape)
        device = self.__dlpack_device__()
        return _DLTensor(
            pointer,
            *device,
            ndim,
            dtype.dlpack_code,
            dtype.dlpack_bits,
            1,
            shape,
            None,
            0,
        )


class DeviceExporter(Exporter):
    """Array over a device's raw memory.

    `wait` makes the consumer's stream wait until the memory is readable; `wait(None)` blocks.
    Streams follow the array API standard: without a stream the consumer blocks, and -1 requests no
    synchronisation.
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


def data_pointer(producer: Any) -> int:
    """Return a pointer to the first element of a DLPack producer's host memory.

    The pointer is valid while the producer lives.
    """
    tensor = _capsule_pointer(producer.__dlpack__(), b"dltensor")
    # `data` is the first field of the first field.
    return ctypes.c_void_p.from_address(tensor).value or 0
