"""What these tests share: a session of their own with the torch worker, and jax with 64-bit
types where asked for."""

from collections.abc import Callable, Iterator

import jax
import pytest

from bridge_client import Session, connect, spawn
from bridge_client.inproc import host
from bridge_client.jax import RemoteTorchFunction
from tests.client.jax_client import torch_models
from tests.conftest import ROOT, TESTS, eventually, python_of
from tests.server.torch_server import models

Remote = Callable[..., RemoteTorchFunction]


@pytest.fixture
def session(torch_worker: Session) -> Iterator[Session]:
    """A new session on the local lane with the torch worker."""
    with connect(torch_worker.address, lane="local") as session:
        yield session


@pytest.fixture(scope="session")
def mortal_worker() -> Iterator[Session]:
    """A worker that tests may kill, if they have it started again; it has hardly any room for
    residuals."""
    models = {
        name: f"tests.server.torch_server.models:{name}"
        for name in ("sine", "smooth", "gated")
    }
    args = ["--residual-bytes", "100"]
    with spawn(
        torch_model=models, python=python_of(".venv-torch"), cwd=ROOT, args=args
    ) as session:
        # So that it has its slab and its lane.
        RemoteTorchFunction(session, name="sine")(jax.numpy.ones(3))
        yield session


def kill(session: Session) -> None:
    """Kill the worker that a session has spawned. Its next call starts another one."""
    session._host._process.kill()
    session._host._process.wait()


@pytest.fixture
def remote(session: Session) -> Remote:
    """Makes functions of that session: `remote("sine")`."""
    return lambda name, **options: RemoteTorchFunction(session, name=name, **options)


@pytest.fixture(params=["local", "grpc", "inproc"])
def any_lane(request: pytest.FixtureRequest, torch_worker: Session) -> Iterator[Remote]:
    """Makes functions of a session on each of the lanes in turn, and of one with the models of
    this process."""
    if request.param == "inproc":
        hosted = {
            name: getattr(module, name)
            for folder, module in (
                ("server/torch_server", models),
                ("client/jax_client", torch_models),
            )
            for name in (TESTS / folder / "models.txt").read_text().split()
        }
        made: Session = host(torch_model=hosted)
    else:
        made = connect(torch_worker.address, lane=request.param)
    with made as session:
        yield lambda name, **options: RemoteTorchFunction(session, name=name, **options)


@pytest.fixture
def x64() -> Iterator[None]:
    """jax has 64-bit types during the test."""
    with jax.enable_x64(True):
        yield


def holds_nothing(session: Session) -> bool:
    """Whether neither residuals nor blocks are left, once what was computed and collected is
    really gone."""

    def is_empty() -> bool:
        stats = session.stats()
        return (stats["residuals"], stats["blocks"]) == (0, 0)

    return eventually(is_empty, 2.0)
