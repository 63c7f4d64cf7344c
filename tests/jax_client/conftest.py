"""What these tests share: a session of their own with the torch worker, and jax with 64-bit types where asked for."""

from collections.abc import Callable, Iterator

import jax
import pytest

from bridge_client import Session, connect, spawn
from bridge_client.jax import RemoteTorchFunction
from tests.conftest import ROOT, eventually, python_of

Remote = Callable[..., RemoteTorchFunction]


@pytest.fixture
def session(torch_worker: Session) -> Iterator[Session]:
    """A new session on the local lane with the torch worker."""
    with connect(torch_worker.address, lane="local") as session:
        yield session


@pytest.fixture(scope="session")
def mortal_worker() -> Iterator[Session]:
    """A worker that tests may kill, if they have it started again; it has hardly any room for residuals."""
    models = {name: f"tests.torch_server.models:{name}" for name in ("sine", "smooth", "gated")}
    args = ["--residual-bytes", "100"]
    with spawn(torch_model=models, python=python_of(".venv-torch"), cwd=ROOT, args=args) as session:
        RemoteTorchFunction(session, name="sine")(jax.numpy.ones(3))  # so that it has its slab and its lane
        yield session


def kill(session: Session) -> None:
    """Kill the worker that a session has spawned. Its next call starts another one."""
    session._host._process.kill()  # type: ignore[attr-defined]
    session._host._process.wait()  # type: ignore[attr-defined]


@pytest.fixture
def remote(session: Session) -> Remote:
    """Makes functions of that session: `remote("sine")`."""
    return lambda name, **options: RemoteTorchFunction(session, name=name, **options)


@pytest.fixture
def any_lane(torch_worker: Session, lane: str) -> Iterator[Remote]:
    """Makes functions of a session on each of the lanes in turn."""
    with connect(torch_worker.address, lane=lane) as session:
        yield lambda name, **options: RemoteTorchFunction(session, name=name, **options)


@pytest.fixture
def x64() -> Iterator[None]:
    """jax has 64-bit types during the test."""
    with jax.enable_x64(True):
        yield


def holds_nothing(session: Session) -> bool:
    """Whether neither residuals nor blocks are left, once what was computed and collected is really gone."""

    def is_empty() -> bool:
        stats = session.stats()
        return (stats["residuals"], stats["blocks"]) == (0, 0)

    return eventually(is_empty, 2.0)
