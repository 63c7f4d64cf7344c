"""The owner of a session's tensors: slabs, and blocks leased from them.

A block's lease is its buffer: whoever keeps the buffer, or a view or a tensor made of it, keeps the block. When the
last of them dies the block is free again, in whichever thread that happens. The finalizer only appends to a list,
since it may run in the middle of anything, and the next allocation reads that list.
"""

import ctypes
import functools
import os
import threading
import weakref
from collections import deque

from bridge_wire.allocator import ALIGNMENT, Allocator, rounded
from bridge_wire.errors import CallerError, OutOfMemory, SessionClosed
from bridge_wire.slabs import PAGE, Slab, create_slab

_FIRST_STEP = 16 << 20
_LARGEST_STEP = 256 << 20


def half_of_memory() -> int:
    """Return half of the machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _configured_max_bytes() -> int:
    configured = os.environ.get("BRIDGE_SLAB_MAX_BYTES")
    if configured is None:
        return half_of_memory()
    if not configured.isdecimal():
        raise CallerError(f"BRIDGE_SLAB_MAX_BYTES={configured!r} is not a number of bytes")
    return int(configured)


class Block:
    """`nbytes` leased bytes: at `address` in the session's address space, at `pointer` in this process.

    `memory` exports them as a buffer. The lease ends when it and everything that was made of it are gone. A block of
    zero bytes has address 0.
    """

    __slots__ = ("address", "memory", "nbytes", "pointer")

    def __init__(self, address: int, pointer: int, nbytes: int, memory: ctypes.Array[ctypes.c_ubyte]) -> None:
        self.address = address
        self.pointer = pointer
        self.nbytes = nbytes
        self.memory = memory

    @property
    def buffer(self) -> memoryview:
        """The bytes as a memoryview, which keeps the lease."""
        return memoryview(self.memory).cast("B")


@functools.lru_cache(maxsize=1024)
def _array_of(nbytes: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    """Return the type of an array of bytes. ctypes forgets one with its last instance, and making one is slow."""
    return ctypes.c_ubyte * nbytes


class _Lease(weakref.ref[ctypes.Array[ctypes.c_ubyte]]):
    __slots__ = ("address", "size")
    address: int
    size: int


class Pool:
    """Leases blocks of slabs, which it adds in growing steps up to `max_bytes`. Thread-safe.

    The cap is by default BRIDGE_SLAB_MAX_BYTES, or half of the machine's memory.
    """

    def __init__(self, *, max_bytes: int | None = None, shareable: bool = True) -> None:
        self.max_bytes = _configured_max_bytes() if max_bytes is None else max_bytes
        self.slabs: tuple[Slab, ...] = ()
        self.shareable = shareable
        self._next_base = PAGE  # address 0 belongs to no block
        self._allocator = Allocator()
        self._leases: dict[int, _Lease] = {}
        self._ended: deque[_Lease] = deque()
        self._lock = threading.Lock()
        self._is_closed = False
        # Of a pool that is forgotten, too, the descriptors are closed; each mapping lives as long as its views.
        self._descriptors: list[int] = []
        self._close_descriptors = weakref.finalize(self, _close_all, self._descriptors)

    def limit(self, max_bytes: int) -> None:
        """Lower the cap to `max_bytes`, if it is higher."""
        self.max_bytes = min(self.max_bytes, max_bytes)

    def lease(self, nbytes: int) -> Block:
        """Return a block of `nbytes` bytes with undefined contents.

        Raises:
          OutOfMemory: it would take the slabs past their cap, or the kernel has no memory.
        """
        if nbytes == 0:
            return Block(0, 0, 0, _array_of(0)())
        size = rounded(nbytes)
        with self._lock:
            if self._ended:
                self._collect()
            address = self._allocator.allocate(size)
            if address is None:
                self._grow(size)
                address = self._allocator.allocate(size)
                assert address is not None, "a new slab has room for the request it was made for"
            slab = self._slab_of(address)
            offset = address - slab.base
            # An exporter of its own, which every view of the buffer keeps alive; views of a slice would not keep it.
            memory = _array_of(nbytes).from_buffer(slab.view, offset)
            lease = _Lease(memory, self._ended.append)
            lease.address, lease.size = address, size
            self._leases[address] = lease
        return Block(address, slab.pointer + offset, nbytes, memory)

    def address_of(self, pointer: int, nbytes: int) -> int | None:
        """Return the address of memory of this process that lies in a slab, aligned as a block is; else None."""
        for slab in self.slabs:
            if 0 <= pointer - slab.pointer <= slab.nbytes - nbytes:
                address = pointer - slab.pointer + slab.base
                return address if address % ALIGNMENT == 0 else None
        return None

    def memory_at(self, address: int) -> ctypes.Array[ctypes.c_ubyte] | None:
        """Return the memory of the block leased at an address, which shares its lease; None if there is none."""
        lease = self._leases.get(address)
        return lease() if lease is not None else None

    def view(self, address: int, nbytes: int) -> memoryview:
        """Return the memory at an address of this pool."""
        if nbytes == 0:
            return memoryview(b"")
        slab = self._slab_of(address)
        return slab.view[address - slab.base :][:nbytes]

    @property
    def slab_bytes(self) -> int:
        return sum(slab.nbytes for slab in self.slabs)

    def live_blocks(self) -> int:
        """Return the number of leased blocks."""
        with self._lock:
            self._collect()
            return len(self._leases)

    def close(self) -> None:
        """Close the slabs' descriptors. Leased blocks stay valid; their pages go with their last view."""
        with self._lock:
            self.slabs = ()
            self._allocator = Allocator()
            self._is_closed = True
        self._close_descriptors()

    def _collect(self) -> None:
        while self._ended:
            lease = self._ended.popleft()
            del self._leases[lease.address]
            if self.slabs:
                self._allocator.free(lease.address, lease.size)

    def _grow(self, size: int) -> None:
        if self._is_closed:
            raise SessionClosed("the session is closed; make a new one")
        step = max(size, min(max(self.slab_bytes, _FIRST_STEP), _LARGEST_STEP))
        room = self.max_bytes // PAGE * PAGE - self.slab_bytes
        if size > room:
            raise OutOfMemory(
                f"a block of {size} bytes does not fit: the slabs hold {self.slab_bytes} of at most {self.max_bytes} "
                f"bytes, in {len(self._leases)} leased blocks; free tensors or raise BRIDGE_SLAB_MAX_BYTES"
            )
        slab = create_slab(min(step, room), self._next_base, shareable=self.shareable)
        # The gap keeps two slabs' extents from ever merging into one.
        self._next_base = slab.base + slab.nbytes + PAGE
        self.slabs = (*self.slabs, slab)
        if slab.fd >= 0:
            self._descriptors.append(slab.fd)
        self._allocator.add(slab.base, slab.nbytes)

    def _slab_of(self, address: int) -> Slab:
        for slab in self.slabs:
            if 0 <= address - slab.base < slab.nbytes:
                return slab
        raise AssertionError(f"no slab holds the address {address}")


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
