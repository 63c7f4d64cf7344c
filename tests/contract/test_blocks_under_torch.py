"""Blocks of a pool under torch tensors: leases end with the storages, in any thread, at exit."""

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bridge_wire.errors import OutOfMemory
from bridge_wire.memory.pool import Pool
from bridge_wire.memory.slabs import PAGE

ROOT = Path(__file__).resolve().parents[2]


def small_pool(nbytes: int = 16 * PAGE) -> Pool:
    return Pool(max_bytes=nbytes, shareable=False)


def test_torch_tensor_on_a_block_keeps_its_lease() -> None:
    """A tensor of torch.frombuffer lies in the block, and its storage keeps the lease, through
    views and detach."""
    pool = small_pool()
    block = pool.lease(4096)
    tensor = torch.frombuffer(block.buffer, dtype=torch.float32)
    assert tensor.data_ptr() == block.pointer
    del block
    view = tensor.view(32, 32)[3:].t().detach()
    del tensor
    assert pool.live_blocks() == 1
    del view
    assert pool.live_blocks() == 0


def test_tensor_saved_by_autograd_keeps_its_lease() -> None:
    """A tensor saved by a graph keeps its block until the graph dies."""
    pool = small_pool()
    x = torch.frombuffer(pool.lease(64).buffer, dtype=torch.float32).fill_(2.0)
    y = (x * torch.ones(16, requires_grad=True)).sum()
    del x
    assert pool.live_blocks() == 1
    y.backward()
    del y
    assert pool.live_blocks() == 0


def test_lease_ends_in_whichever_thread_drops_it() -> None:
    """A tensor that dies in another thread frees its block for this one."""
    pool = small_pool(PAGE)
    held = [torch.frombuffer(pool.lease(PAGE).buffer, dtype=torch.uint8)]
    with pytest.raises(OutOfMemory):
        pool.lease(PAGE)
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert pool.lease(PAGE).nbytes == PAGE


def test_forgotten_pool_leaves_its_tensors_valid() -> None:
    """A tensor outlives the pool that leased its block."""
    pool = small_pool()
    tensor = torch.frombuffer(pool.lease(64).buffer, dtype=torch.float32).fill_(3.0)
    pool.close()
    del pool
    gc.collect()
    assert tensor.sum().item() == 48.0


EXIT_WITH_LIVE_TENSORS = """
import threading, torch
from bridge_wire.memory.pool import Pool
pool = Pool(max_bytes=1 << 20)
tensor = torch.frombuffer(pool.lease(4096).buffer, dtype=torch.float32)
torch.a_tensor_that_outlives_this_module = tensor.view(2, -1)
local = threading.local()
local.tensor = torch.frombuffer(pool.lease(64).buffer, dtype=torch.uint8)
cycle = [pool.lease(100), pool]
cycle.append(cycle)
"""


def test_live_tensors_do_not_disturb_the_exit() -> None:
    """An interpreter that ends with live blocks, tensors on them and cycles around them exits
    with 0, silently."""
    run = subprocess.run(
        [sys.executable, "-c", EXIT_WITH_LIVE_TENSORS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
