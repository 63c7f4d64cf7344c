"""What the tests on a GPU share: a client without JAX, and workers of either framework on the first GPU."""

import gc
import os
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from bridge_client import Session, connect
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.cuda import gpus
from tests.conftest import eventually, held
from tests.gpu.on_gpu import machine
from tests.gpu.on_gpu.machine import DEVICE, JAX, REHEARSED

SERVED = ("sine", "mlp", "unchanged", "pair", "outer", "late", "trainable")


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    """There is a GPU, and this process never imports JAX."""
    if not REHEARSED and not gpus():
        pytest.exit("--gpu was given, but there is no GPU here", returncode=1)
    if not any(name in sys.modules for name in JAX):
        for name in JAX:
            sys.modules[name] = None  # type: ignore[assignment]
    torch.zeros(1, device=DEVICE)  # makes the context


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """After each test there are no more threads than before. Descriptors are CUDA's own affair, and children the
    workers'."""
    before = held()["threads"]
    yield
    gc.collect()
    assert eventually(lambda: held()["threads"] <= before), threading.enumerate()


@pytest.fixture(scope="session")
def worker() -> Iterator[Session]:
    """A JAX worker on the GPU, and a session with it."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with machine.jax_worker(*SERVED) as session:
        RemoteJaxFunction(session, name="sine")(torch.ones(3, device=DEVICE))  # so that it has its slab and its lane
        yield session


@pytest.fixture(params=["local", "grpc"])
def session(request: pytest.FixtureRequest, worker: Session) -> Iterator[Session]:
    """A new session with the JAX worker over each of the lanes."""
    with connect(worker.address, lane=request.param) as session:
        yield session
