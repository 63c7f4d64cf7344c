"""What the tests of a torch client on a GPU share: a process without JAX, and a JAX worker."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from bridge_client import Session, connect
from bridge_client.torch import RemoteJaxFunction
from tests.gpu.on_gpu import machine
from tests.gpu.on_gpu.machine import DEVICE, JAX

SERVED = ("sine", "unchanged", "pair", "outer", "late", "trainable")


@pytest.fixture(autouse=True, scope="session")
def no_jax() -> None:
    """This process never imports JAX, and has a context on the GPU."""
    if not any(name in sys.modules for name in JAX):
        for name in JAX:
            sys.modules[name] = None  # type: ignore[assignment]
    torch.zeros(1, device=DEVICE)


@pytest.fixture(scope="session")
def worker() -> Iterator[Session]:
    """A JAX worker on the GPU, and a session with it."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with machine.jax_worker(*SERVED) as session:
        # So that it has its slab and its lane.
        RemoteJaxFunction(session, name="sine")(torch.ones(3, device=DEVICE))
        yield session


@pytest.fixture(params=["local", "grpc"])
def session(request: pytest.FixtureRequest, worker: Session) -> Iterator[Session]:
    """A new session with the JAX worker over each of the lanes."""
    with connect(worker.address, lane=request.param) as session:
        yield session
