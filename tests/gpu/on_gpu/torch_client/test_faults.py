"""Bad handles, processes that are killed, memory that runs out, contexts that break: on a GPU."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from bridge_client import Session, connect
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import BridgeError, CudaError, OutOfMemory, WorkerDied
from bridge_wire.memory.cuda import HANDLE_BYTES, device_of, gpus
from bridge_wire.memory.cuda_memory import FIRST_ADDRESS, UNIT
from bridge_wire.pb import bridge_pb2 as pb
from tests.conftest import ROOT, eventually
from tests.gpu.on_gpu import machine
from tests.gpu.on_gpu.machine import (
    DEVICE,
    JAX,
    MIB,
    needs_cuda,
    returns_to,
    settled_bytes,
    used_bytes,
    without,
)

pytestmark = [pytest.mark.gpu, needs_cuda]

# A client of a worker at an address: makes a call, says so, and lives until its input ends.
_CLIENT = """
import sys
import torch
from bridge_client import connect
from bridge_client.torch import RemoteJaxFunction

session = connect(sys.argv[1], require="cuda_ipc")
x = torch.ones(64 << 20, device="cuda", requires_grad=True)
y = RemoteJaxFunction(session, name="sine")(x)
torch.cuda.synchronize()
print("called", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def own_worker() -> Iterator[Session]:
    """A worker that a test may kill."""
    with machine.jax_worker("sine", "outer") as session:
        yield session


def _works(session: Session) -> bool:
    x = torch.rand(1000, device=DEVICE)
    return torch.allclose(
        RemoteJaxFunction(session, name="sine")(x), x.sin() * 2, atol=1e-5
    )


# Handles ------------------------------------------------------------------------------------------


def _handles() -> dict[str, bytes]:
    device = device_of(gpus()[0].uuid)
    pointer = device.allocate(UNIT)
    valid = device.handle_of(pointer)
    device.free(pointer)
    return {
        "63 bytes": valid[:-1],
        "65 bytes": valid + b"\0",
        "zeros": bytes(HANDLE_BYTES),
        "random": os.urandom(HANDLE_BYTES),
    }


def test_handles_that_are_none_are_refused_here() -> None:
    """In this process, which goes on using CUDA; its own handle too."""
    device = device_of(gpus()[0].uuid)
    pointer = device.allocate(UNIT)
    for handle in (b"", *_handles().values(), device.handle_of(pointer)):
        with pytest.raises(CudaError):
            device.open(handle, UNIT)
    for handle in (b"", bytes(63), bytes(65), os.urandom(HANDLE_BYTES)):
        with pytest.raises(CudaError):
            device.open_event(handle)
    device.free(pointer)
    assert torch.ones(3, device=DEVICE).sum() == 3


def test_handles_that_are_none_are_refused_by_the_worker(worker: Session) -> None:
    """With a clear error, and the worker lives, for this session and others."""
    with connect(worker.address) as session:
        assert _works(session)
        link = session._link
        lane = link.take(session.pool)
        for name, handle in _handles().items():
            share = pb.Share(base=FIRST_ADDRESS * 2, nbytes=UNIT, cuda_handle=handle)
            with pytest.raises(BridgeError) as raised:
                lane.ask(pb.LaneRequest(share=share))
            assert isinstance(raised.value, CudaError), (name, raised.value)
            assert handle.hex()[:16] not in str(raised.value)
        link.give_back(lane)
        assert _works(session)
    assert _works(worker)


def test_less_memory_than_announced_is_refused_by_the_worker(worker: Session) -> None:
    """By what lies behind the handle, whatever is said."""
    device = device_of(gpus()[0].uuid)
    pointer = device.allocate(UNIT)
    with connect(worker.address) as session:
        assert _works(session)
        link = session._link
        lane = link.take(session.pool)
        share = pb.Share(
            base=FIRST_ADDRESS * 2,
            nbytes=4 * UNIT,
            cuda_handle=device.handle_of(pointer),
        )
        with pytest.raises(CudaError, match="the peer announced"):
            lane.ask(pb.LaneRequest(share=share))
        link.give_back(lane)
        assert _works(session)
    device.free(pointer)


# Ends ---------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_takes_its_memory_along(own_worker: Session) -> None:
    """And its client goes on with the next one, with a residual that has to be computed again."""
    assert _works(own_worker)
    f = RemoteJaxFunction(own_worker, name="sine")
    x = torch.rand(1 << 20, device=DEVICE).requires_grad_()
    y = f(x)
    torch.cuda.synchronize()
    before = used_bytes()
    os.kill(machine.pid_of(own_worker), 9)
    assert eventually(lambda: used_bytes() < before - 100 * MIB, 20), (
        "its context is still there"
    )
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.cos(x.detach()), rtol=1e-5, atol=1e-5)
    assert _works(own_worker)


def test_a_worker_that_is_killed_in_a_call_is_noticed(worker: Session) -> None:
    """The call ends with WorkerDied, the next one finds another worker, and CUDA still works
    here."""
    with machine.jax_worker("sine") as session:
        f, x = RemoteJaxFunction(session), torch.ones(1 << 20, device=DEVICE)
        f(x)
        torch.cuda.synchronize()
        (lane,) = session._link._idle
        # It takes the request, and does nothing about it.
        os.kill(machine.pid_of(session), signal.SIGSTOP)
        handle = f.submit(x)
        assert eventually(lambda: lane not in session._link._idle)
        time.sleep(0.5)
        os.kill(machine.pid_of(session), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            handle.result(60)
        assert torch.allclose(f(x), x.sin() * 2, atol=1e-5)
    assert _works(worker)


def test_a_client_that_is_killed_leaves_nothing(worker: Session) -> None:
    """Neither its own memory, nor what the worker had mapped."""
    before = 0
    for i in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", _CLIENT, worker.address],
            cwd=ROOT,
            env=os.environ | without(*JAX),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as client:
            assert client.stdout
            assert client.stdout.readline() == "called\n"
            during = used_bytes()
            client.kill()
        assert returns_to(during - 256 * MIB, 0), (
            "the client's own memory is still there"
        )
        if i == 0:  # XLA keeps what it has allocated for the next one
            before = settled_bytes()
        assert returns_to(before)
    assert _works(worker)


# Memory that runs out -----------------------------------------------------------------------------


def test_no_room_in_the_slabs_is_out_of_memory(
    worker: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the cap that a user has set; the next call works."""
    monkeypatch.setenv("BRIDGE_SLAB_MAX_BYTES", str(64 * MIB))
    with connect(worker.address) as session:
        with pytest.raises(OutOfMemory, match="BRIDGE_SLAB_MAX_BYTES"):
            RemoteJaxFunction(session, name="sine")(torch.ones(32 << 20, device=DEVICE))
        assert _works(session)


def test_no_room_for_xla_is_out_of_memory() -> None:
    """In the worker, which serves on."""
    with machine.jax_worker(
        "outer", "sine", args=("--device", "cuda:0", "--gpu-memory-fraction", "0.05")
    ) as session:
        with pytest.raises(OutOfMemory):
            # 64 GiB.
            y = RemoteJaxFunction(session, name="outer")(
                torch.ones(1 << 17, device=DEVICE)
            )
            y.sum().item()
        assert _works(session)
