"""Pool of shared memory: owns a session's slabs and leases blocks from them.

A reference to a block, or to a view or tensor of the block, keeps its lease. When the last
reference dies, in any thread, the finalizer appends the block's address to the free list of its
size; the next request of this size reuses the address. The finalizer does nothing else, since a
finalizer may interrupt any code. Neither the finalizer nor a request served by a free list takes a
lock.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

from bridge_wire.errors import CallerError, OutOfMemory, SessionClosed
from bridge_wire.memory.allocator import ALIGNMENT, Allocator, rounded
from bridge_wire.memory.slabs import PAGE, Slab, create_slab

_FIRST_STEP = 16 << 20
_LARGEST_STEP = 256 << 20
MANY = 32  # blocks, of which the small ones share leases
_SMALL = 1024  # bytes
# A small array that is kept for long keeps its neighbours' memory.
_SHARED_NBYTES = 16 << 10


def half_of_memory() -> int:
    """Return half of the machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def configured_max_bytes(default: int) -> int:
    """Return the cap of a pool's slabs in bytes, from BRIDGE_SLAB_MAX_BYTES if it is set."""
    configured = os.environ.get("BRIDGE_SLAB_MAX_BYTES")
    if configured is None:
        return default
    if not configured.isdecimal():
        raise CallerError(
            f"BRIDGE_SLAB_MAX_BYTES={configured!r} is not a number of bytes; set it to digits only"
        )
    return int(configured)


class Returned(Protocol):
    """Free list: receives a block's address when the block dies."""

    def append(self, address: int, /) -> None: ...


class Block:
    """`nbytes` leased bytes: at `address` in the session's address space, at `pointer` in this
    process.

    The lease ends with the last reference to the block, its views and its tensors. A block of zero
    bytes has address 0.
    """

    __slots__ = ()
    address: int
    pointer: int
    nbytes: int
    # The block that exports the bytes as a writable buffer, and the place in it.
    whole: Any
    offset: int

    @property
    def buffer(self) -> memoryview:
        """The bytes as a memoryview; the memoryview keeps the lease."""
        whole = memoryview(self.whole).cast("B")
        return whole[self.offset : self.offset + self.nbytes]


class _Leased(Block):
    """A block with a lease of its own."""

    # One class per number of bytes, since ctypes has one type per array size: see _class_of.
    __slots__ = ()
    offset = 0
    _returns_to: "Returned"

    @property
    def whole(self) -> Any:
        return self

    def __del__(self) -> None:
        self._returns_to.append(self.address)


class _Part(Block):
    """A part of a block, whose lease it keeps."""

    __slots__ = ("__weakref__", "address", "nbytes", "offset", "pointer", "whole")

    def __init__(self, whole: Block, offset: int, nbytes: int) -> None:
        self.whole = whole
        self.offset = offset
        self.nbytes = nbytes
        self.address = whole.address + offset
        self.pointer = whole.pointer + offset


def block_class(nbytes: int) -> Any:
    """Return the class of blocks of `nbytes` bytes."""
    return _class_of(nbytes)[0]


@functools.lru_cache(maxsize=1024)
def _class_of(nbytes: int) -> tuple[Any, int]:
    """Return the class of blocks of `nbytes` bytes, and the size of their extents."""
    body = {"__slots__": ("_returns_to", "address", "pointer"), "nbytes": nbytes}
    return type("Block", (_Leased, ctypes.c_ubyte * nbytes), body), rounded(nbytes)


def block_at(pointer: int, nbytes: int, returns_to: Returned) -> Block:
    """Return memory of this process as a block; the pointer is its address.

    The block keeps `returns_to` alive, and `returns_to` must keep the memory alive.
    """
    block = _class_of(nbytes)[0].from_address(pointer)
    block.address = block.pointer = pointer
    block._returns_to = returns_to
    return block  # type: ignore[no-any-return]


class _Extent(NamedTuple):
    """Location of a block."""

    pointer: int
    view: memoryview  # of the slab; empty for a GPU slab
    offset: int  # in the view
    size: int


class Pool:
    """Leases blocks of slabs and adds slabs in growing steps up to `max_bytes`. Thread-safe.

    The default cap is BRIDGE_SLAB_MAX_BYTES, or half of the machine's memory.
    """

    _FIRST_BASE = PAGE  # address 0 belongs to no block
    _ALIGNMENT = ALIGNMENT
    _UNIT = PAGE  # slab sizes are multiples of it

    def __init__(self, *, max_bytes: int | None = None, shareable: bool = True) -> None:
        self.max_bytes = (
            configured_max_bytes(half_of_memory()) if max_bytes is None else max_bytes
        )
        self.slabs: tuple[Slab, ...] = ()
        self.shareable = shareable
        self._next_base = self._FIRST_BASE
        self._allocator = Allocator()
        # All extents by address, both leased and ready for reuse.
        self._extents: dict[int, _Extent] = {}
        self._count = 0  # of extents
        self._ready: defaultdict[Any, list[int]] = defaultdict(list)  # by size
        self._lock = threading.Lock()
        self._is_closed = False
        # Closes the descriptors also when the pool is dropped without close(). Each mapping lives
        # as long as its views.
        self._descriptors: list[int] = []
        self._close_descriptors = weakref.finalize(self, _close_all, self._descriptors)

    def limit(self, max_bytes: int) -> None:
        """Lower the cap to `max_bytes`, never raise the cap."""
        self.max_bytes = min(self.max_bytes, max_bytes)

    def lease(self, nbytes: int) -> Block:
        """Return a block of `nbytes` bytes with undefined contents.

        Raises:
          OutOfMemory: the block would exceed the slabs' cap, or the kernel has no memory.
        """
        kind, size = _class_of(nbytes)
        if nbytes == 0:
            return block_at(0, 0, [])
        returns_to = self._ready[size]
        try:
            address = returns_to.pop()
        except IndexError:
            address = self._allocate(size)
        try:
            pointer, view, offset, _ = self._extents[address]
        except KeyError:
            returns_to.append(address)
            raise closed() from None
        block = kind.from_buffer(view, offset)
        block.address = address
        block.pointer = pointer
        block._returns_to = returns_to
        return block  # type: ignore[no-any-return]

    def lease_all(self, sizes: Sequence[int]) -> list[Block]:
        """Return blocks of these numbers of bytes.

        Where there are many, small ones share a lease, which ends with the last one of them.

        Raises:
          OutOfMemory: as `lease` does.
        """
        if len(sizes) < MANY:
            return list(map(self.lease, sizes))
        return list(map(Parts(self, sum(map(_extent_of, sizes))).lease, sizes))

    def address_of(self, pointer: int, nbytes: int) -> int | None:
        """Return the session address of memory in a slab with a block's alignment, or None."""
        for slab in self.slabs:
            if 0 <= pointer - slab.pointer <= slab.nbytes - nbytes:
                address = pointer - slab.pointer + slab.base
                return address if address % self._ALIGNMENT == 0 else None
        return None

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
            return self._leased()

    def close(self) -> None:
        """Close the slabs' descriptors.

        Leased blocks stay valid; their pages are freed with their last view.
        """
        with self._lock:
            self._is_closed = True
            self._allocator = Allocator()
            self._extents = {}
            self.slabs = ()
        self._close_descriptors()

    def _leased(self) -> int:
        return self._count - sum(map(len, list(self._ready.values())))

    def _allocate(self, size: int) -> int:
        """Create an extent for a request that no free list can serve, and return its address."""
        with self._lock:
            if self._is_closed:
                raise closed()
            address = self._allocator.allocate(size)
            if address is None:
                self._take_back()
                address = self._allocator.allocate(size)
            if address is None:
                self._grow(size)
                address = self._allocator.allocate(size)
                assert address is not None, (
                    "a new slab has room for the request it was made for"
                )
            slab = self._slab_of(address)
            offset = address - slab.base
            self._extents[address] = _Extent(
                slab.pointer + offset, slab.view, offset, size
            )
            self._count += 1
        return address

    def _take_back(self) -> None:
        """Return the extents of the free lists to the allocator, which may merge them."""
        taken: list[tuple[Any, int]] = []
        for key, addresses in list(self._ready.items()):
            # Other threads also lease from these lists.
            with contextlib.suppress(IndexError):
                while True:
                    taken.append((key, addresses.pop()))
        try:
            self._before_reuse({key for key, _ in taken})
        except BaseException:
            for key, address in taken:
                self._ready[key].append(address)
            raise
        self._count -= len(taken)
        for _, address in taken:
            self._allocator.free(address, self._extents.pop(address).size)

    def _before_reuse(self, keys: Collection[Any]) -> None:
        """Prepare reuse of the extents taken from the free lists with these keys."""

    def _grow(self, size: int) -> None:
        step = max(size, min(max(self.slab_bytes, _FIRST_STEP), _LARGEST_STEP))
        room = self.max_bytes // self._UNIT * self._UNIT - self.slab_bytes
        if size > room:
            raise OutOfMemory(
                f"a block of {size} bytes does not fit: the slabs hold {self.slab_bytes} of at most"
                f" {self.max_bytes} bytes, in {self._leased()} leased blocks; free tensors or raise"
                " BRIDGE_SLAB_MAX_BYTES"
            )
        slab = self._new_slab(min(step, room), self._next_base)
        # The gap prevents merges of extents from different slabs.
        self._next_base = slab.base + slab.nbytes + PAGE
        self.slabs = (*self.slabs, slab)
        self._allocator.add(slab.base, slab.nbytes)

    def _new_slab(self, nbytes: int, base: int) -> Slab:
        slab = create_slab(nbytes, base, shareable=self.shareable)
        if slab.fd >= 0:
            self._descriptors.append(slab.fd)
        return slab

    def _slab_of(self, address: int) -> Slab:
        for slab in self.slabs:
            if 0 <= address - slab.base < slab.nbytes:
                return slab
        if self._is_closed:
            raise closed()
        raise AssertionError(f"no slab holds the address {address}")


class Parts:
    """Leases many blocks of a pool: of small ones, as many share a lease as fit in _SHARED_NBYTES.

    A lease costs some microseconds, and objects that Python's garbage collector looks at.
    """

    def __init__(self, pool: Pool, nbytes: int = sys.maxsize) -> None:
        """Begin without a lease; `nbytes` is the sum of the small blocks' extents, if known."""
        self._pool = pool
        self._left = nbytes
        self._whole: Block | None = None
        self._begin = self._end = 0

    def lease(self, nbytes: int) -> Block:
        """Return a block of `nbytes` bytes with undefined contents; see Pool.lease."""
        size = _extent_of(nbytes)
        if not size:
            return self._pool.lease(nbytes)
        if self._begin + size > self._end:
            self._end = max(size, min(self._left, _SHARED_NBYTES))
            self._left -= self._end
            self._whole, self._begin = self._pool.lease(self._end), 0
        begin = self._begin
        self._begin = begin + size
        assert self._whole is not None
        return _Part(self._whole, begin, nbytes)


def _extent_of(nbytes: int) -> int:
    """Return the size of a small block in a shared lease; 0 for other blocks."""
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT if nbytes <= _SMALL else 0


def closed() -> SessionClosed:
    """Return the error for requests to a closed session's pool."""
    return SessionClosed("the session is closed; open a new session")


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
