"""Slabs of a GPU's memory: leased from by the client that owns them, mapped by the worker that was
given their handles.

They are allocations of the bridge's own. Not all memory of the frameworks can be exported, and
whoever opens a handle can reach all that lies behind it.
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
from bridge_wire.memory.pool import Block, Pool, block_at, block_class, closed, configured_max_bytes
from bridge_wire.memory.slabs import Slab

_T = TypeVar("_T")

# What CUDA maps into another process at once; a smaller allocation would show others that lie
# beside it.
UNIT = 2 << 20
ALIGNMENT = 256
# Far beyond any slab of the host's: both are in one address space.
FIRST_ADDRESS = 1 << 56
_NO_VIEW = memoryview(b"")


@dataclass(frozen=True, slots=True, eq=False)
class GpuSlab(Slab):
    """Memory of a GPU, at `pointer` there for this process.

    `handle` opens it in another, and is empty in that.
    """

    handle: bytes


class GpuPool(Pool):
    """Leases blocks of one GPU's memory. Thread-safe.

    Work on a GPU goes on after a block has died here. So its memory serves the stream again that it
    was leased for, whose work comes in order, and any other stream only once that has been made to
    wait for the first.
    """

    _FIRST_BASE = FIRST_ADDRESS
    _ALIGNMENT = ALIGNMENT
    _UNIT = UNIT
    slabs: tuple[GpuSlab, ...]

    def __init__(self, device: Device, *, max_bytes: int | None = None) -> None:
        """Make a pool; the cap is by default BRIDGE_SLAB_MAX_BYTES, or half of what the GPU has
        free now."""
        super().__init__(
            max_bytes=configured_max_bytes(device.free_bytes() // 2)
            if max_bytes is None
            else max_bytes
        )
        self.device = device
        self._memory = memory = _Allocations(device)
        self._ready = defaultdict(lambda: _Ended(memory))  # by size and stream
        self.lenders: list[Any] = []  # allocators whose memory was adopted, but those in use
        # What streams have given back to all was in use until these events; a stream waits for them
        # once.
        self._fences: dict[int, int] = {}
        self._fenced: set[int] = set()
        self._fencing = threading.Lock()
        # Blocks with the words of lanes, which are never used for anything else; and those that no
        # lane has now.
        self._words: list[Block] = []
        self._spare_words: list[Block] = []

    def lease(self, nbytes: int, stream: int = 0) -> Block:
        """Return a block of `nbytes` bytes with undefined contents, to be used on a stream.

        Raises:
          OutOfMemory: it would take the slabs past their cap, or the GPU has no memory.
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
        """Return a block for the words of a lane, to be cleared on a stream. It is no tensor's, and
        never dies: a worker that is late may still write there.
        """
        try:
            return self._spare_words.pop()
        except IndexError:
            block = self.lease(cuda_words.NBYTES, stream)
            self._words.append(block)
            return block

    def give_back_words(self, block: Block) -> None:
        """Let another lane use words that nobody will write any more."""
        self._spare_words.append(block)

    def let_wait(self, stream: int, other: int) -> None:
        """Let what comes on a stream wait for all that is on another one now."""
        with self._fencing:
            self.device.wait(self._recorded(other), stream)

    def _before_reuse(self, keys: Collection[Any]) -> None:
        # What dies from now on may be in use until later: it stays on its list.
        with self._fencing:
            for stream in {stream for _, stream in keys}:
                self._recorded(stream)
            self._fenced.clear()

    def _recorded(self, stream: int) -> int:
        """Return the stream's event, which stands for all that is on the stream now."""
        event = self._fences.get(stream)
        if event is None:
            event = self._fences[stream] = self._memory.new_event()
        try:
            self.device.record(event, stream)
        except (
            CudaError
        ):  # its owner has destroyed the stream; what was on it is done when the device is
            self.device.synchronize_all()
        return event

    def _fence(self, stream: int) -> None:
        """Let a stream wait for all others that have used what it may get now."""
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
        """Share memory of a lender's, as a slab that nothing is leased from.

        It is the base of an allocation of whole units, which the lender keeps. What was adopted
        before stays so.

        Raises:
          CudaError: it cannot be exported.
        """
        with self._lock:
            if any(slab.pointer == pointer for slab in self.slabs):
                return
            slab = GpuSlab(
                _NO_VIEW, pointer, self._next_base, nbytes, -1, self.device.handle_of(pointer)
            )
            self._next_base = slab.base + nbytes + UNIT
            self.slabs = (*self.slabs, slab)

    def close(self) -> None:
        """End the leasing.

        Memory without a block is freed now, the rest when other such memory is made or freed.
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
        return GpuSlab(_NO_VIEW, pointer, base, nbytes, -1, self.device.handle_of(pointer))


# What is nobody's any more, and how to end it. A finalizer only adds to it: it may run in the
# middle of anything, and CUDA waits for the GPU before it frees memory.
_left: deque[tuple[Callable[[Any], None], Any]] = deque()


def leave(end: Callable[[_T], None], value: _T) -> None:
    """Have something be ended soon, but not now. For finalizers."""
    _left.append((end, value))


def end_what_is_left() -> None:
    """Free, unmap and destroy what has lost its last user."""
    with contextlib.suppress(IndexError):  # other threads may be at it
        for _ in range(len(_left)):  # and what cannot be ended yet comes back
            end, value = _left.popleft()
            with contextlib.suppress(CudaError):
                end(value)


def leave_event(device: Device, event: int) -> None:
    """Have an event of this process be destroyed, once it has passed. CUDA lets whoever waits for
    one that is destroyed before wait forever, if that is another process (pytorch#15974).
    """
    leave(_end_event, (device, event))


def _end_event(left: tuple[Device, int]) -> None:
    device, event = left
    if driver().is_pending(event):
        leave(_end_event, left)
    else:
        device.destroy_event(event)


def is_on_gpu(address: int) -> bool:
    """Whether an address of a session is that of a GPU's memory."""
    return address >= FIRST_ADDRESS


def open_received(device: Device, handle: bytes, nbytes: int, base: int) -> GpuSlab:
    """Return the slab behind a handle that a peer sent. It stays mapped while the slab lives.

    Raises:
      CudaError: the handle cannot be opened here, or less memory lies behind it.
    """
    end_what_is_left()
    pointer = device.open(handle, nbytes)
    slab = _OpenedSlab(_NO_VIEW, pointer, base, nbytes, -1, b"")
    weakref.finalize(slab, leave, device.close, pointer).atexit = False
    return slab


def copied_to_host(device: Device, pointer: int, nbytes: int) -> bytes:
    """Return the bytes at a pointer on the GPU as they are now, whatever is under way there."""
    found = ctypes.create_string_buffer(nbytes)
    _copy_now(device, ctypes.addressof(found), pointer, nbytes)
    return found.raw


def copy_to_device(device: Device, pointer: int, data: bytes) -> None:
    """Write bytes to a pointer on the GPU, whatever is under way there."""
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
    """The addresses of blocks that have died.

    It keeps their memory, as every block does that returns to it.
    """

    __slots__ = ("_memory",)

    def __init__(self, memory: "_Allocations") -> None:
        super().__init__()
        self._memory = memory


class _Allocations:
    """What a pool has on the GPU, which ends with the pool and its last block; of a forked child
    it is the parent's."""

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
