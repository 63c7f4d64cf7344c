"""The order of work on a GPU between two processes, and what would happen without it."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bridge_client import Session, connect
from bridge_client.remote.gpu import Ordering
from bridge_client.torch import RemoteJaxFunction
from tests.gpu.on_gpu.machine import DEVICE, needs_cuda

pytestmark = [pytest.mark.gpu, needs_cuda]

_CYCLES = 1_000_000_000  # half a second or so
_SIZE = 1 << 20


@pytest.fixture
def session(worker: Session) -> Iterator[Session]:
    """A session of each test's own."""
    with connect(worker.address) as session:
        # What is compiled and copied for the first time waits for too much.
        for name in (
            "sine",
            "late",
        ):
            RemoteJaxFunction(session, name=name)(torch.zeros(_SIZE, device=DEVICE))
        torch.cuda.synchronize()
        yield session


def _read_after_a_late_write(session: Session) -> Tensor:
    """Return twice the sine of what is written when the GPU has slept; before it is zero."""
    x = torch.zeros(_SIZE, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda._sleep(_CYCLES)
    x.fill_(1.0)
    return RemoteJaxFunction(session, name="sine")(x)


def _late_result(session: Session) -> Tensor:
    """Return a copy of what the worker writes when its GPU has worked for long."""
    f = RemoteJaxFunction(session, name="late")
    for _ in range(4):  # leave something else in the blocks that may be used next
        f(torch.full((_SIZE,), 5.0, device=DEVICE))
    torch.cuda.synchronize()
    return f(torch.full((_SIZE,), 1.0, device=DEVICE)).clone()


def test_the_lanes_are_in_order_on_the_gpu(session: Session) -> None:
    """In the way that BRIDGE_GPU_ORDER names: nothing below would show anything if each call
    waited on the host."""
    way = os.environ.get("BRIDGE_GPU_ORDER", "words")
    assert session.stats()[f"gpu_lanes_by_{way}"] == 1


def test_the_worker_reads_what_the_client_writes_late(session: Session) -> None:
    """Whatever is on the stream before the call comes first."""
    seen = _read_after_a_late_write(session)
    torch.testing.assert_close(seen, torch.full_like(seen, 1.0).sin() * 2)


def test_the_client_reads_what_the_worker_writes_late(session: Session) -> None:
    """Its stream waits, on any stream."""
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            assert torch.equal(
                _late_result(session), torch.full((_SIZE,), 2.0, device=DEVICE)
            )


def test_in_order_with_another_stream_the_clients_write_is_missed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first test can fail."""
    begin, idle = Ordering.begin, torch.cuda.Stream().cuda_stream
    monkeypatch.setattr(Ordering, "begin", lambda self, stream: begin(self, idle))
    seen = _read_after_a_late_write(session)
    assert not torch.equal(seen, torch.full_like(seen, 1.0).sin() * 2)


def test_unless_its_stream_waits_the_workers_result_is_missed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second test can fail."""
    f = RemoteJaxFunction(session, name="late")
    f(torch.full((_SIZE,), 5.0, device=DEVICE))
    torch.cuda.synchronize()
    monkeypatch.setattr(Ordering, "end", lambda self, stream, outputs=(): None)
    with torch.cuda.stream(torch.cuda.Stream()):
        y = f(torch.full((_SIZE,), 1.0, device=DEVICE))
        seen = y.clone()
        torch.cuda.current_stream().synchronize()
    torch.cuda.synchronize()
    assert not torch.equal(seen, torch.full_like(seen, 2.0))


def test_memory_that_is_freed_is_not_reused_before_the_gpu_is_done(
    session: Session,
) -> None:
    """A block that dies while the worker still has to read it serves no other call meanwhile."""
    f, g = (RemoteJaxFunction(session, name=name) for name in ("late", "sine"))
    for i in range(10):
        # Its input's block dies at once.
        first = f(torch.full((_SIZE,), float(i), device=DEVICE))
        second = g(torch.full((_SIZE,), 100.0, device=DEVICE))
        assert torch.equal(first, torch.full_like(first, i + 1.0))
        torch.testing.assert_close(second, torch.full_like(second, 100.0).sin() * 2)
        del first, second
