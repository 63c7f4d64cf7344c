"""DLPack both ways: blocks become arrays of three frameworks without a copy, and their arrays
are found by pointer."""

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import bridge_wire.memory.dlpack
from bridge_wire.dtypes import BY_NAME, DType
from bridge_wire.memory.dlpack import CPU, Exporter, keep_owners_by
from bridge_wire.memory.pool import Block, Pool
from bridge_wire.specs import Spec

ROOT = Path(__file__).resolve().parents[2]
EVERY = list(BY_NAME.values())
OF_NUMPY = [dtype for dtype in EVERY if hasattr(np, dtype.name) or dtype.name == "bool"]
SHAPES = [(2, 3), (), (4,), (0,), (3, 0, 2), (1, 1, 5)]


Carrier = Callable[[Any], Any]
Consumer = Callable[[Any], Any]
CARRIERS: dict[str, Carrier] = {
    "numpy": lambda buffer: np.frombuffer(buffer, np.uint8).__dlpack__(),
    "torch": lambda buffer: torch.utils.dlpack.to_dlpack(
        torch.frombuffer(buffer, dtype=torch.uint8)
    ),
}


class Owner:
    """Something whose death can be seen."""


@pytest.fixture(autouse=True)
def carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners are kept by arrays of NumPy."""
    monkeypatch.setattr(bridge_wire.memory.dlpack, "_carrier", None)
    keep_owners_by(CARRIERS["numpy"])


@pytest.fixture(autouse=True, scope="module")
def with_64_bit_jax() -> Any:
    """JAX holds 64-bit types in these tests."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def leased(nbytes: int) -> Block:
    """Return a block, filled with small numbers of which every dtype can hold any pattern."""
    block = Pool(max_bytes=1 << 20, shareable=False).lease(nbytes)
    if nbytes:
        block.buffer[:] = bytes(i % 2 for i in range(nbytes))
    return block


def exported(dtype: DType, shape: tuple[int, ...]) -> tuple[Exporter, Block]:
    spec = Spec(dtype, shape)
    block = leased(spec.nbytes)
    return Exporter(block.pointer, spec, block.buffer), block


def bytes_of(array: Any) -> bytes:
    return np.ascontiguousarray(np.asarray(array)).tobytes()


def named(dtype: DType) -> str:
    return dtype.name


# Export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERY, ids=named)
def test_block_becomes_a_torch_tensor_in_place(dtype: DType) -> None:
    """torch takes every dtype and shape: the tensor lies at the block's own pointer and shows
    its bytes."""
    for shape in SHAPES:
        exporter, block = exported(dtype, shape)
        tensor = torch.from_dlpack(exporter)
        assert (tensor.dtype, tuple(tensor.shape)) == (
            getattr(torch, dtype.name),
            shape,
        )
        assert tensor.is_contiguous()
        if block.nbytes:
            assert tensor.data_ptr() == block.pointer
            assert bytes_of(tensor.reshape(-1).view(torch.uint8)) == bytes(block.buffer)


@pytest.mark.parametrize("dtype", EVERY, ids=named)
def test_block_becomes_a_jax_array_in_place(dtype: DType) -> None:
    """JAX takes every dtype and shape but empty ones: the array lies at the block's pointer and
    shows its bytes."""
    for shape in SHAPES:
        if 0 not in shape:  # such an array lies nowhere, in JAX least of all
            exporter, block = exported(dtype, shape)
            array = jax.dlpack.from_dlpack(exporter)
            assert (str(array.dtype), array.shape) == (dtype.name, shape)
            assert array.unsafe_buffer_pointer() == block.pointer
            assert bytes_of(array) == bytes(block.buffer)


@pytest.mark.parametrize("dtype", OF_NUMPY, ids=named)
def test_block_becomes_a_numpy_array_in_place(dtype: DType) -> None:
    """NumPy takes every dtype that it has itself: the array lies at the block's own pointer and
    shows its bytes."""
    for shape in SHAPES:
        exporter, block = exported(dtype, shape)
        array = np.from_dlpack(exporter)
        assert (array.dtype.name, array.shape) == (dtype.name, shape)
        if block.nbytes:
            assert array.ctypes.data == block.pointer
            assert array.tobytes() == bytes(block.buffer)


def test_writes_are_seen_through_every_export() -> None:
    """Two frameworks' arrays on one block show what a third party writes there: nothing was
    copied."""
    exporter, block = exported(BY_NAME["float32"], (4,))
    tensor, array = torch.from_dlpack(exporter), np.from_dlpack(exporter)
    np.frombuffer(block.buffer, np.float32)[:] = [1, 2, 3, 4]
    assert tensor.tolist() == array.tolist() == [1, 2, 3, 4]
    tensor[0] = 9
    assert array[0] == 9


def test_exporter_says_it_is_host_memory() -> None:
    """The exporter's device is the host, as consumers ask for before they take a capsule."""
    assert exported(BY_NAME["int8"], (1,))[0].__dlpack_device__() == CPU == (1, 0)


def test_newer_consumers_arguments_are_accepted() -> None:
    """The arguments of a newer protocol (max_version, dl_device, copy) do not disturb it."""
    exporter, block = exported(BY_NAME["int8"], (8,))
    capsule = exporter.__dlpack__(
        stream=None, max_version=(1, 1), dl_device=CPU, copy=None
    )
    assert torch.from_dlpack(capsule).data_ptr() == block.pointer


# Lifetime of the memory ---------------------------------------------------------------------------

CONSUMERS: list[Consumer] = [torch.from_dlpack, jax.dlpack.from_dlpack, np.from_dlpack]
CONSUMER_NAMES = ["torch", "jax", "numpy"]


def export_with_owner(nbytes: int = 64) -> tuple[Exporter, "weakref.ref[Owner]", Block]:
    block, owner = leased(nbytes), Owner()
    return (
        Exporter(block.pointer, Spec(BY_NAME["uint8"], (nbytes,)), owner),
        weakref.ref(owner),
        block,
    )


@pytest.mark.parametrize("carrier", CARRIERS.values(), ids=CARRIERS)
@pytest.mark.parametrize("consume", CONSUMERS, ids=CONSUMER_NAMES)
def test_owner_lives_until_the_consumer_s_array_dies(
    consume: Consumer, carrier: Carrier
) -> None:
    """The exporter may go at once: its owner lives as long as the array, and not longer."""
    keep_owners_by(carrier)
    exporter, owner, _block = export_with_owner()
    array = consume(exporter)
    del exporter
    gc.collect()
    assert owner() is not None
    del array
    gc.collect()
    assert owner() is None


def test_owner_lives_until_the_last_of_several_arrays_dies() -> None:
    """Each export holds the owner by itself."""
    exporter, owner, _block = export_with_owner()
    arrays = [
        torch.from_dlpack(exporter),
        np.from_dlpack(exporter),
        torch.from_dlpack(exporter),
    ]
    del exporter
    while arrays:
        assert owner() is not None
        arrays.pop()
    gc.collect()
    assert owner() is None


def test_owner_lives_while_a_view_of_the_array_does() -> None:
    """A slice of the consumer's array keeps the owner too."""
    exporter, owner, _block = export_with_owner()
    view = torch.from_dlpack(exporter)[3:7].view(2, 2)
    del exporter
    gc.collect()
    assert owner() is not None
    del view
    assert owner() is None


def test_array_may_die_in_another_thread() -> None:
    """The owner is released from whichever thread drops the array last."""
    exporter, owner, _block = export_with_owner()
    held = [torch.from_dlpack(exporter)]
    del exporter
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert owner() is None


def test_export_of_a_block_keeps_its_lease() -> None:
    """With the block's buffer as owner, the consumer's array is the lease."""
    pool = Pool(max_bytes=1 << 16, shareable=False)
    block = pool.lease(64)
    tensor = torch.from_dlpack(
        Exporter(block.pointer, Spec(BY_NAME["float32"], (16,)), block.buffer)
    )
    del block
    assert pool.live_blocks() == 1
    del tensor
    assert pool.live_blocks() == 0


@pytest.mark.parametrize("carrier", CARRIERS.values(), ids=CARRIERS)
@pytest.mark.parametrize("consume", CONSUMERS, ids=CONSUMER_NAMES)
def test_array_may_die_while_an_exception_is_raised(
    consume: Consumer, carrier: Carrier
) -> None:
    """An array that goes as an exception leaves its expression disturbs neither the exception
    nor the interpreter."""
    keep_owners_by(carrier)
    exporter, owner, _block = export_with_owner()
    with pytest.raises(ZeroDivisionError):
        [consume(exporter), exporter.__dlpack__(), 1 / 0]
    del exporter
    gc.collect()
    assert owner() is None


def test_capsule_that_nobody_consumes_lets_go_of_its_owner() -> None:
    """A capsule dropped unconsumed does not keep the owner; a consumed one still does."""
    unused, owner, _block = export_with_owner()
    kept = torch.from_dlpack(unused)
    capsule = unused.__dlpack__()
    del unused, capsule
    assert owner() is not None, "the tensor still needs it"
    del kept
    assert owner() is None


def test_capsule_that_is_still_held_keeps_its_owner() -> None:
    """An exporter may go before its capsule is consumed."""
    exporter, owner, block = export_with_owner()
    capsule = exporter.__dlpack__()
    del exporter
    assert owner() is not None
    assert torch.from_dlpack(capsule).data_ptr() == block.pointer


def test_many_exports_leave_nothing_behind() -> None:
    """Owners of a thousand exports, consumed and not, from several threads, are all gone in the
    end."""
    owners: list[weakref.ref[Owner]] = []

    def export(consume: bool) -> None:
        for _ in range(250):
            exporter, owner, _block = export_with_owner()
            owners.append(owner)
            if consume:
                torch.from_dlpack(exporter)
            else:
                exporter.__dlpack__()

    threads = [threading.Thread(target=export, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not [owner for owner in owners if owner() is not None]


EXIT_WITH_LIVE_EXPORTS = """
import importlib, sys
import jax, numpy as np, torch
from bridge_wire.memory.dlpack import Exporter
importlib.import_module(sys.argv[1])  # whose arrays keep the owners
from bridge_wire.dtypes import BY_NAME
from bridge_wire.memory.pool import Pool
from bridge_wire.specs import Spec
pool = Pool(max_bytes=1 << 20)
def export(owned):
    block = pool.lease(64)
    held.append(block)
    return Exporter(block.pointer, Spec(BY_NAME["float32"], (16,)), block.buffer if owned else None)
held = []
takers = torch.from_dlpack, jax.dlpack.from_dlpack, np.from_dlpack
arrays = [take(export(owned)) for take in takers
          for owned in (True, False)]
torch.arrays_that_outlive_this_module = arrays[:]
arrays.append(arrays)
unconsumed = export(True).__dlpack__()
torch.a_capsule_that_outlives_this_module = export(True).__dlpack__()
"""


@pytest.mark.parametrize(
    "runtime", ["bridge_server.jax_runtime.types", "bridge_server.torch_runtime.types"]
)
def test_live_exports_do_not_disturb_the_exit(runtime: str) -> None:
    """An interpreter that ends with live arrays of three frameworks, and with capsules, exits
    with 0, silently."""
    run = subprocess.run(
        [sys.executable, "-c", EXIT_WITH_LIVE_EXPORTS, runtime],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
