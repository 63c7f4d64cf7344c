"""Blocks: leased as long as somebody looks at them, in whatever thread the last look ends;
counted, capped, reused."""

import gc
import itertools
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_wire.errors import BridgeError, CallerError, OutOfMemory, SessionClosed
from bridge_wire.memory.allocator import ALIGNMENT
from bridge_wire.memory.pool import Block, Pool, half_of_memory
from bridge_wire.memory.slabs import PAGE

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def small_pool(nbytes: int = 16 * PAGE) -> Pool:
    return Pool(max_bytes=nbytes, shareable=False)


# Leases -------------------------------------------------------------------------------------------


def test_block_is_memory_of_this_process() -> None:
    """A block's buffer, pointer and address are three names of the same bytes."""
    pool = small_pool()
    block = pool.lease(100)
    block.buffer[:] = bytes(range(100))
    seen = np.frombuffer(block.buffer, np.uint8)
    assert seen.ctypes.data == block.pointer and block.pointer % ALIGNMENT == 0
    assert bytes(pool.view(block.address, 100)) == bytes(range(100))
    assert len(block.buffer) == block.nbytes == 100


def test_lease_ends_when_the_block_dies() -> None:
    """A block that nobody holds any more is free, and serves the next request of its size."""
    pool = small_pool()
    block = pool.lease(1000)
    address = block.address
    assert pool.live_blocks() == 1
    del block
    assert pool.live_blocks() == 0
    assert pool.lease(1000).address == address


def test_block_that_died_last_is_the_next_one() -> None:
    """Of the free blocks of a size, the one that was used last, whose pages are the warmest,
    comes first."""
    pool = small_pool()
    first, second = pool.lease(PAGE), pool.lease(PAGE)
    addresses = [first.address, second.address]
    del first
    del second
    held = [pool.lease(PAGE), pool.lease(PAGE)]
    assert [block.address for block in held] == addresses[::-1]


def test_array_on_a_block_keeps_its_lease() -> None:
    """A NumPy array on a block's buffer keeps the block, and so does every view of that array."""
    pool = small_pool()
    array = np.frombuffer(pool.lease(4096).buffer, np.float32)
    view = array.reshape(32, 32)[1:, ::2].T
    del array
    assert pool.live_blocks() == 1
    del view
    assert pool.live_blocks() == 0


def test_lease_ends_when_a_cycle_is_collected() -> None:
    """A block that only a reference cycle holds is free once the cycle is collected, from within
    an allocation too."""
    pool = small_pool()
    cycle: list[object] = [pool.lease(10)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert pool.live_blocks() == 0


def test_threads_lease_side_by_side() -> None:
    """Many threads that lease, write and drop never see each other's bytes, and leave nothing
    leased."""
    pool = small_pool(64 * PAGE)
    mixed_up: list[int] = []

    def work(mark: int) -> None:
        for i in range(300):
            block = pool.lease(64 + 8 * (i % 50))
            view = np.frombuffer(block.buffer, np.uint8)
            view[:] = mark
            del block
            if (view != mark).any():
                mixed_up.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mixed_up
    assert pool.live_blocks() == 0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3 * PAGE)), max_size=60))
def test_live_blocks_never_share_a_byte(steps: list[tuple[bool, int]]) -> None:
    """However blocks are leased and dropped, live ones are disjoint, aligned and counted."""
    pool, live = small_pool(), list[Block]()
    for drop, number in steps:
        if drop and live:
            live.pop(number % len(live))
            continue
        try:
            live.append(pool.lease(number))
        except OutOfMemory:
            continue
        assert live[-1].pointer % ALIGNMENT == live[-1].address % ALIGNMENT == 0
    ranges = sorted((block.pointer, block.nbytes) for block in live if block.nbytes)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(ranges))
    assert pool.live_blocks() == len(ranges)


# Zero bytes, addresses ----------------------------------------------------------------------------


def test_block_of_zero_bytes_takes_nothing() -> None:
    """A block of zero bytes has address 0, is no lease, and needs no slab."""
    pool = small_pool()
    blocks = [pool.lease(0) for _ in range(3)]
    assert all(
        (block.address, block.nbytes, bytes(block.buffer)) == (0, 0, b"")
        for block in blocks
    )
    assert (pool.live_blocks(), pool.slab_bytes) == (0, 0)
    assert bytes(pool.view(0, 0)) == b""


def test_many_small_blocks_share_leases() -> None:
    """They are memory as other blocks are, aligned and apart, and large ones have leases of their
    own; a shared lease ends with the last of its blocks."""
    pool = small_pool(1 << 20)
    sizes = [1, 64, 65, 0, 1000, 5000, 100] * 10
    blocks = pool.lease_all(sizes)
    assert [block.nbytes for block in blocks] == sizes
    assert pool.live_blocks() < len(sizes) / 3
    for i, block in enumerate(blocks):
        block.buffer[:] = bytes([i]) * block.nbytes
    spans = sorted((block.address, block.nbytes) for block in blocks if block.nbytes)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))
    for i, block in enumerate(blocks):
        assert block.pointer % ALIGNMENT == block.address % ALIGNMENT == 0
        assert bytes(block.buffer) == bytes([i]) * block.nbytes
        assert not block.nbytes or pool.view(block.address, 1)[0] == i
    kept = np.frombuffer(blocks[4].buffer, np.uint8)
    del block, blocks
    assert pool.live_blocks() == 1
    assert set(kept.tolist()) == {4}
    del kept
    assert pool.live_blocks() == 0


def test_few_small_blocks_share_no_lease() -> None:
    pool = small_pool()
    blocks = pool.lease_all([4, 8, 12])
    assert pool.live_blocks() == len(blocks) == 3


def test_no_block_has_address_zero() -> None:
    """The first block of a pool has another address than that of empty blocks."""
    assert small_pool().lease(1).address != 0


def test_memory_in_a_slab_has_an_address() -> None:
    """`address_of` gives a block's address for its pointer, and for any aligned place in it."""
    pool = small_pool()
    block = pool.lease(1000)
    assert pool.address_of(block.pointer, 1000) == block.address
    assert pool.address_of(block.pointer + ALIGNMENT, 8) == block.address + ALIGNMENT


def test_memory_elsewhere_has_no_address() -> None:
    """Memory outside the slabs, across their ends, or not aligned as a block, has none."""
    pool = small_pool()
    block = pool.lease(1000)
    [slab] = pool.slabs
    foreign = np.zeros(16)
    assert pool.address_of(foreign.ctypes.data, foreign.nbytes) is None
    assert pool.address_of(block.pointer + 4, 4) is None
    assert pool.address_of(slab.pointer - ALIGNMENT, 2 * ALIGNMENT) is None
    assert (
        pool.address_of(slab.pointer + slab.nbytes - ALIGNMENT, ALIGNMENT) is not None
    )
    assert (
        pool.address_of(slab.pointer + slab.nbytes - ALIGNMENT, ALIGNMENT + 1) is None
    )
    assert pool.address_of(slab.pointer, slab.nbytes + 1) is None


# Growth, cap, statistics --------------------------------------------------------------------------


def test_slabs_grow_in_steps() -> None:
    """The first slab has 16 MiB; each further one as much as all before together."""
    pool = Pool(max_bytes=1 << 40, shareable=False)
    blocks, sizes = [], []
    while len(pool.slabs) < 3:
        blocks.append(pool.lease(8 * MIB))
        sizes.append(pool.slab_bytes // MIB)
    assert sizes == [16, 16, 32, 32, 64]
    assert pool.live_blocks() == 5


def test_block_larger_than_a_step_gets_a_slab_of_its_size() -> None:
    """A request beyond the next step is served from a slab made for it."""
    pool = Pool(max_bytes=1 << 40, shareable=False)
    block = pool.lease(20 * MIB + 1)
    assert block.nbytes == 20 * MIB + 1
    assert pool.slab_bytes == 20 * MIB + PAGE


def test_last_step_is_what_the_cap_leaves() -> None:
    """A step that would pass the cap is shortened to end there."""
    pool = Pool(max_bytes=18 * MIB, shareable=False)
    held = [pool.lease(16 * MIB), pool.lease(MIB)]
    assert [slab.nbytes // MIB for slab in pool.slabs] == [16, 2]
    assert len(held) == 2


def test_slabs_never_exceed_the_cap() -> None:
    """A cap that is no whole number of pages is kept all the same."""
    pool = Pool(max_bytes=2 * PAGE + 100, shareable=False)
    pool.lease(100)
    assert pool.slab_bytes <= pool.max_bytes


def test_cap_is_an_error_with_figures() -> None:
    """Past the cap a block is OutOfMemory, with the sizes, the number of leases, and the remedy;
    the pool goes on."""
    pool = small_pool(4 * PAGE)
    held = [pool.lease(PAGE) for _ in range(3)]
    with pytest.raises(OutOfMemory) as raised:
        pool.lease(2 * PAGE)
    message = str(raised.value)
    assert (
        f"{2 * PAGE} bytes" in message
        and f"{4 * PAGE} of at most {4 * PAGE}" in message
    )
    assert "3 leased blocks" in message and "BRIDGE_SLAB_MAX_BYTES" in message
    held.pop()
    assert pool.lease(2 * PAGE).nbytes == 2 * PAGE


def test_cap_counts_only_what_is_still_leased() -> None:
    """Blocks that have died do not stand in the figures of an OutOfMemory."""
    pool = small_pool(2 * PAGE)
    for _ in range(3):
        pool.lease(PAGE)
    with pytest.raises(OutOfMemory, match="in 0 leased blocks"):
        pool.lease(3 * PAGE)


def test_freed_neighbours_serve_a_larger_block() -> None:
    """Fragments that were freed one by one become room for one block of all their bytes, without
    growth."""
    pool = small_pool(8 * PAGE)
    held = [pool.lease(PAGE) for _ in range(8)]
    held.clear()
    assert pool.lease(8 * PAGE).nbytes == pool.slab_bytes


def test_cap_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """BRIDGE_SLAB_MAX_BYTES sets the cap; without it, the cap is half of the machine's memory."""
    monkeypatch.setenv("BRIDGE_SLAB_MAX_BYTES", str(4 * PAGE))
    assert Pool().max_bytes == 4 * PAGE
    monkeypatch.delenv("BRIDGE_SLAB_MAX_BYTES")
    assert Pool().max_bytes == half_of_memory()


@pytest.mark.parametrize("value", ["", "much", "-1", "1e9", "2G", "\u00b2"], ids=ascii)
def test_cap_that_is_no_number_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """A BRIDGE_SLAB_MAX_BYTES that is no number is a CallerError that shows it."""
    monkeypatch.setenv("BRIDGE_SLAB_MAX_BYTES", value)
    with pytest.raises(CallerError, match="BRIDGE_SLAB_MAX_BYTES"):
        Pool()


def test_slabs_do_not_touch_each_other() -> None:
    """The address ranges of two slabs lie apart, so that no block spans both."""
    pool = Pool(max_bytes=64 * MIB, shareable=False)
    held = [pool.lease(16 * MIB), pool.lease(16 * MIB)]
    first, second = pool.slabs
    assert first.base + first.nbytes < second.base
    assert len(held) == 2


# The end ------------------------------------------------------------------------------------------


def test_blocks_stay_valid_when_the_pool_is_closed() -> None:
    """After close() tensors keep their memory, descriptors are closed, and no new block is
    leased."""
    before = len(os.listdir("/proc/self/fd"))
    pool = Pool(max_bytes=PAGE)
    block = pool.lease(16)
    block.buffer[:] = b"still here after"
    pool.close()
    assert bytes(block.buffer) == b"still here after"
    with pytest.raises(BridgeError):
        pool.lease(16)
    pool.close()
    del block
    assert pool.live_blocks() == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_closed_pool_refuses_and_counts_on() -> None:
    """A closed pool gives out and shows no memory, and still counts the blocks that live."""
    pool = small_pool()
    kept, returned = pool.lease(100), pool.lease(100)
    address = returned.address
    del returned
    pool.close()
    for _ in range(3):
        with pytest.raises(SessionClosed):
            pool.lease(100)
        with pytest.raises(SessionClosed):
            pool.view(address, 100)
    assert pool.live_blocks() == 1
    del kept
    assert pool.live_blocks() == 0
