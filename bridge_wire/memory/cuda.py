"""Thin layer over CUDA: memory and events for interprocess use, streams, copies.

The first use of a device imports CuPy and creates a CUDA context. Listing the devices needs only
the driver. Pointers, events and streams are plain integers, as in CUDA's own interfaces.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from bridge_wire.errors import CudaError, OutOfMemory

_T = TypeVar("_T")

HANDLE_BYTES = 64  # size of cudaIpcMemHandle_t and cudaIpcEventHandle_t
UUID_BYTES = 16

# driver_types.h
_EVENT_DISABLE_TIMING = 0x02
_EVENT_INTERPROCESS = 0x04
_LAZY_PEER_ACCESS = 0x01  # cudaIpcMemLazyEnablePeerAccess, required to open a handle
_STREAM_NON_BLOCKING = 0x01
_COPY_DEFAULT = 4  # cudaMemcpyDefault: CUDA infers the direction from the addresses
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_HAS_WORDS = 122  # CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ


class Gpu(NamedTuple):
    """A GPU: its number in this process (set by CUDA_VISIBLE_DEVICES), global UUID and name."""

    ordinal: int
    uuid: bytes
    name: str

    @property
    def label(self) -> str:
        """The UUID as nvidia-smi and CUDA_VISIBLE_DEVICES write it."""
        return label_of(self.uuid)


def label_of(uuid: bytes) -> str:
    """Return a device's UUID as nvidia-smi and CUDA_VISIBLE_DEVICES write it."""
    text = uuid.hex()
    return f"GPU-{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class _Handle(ctypes.Structure):
    """CUipcMemHandle and CUipcEventHandle, passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class Driver:
    """The CUDA driver through ctypes, which releases the GIL: many driver calls wait for the
    GPU."""

    def __init__(self) -> None:
        """Load the driver.

        Raises:
          CudaError: the driver is missing or does not initialise.
        """
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError("there is no NVIDIA driver here (libcuda.so.1)") from error
        self._call("cuInit", 0)

    def gpus(self) -> tuple[Gpu, ...]:
        """Return the devices that this process may use."""
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        return tuple(map(self._gpu, range(count.value)))

    def version(self) -> str:
        """Return the newest CUDA version that the driver supports, such as "13.0"."""
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def size_of(self, pointer: int) -> int:
        """Return the number of bytes from a pointer to its allocation's end. Needs a context."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._call(
            "cuMemGetAddressRange_v2",
            ctypes.byref(base),
            ctypes.byref(size),
            ctypes.c_uint64(pointer),
        )
        return base.value + size.value - pointer

    def has_words(self, ordinal: int) -> bool:
        """Whether a device's streams can write 64-bit words in its memory and wait for them."""
        device, found = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDeviceGetAttribute", ctypes.byref(found), _HAS_WORDS, device)
        return bool(found.value)

    # These methods need the context of their handle, pointer or stream.

    def map(self, handle: bytes) -> int:
        """Map another process's allocation."""
        pointer = ctypes.c_uint64()
        self._call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(pointer),
            _Handle.from_buffer_copy(handle),
            _LAZY_PEER_ACCESS,
        )
        return pointer.value

    def unmap(self, pointer: int) -> None:
        """Unmap another process's allocation in the context of its mapping."""
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(pointer))

    def open_event(self, handle: bytes) -> int:
        """Open another process's event."""
        event = ctypes.c_void_p()
        self._call(
            "cuIpcOpenEventHandle",
            ctypes.byref(event),
            _Handle.from_buffer_copy(handle),
        )
        return event.value or 0

    def new_urgent_stream(self) -> int:
        """Return a stream of the highest priority."""
        stream, least, greatest = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        self._call(
            "cuCtxGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest)
        )
        self._call(
            "cuStreamCreateWithPriority",
            ctypes.byref(stream),
            _STREAM_NON_BLOCKING,
            greatest,
        )
        return stream.value or 0

    def write_word(self, stream: int, pointer: int, value: int) -> None:
        """Enqueue a write of a word."""
        self._call(
            "cuStreamWriteValue64_v2",
            ctypes.c_void_p(stream),
            ctypes.c_uint64(pointer),
            ctypes.c_uint64(value),
            0,
        )

    def wait_for_word(self, stream: int, pointer: int, value: int) -> None:
        """Enqueue a wait until a word is at least `value`."""
        self._call(
            "cuStreamWaitValue64_v2",
            ctypes.c_void_p(stream),
            ctypes.c_uint64(pointer),
            ctypes.c_uint64(value),
            _AT_LEAST,
        )

    # Queries use the driver: after the CUDA runtime's "not ready", torch would raise an error.

    def has_passed(self, event: int) -> bool:
        """Whether all work before the event's last record is done. Never blocks."""
        return bool(self._library.cuEventQuery(ctypes.c_void_p(event)) == 0)

    def is_pending(self, event: int) -> bool:
        """Whether work before the event's last record is known to be unfinished. Never blocks."""
        return bool(self._library.cuEventQuery(ctypes.c_void_p(event)) == _NOT_READY)

    def is_busy(self, stream: int) -> bool:
        """Whether a stream has unfinished work.

        Never blocks. Needs the stream's context.
        """
        return bool(self._library.cuStreamQuery(ctypes.c_void_p(stream)) == _NOT_READY)

    def _gpu(self, ordinal: int) -> Gpu:
        device, uuid, name = (
            ctypes.c_int(),
            (ctypes.c_ubyte * UUID_BYTES)(),
            ctypes.create_string_buffer(256),
        )
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDeviceGetUuid_v2", uuid, device)
        self._call("cuDeviceGetName", name, len(name), device)
        return Gpu(ordinal, bytes(uuid), name.value.decode(errors="replace"))

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            status = getattr(self._library, name)(*arguments)
        except AttributeError:
            raise CudaError(
                f"the NVIDIA driver has no {name}; install a driver for CUDA 11.7 or newer"
            ) from None
        if status:
            error = OutOfMemory if status == _OUT_OF_MEMORY else CudaError
            raise error(
                f"the NVIDIA driver answers {name} with error {status}, {self._name_of(status)}"
            )

    def _name_of(self, status: int) -> str:
        name = ctypes.c_char_p()
        self._library.cuGetErrorName(status, ctypes.byref(name))
        return (name.value or b"without a name").decode()


def gpu_at(ordinal: int | None) -> Gpu | None:
    """Return the GPU with this ordinal in this process's frameworks; None without a GPU."""
    if ordinal is None:
        return None
    return next((gpu for gpu in gpus() if gpu.ordinal == ordinal), None)


@functools.cache
def driver() -> Driver:
    """Return this process's driver.

    Raises:
      CudaError: the driver is missing or does not initialise.
    """
    return Driver()


def gpus() -> tuple[Gpu, ...]:
    """Return the devices that this process may use; empty without a driver."""
    try:
        return driver().gpus()
    except CudaError:
        return ()


class Device:
    """One GPU used by this process. Thread-safe, like CUDA."""

    dlpack_type = 2  # kDLCUDA

    def __init__(self, gpu: Gpu, runtime: Any, *, is_only: bool) -> None:
        self.gpu = gpu
        self._runtime = runtime
        self._is_only = is_only

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """The DLPack device pair: type and number."""
        return self.dlpack_type, self.gpu.ordinal

    def allocate(self, nbytes: int) -> int:
        """Return fresh memory that another process can open.

        Raises:
          OutOfMemory: the device lacks the memory.
        """
        pointer: int = self._do(self._runtime.malloc, nbytes)
        return pointer

    def free(self, pointer: int) -> None:
        """Free memory, after all its pending copies."""
        self._do(self._runtime.free, pointer)

    def handle_of(self, pointer: int) -> bytes:
        """Return the handle by which another process opens an allocation."""
        handle: bytes = self._do(self._runtime.ipcGetMemHandle, pointer)
        return handle

    def open(self, handle: bytes, nbytes: int) -> int:
        """Map another process's allocation of at least `nbytes` bytes; call `close` later.

        Raises:
          CudaError: this process cannot open the allocation, or the allocation is smaller.
        """
        if len(handle) != HANDLE_BYTES:
            raise CudaError(
                f"a memory handle has {len(handle)} bytes; expected {HANDLE_BYTES}"
            )
        # Calls that open and close use the driver. CUDA may wait for the whole device
        # (pytorch#15937, tensorpipe#321), and the device for a model's Python callback, which would
        # deadlock with CuPy, since CuPy keeps the GIL.
        pointer = self._by_driver(driver().map, handle)
        try:
            with self._current():
                size = driver().size_of(pointer)
            if size < nbytes:
                raise CudaError(
                    f"the memory of a handle has {size} bytes, but the peer announced {nbytes}"
                )
        except BaseException:
            self.close(pointer)
            raise
        return pointer

    def close(self, pointer: int) -> None:
        """Unmap another process's allocation."""
        self._by_driver(driver().unmap, pointer)

    def new_event(self, *, is_shared: bool = False) -> int:
        """Return an event; another process can open a shared event."""
        flags = _EVENT_DISABLE_TIMING | (_EVENT_INTERPROCESS if is_shared else 0)
        event: int = self._do(self._runtime.eventCreateWithFlags, flags)
        return event

    def event_handle_of(self, event: int) -> bytes:
        """Return the handle by which another process opens an event."""
        handle: bytes = self._do(self._runtime.ipcGetEventHandle, event)
        return handle

    def open_event(self, handle: bytes) -> int:
        """Open another process's event; call `destroy_event` later.

        Raises:
          CudaError: this process cannot open the event.
        """
        if len(handle) != HANDLE_BYTES:
            raise CudaError(
                f"an event handle has {len(handle)} bytes; expected {HANDLE_BYTES}"
            )
        return self._by_driver(driver().open_event, handle)

    def destroy_event(self, event: int) -> None:
        """Destroy an event."""
        self._do(self._runtime.eventDestroy, event)

    def record(self, event: int, stream: int) -> None:
        """Record the event after the stream's present work."""
        self._do(self._runtime.eventRecord, event, stream)

    def wait(self, event: int, stream: int | None) -> None:
        """Make later work on the stream wait for the event; without a stream, block here."""
        if stream is None:
            self._do(self._runtime.eventSynchronize, event)
        else:
            self._do(self._runtime.streamWaitEvent, stream, event)

    def new_stream(self) -> int:
        """Return a stream without implicit synchronisation with the default stream."""
        stream: int = self._do(
            self._runtime.streamCreateWithFlags, _STREAM_NON_BLOCKING
        )
        return stream

    def new_urgent_stream(self) -> int:
        """Return a high-priority stream: its separate hardware queue avoids delays by other
        streams."""
        return self._by_driver(driver().new_urgent_stream)

    @property
    def has_words(self) -> bool:
        """Whether this device's streams can write words in memory and wait for them."""
        try:
            return driver().has_words(self.gpu.ordinal)
        except CudaError:
            return False

    def write_word(self, pointer: int, value: int, stream: int) -> None:
        """Enqueue a write of a 64-bit word after the stream's present work."""
        self._by_driver(driver().write_word, stream, pointer, value)

    def wait_for_word(self, pointer: int, value: int, stream: int) -> None:
        """Make later work on the stream wait until a 64-bit word is at least `value`."""
        self._by_driver(driver().wait_for_word, stream, pointer, value)

    def fill(self, pointer: int, byte: int, nbytes: int, stream: int) -> None:
        """Enqueue a fill of `nbytes` bytes with `byte`."""
        self._do(self._runtime.memsetAsync, pointer, byte, nbytes, stream)

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream; its pending work still completes."""
        self._do(self._runtime.streamDestroy, stream)

    def synchronize(self, stream: int) -> None:
        """Wait until all work on the stream is done."""
        self._do(self._runtime.streamSynchronize, stream)

    def synchronize_all(self) -> None:
        """Wait until all of this process's work on the device is done."""
        self._do(self._runtime.deviceSynchronize)

    def is_busy(self, stream: int) -> bool:
        """Whether the stream has unfinished work.

        Never blocks. False on a failed GPU.
        """
        with self._current():
            return driver().is_busy(stream)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy between any two of this device's memory and host memory."""
        self._do(
            self._runtime.memcpyAsync, target, source, nbytes, _COPY_DEFAULT, stream
        )

    def free_bytes(self) -> int:
        """Return the device's free memory in bytes."""
        free, _ = self._do(self._runtime.memGetInfo)
        return int(free)

    def _do(self, action: Callable[..., _T], *arguments: Any) -> _T:
        with self._current():
            try:
                return action(*arguments)
            except self._runtime.CUDARuntimeError as error:
                if error.status == _OUT_OF_MEMORY:
                    raise OutOfMemory(
                        f"{self.gpu.label} is out of memory: {error}"
                    ) from error
                raise CudaError(f"{self.gpu.label} refused: {error}") from error

    def _by_driver(self, action: Callable[..., _T], *arguments: Any) -> _T:
        with self._current():
            # The driver uses this thread's context.
            self._do(self._runtime.setDevice, self.gpu.ordinal)
            try:
                return action(*arguments)
            except CudaError as error:
                raise CudaError(f"{self.gpu.label} refused: {error}") from error

    def _current(self) -> contextlib.AbstractContextManager[None]:
        # The default stream and allocations belong to the thread's current device.
        return _NOTHING if self._is_only else self._switched()

    @contextlib.contextmanager
    def _switched(self) -> Iterator[None]:
        previous = self._runtime.getDevice()
        self._runtime.setDevice(self.gpu.ordinal)
        try:
            yield
        finally:
            self._runtime.setDevice(previous)


_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


@functools.cache
def device_of(uuid: bytes) -> Device:
    """Return a device of this process by its UUID, and create a context on the device.

    Raises:
      CudaError: this process cannot see the device, or CuPy is not installed.
    """
    visible = driver().gpus()
    gpu = next((each for each in visible if each.uuid == uuid), None)
    if gpu is None:
        raise CudaError(
            f"this process cannot see {label_of(uuid)}; add the GPU to CUDA_VISIBLE_DEVICES or to"
            " the container"
        )
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise CudaError(
            f"cannot import CuPy ({error}), which GPUs need; install torch-jax-bridge[cuda]"
        ) from error
    device = Device(gpu, runtime, is_only=len(visible) == 1)
    device.free_bytes()  # creates the context, so that a broken device fails here
    return device
