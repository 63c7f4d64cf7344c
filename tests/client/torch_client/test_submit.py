"""Calls that were submitted: futures of results, gathered, cancelled and given up. What is said of
time is said by the order of events: the model `gated` waits until its gate opens.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path

import pytest
import torch
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from bridge_client import Session, connect
from bridge_client.torch import RemoteJaxFunction, gather
from bridge_wire.errors import (
    ArgumentError,
    BridgeError,
    CallTimeout,
    RemoteModelError,
    SessionClosed,
)
from tests.conftest import eventually
from tests.workers import Background, Gate

_AT_ONCE = 32  # calls of one session


@pytest.fixture
def session(jax_worker: Session) -> Iterator[Session]:
    """A session of the test's own: calls at once leave it with several lanes."""
    with connect(jax_worker.address) as session:
        yield session


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate that does not stay shut after the test."""
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@pytest.fixture
def gated(session: Session, gate: Gate) -> Callable[..., torch.Tensor]:
    """Doubles its argument once the gate is open; compiled already."""
    f = RemoteJaxFunction(session, name="gated")
    gate.open()
    f(torch.ones(3), str(gate))
    gate.shut()
    return f


def holds_nothing(session: Session) -> bool:
    """Whether no block is leased and no residual kept any more.

    Tracebacks hold blocks, and may be in cycles.
    """

    def is_released() -> bool:
        gc.collect()
        stats = session.stats()
        return (stats["blocks"], stats["residuals"]) == (0, 0)

    return eventually(is_released)


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
    """An error of the model, or of its arguments, comes out of the future."""
    f = RemoteJaxFunction(session, name="failing")
    with pytest.raises(RemoteModelError):
        f.submit(torch.ones(2)).result(timeout=60)
    with pytest.raises(ArgumentError):
        f.submit(torch.ones(2), torch.ones(2)).result(timeout=60)


def test_nothing_is_submitted_to_a_closed_session(session: Session) -> None:
    """After close() a submission raises SessionClosed; a call under way is not waited for."""
    f = RemoteJaxFunction(session, name="sine")
    future = f.submit(torch.ones(2))
    session.close()
    with pytest.raises(SessionClosed):
        f.submit(torch.ones(2))
    # It may have been faster or slower than the close.
    with contextlib.suppress(CancelledError, BridgeError):
        future.result(timeout=60)


def test_closing_the_session_ends_what_waits_for_its_turn(
    session: Session, gate: Gate, gated: RemoteJaxFunction
) -> None:
    """Futures of calls that had not begun when the session was closed have SessionClosed, and
    gather does not hang."""
    futures = [gated.submit(torch.ones(3), str(gate)) for _ in range(_AT_ONCE + 2)]
    gathered = Background(lambda: gather(*futures))
    session.close()
    gate.open()
    with pytest.raises(BridgeError):
        gathered.result()
    for future in futures[_AT_ONCE:]:
        with pytest.raises(SessionClosed):
            future.result(timeout=60)


# Side by side -------------------------------------------------------------------------------------


def test_calls_of_several_models_overlap_with_torch_work(
    session: Session, gate: Gate, gated: RemoteJaxFunction
) -> None:
    """While one model computes, others are called and answer, and this thread computes and
    differentiates."""
    x, events = torch.ones(3, requires_grad=True), []
    slow = gated.submit(x, str(gate))
    slow.add_done_callback(lambda _: events.append("slow"))
    gate.wait_for_a_caller()
    sine = RemoteJaxFunction(session, name="sine").submit(x)
    square = RemoteJaxFunction(session, name="square").submit(x)
    events.append(
        f"others {sine.result(timeout=60)[0]:.3f} {square.result(timeout=60)[0]:.3f}"
    )
    (gradient,) = torch.autograd.grad((sine.result() + (x * 3)).sum(), x)
    events.append(f"torch {gradient[0]:.3f}")
    gate.open()
    assert slow.result(timeout=60).tolist() == [2, 2, 2]
    assert events == ["others 1.683 1.000", "torch 4.081", "slow"]


def test_independent_calls_of_one_forward_are_gathered(
    session: Session, tmp_path: Path
) -> None:
    """Calls that each wait for the others' gates are under way at once; gather returns their
    results in order."""
    gates = [Gate(tmp_path / str(i)) for i in range(4)]
    f, x = RemoteJaxFunction(session, name="gated"), torch.ones(3, requires_grad=True)
    futures = [f.submit(x * i, str(gate)) for i, gate in enumerate(gates)]
    for gate in gates:
        gate.wait_for_a_caller()
    for gate in reversed(gates):
        gate.open()
    torch.stack(gather(*futures, timeout_s=60)).sum().backward()
    assert x.grad.tolist() == [12, 12, 12]


def test_gather_raises_after_all_have_ended(
    session: Session, gate: Gate, gated: RemoteJaxFunction
) -> None:
    """The first error is raised when no call is under way any more, and holds nothing then."""
    failing = RemoteJaxFunction(session, name="raises_below_zero").submit(
        -torch.ones(3)
    )
    slow = gated.submit(torch.ones(3), str(gate))
    futures = [slow, failing]
    gathered = Background(lambda: gather(*futures))
    gate.wait_for_a_caller()
    wait([failing], timeout=60)
    assert failing.done() and gathered.is_alive()
    gate.open()
    with pytest.raises(RemoteModelError, match="dislikes negative numbers"):
        gathered.result()
    assert slow.done()
    futures.clear()
    del failing, slow
    assert holds_nothing(session)


def test_gather_gives_up_in_time(
    session: Session, gate: Gate, gated: RemoteJaxFunction
) -> None:
    """Past timeout_s gather raises CallTimeout, and cancels what has not begun."""
    futures = [gated.submit(torch.ones(3), str(gate)) for _ in range(_AT_ONCE + 2)]
    with pytest.raises(CallTimeout, match=r"34 of 34 calls"):
        gather(*futures, timeout_s=0.1)
    assert [future.cancelled() for future in futures] == [False] * _AT_ONCE + [True] * 2
    gate.open()
    assert all(y.eq(2).all() for y in gather(*futures[:_AT_ONCE], timeout_s=60))
    del futures
    assert holds_nothing(session)


# Given up -----------------------------------------------------------------------------------------


def test_a_call_that_has_not_begun_can_be_cancelled(
    session: Session, gate: Gate, gated: RemoteJaxFunction
) -> None:
    """A future that is cancelled while it waits for its turn never calls the worker."""
    busy = [gated.submit(torch.ones(3), str(gate)) for _ in range(_AT_ONCE)]
    calls, queued = session.stats()["calls"], gated.submit(torch.ones(3), str(gate))
    assert queued.cancel()
    gate.open()
    gather(*busy, timeout_s=60)
    with pytest.raises(CancelledError):
        queued.result()
    assert session.stats()["calls"] == calls + _AT_ONCE


def test_a_call_under_way_goes_on_when_cancelled(
    session: Session, gate: Gate, gated: RemoteJaxFunction
) -> None:
    """cancel() of a call under way says no; its blocks are leased until it has ended, and the
    next call works."""
    x = torch.ones(1024, requires_grad=True)
    future = gated.submit(x, str(gate))
    gate.wait_for_a_caller()
    assert not future.cancel()
    del future
    held = session.stats()["blocks"]
    others = [session.pool.lease(x.nbytes) for _ in range(16)]
    assert session.stats()["blocks"] == held + len(others) and held >= 2
    del others
    gate.open()
    assert holds_nothing(session)
    assert gated(torch.ones(3), str(gate)).tolist() == [2, 2, 2]


def test_a_submitted_call_can_time_out(
    session: Session, gate: Gate, gated: RemoteJaxFunction
) -> None:
    """Past timeout_s the future has CallTimeout; the call's blocks stay leased until the worker
    lets go of them."""
    timed = RemoteJaxFunction(session, name="gated", timeout_s=1.0)
    future = timed.submit(torch.ones(3), str(gate))
    with pytest.raises(CallTimeout, match=r"1\.0 s"):
        future.result(timeout=60)
    del future
    gc.collect()
    assert session.stats()["blocks"] == 2
    gate.open()
    assert holds_nothing(session)
    assert timed(torch.ones(3), str(gate)).tolist() == [2, 2, 2]


# Bound to the thread ------------------------------------------------------------------------------


def test_a_call_within_a_transform_is_made_at_once(session: Session) -> None:
    """Other threads know nothing of this one's transforms and traces: a call that takes part in
    one is made here."""
    f, x = RemoteJaxFunction(session, name="sine"), torch.rand(4, 3)

    def submitted(x: torch.Tensor) -> torch.Tensor:
        future = f.submit(x)
        assert future.done()
        return future.result()

    torch.testing.assert_close(vmap(submitted)(x), 2 * x.sin())
    torch.testing.assert_close(grad(lambda x: submitted(x).sum())(x), 2 * x.cos())
    graph = make_fx(submitted)(x).graph
    assert torch.ops.torch_jax_bridge.run.default in {
        node.target for node in graph.nodes
    }


def test_a_call_made_at_once_has_its_error_in_the_future(session: Session) -> None:
    """Its error too comes out of result(), as that of any other submitted call."""
    f = RemoteJaxFunction(session, name="raises_at_trace")

    def submitted(x: torch.Tensor) -> torch.Tensor:
        future = f.submit(x)
        assert isinstance(future.exception(), RemoteModelError)
        return x

    vmap(submitted)(torch.ones(2))
