"""The owner of a session's tensors: slabs, and blocks leased from them.

A block is its memory: whoever keeps it, or a view or a tensor made of it, keeps the lease. When the
last of them dies the block's address goes on the list of its size, in whichever thread that
happens, and serves the next request. The finalizer does no more than that, since it may run in the
middle of anything; neither it nor a request that such a list can serve takes a lock.
"""

import contextlib
import ctypes
import functools
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

from bridge_wire.errors import CallerError, OutOfMemory, SessionClosed
from bridge_wire.memory.allocator import ALIGNMENT, Allocator, rounded
from bridge_wire.memory.slabs import PAGE, Slab, create_slab

_FIRST_STEP = 16 << 20
_LARGEST_STEP = 256 << 20


def half_of_memory() -> int:
    """Return half of the machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def configured_max_bytes(default: int) -> int:
    """Return the most bytes that a pool's slabs may have, as BRIDGE_SLAB_MAX_BYTES says."""
    configured = os.environ.get("BRIDGE_SLAB_MAX_BYTES")
    if configured is None:
        return default
    if not configured.isdecimal():
        raise CallerError(f"BRIDGE_SLAB_MAX_BYTES={configured!r} is not a number of bytes")
    return int(configured)


class Returned(Protocol):
    """Where a block's address goes when the block has died."""

    def append(self, address: int, /) -> None: ...


class Block:
    """`nbytes` leased bytes: at `address` in the session's address space, at `pointer` in this
    process.

    It exports them as a writable buffer. The lease ends when it and everything that was made of it
    are gone. A block of zero bytes has address 0.
    """

    # Each number of bytes has a class of its own, since ctypes has a type for each size of an
    # array: see _class_of.
    __slots__ = ()
    address: int
    pointer: int
    nbytes: int
    _returns_to: "Returned"

    @property
    def buffer(self) -> memoryview:
        """The bytes as a memoryview, which keeps the lease."""
        return memoryview(self).cast("B")  # type: ignore[arg-type]

    def __del__(self) -> None:
        self._returns_to.append(self.address)


def block_class(nbytes: int) -> Any:
    """Return the class of blocks of so many bytes."""
    return _class_of(nbytes)[0]


@functools.lru_cache(maxsize=1024)
def _class_of(nbytes: int) -> tuple[Any, int]:
    """Return the class of blocks of so many bytes, and the size of the extents that serve them."""
    body = {"__slots__": ("_returns_to", "address", "pointer"), "nbytes": nbytes}
    return type("Block", (Block, ctypes.c_ubyte * nbytes), body), rounded(nbytes)


def block_at(pointer: int, nbytes: int, returns_to: Returned) -> Block:
    """Return memory of this process as a block, whose address is the pointer.

    `returns_to` lives as long as the block, and has to keep the memory alive.
    """
    block = _class_of(nbytes)[0].from_address(pointer)
    block.address = block.pointer = pointer
    block._returns_to = returns_to
    return block  # type: ignore[no-any-return]


class _Extent(NamedTuple):
    """Where a block lies."""

    pointer: int
    view: memoryview  # of the slab; of a device's, empty
    offset: int  # in the view
    size: int


class Pool:
    """Leases blocks of slabs, which it adds in growing steps up to `max_bytes`. Thread-safe.

    The cap is by default BRIDGE_SLAB_MAX_BYTES, or half of the machine's memory.
    """

    _FIRST_BASE = PAGE  # address 0 belongs to no block
    _ALIGNMENT = ALIGNMENT
    _UNIT = PAGE  # of which slabs consist

    def __init__(self, *, max_bytes: int | None = None, shareable: bool = True) -> None:
        self.max_bytes = configured_max_bytes(half_of_memory()) if max_bytes is None else max_bytes
        self.slabs: tuple[Slab, ...] = ()
        self.shareable = shareable
        self._next_base = self._FIRST_BASE
        self._allocator = Allocator()
        # Every extent by its address, leased or ready for the next request of its size.
        self._extents: dict[int, _Extent] = {}
        self._count = 0  # of extents
        self._ready: defaultdict[Any, list[int]] = defaultdict(list)  # by size
        self._lock = threading.Lock()
        self._is_closed = False
        # Of a pool that is forgotten, too, the descriptors are closed; each mapping lives as long
        # as its views.
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

    def address_of(self, pointer: int, nbytes: int) -> int | None:
        """Return the address of memory of this process that lies in a slab, aligned as a block
        is; else None."""
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

        Leased blocks stay valid; their pages go with their last view.
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
        """Make an extent for a request that no ended lease has left one for, and return its
        address."""
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
                assert address is not None, "a new slab has room for the request it was made for"
            slab = self._slab_of(address)
            offset = address - slab.base
            self._extents[address] = _Extent(slab.pointer + offset, slab.view, offset, size)
            self._count += 1
        return address

    def _take_back(self) -> None:
        """Give what ended leases have left back to the allocator, which may make larger extents
        of it."""
        taken: list[tuple[Any, int]] = []
        for key, addresses in list(self._ready.items()):
            with contextlib.suppress(IndexError):  # other threads lease from these lists, too
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
        """Prepare for other use what was taken from the lists with these keys."""

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
        # The gap keeps two slabs' extents from ever merging into one.
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


def closed() -> SessionClosed:
    """Return the error of a pool whose session was closed."""
    return SessionClosed("the session is closed; make a new one")


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
