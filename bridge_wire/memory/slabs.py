"""Slabs: shared mappings without a name.

A slab is a sealed memfd. The client creates it, and hands its descriptor over once; the worker
checks what it got before it maps it. The kernel frees the pages when the last mapping of either
side is gone, however it went.
"""

import ctypes
import fcntl
import mmap
import os
import stat
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

from bridge_wire.errors import OutOfMemory, ProtocolError

PAGE = mmap.PAGESIZE
_MADV_POPULATE_WRITE = 23  # linux/mman.h; Python 3.11's mmap module does not name it
# Without these, a peer could truncate the file and let this process die of SIGBUS.
_SEALS = (
    getattr(fcntl, "F_SEAL_SHRINK", 2)
    | getattr(fcntl, "F_SEAL_GROW", 4)
    | getattr(fcntl, "F_SEAL_SEAL", 1)
)


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
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True, slots=True, eq=False)
class Slab:
    """One mapping: `nbytes` of memory at `pointer` in this process and at `base` in the session's
    address space.

    `fd` is the memfd, or -1 where the memory cannot be shared. The mapping lives as long as any
    slice of `view`.
    """

    view: memoryview
    pointer: int
    base: int
    nbytes: int
    fd: int

    def close(self) -> None:
        """Close the descriptor. The pages stay until the last view of them dies."""
        if self.fd >= 0:
            os.close(self.fd)


def create_slab(
    nbytes: int, base: int, *, shareable: bool = True, name: str = "bridge-slab"
) -> Slab:
    """Return a new slab of at least `nbytes` bytes, with every page present: a fault costs more
    than the write.

    `name` is what /proc/PID/maps shows.

    Raises:
      OutOfMemory: the kernel has no memory, or no file descriptor, for it.
    """
    nbytes = -(-nbytes // PAGE) * PAGE
    # A memfd has no quota, so the kernel would rather kill a process than refuse.
    if nbytes > (available := _available_bytes()):
        raise OutOfMemory(
            f"the system has no room for a slab of {nbytes} bytes: {available} are available"
        )
    fd = -1
    try:
        if shareable:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, nbytes)
            os.posix_fallocate(fd, 0, nbytes)  # an early error instead of a late SIGBUS
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        view, pointer = _map(fd, nbytes)
        # Fails before Linux 5.14; the pages then come one by one.
        _libc.madvise(pointer, nbytes, _MADV_POPULATE_WRITE)
        return Slab(view, pointer, base, nbytes, fd)
    except (
        BaseException
    ) as error:  # KeyboardInterrupt, for one: the pages of a large slab take a while
        if fd >= 0:
            os.close(fd)
        if isinstance(error, OSError):
            raise OutOfMemory(
                f"the system refused a slab of {nbytes} bytes: {error.strerror}"
            ) from error
        raise


def map_received(fd: int, nbytes: int, base: int) -> Slab:
    """Return the slab behind a descriptor that a peer sent. Takes ownership of the descriptor.

    Raises:
      ProtocolError: it is not a memfd sealed against shrinking, growing and unsealing, of exactly
        this size.
    """
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ProtocolError("the descriptor of a slab is not a memfd")
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise ProtocolError("the descriptor of a slab is not a memfd") from error
        if seals & _SEALS != _SEALS:
            raise ProtocolError("the memfd of a slab lacks the seals SHRINK, GROW and SEAL")
        size = os.fstat(fd).st_size
        if size != nbytes or nbytes == 0 or nbytes % PAGE:
            raise ProtocolError(
                f"the memfd of a slab has {size} bytes, but {nbytes} were announced"
            )
        try:
            view, pointer = _map(fd, nbytes)
        except OSError as error:
            raise ProtocolError(f"a slab of {nbytes} bytes cannot be mapped") from error
    finally:
        os.close(fd)
    return Slab(view, pointer, base, nbytes, -1)


def memfd_works() -> bool:
    """Whether this system has sealed memfds, and lets this process make one now."""
    if not hasattr(os, "memfd_create"):
        return False
    try:
        create_slab(PAGE, 0).close()
    except OutOfMemory:
        return False
    return True


def _available_bytes() -> int:
    """Return what the machine, and this process's control group, can still give; without /proc,
    no limit."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return sys.maxsize
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no limit reads "max"
        return available
    return min(available, limit - used)


def _map(fd: int, nbytes: int) -> tuple[memoryview, int]:
    """Map a file, or fresh memory for -1; the mapping ends with the last slice of the view.

    Not by mmap.mmap, which keeps a descriptor for each mapping.
    """
    flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pointer = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if pointer == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    mapping = (ctypes.c_ubyte * nbytes).from_address(pointer)
    # Not at exit: tensors may outlive the interpreter.
    weakref.finalize(mapping, _libc.munmap, pointer, nbytes).atexit = False
    return memoryview(mapping).cast("B"), pointer
