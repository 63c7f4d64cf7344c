"""The machine that the tests in this directory run on: its GPU's memory, and processes with one
framework each.

One interpreter may carry both frameworks there, so each process is kept from the other one.

BRIDGE_TESTS_REHEARSE=1 lets `pytest --gpu` run them on the host as far as that is possible, for the
sake of the tests.
"""

import ctypes
import functools
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bridge_client import Session, spawn
from bridge_wire.memory.cuda import gpus
from tests.conftest import ROOT, eventually

REHEARSED = bool(os.environ.get("BRIDGE_TESTS_REHEARSE"))
DEVICE = "cpu" if REHEARSED else "cuda:0"
MEMORY = "memfd" if REHEARSED else "cuda_ipc"
JAX = ("jax", "jaxlib", "flax", "equinox", "optax", "diffrax", "haiku")
TORCH = ("torch", "torchax")
MIB = 1 << 20
TORCH_ALLOCATORS = (
    {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
    {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
)

needs_cuda = pytest.mark.skipif(REHEARSED, reason="the host has nothing like it")

_APART = Path(__file__).resolve().parent.parent / "apart"
_WORKER = () if REHEARSED else ("--device", "cuda:0", "--gpu-memory-fraction", "0.3")


def without(*names: str) -> dict[str, str]:
    """Return the variables of a process that cannot import these packages."""
    paths = [str(_APART), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "TESTS_BLOCKED": " ".join(names)}


def jax_worker(
    *names: str, env: Mapping[str, str] | None = None, **options: Any
) -> Session:
    """Start a JAX worker without torch on the GPU, with these models of `jax_models`."""
    models = {name: f"tests.gpu.on_gpu.jax_models:{name}" for name in names}
    return _worker(jax_model=models, env=without(*TORCH) | dict(env or {}), **options)


def torch_worker(
    *names: str, env: Mapping[str, str] | None = None, **options: Any
) -> Session:
    """Start a torch worker without jax on the GPU, with these models of `torch_models`."""
    models = {name: f"tests.gpu.on_gpu.torch_models:{name}" for name in names}
    return _worker(torch_model=models, env=without(*JAX) | dict(env or {}), **options)


def _worker(args: tuple[str, ...] = _WORKER, **options: Any) -> Session:
    return spawn(python=sys.executable, cwd=ROOT, args=args, **options)


def pid_of(session: Session) -> int:
    """Return the process id of the worker that a session has spawned."""
    return int(session._host._process.pid)


def used_bytes() -> int:
    """Return how much of the GPU's memory is in use by anybody, as NVML tells."""
    if REHEARSED:
        return 0
    nvml, handle = _nvml()
    memory = (ctypes.c_uint64 * 3)()  # total, free, used
    _checked(nvml.nvmlDeviceGetMemoryInfo(handle, memory))
    return int(memory[2])


@functools.cache
def _nvml() -> tuple[Any, Any]:
    nvml, handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
    _checked(nvml.nvmlInit_v2())
    _checked(
        nvml.nvmlDeviceGetHandleByUUID(gpus()[0].label.encode(), ctypes.byref(handle))
    )
    return nvml, handle


def _checked(status: int) -> None:
    if status:
        raise RuntimeError(f"NVML answers with error {status}")


def settled_bytes() -> int:
    """Return how much of the GPU's memory is in use once that has stayed the same for a while."""
    last = -1

    def is_settled() -> bool:
        nonlocal last
        before, last = last, used_bytes()
        time.sleep(0.5)
        return before == last

    assert eventually(is_settled, 20.0), "the GPU's memory in use keeps changing"
    return last


def returns_to(used: int, slack: int = 32 * MIB, within_s: float = 20.0) -> bool:
    """Whether the GPU's memory in use comes back to what it was."""
    return eventually(lambda: used_bytes() <= used + slack, within_s)
