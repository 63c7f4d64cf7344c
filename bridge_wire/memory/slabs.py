"""Slabs: anonymous shared mappings of sealed memfds.

The client creates a slab and sends its descriptor once. The worker validates the descriptor before
mapping it. The kernel frees the pages with the last mapping of either side, also after a crash.
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
# Without these seals, a peer could truncate the file and kill this process by SIGBUS.
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

    `fd` is the memfd, or -1 for memory that cannot be shared. The mapping lives as long as any
    slice of `view`.
    """

    view: memoryview
    pointer: int
    base: int
    nbytes: int
    fd: int

    def close(self) -> None:
        """Close the descriptor. The pages stay until their last view dies."""
        if self.fd >= 0:
            os.close(self.fd)


def create_slab(
    nbytes: int, base: int, *, shareable: bool = True, name: str = "bridge-slab"
) -> Slab:
    """Return a new slab of at least `nbytes` bytes, with every page present.

    Pages are populated here, since a page fault costs more than the write. /proc/PID/maps shows
    `name`.

    Raises:
      OutOfMemory: the kernel has no memory, or no file descriptor, for the slab.
    """
    nbytes = -(-nbytes // PAGE) * PAGE
    # A memfd has no quota: without this check the kernel kills a process instead of refusing.
    if nbytes > (available := _available_bytes()):
        raise OutOfMemory(
            f"a slab needs {nbytes} bytes, but the system has {available} bytes; free memory"
        )
    fd = -1
    try:
        if shareable:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, nbytes)
            os.posix_fallocate(fd, 0, nbytes)  # an early error instead of a late SIGBUS
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        view, pointer = _map(fd, nbytes)
        # Fails before Linux 5.14: page faults then populate the pages.
        _libc.madvise(pointer, nbytes, _MADV_POPULATE_WRITE)
        return Slab(view, pointer, base, nbytes, fd)
    # BaseException includes KeyboardInterrupt: populating a large slab takes a while.
    except BaseException as error:
        if fd >= 0:
            os.close(fd)
        if isinstance(error, OSError):
            raise OutOfMemory(
                f"cannot allocate a slab of {nbytes} bytes: {error.strerror}"
            ) from error
        raise


def map_received(fd: int, nbytes: int, base: int) -> Slab:
    """Map the slab of a descriptor that a peer sent. Takes ownership of the descriptor.

    Raises:
      ProtocolError: the descriptor is not a memfd of exactly this size, sealed against shrinking,
        growing and unsealing.
    """
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ProtocolError(
                "the slab's descriptor is not a memfd; expected a sealed memfd"
            )
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise ProtocolError(
                "the slab's descriptor is not a memfd; expected a sealed memfd"
            ) from error
        if seals & _SEALS != _SEALS:
            raise ProtocolError(
                "the slab's memfd lacks one of the seals SHRINK, GROW and SEAL"
            )
        size = os.fstat(fd).st_size
        if size != nbytes or nbytes == 0 or nbytes % PAGE:
            raise ProtocolError(
                f"the slab's memfd has {size} bytes, but the peer announced {nbytes} bytes"
            )
        try:
            view, pointer = _map(fd, nbytes)
        except OSError as error:
            raise ProtocolError(f"cannot map a slab of {nbytes} bytes") from error
    finally:
        os.close(fd)
    return Slab(view, pointer, base, nbytes, -1)


def memfd_works() -> bool:
    """Whether this process can create a sealed memfd on this system."""
    if not hasattr(os, "memfd_create"):
        return False
    try:
        create_slab(PAGE, 0).close()
    except OutOfMemory:
        return False
    return True


def _available_bytes() -> int:
    """Return the free bytes of the machine and this process's control group; without /proc,
    no limit."""
    try:
        fields = dict(
            line.split(":", 1)
            for line in Path("/proc/meminfo").read_text().splitlines()
        )
        available = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return sys.maxsize
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (
            int((group / name).read_text()) for name in ("memory.max", "memory.current")
        )
    except (OSError, ValueError):  # no limit reads "max"
        return available
    return min(available, limit - used)


def _map(fd: int, nbytes: int) -> tuple[memoryview, int]:
    """Map a file, or fresh memory for fd -1; the mapping ends with the last slice of the view.

    Calls libc's mmap, since Python's mmap.mmap keeps a descriptor for each mapping.
    """
    flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pointer = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if pointer == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    mapping = (ctypes.c_ubyte * nbytes).from_address(pointer)
    # atexit=False: tensors may outlive the interpreter.
    weakref.finalize(mapping, _libc.munmap, pointer, nbytes).atexit = False
    return memoryview(mapping).cast("B"), pointer
