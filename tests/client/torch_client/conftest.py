"""What these tests share: a session of their own with a session-wide worker, so that its counts
are theirs alone."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from bridge_client import Session, connect
from bridge_client.inproc import host
from bridge_client.torch import RemoteJaxFunction
from tests import models
from tests.conftest import TESTS

Remote = Callable[..., RemoteJaxFunction]


@pytest.fixture
def session(jax_worker: Session) -> Iterator[Session]:
    """A new session on the local lane."""
    with connect(jax_worker.address, lane="local") as session:
        yield session


@pytest.fixture
def remote(session: Session) -> Remote:
    """Makes functions of that session: `remote("sine")`."""
    return lambda name, **options: RemoteJaxFunction(session, name=name, **options)


@pytest.fixture
def x64_session(x64_worker: Session) -> Iterator[Session]:
    """A new session on the local lane with the worker that has x64."""
    with connect(x64_worker.address, lane="local") as session:
        yield session


@pytest.fixture
def x64_remote(x64_session: Session) -> Remote:
    """Makes functions of that session."""
    return lambda name, **options: RemoteJaxFunction(x64_session, name=name, **options)


@pytest.fixture(params=["local", "grpc", "inproc"])
def any_lane(request: pytest.FixtureRequest, jax_worker: Session) -> Iterator[Remote]:
    """Makes functions of a session on each of the lanes in turn, and of one with the models of
    this process."""
    if request.param == "inproc":
        names = (TESTS / "models.txt").read_text().split()
        made: Session = host(jax_model={name: getattr(models, name) for name in names})
    else:
        made = connect(jax_worker.address, lane=request.param)
    with made as session:
        yield lambda name, **options: RemoteJaxFunction(session, name=name, **options)


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled outlives its test, and the compiler starts no processes and threads."""
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(compile_threads=1, force_disable_caches=True):
        yield
    torch._dynamo.reset()
