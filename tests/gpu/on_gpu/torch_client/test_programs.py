"""Whole programs on a GPU: the demo, ten thousand calls, both frameworks in one process, the
doctor."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bridge_client import Session, connect
from bridge_client.torch import RemoteJaxFunction
from tests.conftest import ROOT
from tests.gpu.on_gpu.machine import (
    DEVICE,
    JAX,
    MEMORY,
    MIB,
    REHEARSED,
    TORCH,
    needs_cuda,
    used_bytes,
    without,
)

pytestmark = pytest.mark.gpu

_CALLS = 300 if REHEARSED else 10_000

_IN_ONE_PROCESS = """
import jax, jax.numpy as jnp, torch
from bridge_client.inproc import to_jax, to_torch
from bridge_client.torch import RemoteJaxFunction
from bridge_client.jax import RemoteTorchFunction

x = torch.rand(1 << 20, device="cuda", requires_grad=True)
f = RemoteJaxFunction(lambda x: jnp.sin(x) * 2)
y = f(x)
y.sum().backward()
assert y.is_cuda and torch.allclose(y, 2 * x.sin(), atol=1e-5)
assert torch.allclose(x.grad, 2 * x.cos(), atol=1e-5)
array = to_jax(x.detach())
assert array.unsafe_buffer_pointer() == x.data_ptr() and to_torch(array).data_ptr() == x.data_ptr()
g = RemoteTorchFunction(lambda x: torch.sin(x) * 2)
for wrapped in (lambda g: g, jax.jit):
    assert jnp.allclose(wrapped(g)(array), 2 * jnp.sin(array), atol=1e-5)
    gradient = wrapped(jax.grad(lambda x: g(x).sum()))(array)
    assert jnp.allclose(gradient, 2 * jnp.cos(array), atol=1e-5)
    rows = wrapped(jax.vmap(jax.grad(g)))(array[:100])
    assert jnp.allclose(rows, 2 * jnp.cos(array[:100]), atol=1e-5)
linear = torch.nn.Linear(4, 3, device="cuda")
h, rows = RemoteTorchFunction(linear), array[:40].reshape(10, 4)
expected = to_jax(linear(to_torch(rows)).detach())
assert h.session.gpu_pool() is not None and jnp.allclose(h(rows), expected, atol=1e-5)
assert jnp.allclose(jax.jit(h.apply)(jax.device_put(h.params), rows), expected, atol=1e-5)
for session in (f.session, g.session, h.session):
    assert session.stats()["bytes_through_host"] == 0, session.framework
print("right")
"""


@pytest.mark.gpu(limit_s=250)
def test_the_demo_learns(tmp_path: Path) -> None:
    """Client and worker on the GPU, neither with the other's framework, and no byte through the
    host."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nTESTS_BLOCKED="{" ".join(TORCH)}" exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    device = "cpu" if REHEARSED else "cuda"
    done = subprocess.run(
        [
            sys.executable,
            "examples/digits.py",
            "--device",
            device,
            "--worker-python",
            str(python),
        ],
        cwd=ROOT,
        env=os.environ | without(*JAX),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(
        r"this process \d+: torch yes, jax no \| worker \d+: torch no, jax yes\n",
        done.stdout,
    )
    assert f"lane and memory:  local, {MEMORY}\n" in done.stdout
    assert REHEARSED or "through the host: 0 bytes" in done.stdout


@pytest.mark.gpu(limit_s=180)
def test_many_calls_of_mixed_sizes_leave_nothing(worker: Session) -> None:
    """Every result is right, and the GPU's memory in use is flat after the first tenth."""
    random.seed(0)
    with connect(worker.address) as session:
        f, used = RemoteJaxFunction(session, name="sine"), 0
        sizes = [1, 7, 256, 1000, 4096, 65_537, 1 << 20, 3 << 20]
        for i in range(_CALLS):
            if i == _CALLS // 10:
                torch.cuda.empty_cache()
                used = used_bytes()
            x = torch.full(
                (random.choice(sizes),),
                i / _CALLS,
                device=DEVICE,
                requires_grad=bool(i % 3),
            )
            y = f(x)
            if i % 3:
                y.sum().backward()
                assert torch.allclose(x.grad, 2 * x.detach().cos(), atol=1e-5), i
            assert torch.allclose(y, 2 * x.sin(), atol=1e-5), i
        del x, y
        torch.cuda.empty_cache()
        assert used_bytes() <= used + 8 * MIB
        assert session.stats()["bytes_through_host"] == 0


@needs_cuda
@pytest.mark.gpu(limit_s=250)
def test_both_frameworks_in_one_process_share_the_gpu() -> None:
    """By DLPack, in both directions."""
    done = subprocess.run(
        [sys.executable, "-c", _IN_ONE_PROCESS],
        cwd=ROOT,
        env=os.environ | without() | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@needs_cuda
@pytest.mark.gpu(limit_s=130)
def test_the_doctor_finds_all_well(worker: Session) -> None:
    """The driver, CuPy, a child that opens this process's memory, and the worker that does."""
    command = ["doctor", worker.address]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from bridge_client.cli import main; sys.exit(main())",
            *command,
        ],
        cwd=ROOT,
        env=os.environ | without(*JAX, *TORCH),
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = {
        line[8:].split("  ")[0]: line[:6].strip() for line in done.stdout.splitlines()
    }
    for name in ("NVIDIA driver", "GPUs", "CuPy", "memory of cuda:0", "its GPU"):
        assert lines[name] == "ok", done.stdout
