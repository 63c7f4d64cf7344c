"""What these tests share: functions of the torch worker, called from torch, where their twins
are at hand."""

from collections.abc import Callable, Iterator

import pytest

from bridge_client import Session, connect
from bridge_client.torch import RemoteJaxFunction

Remote = Callable[..., RemoteJaxFunction]


@pytest.fixture
def session(torch_worker: Session) -> Iterator[Session]:
    """A new session on the local lane with the torch worker."""
    with connect(torch_worker.address, lane="local") as session:
        yield session


@pytest.fixture
def remote(session: Session) -> Remote:
    """Makes functions of that session: `remote("sine")`. A session says nothing about
    frameworks, nor does the name."""
    return lambda name, **options: RemoteJaxFunction(session, name=name, **options)
