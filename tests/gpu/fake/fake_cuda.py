"""CUDA without a GPU: the functions of the driver and of CuPy that `bridge_wire.memory.cuda` uses,
over mapped files.

"Device memory" is a file of FAKE_CUDA_DIR, mapped shared. Streams are queues, each worked off by a
thread of its own, so that work is as asynchronous as on a GPU, also where CUDA would be kinder, as
with copies from the host. Handles and events reach other processes. Where CUDA refuses, this
refuses with the same number.

  FAKE_CUDA_DIR    where memory and events are; the processes of one "machine" have it in common
  FAKE_CUDA_GPUS   the devices, as "GPU-..." with commas; one by default, none if empty
  FAKE_CUDA_BYTES  how much memory each has
  FAKE_CUDA_FAILS  what fails, and with which error: "ipcGetEventHandle:801,malloc:2"
  FAKE_CUDA_WORDS  0: streams neither write words nor wait for them

CUDA_VISIBLE_DEVICES is honoured. No framework.
"""

import contextlib
import ctypes
import functools
import itertools
import mmap
import os
import struct
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

ONE = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
TWO = "GPU-10111213-1415-1617-1819-1a1b1c1d1e1f"
_VERSION = 13000

_NAMES = {
    1: "cudaErrorInvalidValue: invalid argument",
    2: "cudaErrorMemoryAllocation: out of memory",
    100: "cudaErrorNoDevice: no CUDA-capable device is detected",
    101: "cudaErrorInvalidDevice: invalid device ordinal",
    201: "cudaErrorDeviceUninitialized: invalid device context",
    217: "cudaErrorPeerAccessUnsupported: peer access is not supported between these two devices",
    400: "cudaErrorInvalidResourceHandle: invalid resource handle",
    700: "cudaErrorIllegalAddress: an illegal memory access was encountered",
    801: "cudaErrorNotSupported: operation not supported",
}
_INVALID_VALUE, _OUT_OF_MEMORY, _NO_DEVICE, _INVALID_DEVICE = 1, 2, 100, 101
_OWN_HANDLE, _NO_PEER, _INVALID_HANDLE, _NOT_READY = 201, 217, 400, 600
_DISABLE_TIMING, _INTERPROCESS = 0x02, 0x04
_POLL_S = 0.0003

# What it is of, the process, the number there, the device.
_handle = struct.Struct("<4sIQ16s32x")
_SLOTS = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class CUDARuntimeError(RuntimeError):
    """As CuPy's: `status` is the number."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(_NAMES.get(status, f"CUDA error {status}"))


# What other processes, and tests, can see: one file for each thing that a process holds.


def directory() -> Path:
    """Return where memory and events are."""
    return Path(os.environ["FAKE_CUDA_DIR"])


def held(where: Path | None = None) -> Counter[str]:
    """Return what living processes hold: "bytes", and how many of "mem", "event", "stream" and, of
    other processes' memory and events, "openmem" and "openevent". "undefined" counts what they did
    that CUDA leaves undefined: use an opened event after its owner has destroyed it.
    """
    found: Counter[str] = Counter()
    for path in _held_files(where or directory()):
        kind = path.name.partition("-")[0]
        found[kind] += 1
        if kind == "mem":
            found["bytes"] += _size_of(path)
    return found


def _held_files(where: Path) -> list[Path]:
    paths = list(where.iterdir())
    held = [path for path in paths if _is_held(path.name)]
    # What a dead process has allocated goes when no other has it open any more.
    opened = {path.name.partition("@")[2] for path in held}
    return held + [path for path in paths if path.name in opened and path not in held]


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # freed meanwhile
        return 0


def _is_held(name: str) -> bool:
    _, pid, *_ = name.partition("@")[0].split("-")
    return _lives(int(pid))


def _lives(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            not in "ZX"
        )
    except (FileNotFoundError, ProcessLookupError):
        return False


# Devices.


def visible() -> tuple[bytes, ...]:
    """Return the UUIDs of the devices that this process may use."""
    there = [
        label.strip()
        for label in os.environ.get("FAKE_CUDA_GPUS", ONE).split(",")
        if label.strip()
    ]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(map(_uuid, there))
    found = []
    for word in chosen.split(","):
        if word.strip().isdecimal() and int(word) < len(there):
            found.append(there[int(word)])
        elif word.strip() and (
            matching := [label for label in there if label.startswith(word.strip())]
        ):
            found.append(matching[0])
        else:
            break  # as CUDA does: what follows an unknown device is not seen either
    return tuple(map(_uuid, found))


def _uuid(label: str) -> bytes:
    return bytes.fromhex(label.removeprefix("GPU-").replace("-", ""))


class _Thread(threading.local):
    device = 0


_thread = _Thread()


def _current() -> bytes:
    devices = visible()
    if not devices:
        raise CUDARuntimeError(_NO_DEVICE)
    return devices[_thread.device]


# What a process has: by pointer, number of the event and number of the stream. Numbers look like
# pointers.

_numbers = itertools.count(0x7F0000010000, 0x100)
_lock = threading.RLock()
_memory: dict[int, "_Memory"] = {}
_events: dict[int, "_Event"] = {}
_streams: dict[Any, "_Stream"] = {}
_broken_by = 0  # the error that has made this process's context unusable


class _File:
    """A mapping of a file of the directory; `name` is what this process holds by it. It ends
    with its last user."""

    def __init__(self, name: str, source: str, nbytes: int | None) -> None:
        """Create the file of so many bytes; None opens the one that is there."""
        path = directory() / source
        fd = os.open(
            path, os.O_RDWR | (0 if nbytes is None else os.O_CREAT | os.O_EXCL)
        )
        try:
            if nbytes is not None:
                os.ftruncate(fd, nbytes)
            self.nbytes = os.fstat(fd).st_size
            self.pointer = _libc.mmap(
                None,
                self.nbytes,
                mmap.PROT_READ | mmap.PROT_WRITE,
                mmap.MAP_SHARED,
                fd,
                0,
            )
        finally:
            os.close(fd)
        # Not at exit: what is on a stream may use it until the very end.
        weakref.finalize(self, _libc.munmap, self.pointer, self.nbytes).atexit = False
        self.name = name
        self._held = directory() / name  # also after the machine is uninstalled
        if name != source:
            self._held.touch()

    def forget(self) -> None:
        """This process holds it no longer. What is on a stream still may use it."""
        with contextlib.suppress(FileNotFoundError):
            self._held.unlink()


class _Memory:
    def __init__(self, file: _File, device: bytes, handle: bytes) -> None:
        self.file, self.device, self.handle = file, device, handle
        self.uses = 1  # of another process's memory: how often it was opened here


class _Event:
    """A count of records, and for each, in slots used in turn, whether a stream has come to it.

    In shared memory.
    """

    def __init__(self, file: _File, device: bytes, flags: int, handle: bytes) -> None:
        self.file, self.device, self.flags, self.handle = file, device, flags, handle
        self._words = (ctypes.c_uint64 * (1 + _SLOTS)).from_address(file.pointer)

    def record(self) -> int:
        with _lock:
            self._words[0] += 1
            return int(self._words[0])

    def arrive(self, record: int) -> None:
        self._words[1 + record % _SLOTS] = record

    @property
    def recorded(self) -> int:
        return int(self._words[0])

    def has_passed(self, record: int) -> bool:
        return bool(self._words[1 + record % _SLOTS] >= record)

    def wait(self, record: int) -> None:
        # Forever, if the process that was to come to it is dead.
        while not self.has_passed(record):
            time.sleep(_POLL_S)


class _Stream:
    """Work in order. A thread does it, and ends when there is none left."""

    def __init__(self, device: bytes, name: str | None = None) -> None:
        self.device = device
        self._held = directory() / name if name else None
        self._work: deque[Callable[[], object]] = deque()
        self._is_running = False
        self._lock = threading.Lock()
        if self._held:
            self._held.touch()

    def put(self, work: Callable[[], object]) -> None:
        with self._lock:
            self._work.append(work)
            if self._is_running:
                return
            self._is_running = True
        try:
            threading.Thread(target=self._run, daemon=True, name="fake-cuda").start()
        except RuntimeError:  # the interpreter ends
            self._run()

    @property
    def is_busy(self) -> bool:
        return self._is_running

    def synchronize(self) -> None:
        done = threading.Event()
        self.put(done.set)
        done.wait()

    def forget(self) -> None:
        if self._held:
            self._held.unlink(missing_ok=True)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._work:
                    self._is_running = False
                    return
                work = self._work.popleft()
            work()


def _stream(number: int) -> _Stream:
    device = _current()
    # The legacy default stream by two names, and that of the thread.
    if number in (
        0,
        1,
        2,
    ):
        key: Any = (device, threading.get_ident() if number == 2 else 0)
        with _lock:
            return _streams.setdefault(key, _Stream(device))
    try:
        return _streams[number]
    except KeyError:
        raise CUDARuntimeError(_INVALID_HANDLE) from None


def _event(number: int) -> _Event:
    try:
        found = _events[number]
    except KeyError:
        raise CUDARuntimeError(_INVALID_HANDLE) from None
    _, _, source = found.file.name.partition("@")
    # It was opened here, and its owner has destroyed it.
    if source and not (directory() / source).exists():
        (directory() / f"undefined-{os.getpid()}-{number}").touch()
    return found


def _of_runtime(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function fail where it is to."""

    @functools.wraps(function)
    def checked(*arguments: Any) -> Any:
        global _broken_by
        fails = dict(
            entry.split(":")
            for entry in os.environ.get("FAKE_CUDA_FAILS", "").split(",")
            if entry
        )
        status = _broken_by or int(fails.get(function.__name__, 0))
        if status:
            _broken_by = status if status == 700 else 0
            raise CUDARuntimeError(status)
        _current()
        return function(*arguments)

    return checked


# CuPy's runtime, by the names that it has there.


@_of_runtime
def getDevice() -> int:
    return _thread.device


@_of_runtime
def setDevice(device: int) -> None:
    if not 0 <= device < len(visible()):
        raise CUDARuntimeError(_INVALID_DEVICE)
    _thread.device = device


@_of_runtime
def memGetInfo() -> tuple[int, int]:
    total = int(os.environ.get("FAKE_CUDA_BYTES", 4 << 30))
    ours = (
        path
        for path in _held_files(directory())
        if _is_memory_of(_current(), path.name)
    )
    return max(total - sum(map(_size_of, ours)), 0), total


def _is_memory_of(device: bytes, name: str) -> bool:
    return name.startswith("mem-") and name.endswith(device.hex())


@_of_runtime
def malloc(size: int) -> int:
    if size == 0:
        return 0
    device = _current()
    if size > memGetInfo()[0]:
        raise CUDARuntimeError(_OUT_OF_MEMORY)
    serial = next(_numbers)
    name = f"mem-{os.getpid()}-{serial}-{device.hex()}"
    file = _File(name, name, size)
    _memory[file.pointer] = _Memory(
        file, device, _handle.pack(b"mem-", os.getpid(), serial, device)
    )
    return file.pointer


@_of_runtime
def free(ptr: int) -> None:
    if ptr == 0:
        return
    found = _memory.get(ptr)
    if found is None or found.file.name.startswith("open"):
        raise CUDARuntimeError(_INVALID_VALUE)
    for stream in list(_streams.values()):  # as CUDA does
        stream.synchronize()
    _forget(ptr)


def _forget(pointer: int) -> None:
    with _lock:
        _memory.pop(pointer).file.forget()


@_of_runtime
def ipcGetMemHandle(devPtr: int) -> bytes:
    found = _memory.get(devPtr)
    if found is None or found.file.name.startswith("open"):
        raise CUDARuntimeError(_INVALID_VALUE)
    return found.handle


@_of_runtime
def ipcOpenMemHandle(handle: bytes, flags: int = 1) -> int:
    serial, pid, device = _read(handle, b"mem-")
    if device != _current():
        raise CUDARuntimeError(_NO_PEER)
    with _lock:
        for pointer, memory in _memory.items():
            if memory.handle == handle:
                memory.uses += 1
                return pointer
        source = f"mem-{pid}-{serial}-{device.hex()}"
        file = _opened(f"openmem-{os.getpid()}@{source}", source)
        _memory[file.pointer] = _Memory(file, device, handle)
        return file.pointer


@_of_runtime
def ipcCloseMemHandle(devPtr: int) -> None:
    with _lock:
        found = _memory.get(devPtr)
        if found is None or not found.file.name.startswith("open"):
            raise CUDARuntimeError(_INVALID_VALUE)
        found.uses -= 1
        if not found.uses:
            _forget(devPtr)


def _read(handle: bytes, kind: bytes) -> tuple[int, int, bytes]:
    if len(handle) != _handle.size:
        raise AssertionError("CuPy reads 64 bytes, whatever it is given")
    found, pid, serial, device = _handle.unpack(handle)
    if found != kind or _handle.pack(found, pid, serial, device) != handle:
        raise CUDARuntimeError(_INVALID_VALUE)
    if pid == os.getpid():
        raise CUDARuntimeError(_OWN_HANDLE)
    return serial, pid, device


def _opened(name: str, source: str) -> _File:
    try:
        return _File(name, source, None)
    except FileNotFoundError:
        raise CUDARuntimeError(_INVALID_HANDLE) from None


@_of_runtime
def eventCreateWithFlags(flags: int) -> int:
    if flags & _INTERPROCESS and not flags & _DISABLE_TIMING:
        raise CUDARuntimeError(_INVALID_VALUE)
    number, device = next(_numbers), _current()
    name = f"event-{os.getpid()}-{number}-{device.hex()}"
    file = _File(name, name, 8 * (1 + _SLOTS))
    _events[number] = _Event(
        file, device, flags, _handle.pack(b"evnt", os.getpid(), number, device)
    )
    return number


@_of_runtime
def eventDestroy(event: int) -> None:
    _event(event)
    _events.pop(event).file.forget()


@_of_runtime
def eventRecord(event: int, stream: int) -> None:
    found, queue = _event(event), _stream(stream)
    if found.device != queue.device:
        raise CUDARuntimeError(_INVALID_HANDLE)
    record = found.record()
    queue.put(lambda: found.arrive(record))


@_of_runtime
def eventSynchronize(event: int) -> None:
    found = _event(event)
    found.wait(found.recorded)


@_of_runtime
def ipcGetEventHandle(event: int) -> bytes:
    found = _event(event)
    if not found.flags & _INTERPROCESS:
        raise CUDARuntimeError(_INVALID_HANDLE)
    return found.handle


@_of_runtime
def ipcOpenEventHandle(handle: bytes) -> int:
    serial, pid, device = _read(handle, b"evnt")
    number = next(_numbers)
    source = f"event-{pid}-{serial}-{device.hex()}"
    file = _opened(f"openevent-{os.getpid()}-{number}@{source}", source)
    _events[number] = _Event(file, device, _DISABLE_TIMING | _INTERPROCESS, handle)
    return number


@_of_runtime
def streamCreateWithFlags(flags: int) -> int:
    number = next(_numbers)
    _streams[number] = _Stream(_current(), f"stream-{os.getpid()}-{number}")
    return number


@_of_runtime
def streamDestroy(stream: int) -> None:
    if stream in (0, 1, 2):
        raise CUDARuntimeError(_INVALID_HANDLE)
    _stream(stream)
    _streams.pop(stream).forget()


@_of_runtime
def streamWaitEvent(stream: int, event: int, flags: int = 0) -> None:
    found = _event(event)
    record = found.recorded  # what is recorded later does not count
    _stream(stream).put(lambda: found.wait(record))


@_of_runtime
def streamSynchronize(stream: int) -> None:
    _stream(stream).synchronize()


@_of_runtime
def deviceSynchronize() -> None:
    for stream in list(_streams.values()):
        if stream.device == _current():
            stream.synchronize()


@_of_runtime
def memcpyAsync(dst: int, src: int, size: int, kind: int, stream: int) -> None:
    _stream(stream).put(lambda: ctypes.memmove(dst, src, size))


@_of_runtime
def memsetAsync(ptr: int, value: int, size: int, stream: int) -> None:
    _stream(stream).put(lambda: ctypes.memset(ptr, value, size))


# What only the driver has: words that streams write and wait for.


@_of_runtime
def streamWriteValue64(stream: int, pointer: int, value: int) -> None:
    word = _Word(pointer)
    _stream(stream).put(lambda: word.write(value))


@_of_runtime
def streamWaitValue64(stream: int, pointer: int, value: int) -> None:
    word = _Word(pointer)
    _stream(stream).put(lambda: word.wait(value))


class _Word:
    """64 bits of a device's memory, which is kept."""

    def __init__(self, pointer: int) -> None:
        found = [
            m
            for start, m in list(_memory.items())
            if start <= pointer <= start + m.file.nbytes - 8
        ]
        if not found or pointer % 8:
            raise CUDARuntimeError(_INVALID_VALUE)
        self._file = found[0].file
        self._word = ctypes.c_uint64.from_address(pointer)

    def write(self, value: int) -> None:
        self._word.value = value

    def wait(self, value: int) -> None:
        while self._word.value < value:  # forever, if nobody writes it
            time.sleep(_POLL_S)


# For tests.


def sleep(stream: int, seconds: float) -> None:
    """Put a delay on a stream, as torch.cuda._sleep does."""
    _stream(stream).put(lambda: time.sleep(seconds))


def hold(stream: int) -> threading.Event:
    """Stop a stream where it is, until the event is set."""
    released = threading.Event()
    _stream(stream).put(released.wait)
    return released


# The driver, as ctypes loads it.


class Library:
    """libcuda.so.1: the functions return their error's number."""

    def cuInit(self, flags: int) -> int:
        return 0 if visible() else _NO_DEVICE

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = _VERSION
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(visible())
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0

    def cuDeviceGetUuid_v2(self, uuid: Any, device: Any) -> int:
        uuid[:] = visible()[device.value]
        return 0

    def cuDeviceGetName(self, name: Any, nbytes: int, device: Any) -> int:
        name.value = f"Fake GPU {visible()[device.value][0] >> 4}".encode()[
            : nbytes - 1
        ]
        return 0

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, pointer: Any) -> int:
        for start, memory in list(_memory.items()):
            if start <= pointer.value < start + memory.file.nbytes:
                base._obj.value, size._obj.value = start, memory.file.nbytes
                return 0
        return _INVALID_VALUE

    def cuEventQuery(self, event: Any) -> int:
        try:
            found = _event(event.value)
        except CUDARuntimeError as error:
            return error.status
        return 0 if found.has_passed(found.recorded) else _NOT_READY

    def cuDeviceGetAttribute(self, found: Any, attribute: int, device: Any) -> int:
        found._obj.value = attribute == 122 and os.environ.get("FAKE_CUDA_WORDS") != "0"
        return 0

    def cuGetErrorName(self, status: int, name: Any) -> int:
        name._obj.value = _NAMES.get(status, f"CUDA error {status}").encode()
        return 0

    def cuIpcOpenMemHandle_v2(self, pointer: Any, handle: Any, flags: int) -> int:
        return _status_of(
            lambda: _put(pointer, ipcOpenMemHandle(bytes(handle.reserved), flags))
        )

    def cuIpcCloseMemHandle(self, pointer: Any) -> int:
        return _status_of(lambda: ipcCloseMemHandle(pointer.value))

    def cuIpcOpenEventHandle(self, event: Any, handle: Any) -> int:
        return _status_of(
            lambda: _put(event, ipcOpenEventHandle(bytes(handle.reserved)))
        )

    def cuCtxGetStreamPriorityRange(self, least: Any, greatest: Any) -> int:
        least._obj.value, greatest._obj.value = 0, -5
        return 0

    def cuStreamCreateWithPriority(self, stream: Any, flags: int, priority: Any) -> int:
        return _status_of(lambda: _put(stream, streamCreateWithFlags(flags)))

    def cuStreamWriteValue64_v2(
        self, stream: Any, pointer: Any, value: Any, flags: int
    ) -> int:
        return _status_of(
            lambda: streamWriteValue64(stream.value or 0, pointer.value, value.value)
        )

    def cuStreamWaitValue64_v2(
        self, stream: Any, pointer: Any, value: Any, flags: int
    ) -> int:
        return _status_of(
            lambda: streamWaitValue64(stream.value or 0, pointer.value, value.value)
        )

    def cuLaunchHostFunc(self, stream: Any, function: Any, data: Any) -> int:
        called = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.value)
        return _status_of(
            lambda: _stream(stream.value or 0).put(lambda: called(data.value))
        )

    def cuStreamQuery(self, stream: Any) -> int:
        return _NOT_READY if _stream(stream.value or 0).is_busy else 0


def _put(target: Any, value: int) -> None:
    target._obj.value = value


def _status_of(action: Callable[[], None]) -> int:
    try:
        action()
    except CUDARuntimeError as error:
        return error.status
    return 0


_CDLL = ctypes.CDLL


class _Loader(_CDLL):
    def __new__(cls, name: Any = None, *arguments: Any, **options: Any) -> Any:
        return Library() if name == "libcuda.so.1" else super().__new__(cls)


def install() -> None:
    """Let ctypes find this as the driver.

    CuPy is the package beside this file, for whom that is on the path.
    """
    ctypes.CDLL = _Loader


def uninstall() -> None:
    """Undo it. What the process still holds is given back."""
    ctypes.CDLL = _CDLL
    for thing in (*_memory.values(), *_events.values()):
        thing.file.forget()
    for stream in _streams.values():
        stream.forget()


def pose_as_host() -> Callable[[], None]:
    """Let frameworks take the device's memory for the host's, which it is.

    Returns how to undo it.
    """
    from bridge_wire.memory.cuda import Device

    before = {name: Device.__dict__[name] for name in ("dlpack_type", "dlpack_device")}
    Device.dlpack_type = 1  # kDLCPU
    Device.dlpack_device = (1, 0)  # type: ignore[assignment]

    def undo() -> None:
        for name, value in before.items():
            setattr(Device, name, value)

    return undo
