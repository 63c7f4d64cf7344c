"""Slabs of a GPU's memory and the blocks leased from them, on a GPU that is none."""

import ctypes
import gc
import itertools
from typing import Any

import pytest

from bridge_wire.errors import OutOfMemory, SessionClosed
from bridge_wire.memory.cuda import Device, device_of, gpus
from bridge_wire.memory.cuda_memory import (
    ALIGNMENT,
    FIRST_ADDRESS,
    UNIT,
    GpuPool,
    copied_to_host,
)


@pytest.fixture
def device(fake_cuda: Any) -> Device:
    """The fake GPU."""
    return device_of(gpus()[0].uuid)


def test_slabs_are_whole_units_and_blocks_aligned(device: Device) -> None:
    """CUDA maps in units of 2 MiB; what reads a block may want it aligned to 256 bytes."""
    pool = GpuPool(device)
    blocks = [pool.lease(nbytes) for nbytes in (1, 255, 256, 257, 5000, 20 << 20)]
    assert all(slab.nbytes % UNIT == 0 for slab in pool.slabs) and len(pool.slabs) == 2
    assert all(
        block.pointer % ALIGNMENT == 0 and block.address >= FIRST_ADDRESS
        for block in blocks
    )
    ends = sorted((block.address, block.address + block.nbytes) for block in blocks)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    assert pool.live_blocks() == 6


def test_an_empty_block_needs_no_memory(device: Device) -> None:
    """An array without elements lies nowhere."""
    pool = GpuPool(device)
    assert pool.lease(0).address == 0 and pool.slabs == ()


def test_memory_in_a_slab_has_an_address_if_it_is_aligned(device: Device) -> None:
    """What a tensor views in a block can be passed as it lies."""
    pool = GpuPool(device)
    block = pool.lease(4096)
    assert pool.address_of(block.pointer + 512, 1024) == block.address + 512
    assert pool.address_of(block.pointer + 4, 4) is None
    assert pool.address_of(block.pointer - (1 << 40), 4) is None


def test_a_block_serves_its_own_stream_first(device: Device, fake_cuda: Any) -> None:
    """The stream that has used the memory need not wait for anything; another one gets other
    memory."""
    pool = GpuPool(device)
    one, two = device.new_stream(), device.new_stream()
    address = pool.lease(1024, one).address
    assert pool.lease(1024, two).address != address
    assert pool.lease(1024, one).address == address


def test_a_block_that_dies_while_others_are_taken_back_is_not_among_them(
    device: Device, fake_cuda: Any
) -> None:
    """What its stream is still to do with it may come after the event that other streams wait
    for."""
    pool = GpuPool(device, max_bytes=UNIT)
    one, two = device.new_stream(), device.new_stream()
    blocks, record = [pool.lease(UNIT // 2, one) for _ in range(2)], device.record

    def record_and_die(event: int, stream: int) -> None:
        record(event, stream)
        blocks.clear()

    blocks.pop()
    device.record = record_and_die
    with pytest.raises(OutOfMemory):
        pool.lease(UNIT, two)
    assert not blocks and pool.lease(UNIT, two).nbytes == UNIT


def test_another_stream_waits_for_the_one_that_used_the_memory(
    device: Device, fake_cuda: Any
) -> None:
    """A full pool gives a stream what another has left, and the stream comes to it only when
    that is done."""
    pool = GpuPool(device, max_bytes=UNIT)
    one, two = device.new_stream(), device.new_stream()
    block = pool.lease(UNIT, one)
    busy = fake_cuda.hold(one)
    pointer = block.pointer
    del block
    assert pool.lease(UNIT, two).pointer == pointer
    written = (ctypes.c_ubyte * 4)(1, 2, 3, 4)
    device.copy(pointer, ctypes.addressof(written), 4, two)
    assert copied_to_host(device, pointer, 4) == bytes(4)
    busy.set()
    device.synchronize(two)
    assert copied_to_host(device, pointer, 4) == bytes(written)


def test_a_stream_that_its_owner_has_destroyed_delays_nothing(
    device: Device, fake_cuda: Any
) -> None:
    """Its fence can no longer be recorded, so the device is waited for: then its memory serves
    another stream."""
    pool = GpuPool(device, max_bytes=UNIT)
    gone, other = device.new_stream(), device.new_stream()
    pool.lease(UNIT, gone)
    device.destroy_stream(gone)
    block = pool.lease(UNIT // 2, other)
    assert block.nbytes == UNIT // 2
    device.destroy_stream(other)


def test_a_full_pool_says_how_full(device: Device) -> None:
    """And after something was let go of, the next request is served."""
    pool = GpuPool(device, max_bytes=4 << 20)
    block = pool.lease(3 << 20)
    with pytest.raises(OutOfMemory, match=r"3145728 .*4194304.*1 leased"):
        pool.lease(3 << 20)
    del block
    assert pool.lease(4 << 20).nbytes == 4 << 20


def test_a_gpu_without_room_is_out_of_memory(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's own refusal has the same type as the pool's."""
    pool = GpuPool(device, max_bytes=1 << 40)
    monkeypatch.setenv("FAKE_CUDA_BYTES", str(64 << 20))
    with pytest.raises(OutOfMemory, match="is out of memory"):
        pool.lease(128 << 20)
    assert pool.lease(1 << 20).nbytes == 1 << 20


def test_a_closed_pool_frees_its_memory(device: Device, fake_cuda: Any) -> None:
    """At once, and its events too; it leases no more."""
    pool = GpuPool(device, max_bytes=UNIT)
    pool.lease(UNIT, device.new_stream())
    pool.lease(UNIT, device.new_stream())
    pool.close()
    assert (fake_cuda.held()["bytes"], fake_cuda.held()["event"]) == (0, 0)
    with pytest.raises(SessionClosed):
        pool.lease(1)


def test_a_closed_pool_still_puts_streams_in_order(
    device: Device, fake_cuda: Any
) -> None:
    """For the arrays that outlive it."""
    pool = GpuPool(device)
    one, two = device.new_stream(), device.new_stream()
    pool.let_wait(one, two)
    pool.close()
    busy = fake_cuda.hold(two)
    pool.let_wait(one, two)
    written, pointer = (ctypes.c_ubyte * 4)(1, 2, 3, 4), device.allocate(UNIT)
    device.copy(pointer, ctypes.addressof(written), 4, one)
    assert copied_to_host(device, pointer, 4) == bytes(4)
    busy.set()
    device.synchronize(one)
    assert copied_to_host(device, pointer, 4) == bytes(written)


def test_a_block_outlives_its_pool(device: Device, fake_cuda: Any) -> None:
    """Its memory is freed after it, when other memory is made or freed: a finalizer does nothing
    on the GPU."""
    pool = GpuPool(device)
    block = pool.lease(1024)
    pool.close()
    assert fake_cuda.held()["mem"] == 1
    ctypes.memset(block.pointer, 7, block.nbytes)
    del block
    gc.collect()
    assert fake_cuda.held()["mem"] == 1
    other = GpuPool(device)
    other.lease(1)
    assert fake_cuda.held()["mem"] == 1
    other.close()
    assert fake_cuda.held()["mem"] == 0
