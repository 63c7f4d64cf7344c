"""DLPack both ways: blocks become arrays of three frameworks without a copy, and their arrays
are found by pointer."""

import ctypes
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import bridge_wire.memory.dlpack
from bridge_wire.dtypes import BY_NAME, DType
from bridge_wire.errors import StructureError
from bridge_wire.memory.dlpack import CPU, Exporter, borrow, keep_owners_by
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
        assert (tensor.dtype, tuple(tensor.shape)) == (getattr(torch, dtype.name), shape)
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
    """What a newer protocol passes (max_version, dl_device, copy) does not disturb the export."""
    exporter, block = exported(BY_NAME["int8"], (8,))
    capsule = exporter.__dlpack__(stream=None, max_version=(1, 1), dl_device=CPU, copy=None)
    assert torch.from_dlpack(capsule).data_ptr() == block.pointer


# Who keeps the memory alive -----------------------------------------------------------------------

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
def test_owner_lives_until_the_consumer_s_array_dies(consume: Consumer, carrier: Carrier) -> None:
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
    arrays = [torch.from_dlpack(exporter), np.from_dlpack(exporter), torch.from_dlpack(exporter)]
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
def test_array_may_die_while_an_exception_is_raised(consume: Consumer, carrier: Carrier) -> None:
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


# Import -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERY, ids=named)
def test_torch_tensor_is_borrowed_in_place(dtype: DType) -> None:
    """A torch tensor of any dtype is found at its own pointer, with its dtype and shape."""
    tensor = (
        torch.zeros(2, 3, dtype=torch.uint8)
        .repeat(1, dtype.itemsize)
        .view(getattr(torch, dtype.name))
    )
    borrowed = borrow(tensor)
    assert (borrowed.pointer, borrowed.spec) == (tensor.data_ptr(), Spec(dtype, (2, 3)))
    assert borrowed.is_row_major


@pytest.mark.parametrize("dtype", EVERY, ids=named)
def test_jax_array_is_borrowed_in_place(dtype: DType) -> None:
    """A JAX array of any dtype is found at its own pointer, with its dtype and shape."""
    array = jnp.asarray(np.zeros((2, 3), getattr(ml_dtypes, dtype.name, dtype.name)))
    borrowed = borrow(array)
    assert (borrowed.pointer, borrowed.spec) == (array.unsafe_buffer_pointer(), Spec(dtype, (2, 3)))
    assert borrowed.is_row_major


@pytest.mark.parametrize("dtype", OF_NUMPY, ids=named)
def test_numpy_array_is_borrowed_in_place(dtype: DType) -> None:
    """A NumPy array of any dtype that NumPy has is found at its own pointer, with its dtype and
    shape."""
    array = np.zeros((2, 3), dtype.name)
    borrowed = borrow(array)
    assert (borrowed.pointer, borrowed.spec) == (array.ctypes.data, Spec(dtype, (2, 3)))
    assert borrowed.is_row_major


GRID = np.arange(60, dtype=np.float64).reshape(3, 4, 5)
STRIDED = {
    "whole": GRID,
    "transposed": GRID.T,
    "every second": GRID[:, ::2],
    "reversed": GRID[::-1],
    "plane": GRID[:, :, 2],
    "column": GRID[:, 1:2, 3:4],
    "one row": GRID[1:2],
    "swapped ones": GRID[:1, :, :1].transpose(2, 1, 0),
    "empty": GRID[:0, ::2],
    "scalar": np.array(7.0),
}


@pytest.mark.parametrize("array", STRIDED.values(), ids=STRIDED.keys())
def test_strided_array_is_borrowed_with_its_strides(array: np.ndarray) -> None:
    """Strides come in elements, reach the array's own elements, and `is_row_major` agrees with
    NumPy."""
    borrowed = borrow(array)
    assert borrowed.spec.shape == array.shape
    assert borrowed.is_row_major == array.flags.c_contiguous
    strides = borrowed.strides or tuple(stride // 8 for stride in array.strides)
    for index in np.ndindex(array.shape):
        offset = sum(i * stride for i, stride in zip(index, strides, strict=True))
        assert ctypes.c_double.from_address(borrowed.pointer + 8 * offset).value == array[index]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
        torch.arange(24.0).view(2, 3, 4)[:, 1:, ::2],
        torch.ones(3).expand(5, 3),
        torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ],
    ids=["permuted", "sliced", "expanded", "channels last"],
)
def test_strided_tensor_is_borrowed_with_its_strides(tensor: torch.Tensor) -> None:
    """A tensor that is not contiguous is found at its first element, with torch's own strides."""
    borrowed = borrow(tensor)
    assert (borrowed.pointer, borrowed.strides) == (tensor.data_ptr(), tensor.stride())
    assert not borrowed.is_row_major


def test_borrowed_memory_lives_as_long_as_the_capsule() -> None:
    """The producer may go: the capsule keeps its memory."""
    array = np.full(1000, 7.0)
    memory = weakref.ref(array)
    borrowed = borrow(array)
    del array
    gc.collect()
    assert memory() is not None
    assert ctypes.c_double.from_address(borrowed.pointer).value == 7.0
    del borrowed
    gc.collect()
    assert memory() is None


def test_exporter_can_be_borrowed() -> None:
    """What this project exports it also imports, at the same pointer."""
    exporter, block = exported(BY_NAME["bfloat16"], (2, 2))
    borrowed = borrow(exporter)
    assert (borrowed.pointer, borrowed.spec) == (block.pointer, exporter.spec)


class ElsewhereArray:
    """An array on a GPU."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self) -> None:
        raise AssertionError("not asked for: its memory is not the host's")


class NoCapsuleArray:
    """A producer of something else."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU

    def __dlpack__(self) -> object:
        return object()


def read_only_array() -> np.ndarray:
    array = np.zeros(3)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "producer",
    [
        3.5,
        [1, 2],
        ElsewhereArray(),
        NoCapsuleArray(),
        np.zeros(3, np.longdouble),
        np.zeros(3, "datetime64[s]"),
        np.zeros(3, ">f4"),
        np.zeros(3, object),
        read_only_array(),
        torch.ones(3, requires_grad=True),
        torch.ones(3, dtype=torch.complex64).conj(),
    ],
    ids=[
        "number",
        "list",
        "gpu",
        "no capsule",
        "longdouble",
        "dates",
        "big-endian",
        "objects",
        "read-only",
        "requires grad",
        "conjugate",
    ],
)
def test_what_cannot_be_borrowed_is_refused(producer: Any) -> None:
    """No producer, memory elsewhere, a type that is none of ours, or a producer that declines: a
    StructureError."""
    with pytest.raises(StructureError):
        borrow(producer)
