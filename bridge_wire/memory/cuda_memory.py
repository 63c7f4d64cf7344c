"""Pool and slabs of GPU memory. The client owns slabs and leases blocks; the worker maps slabs.

Slabs are separate allocations of the bridge. CUDA cannot export all memory of the frameworks, and a
process that opens a handle can reach the whole allocation.
"""

import contextlib
import ctypes
import os
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from bridge_wire.errors import CudaError
from bridge_wire.memory import cuda_words
from bridge_wire.memory.cuda import Device, driver
from bridge_wire.memory.pool import (
    Block,
    Pool,
    block_at,
    block_class,
    closed,
    configured_max_bytes,
)
from bridge_wire.memory.slabs import Slab

_T = TypeVar("_T")

# CUDA's mapping granularity between processes: a smaller allocation would expose its neighbours.
UNIT = 2 << 20
ALIGNMENT = 256
# Beyond all host slabs: GPU slabs share their address space.
FIRST_ADDRESS = 1 << 56
_NO_VIEW = memoryview(b"")


@dataclass(frozen=True, slots=True, eq=False)
class GpuSlab(Slab):
    """A slab of GPU memory; `pointer` is this process's device pointer.

    `handle` opens the slab in another process. In the process that opened it, `handle` is empty.
    """

    handle: bytes


class GpuPool(Pool):
    """Leases blocks of one GPU's memory. Thread-safe.

    GPU work may continue after its block has died. A free block is therefore reused by its own
    stream, where work is stream-ordered. Another stream reuses the block only after a wait for the
    first stream.
    """

    _FIRST_BASE = FIRST_ADDRESS
    _ALIGNMENT = ALIGNMENT
    _UNIT = UNIT
    slabs: tuple[GpuSlab, ...]

    def __init__(self, device: Device, *, max_bytes: int | None = None) -> None:
        """Create a pool; the default cap is BRIDGE_SLAB_MAX_BYTES, or half of the GPU's free
        memory."""
        super().__init__(
            max_bytes=configured_max_bytes(device.free_bytes() // 2)
            if max_bytes is None
            else max_bytes
        )
        self.device = device
        self._memory = memory = _Allocations(device)
        self._ready = defaultdict(lambda: _Ended(memory))  # by size and stream
        self.lenders: list[Any] = []  # idle allocators with adopted memory
        # Events by stream: memory returned to the allocator was in use until then. Each stream
        # waits once for all events.
        self._fences: dict[int, int] = {}
        self._fenced: set[int] = set()
        self._fencing = threading.Lock()
        # Blocks reserved for the words of lanes, and the unused ones among these blocks.
        self._words: list[Block] = []
        self._spare_words: list[Block] = []

    def lease(self, nbytes: int, stream: int = 0) -> Block:
        """Return a block of `nbytes` bytes with undefined contents, for use on a stream.

        Raises:
          OutOfMemory: the block would exceed the slabs' cap, or the GPU has no memory.
        """
        if nbytes == 0:
            return block_at(0, 0, [])
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        returns_to = self._ready[size, stream]
        try:
            address = returns_to.pop()
        except IndexError:
            address = self._allocate(size)
            self._fence(stream)
        try:
            pointer = self._extents[address].pointer
        except KeyError:
            returns_to.append(address)
            raise closed() from None
        block = block_class(nbytes).from_address(pointer)
        block.address = address
        block.pointer = pointer
        block._returns_to = returns_to
        return block  # type: ignore[no-any-return]

    def lease_words(self, stream: int) -> Block:
        """Return a block for a lane's words, which the caller clears on a stream.

        The block never holds a tensor and never dies, since a late worker may still write there.
        """
        try:
            return self._spare_words.pop()
        except IndexError:
            block = self.lease(cuda_words.NBYTES, stream)
            self._words.append(block)
            return block

    def give_back_words(self, block: Block) -> None:
        """Release words for another lane, when no process will write them any more."""
        self._spare_words.append(block)

    def let_wait(self, stream: int, other: int) -> None:
        """Make later work on a stream wait for the present work of another stream."""
        with self._fencing:
            self.device.wait(self._recorded(other), stream)

    def _before_reuse(self, keys: Collection[Any]) -> None:
        # Blocks that die from now on may be in use after these events: they stay on their lists.
        with self._fencing:
            for stream in {stream for _, stream in keys}:
                self._recorded(stream)
            self._fenced.clear()

    def _recorded(self, stream: int) -> int:
        """Return the stream's event, recorded after the stream's present work."""
        event = self._fences.get(stream)
        if event is None:
            event = self._fences[stream] = self._memory.new_event()
        try:
            self.device.record(event, stream)
        # The owner has destroyed the stream: synchronising the device completes its work.
        except CudaError:
            self.device.synchronize_all()
        return event

    def _fence(self, stream: int) -> None:
        """Make a stream wait for all other streams whose memory it may reuse now."""
        with self._fencing:
            if stream in self._fenced:
                return
            for other, event in self._fences.items():
                if other != stream:
                    self.device.wait(event, stream)
            self._fenced.add(stream)

    def _leased(self) -> int:
        return super()._leased() - len(self._words)

    def adopt(self, pointer: int, nbytes: int) -> None:
        """Share a lender's memory as a slab without leases. Idempotent.

        `pointer` is the base of an allocation of whole units, which the lender keeps alive.

        Raises:
          CudaError: CUDA cannot export the memory.
        """
        with self._lock:
            if any(slab.pointer == pointer for slab in self.slabs):
                return
            slab = GpuSlab(
                _NO_VIEW,
                pointer,
                self._next_base,
                nbytes,
                -1,
                self.device.handle_of(pointer),
            )
            self._next_base = slab.base + nbytes + UNIT
            self.slabs = (*self.slabs, slab)

    def close(self) -> None:
        """Stop leasing.

        Memory without blocks is freed now, the rest at a later allocation or free of GPU memory.
        """
        super().close()
        self._words.clear()
        self._spare_words.clear()
        self._ready = defaultdict(list)
        with self._fencing:
            self._fences.clear()
            self._memory = _Allocations(self.device)
        self.lenders.clear()
        end_what_is_left()

    def _new_slab(self, nbytes: int, base: int) -> GpuSlab:
        end_what_is_left()
        nbytes = -(-nbytes // UNIT) * UNIT
        pointer = self._memory.allocate(nbytes)
        return GpuSlab(
            _NO_VIEW, pointer, base, nbytes, -1, self.device.handle_of(pointer)
        )


# Deferred frees: queued by finalizers, executed later, since a finalizer may interrupt any code and
# cudaFree waits for the GPU.
_left: deque[tuple[Callable[[Any], None], Any]] = deque()


def leave(end: Callable[[_T], None], value: _T) -> None:
    """Queue a deferred free of `value` by `end`. For finalizers."""
    _left.append((end, value))


def end_what_is_left() -> None:
    """Execute the deferred frees: free, unmap and destroy unused resources."""
    with contextlib.suppress(IndexError):  # other threads may empty the queue too
        for _ in range(len(_left)):  # pending events re-enter the queue
            end, value = _left.popleft()
            with contextlib.suppress(CudaError):
                end(value)


def leave_event(device: Device, event: int) -> None:
    """Queue the destruction of this process's event after the event has passed.

    If an event is destroyed earlier, another process's wait for it never ends (pytorch#15974).
    """
    leave(_end_event, (device, event))


def _end_event(left: tuple[Device, int]) -> None:
    device, event = left
    if driver().is_pending(event):
        leave(_end_event, left)
    else:
        device.destroy_event(event)


def is_on_gpu(address: int) -> bool:
    """Whether a session address refers to GPU memory."""
    return address >= FIRST_ADDRESS


def open_received(device: Device, handle: bytes, nbytes: int, base: int) -> GpuSlab:
    """Map the slab of a handle that a peer sent. The memory stays mapped while the slab lives.

    Raises:
      CudaError: CUDA cannot open the handle here, or its memory is smaller.
    """
    end_what_is_left()
    pointer = device.open(handle, nbytes)
    slab = _OpenedSlab(_NO_VIEW, pointer, base, nbytes, -1, b"")
    weakref.finalize(slab, leave, device.close, pointer).atexit = False
    return slab


def copied_to_host(device: Device, pointer: int, nbytes: int) -> bytes:
    """Return the present bytes at a GPU pointer, without waiting for pending work."""
    found = ctypes.create_string_buffer(nbytes)
    _copy_now(device, ctypes.addressof(found), pointer, nbytes)
    return found.raw


def copy_to_device(device: Device, pointer: int, data: bytes) -> None:
    """Write bytes to a GPU pointer, without waiting for pending work."""
    source = ctypes.create_string_buffer(data, len(data))
    _copy_now(device, pointer, ctypes.addressof(source), len(data))


def _copy_now(device: Device, target: int, source: int, nbytes: int) -> None:
    stream = device.new_stream()
    try:
        device.copy(target, source, nbytes, stream)
        device.synchronize(stream)
    finally:
        device.destroy_stream(stream)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _OpenedSlab(GpuSlab):
    pass


class _Ended(list[int]):
    """Free list: the addresses of dead blocks.

    The list keeps the pool's memory alive, and each block keeps its list alive.
    """

    __slots__ = ("_memory",)

    def __init__(self, memory: "_Allocations") -> None:
        super().__init__()
        self._memory = memory


class _Allocations:
    """A pool's GPU memory and events, freed with the pool and its last block. A forked child
    leaves them to its parent."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pointers: list[int] = []
        self._events: list[int] = []
        weakref.finalize(
            self, _leave, device, self._pointers, self._events, os.getpid()
        ).atexit = False

    def allocate(self, nbytes: int) -> int:
        pointer = self._device.allocate(nbytes)
        self._pointers.append(pointer)
        return pointer

    def new_event(self) -> int:
        event = self._device.new_event()
        self._events.append(event)
        return event


def _leave(device: Device, pointers: list[int], events: list[int], pid: int) -> None:
    if os.getpid() == pid:
        _left.extend((device.free, pointer) for pointer in pointers)
        _left.extend((device.destroy_event, event) for event in events)
