"""Whatever allocator either side uses, and whatever it has been told to take: a call takes one
copy on the device."""

import os
import subprocess
import sys

import pytest
import torch

from bridge_client import Session
from bridge_client.torch import RemoteJaxFunction
from tests.conftest import ROOT
from tests.gpu.on_gpu import machine
from tests.gpu.on_gpu.machine import (
    DEVICE,
    JAX,
    MEMORY,
    TORCH_ALLOCATORS,
    needs_cuda,
    without,
)

pytestmark = [pytest.mark.gpu, needs_cuda]

_CLIENT = """
import sys
import torch
from bridge_client import connect
from bridge_client.torch import RemoteJaxFunction

with connect(sys.argv[1], require="cuda_ipc") as session:
    x = torch.rand(1 << 20, device="cuda", requires_grad=True)
    y = RemoteJaxFunction(session, name="sine")(x)
    y.sum().backward()
    assert torch.allclose(y, 2 * x.sin(), atol=1e-5)
    assert torch.allclose(x.grad, 2 * x.cos(), atol=1e-5)
    assert session.stats()["bytes_through_host"] == 0
print("right")
"""


@pytest.mark.gpu(limit_s=130)
@pytest.mark.parametrize(
    "settings", TORCH_ALLOCATORS, ids=lambda settings: next(iter(settings.values()))
)
def test_every_allocator_of_the_client_works(
    settings: dict[str, str], worker: Session
) -> None:
    """In a process of its own, since torch reads them once."""
    done = subprocess.run(
        [sys.executable, "-c", _CLIENT, worker.address],
        cwd=ROOT,
        env=os.environ | without(*JAX) | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@pytest.mark.parametrize(
    "settings",
    [
        {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_CLIENT_MEM_FRACTION": "0.2"},
        {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
        {"XLA_PYTHON_CLIENT_ALLOCATOR": "bfc"},
        {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"},
        {"XLA_PYTHON_CLIENT_ALLOCATOR": "vmm"},
        {"TF_GPU_ALLOCATOR": "cuda_malloc_async"},
    ],
    ids=lambda settings: " ".join(
        f"{name}={value}" for name, value in settings.items()
    ),
)
def test_every_allocator_of_the_worker_works(settings: dict[str, str]) -> None:
    """What XLA has is copied from, and never exported."""
    with machine.jax_worker(
        "sine", env=settings, args=("--device", "cuda:0")
    ) as session:
        x = torch.rand(1 << 20, device=DEVICE, requires_grad=True)
        y = RemoteJaxFunction(session)(x)
        y.sum().backward()
        torch.testing.assert_close(y, 2 * x.sin(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad, 2 * x.detach().cos(), rtol=1e-5, atol=1e-5)
        assert session.memory == MEMORY and session.stats()["bytes_through_host"] == 0
