"""Workers with the models of these tests."""

from collections.abc import Iterator

import pytest

from bridge_client import Session, connect, spawn
from bridge_client.remote.session import RemoteSession
from tests.conftest import ROOT, python_of

FOLDER = "tests/client/numpy_client"
_JAX = (
    *("rosenbrock", "damped", "loss", "echo", "power", "tripled", "started"),
    *("stepped", "cast", "split", "affine", "affine_loss"),
)
_TORCH = ("rosenbrock", "damped", "echo", "scored", "guarded")


def spawned(venv: str, *args: str) -> RemoteSession:
    """Return a session with a worker that hosts this package's models of one framework."""
    if venv == ".venv-torch":
        hosted = {name: f"{FOLDER}/torch_models.py:{name}" for name in _TORCH}
        return spawn(torch_model=hosted, python=python_of(venv), cwd=ROOT)
    hosted = {name: f"{FOLDER}/models.py:{name}" for name in _JAX}
    return spawn(hosted, python=python_of(venv), cwd=ROOT, args=args)


@pytest.fixture(scope="module")
def wide_address() -> Iterator[str]:
    """The address of a JAX worker with x64."""
    with spawned(".venv-jax", "--x64") as session:
        yield session.address


@pytest.fixture(scope="module")
def torch_address() -> Iterator[str]:
    """The address of a torch worker."""
    with spawned(".venv-torch") as session:
        yield session.address


@pytest.fixture
def worker(wide_address: str) -> Iterator[Session]:
    """A new session with a JAX worker with x64, over the local lane."""
    with connect(wide_address, lane="local") as session:
        yield session


@pytest.fixture
def narrow() -> Iterator[Session]:
    """A JAX worker without x64."""
    with spawned(".venv-jax") as session:
        yield session


@pytest.fixture(
    params=[
        *(("jax", lane) for lane in ("local", "grpc")),
        *(("torch", lane) for lane in ("local", "grpc")),
    ],
    ids="-".join,
)
def either(
    request: pytest.FixtureRequest, wide_address: str, torch_address: str
) -> Iterator[Session]:
    """A new session with a worker of either framework, over either lane."""
    framework, lane = request.param
    address = wide_address if framework == "jax" else torch_address
    with connect(address, lane=lane) as session:
        yield session
