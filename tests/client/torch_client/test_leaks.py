"""Many calls leave both processes as they were.

BRIDGE_LEAK_CALLS=100000 makes it the long run of the acceptance.
"""

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bridge_client import Session, connect, spawn
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import RemoteModelError
from tests.conftest import ROOT, eventually, python_of

CALLS = int(os.environ.get("BRIDGE_LEAK_CALLS", "2000"))
WARM_UP = max(600, CALLS // 20)
SIZES = (1, 100, 5_000, 60_000)
GROWTH = 0.01
# gRPC's own pool of threads breathes.
SLACK = {"descriptors": 0, "threads": 4, "slabs": 0}


def children() -> set[int]:
    return {
        int(pid)
        for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    }


@pytest.fixture(scope="module")
def worker() -> Iterator[tuple[Session, int]]:
    """A worker of this test's own, and its process: its size must not depend on other tests."""
    before = children()
    models = {
        name: f"tests.client.torch_client.functions:{name}"
        for name in ("echo", "affine", "raises_below_zero")
    }
    with spawn(jax_model=models, python=python_of(".venv-jax"), cwd=ROOT) as session:
        (pid,) = children() - before
        yield session, pid


def held(pid: int) -> dict[str, int]:
    """Return what a process holds: descriptors, threads, and mapped slabs."""
    process = Path(f"/proc/{pid}")
    return {
        "descriptors": len(list((process / "fd").iterdir())),
        "threads": len(list((process / "task").iterdir())),
        "slabs": (process / "maps").read_text().count("memfd:"),
    }


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


def caller(session: Session) -> Callable[[int], None]:
    """Return a function that makes the n-th of a mixture of calls: sizes, structures, gradients,
    parameters, errors."""
    echo, affine, raising = (
        RemoteJaxFunction(session, name=name)
        for name in ("echo", "affine", "raises_below_zero")
    )
    optimizer = torch.optim.SGD(affine.parameters(), lr=1e-3)

    def call(n: int) -> None:
        x = torch.full((SIZES[n % len(SIZES)],), 0.5, requires_grad=n % 3 != 0)
        made = echo({"x": x, "n": torch.tensor([n])}, scale=float(n))
        if n % 3 == 1:  # else no backward pass, whose residual goes with the output
            made["args"][0]["x"].sum().backward()
        if n % 5 == 0:
            optimizer.zero_grad()
            affine(torch.ones(1 + n % 2, 3)).sum().backward()
            optimizer.step()
        if n % 50 == 0:
            with pytest.raises(RemoteModelError):
                raising(-x)

    return call


@pytest.mark.parametrize("lane", ["local", "grpc"])
def test_many_calls_leave_no_trace(worker: tuple[Session, int], lane: str) -> None:
    """After thousands of mixed calls both processes have the size, descriptors, threads and
    slabs that they had."""
    session, worker_pid = worker
    pids = (os.getpid(), worker_pid)
    with connect(session.address, lane=lane) as session:
        call = caller(session)
        for n in range(WARM_UP):
            call(n)
        gc.collect()
        counts = session.stats()
        before = [held(pid) for pid in pids], [resident_bytes(pid) for pid in pids]
        for n in range(WARM_UP, WARM_UP + (CALLS if lane == "local" else CALLS // 3)):
            call(n)
        gc.collect()
        after = [held(pid) for pid in pids], [resident_bytes(pid) for pid in pids]
        for now, then in zip(after[0], before[0], strict=True):
            assert all(
                now[kind] <= then[kind] + slack for kind, slack in SLACK.items()
            ), (
                then,
                now,
            )
        for size, then_size in zip(after[1], before[1], strict=True):
            assert size <= then_size * (1 + GROWTH)
        stats = session.stats()
        assert [stats[key] for key in ("blocks", "slab_bytes", "residuals")] == [
            counts[key] for key in ("blocks", "slab_bytes", "residuals")
        ]


def test_sessions_come_and_go(worker: tuple[Session, int]) -> None:
    """Sessions that were opened, used and closed leave nothing in the worker, nor here."""
    address, worker_pid = worker[0].address, worker[1]

    def visit() -> None:
        with connect(address) as visitor:
            RemoteJaxFunction(visitor, name="affine")(
                torch.ones(1, 3).requires_grad_()
            ).sum().backward()

    def seen() -> tuple[int, ...]:
        gc.collect()
        counts = held(worker_pid)
        return held(os.getpid())["slabs"], counts["slabs"], counts["descriptors"]

    visit()
    before = seen()
    for _ in range(20):
        visit()
    assert eventually(
        lambda: all(now <= then for now, then in zip(seen(), before, strict=True))
    )


def test_threads_that_ended_leave_no_lanes(worker: tuple[Session, int]) -> None:
    """Threads that called and ended, many after each other, leave as many connections as ran at
    once."""
    with connect(worker[0].address, lane="local") as session:
        echo = RemoteJaxFunction(session, name="echo")

        def run_threads(count: int) -> None:
            threads = [
                threading.Thread(target=echo, args=(torch.ones(3),))
                for _ in range(count)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        run_threads(4)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            run_threads(4)
        assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_a_forgotten_session_ends(worker: tuple[Session, int]) -> None:
    """A session that nobody refers to any more ends without close(): its slabs and connections
    go on both sides."""
    address, worker_pid = worker[0].address, worker[1]

    def seen() -> tuple[int, ...]:
        gc.collect()
        return tuple(
            held(pid)[kind]
            for pid in (os.getpid(), worker_pid)
            for kind in ("descriptors", "slabs")
        )

    before = seen()
    for _ in range(3):
        RemoteJaxFunction(connect(address, lane="local"), name="echo")(torch.ones(3))
    assert eventually(
        lambda: all(now <= then for now, then in zip(seen(), before, strict=True))
    )
