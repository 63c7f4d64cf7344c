"""CUDA, as far as the bridge needs it: memory and events that another process can open, streams and
copies.

CuPy carries it; it is imported, and a CUDA context made, when a device is first used. To list the
devices takes the driver alone. Pointers, events and streams are the integers that CUDA's own
interfaces take.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from bridge_wire.errors import CudaError, OutOfMemory

_T = TypeVar("_T")

HANDLE_BYTES = 64  # of cudaIpcMemHandle_t and cudaIpcEventHandle_t
UUID_BYTES = 16

# driver_types.h
_EVENT_DISABLE_TIMING = 0x02
_EVENT_INTERPROCESS = 0x04
_LAZY_PEER_ACCESS = 0x01  # cudaIpcMemLazyEnablePeerAccess, which opening a handle takes always
_STREAM_NON_BLOCKING = 0x01
_COPY_DEFAULT = 4  # cudaMemcpyDefault: the addresses say where they are
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_HAS_WORDS = 122  # CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ


class Gpu(NamedTuple):
    """A device: its number in this process, which CUDA_VISIBLE_DEVICES decides, and what it is
    called everywhere."""

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
    """CUipcMemHandle and CUipcEventHandle, which are passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class Driver:
    """CUDA's driver, by ctypes, which releases the GIL during each call: many of them wait for
    the GPU."""

    def __init__(self) -> None:
        """Load the driver.

        Raises:
          CudaError: there is none, or it does not start.
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
        """Return the newest CUDA that the driver knows, such as "13.0"."""
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def size_of(self, pointer: int) -> int:
        """Return the bytes from a pointer to the end of its allocation. Needs a context."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._call(
            "cuMemGetAddressRange_v2",
            ctypes.byref(base),
            ctypes.byref(size),
            ctypes.c_uint64(pointer),
        )
        return base.value + size.value - pointer

    def has_words(self, ordinal: int) -> bool:
        """Whether streams of a device can write words of 64 bits in its memory, and wait for
        them."""
        device, found = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDeviceGetAttribute", ctypes.byref(found), _HAS_WORDS, device)
        return bool(found.value)

    # All of these need the context of what they are given.

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
        """Unmap another process's allocation, from the context that it was opened in."""
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(pointer))

    def open_event(self, handle: bytes) -> int:
        """Open another process's event."""
        event = ctypes.c_void_p()
        self._call("cuIpcOpenEventHandle", ctypes.byref(event), _Handle.from_buffer_copy(handle))
        return event.value or 0

    def new_urgent_stream(self) -> int:
        """Return a stream of the highest priority."""
        stream, least, greatest = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        self._call("cuCtxGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
        self._call(
            "cuStreamCreateWithPriority", ctypes.byref(stream), _STREAM_NON_BLOCKING, greatest
        )
        return stream.value or 0

    def write_word(self, stream: int, pointer: int, value: int) -> None:
        """Have a stream write a word."""
        self._call(
            "cuStreamWriteValue64_v2",
            ctypes.c_void_p(stream),
            ctypes.c_uint64(pointer),
            ctypes.c_uint64(value),
            0,
        )

    def wait_for_word(self, stream: int, pointer: int, value: int) -> None:
        """Have a stream wait until a word has at least this value."""
        self._call(
            "cuStreamWaitValue64_v2",
            ctypes.c_void_p(stream),
            ctypes.c_uint64(pointer),
            ctypes.c_uint64(value),
            _AT_LEAST,
        )

    # These not by the runtime: torch would take its "not ready" for an error of its own.

    def has_passed(self, event: int) -> bool:
        """Whether all that was before the event's last record is done. Never blocks."""
        return bool(self._library.cuEventQuery(ctypes.c_void_p(event)) == 0)

    def is_pending(self, event: int) -> bool:
        """Whether something before the event's last record is still to be done, as far as is known.

        Never blocks.
        """
        return bool(self._library.cuEventQuery(ctypes.c_void_p(event)) == _NOT_READY)

    def is_busy(self, stream: int) -> bool:
        """Whether something on a stream has still to be done.

        Never blocks. Needs the context of the stream.
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
                f"the NVIDIA driver has no {name}: it is older than CUDA 11.7"
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


@functools.cache
def driver() -> Driver:
    """Return the driver of this process.

    Raises:
      CudaError: there is none, or it does not start.
    """
    return Driver()


def gpus() -> tuple[Gpu, ...]:
    """Return the devices that this process may use: none where there is no driver."""
    try:
        return driver().gpus()
    except CudaError:
        return ()


class Device:
    """One GPU in this process's use. Thread-safe, as CUDA is."""

    dlpack_type = 2  # kDLCUDA

    def __init__(self, gpu: Gpu, runtime: Any, *, is_only: bool) -> None:
        self.gpu = gpu
        self._runtime = runtime
        self._is_only = is_only

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """The device as DLPack names it."""
        return self.dlpack_type, self.gpu.ordinal

    def allocate(self, nbytes: int) -> int:
        """Return fresh memory, which another process can open.

        Raises:
          OutOfMemory: the device has no such room.
        """
        pointer: int = self._do(self._runtime.malloc, nbytes)
        return pointer

    def free(self, pointer: int) -> None:
        """Give memory back. What is still on its way to or from it is waited for."""
        self._do(self._runtime.free, pointer)

    def handle_of(self, pointer: int) -> bytes:
        """Return the handle by which another process opens an allocation."""
        handle: bytes = self._do(self._runtime.ipcGetMemHandle, pointer)
        return handle

    def open(self, handle: bytes, nbytes: int) -> int:
        """Map another process's allocation of at least so many bytes; `close` must follow.

        Raises:
          CudaError: this process cannot open it, or it is smaller.
        """
        if len(handle) != HANDLE_BYTES:
            raise CudaError(f"a handle of {len(handle)} bytes; CUDA's have {HANDLE_BYTES}")
        # By the driver, as all that opens and closes: CuPy would keep the GIL, CUDA may wait for
        # the whole device (pytorch#15937, tensorpipe#321), and that for a model's callback in
        # Python.
        pointer = self._by_driver(driver().map, handle)
        try:
            with self._current():
                size = driver().size_of(pointer)
            if size < nbytes:
                raise CudaError(
                    f"the memory behind a handle has {size} bytes, but {nbytes} were announced"
                )
        except BaseException:
            self.close(pointer)
            raise
        return pointer

    def close(self, pointer: int) -> None:
        """Unmap another process's allocation."""
        self._by_driver(driver().unmap, pointer)

    def new_event(self, *, is_shared: bool = False) -> int:
        """Return an event; a shared one can be opened by another process."""
        flags = _EVENT_DISABLE_TIMING | (_EVENT_INTERPROCESS if is_shared else 0)
        event: int = self._do(self._runtime.eventCreateWithFlags, flags)
        return event

    def event_handle_of(self, event: int) -> bytes:
        """Return the handle by which another process opens an event."""
        handle: bytes = self._do(self._runtime.ipcGetEventHandle, event)
        return handle

    def open_event(self, handle: bytes) -> int:
        """Open another process's event; `destroy_event` must follow.

        Raises:
          CudaError: this process cannot open it.
        """
        if len(handle) != HANDLE_BYTES:
            raise CudaError(f"an event's handle of {len(handle)} bytes; CUDA's have {HANDLE_BYTES}")
        return self._by_driver(driver().open_event, handle)

    def destroy_event(self, event: int) -> None:
        """Let go of an event."""
        self._do(self._runtime.eventDestroy, event)

    def record(self, event: int, stream: int) -> None:
        """Let the event stand for all that is on the stream now."""
        self._do(self._runtime.eventRecord, event, stream)

    def wait(self, event: int, stream: int | None) -> None:
        """Let what comes on the stream wait for the event; without a stream, wait here."""
        if stream is None:
            self._do(self._runtime.eventSynchronize, event)
        else:
            self._do(self._runtime.streamWaitEvent, stream, event)

    def new_stream(self) -> int:
        """Return a stream that waits for no other."""
        stream: int = self._do(self._runtime.streamCreateWithFlags, _STREAM_NON_BLOCKING)
        return stream

    def new_urgent_stream(self) -> int:
        """Return a stream that no other one's work delays: those of high priority have hardware
        queues of their own."""
        return self._by_driver(driver().new_urgent_stream)

    @property
    def has_words(self) -> bool:
        """Whether streams can write words in memory here, and wait for them."""
        try:
            return driver().has_words(self.gpu.ordinal)
        except CudaError:
            return False

    def write_word(self, pointer: int, value: int, stream: int) -> None:
        """Write a word of 64 bits when all that is on the stream now is done."""
        self._by_driver(driver().write_word, stream, pointer, value)

    def wait_for_word(self, pointer: int, value: int, stream: int) -> None:
        """Let what comes on the stream wait until a word of 64 bits is at least `value`."""
        self._by_driver(driver().wait_for_word, stream, pointer, value)

    def fill(self, pointer: int, byte: int, nbytes: int, stream: int) -> None:
        """Put on the stream that all of these bytes become `byte`."""
        self._do(self._runtime.memsetAsync, pointer, byte, nbytes, stream)

    def destroy_stream(self, stream: int) -> None:
        """Let go of a stream; what is on it is still done."""
        self._do(self._runtime.streamDestroy, stream)

    def synchronize(self, stream: int) -> None:
        """Wait until all that is on the stream is done."""
        self._do(self._runtime.streamSynchronize, stream)

    def synchronize_all(self) -> None:
        """Wait until all that this process has put on the device is done."""
        self._do(self._runtime.deviceSynchronize)

    def is_busy(self, stream: int) -> bool:
        """Whether something on the stream has still to be done.

        Never blocks; a GPU that has failed does nothing.
        """
        with self._current():
            return driver().is_busy(stream)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Put a copy on the stream: from this device or the host, to either."""
        self._do(self._runtime.memcpyAsync, target, source, nbytes, _COPY_DEFAULT, stream)

    def free_bytes(self) -> int:
        """Return how much memory the device has left."""
        free, _ = self._do(self._runtime.memGetInfo)
        return int(free)

    def _do(self, action: Callable[..., _T], *arguments: Any) -> _T:
        with self._current():
            try:
                return action(*arguments)
            except self._runtime.CUDARuntimeError as error:
                if error.status == _OUT_OF_MEMORY:
                    raise OutOfMemory(f"{self.gpu.label} has no room: {error}") from error
                raise CudaError(f"{self.gpu.label} refused: {error}") from error

    def _by_driver(self, action: Callable[..., _T], *arguments: Any) -> _T:
        with self._current():
            self._do(
                self._runtime.setDevice, self.gpu.ordinal
            )  # the driver looks for this thread's context
            try:
                return action(*arguments)
            except CudaError as error:
                raise CudaError(f"{self.gpu.label} refused: {error}") from error

    def _current(self) -> contextlib.AbstractContextManager[None]:
        # The default stream, and what is allocated, are those of the thread's current device.
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
    """Return a device of this process by its UUID; makes a context on it.

    Raises:
      CudaError: this process cannot see it, or CuPy is not installed.
    """
    visible = driver().gpus()
    gpu = next((each for each in visible if each.uuid == uuid), None)
    if gpu is None:
        raise CudaError(
            f"this process cannot see {label_of(uuid)}; change CUDA_VISIBLE_DEVICES, or the"
            " container's"
        )
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise CudaError(
            f"CuPy is needed beside a GPU: install torch-jax-bridge[cuda] ({error})"
        ) from error
    device = Device(gpu, runtime, is_only=len(visible) == 1)
    device.free_bytes()  # makes the context, so that a device out of order is found out here
    return device
