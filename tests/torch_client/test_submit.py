"""Calls that were submitted: futures of results."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest
import torch

from bridge_client import Session, connect
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import BridgeError, RemoteModelError, SessionClosed


@pytest.fixture
def session(jax_worker: Session) -> Iterator[Session]:
    """A session of the test's own: calls at once leave it with several lanes."""
    with connect(jax_worker.address) as session:
        yield session


def test_a_future_has_the_call_s_result(session: Session) -> None:
    """`submit` returns a future whose result is the call's, and part of the autograd graph."""
    f = RemoteJaxFunction(session, name="sine")
    xs = [torch.full((3,), float(i), requires_grad=True) for i in range(8)]
    futures = [f.submit(x) for x in xs]
    torch.stack([future.result(timeout=60) for future in futures]).sum().backward()
    for x in xs:
        torch.testing.assert_close(x.grad, 2 * torch.cos(x.detach()))


def test_a_future_keeps_the_caller_s_grad_mode(session: Session) -> None:
    """What was submitted under no_grad records nothing, in whichever thread it runs."""
    f = RemoteJaxFunction(session, name="sine")
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        future = f.submit(x)
    assert not future.result(timeout=60).requires_grad
    assert session.stats()["residuals"] == 0


def test_a_future_has_the_call_s_error(session: Session) -> None:
    """An error of the model comes out of the future."""
    f = RemoteJaxFunction(session, name="sine")
    with pytest.raises(RemoteModelError):
        f.submit(torch.ones(2), torch.ones(2)).result(timeout=60)


def test_nothing_is_submitted_to_a_closed_session(session: Session) -> None:
    """After close() a submission raises SessionClosed; a call under way is not waited for."""
    f = RemoteJaxFunction(session, name="sine")
    future = f.submit(torch.ones(2))
    session.close()
    with pytest.raises(SessionClosed):
        f.submit(torch.ones(2))
    with contextlib.suppress(CancelledError, BridgeError):  # it may have been faster or slower than the close
        future.result(timeout=60)
