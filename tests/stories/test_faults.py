"""What goes wrong outside a call: killed, hung and draining workers, killed clients, no memory,
forks, and ends."""

import contextlib
import gc
import logging
import os
import resource
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bridge_client import Session, connect, spawn
from bridge_client.remote.local_lane import LocalLane
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import (
    BridgeError,
    CallerError,
    CallTimeout,
    OutOfMemory,
    SessionClosed,
    StartupTimeout,
    WorkerCrashed,
    WorkerDied,
    WorkerUnavailable,
)
from tests.calls import floats, placed, prepare, squares, values
from tests.conftest import ROOT, eventually, python_of
from tests.workers import (
    Background,
    Gate,
    Worker,
    children,
    held_by,
    is_running,
    models,
    run_program,
    serving,
    slabs_mapped,
    start_program,
)

_HOSTED = models(
    "square", "outer", "total", "gated", "gated_outer", "gated_while_traced"
)
_BUDGET = 1 << 20
_SERVICE = "bridge.v1.Bridge"
_SERVING, _NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker that lives on, with a small budget for residuals."""
    directory = tmp_path_factory.mktemp("faults")
    listen = f"unix:{directory}/worker.sock"
    with serving(
        directory, "--listen", listen, "--residual-bytes", str(_BUDGET), *_HOSTED
    ) as worker:
        # gRPC's threads are made on demand and stay: have enough of them before anybody counts.
        with contextlib.ExitStack() as sessions:
            for _ in range(16):
                sessions.enter_context(connect(worker.address, lane="grpc"))
        yield worker


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts a worker, always at the same address."""
    with contextlib.ExitStack() as workers:
        started = iter(range(100))

        def start(*args: str, **variables: str) -> Worker:
            directory = tmp_path / f"worker-{next(started)}"
            listen = f"unix:{tmp_path}/worker.sock"
            return workers.enter_context(
                Worker(directory, "--listen", listen, *_HOSTED, *args, env=variables)
            )

        yield start


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate that does not stay shut after the test."""
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which `spawn` makes its own."""
    directory = tmp_path / "t"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def _spawn(**options: object) -> Session:
    return spawn(
        "tests.models:square", python=python_of(".venv-jax"), cwd=ROOT, **options
    )


def _blocks_return(session: Session) -> bool:
    """Whether no block stays leased.

    The traceback of an error holds the blocks of its call, and may be in a cycle.
    """
    return eventually(lambda: gc.collect() >= 0 and session.stats()["blocks"] == 0)


def _numbers() -> torch.Tensor:
    return torch.tensor([1.0, 2.0, 3.0], requires_grad=True)


# The worker is killed -----------------------------------------------------------------------------


def test_calls_and_backwards_outlive_a_killed_worker(
    start: Callable[..., Worker], lane: str
) -> None:
    """While a killed worker is away calls raise WorkerUnavailable; once it is back they work, and
    so does a backward whose forward was before.
    """
    worker = start().wait_until_ready()
    with connect(worker.address, lane=lane, retry_s=0) as session:
        f = RemoteJaxFunction(session, name="square")
        x = _numbers()
        y = f(x)
        worker.kill()
        with pytest.raises(WorkerUnavailable):
            torch.autograd.grad(y.sum(), x, retain_graph=True)
        with pytest.raises(WorkerUnavailable):
            f(x)
        start().wait_until_ready()
        y.sum().backward()
        assert torch.equal(x.grad, 2 * x)
        assert torch.equal(f(x), x * x)
        assert session.stats()["residuals"] == 0


def test_a_worker_killed_during_calls_is_a_death(
    start: Callable[..., Worker], gate: Gate, tmp_path: Path, lane: str
) -> None:
    """Every call under way raises WorkerDied as soon as the worker is killed."""
    worker = start().wait_until_ready()
    with connect(worker.address, lane=lane, retry_s=0) as session:
        gates = [gate, Gate(tmp_path / "second")]
        programs = [prepare(session, "gated", floats(1), str(each)) for each in gates]
        running = [
            Background(
                lambda program=program: session.run(program, [placed(session, [1.0])])
            )
            for program in programs
        ]
        for each in gates:
            each.wait_for_a_caller()
        worker.kill()
        for call in running:
            with pytest.raises(WorkerDied):
                call.result()
        with pytest.raises(WorkerUnavailable):
            squares(session, 1.0)
        start().wait_until_ready()
        gate.open()
        assert values(*session.run(programs[0], [placed(session, [1.0])])) == [2.0]
        assert _blocks_return(session)


def test_a_worker_killed_during_a_backward_is_a_death(
    start: Callable[..., Worker], gate: Gate, lane: str
) -> None:
    """A backward raises WorkerDied as soon as the worker is killed, and can be repeated with
    another one."""
    worker = start().wait_until_ready()
    with connect(worker.address, lane=lane) as session:
        x = _numbers()
        y = RemoteJaxFunction(session, name="gated")(x, str(gate), when="backward")
        running = Background(lambda: y.sum().backward(retain_graph=True))
        gate.wait_for_a_caller()
        worker.kill()
        with pytest.raises(WorkerDied):
            running.result()
        gate.open()
        start().wait_until_ready()
        y.sum().backward()
        assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_a_worker_killed_during_a_preparation_is_a_death(
    start: Callable[..., Worker], gate: Gate
) -> None:
    """A worker that is killed while it traces fails the preparation at once."""
    worker = start(BRIDGE_TEST_GATE=str(gate)).wait_until_ready()
    with connect(worker.address) as session:
        running = Background(lambda: prepare(session, "gated_while_traced", floats(2)))
        gate.wait_for_a_caller()
        worker.kill()
        with pytest.raises(WorkerUnavailable):
            running.result()


def test_a_spawned_worker_is_started_again(lane: str) -> None:
    """The next call after the death of a spawned worker starts it again, and a backward finds
    its gradient there.

    `retries`, since gRPC may take a call before it notices that its connection has ended.
    """
    before = children()
    with _spawn(lane=lane, retries=1) as session:
        f = RemoteJaxFunction(session)
        x = _numbers()
        y = f(x)
        (first,) = children() - before
        os.kill(first, signal.SIGKILL)
        y.sum().backward()
        assert torch.equal(x.grad, 2 * x)
        (second,) = children() - before
        assert second != first
    assert children() == before


def test_a_call_that_a_dead_worker_never_took_is_made_by_the_next() -> None:
    """What still lay before a worker when it died was not computed, and is asked of the one that
    takes its place."""
    before = children()
    with _spawn() as session:
        program = prepare(session, "square", floats(1))
        inputs = [placed(session, [3.0])]
        assert values(*session.run(program, inputs)) == [9.0]
        (pid,) = children() - before
        os.kill(pid, signal.SIGSTOP)
        running = Background(lambda: values(*session.run(program, inputs)))
        os.kill(pid, signal.SIGKILL)
        assert running.result() == [9.0]


# The worker hangs ---------------------------------------------------------------------------------


def test_blocks_of_a_timed_out_call_wait_for_the_worker(
    worker: Worker, gate: Gate
) -> None:
    """The blocks of a call that was given up are leased to nobody else until the worker has let
    go of them."""
    with connect(worker.address, lane="local") as session:
        program = prepare(session, "gated", floats(1024), str(gate))
        block = placed(session, [1.0] * 1024)
        address = block.address
        with pytest.raises(CallTimeout):
            session.run(program, [block], timeout_s=0.2)
        del block
        assert session.stats()["blocks"] == 2
        others = [session.pool.lease(4096) for _ in range(64)]
        assert address not in {other.address for other in others}
        assert session.stats()["blocks"] == 2 + len(others)
        gate.open()
        assert eventually(lambda: session.stats()["blocks"] == len(others))
        assert squares(session, 3.0) == [9.0]


def test_a_timed_out_forward_leaves_no_residual(
    worker: Worker, gate: Gate, lane: str
) -> None:
    """What a call keeps that was given up is released, although the client let go of it before
    it was kept."""
    with connect(worker.address, lane=lane) as session:
        program = prepare(session, "gated", floats(1), str(gate)).keeping((0,))
        with pytest.raises(CallTimeout):
            session.run_keeping(program, [placed(session, [1.0])], timeout_s=0.3)
        assert squares(session, 3.0) == [9.0]  # takes the release along, too early
        gate.open()
        assert _blocks_return(session)
        assert eventually(lambda: session.stats()["residuals"] == 0)


def test_a_slab_that_may_have_been_shared_is_shared_over_a_new_link(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C or a time limit after a slab was sent, before the answer came, does not spoil the
    session."""
    share = LocalLane.share

    def unanswered(lane: LocalLane, *args: Any) -> None:
        share(lane, *args)
        raise CallTimeout("no answer")

    with connect(worker.address, lane="local") as session:
        # Keeps the session on the worker.
        session._require_link().give_back(session._require_link()._new_lane())
        with monkeypatch.context() as patched:
            patched.setattr(LocalLane, "share", unanswered)
            with pytest.raises(CallTimeout):
                squares(session, 2.0)
        assert squares(session, 3.0) == [9.0]


def test_a_link_that_another_thread_has_ended_is_replaced(
    worker: Worker, lane: str
) -> None:
    """Calls and preparations over a link that ends meanwhile go over a new one."""
    with connect(worker.address, lane=lane) as session:
        assert squares(session, 2.0) == [4.0]
        session._require_link().abort()
        assert squares(session, 3.0) == [9.0]
        session._require_link().abort()
        assert prepare(session, "square", floats(17)).output_nbytes == (68,)


def test_a_timed_out_backward_can_be_repeated(
    worker: Worker, gate: Gate, lane: str
) -> None:
    """A backward past its time raises CallTimeout, and gives the right gradient later."""
    with connect(worker.address, lane=lane) as session:
        x = _numbers()
        y = RemoteJaxFunction(session, name="gated")(x, str(gate), when="backward")
        session.timeout_s = 0.3
        with pytest.raises(CallTimeout):
            y.sum().backward(retain_graph=True)
        session.timeout_s = None
        gate.open()
        y.sum().backward()
        assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_a_stopped_worker_times_out(start: Callable[..., Worker], lane: str) -> None:
    """Calls and preparations of a worker that does nothing at all end after timeout_s, and later
    ones work."""
    worker = start().wait_until_ready()
    with connect(worker.address, lane=lane) as session:
        program = prepare(session, "square", floats(2))
        session.timeout_s = 0.3
        worker.process.send_signal(signal.SIGSTOP)
        with pytest.raises(CallTimeout, match=r"0\.3 s"):
            Background(
                lambda: session.run(program, [placed(session, [1.0, 2.0])])
            ).result()
        with pytest.raises(CallTimeout):
            Background(lambda: prepare(session, "square", floats(3))).result()
        worker.process.send_signal(signal.SIGCONT)
        session.timeout_s = None
        assert squares(session, 3.0) == [9.0]
        assert _blocks_return(session)


def test_a_call_under_way_in_a_closed_session_says_so(
    worker: Worker, gate: Gate, lane: str
) -> None:
    """A session that another thread closes ends its calls with SessionClosed, or answers them;
    the worker is not blamed."""
    session = connect(worker.address, lane=lane, retries=1)
    program = prepare(session, "gated", floats(1), str(gate))
    running = Background(
        lambda: values(*session.run(program, [placed(session, [1.0])]))
    )
    gate.wait_for_a_caller()
    session.close()
    gate.open()
    if lane == "local":
        assert running.result() == [2.0]
    else:
        with pytest.raises(SessionClosed):
            running.result()


def test_a_call_can_be_interrupted(
    worker: Worker, gate: Gate, lane: str, ctrl_c: None
) -> None:
    """Ctrl-C ends a call with KeyboardInterrupt; the session works on, and no block is lost."""
    with connect(worker.address, lane=lane) as session:
        program = prepare(session, "gated", floats(1), str(gate))

        def interrupt() -> None:
            gate.wait_for_a_caller()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        interrupting = Background(interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.run(program, [placed(session, [1.0])])
        interrupting.result()
        assert squares(session, 2.0) == [4.0]
        gate.open()
        assert _blocks_return(session)


# The client is killed -----------------------------------------------------------------------------

_VICTIM = """
    import sys
    from bridge_client import connect
    from tests.calls import floats, placed, prepare
    address, lane, moment, gate = sys.argv[1:]
    session = connect(address, lane=lane)
    keeping = prepare(session, "square", floats(4096)).keeping((0,))
    gated = prepare(session, "gated", floats(1), gate)
    kept = [session.run_keeping(keeping, [placed(session, [1.0] * 4096)]) for _ in range(3)]
    assert session.stats()["residuals"] == 3
    print("now", flush=True)
    if moment == "idle":
        sys.stdin.read()
    elif moment == "in a call":
        session.run(gated, [placed(session, [1.0])])
    while True:
        session.drop_residual(session.run_keeping(keeping, [placed(session, [1.0] * 4096)])[1])
"""


@pytest.mark.parametrize("moment", ["idle", "in a call", "busy"])
def test_a_killed_client_leaves_nothing(
    worker: Worker, tmp_path: Path, lane: str, moment: str
) -> None:
    """The worker's mappings, descriptors and threads go with a client, at whatever moment that is
    killed.

    The residuals go too: those of this model alias the client's slab, so that one of them would
      keep its mapping.
    """

    def kill_one(name: str) -> None:
        gate = Gate(tmp_path / name)
        with start_program(_VICTIM, worker.address, lane, moment, str(gate)) as client:
            assert client.stdout.readline() == "now\n", client.stderr.read()
            if moment == "in a call":
                gate.wait_for_a_caller()
            client.kill()
            client.wait()
        gate.open()

    assert eventually(lambda: slabs_mapped(worker.pid) == 0)
    kill_one("first")
    assert eventually(lambda: slabs_mapped(worker.pid) == 0)
    baseline = held_by(worker.pid)
    for i in range(3):
        kill_one(str(i))
    assert eventually(
        lambda: all(
            count <= baseline[kind] for kind, count in held_by(worker.pid).items()
        )
    ), f"{baseline} before, {held_by(worker.pid)} after"
    with connect(worker.address, lane=lane) as session:
        assert squares(session, 3.0) == [9.0]


def test_a_live_clients_residuals_keep_its_mapping(worker: Worker) -> None:
    """What the test above goes by: a residual aliases the client's slab, and the mapping is
    there while it is."""
    assert eventually(lambda: slabs_mapped(worker.pid) == 0)
    with connect(worker.address, lane="local") as session:
        keeping = prepare(session, "square", floats(4096)).keeping((0,))
        session.run_keeping(keeping, [placed(session, [1.0] * 4096)])
        assert slabs_mapped(worker.pid) == 1


# No room ------------------------------------------------------------------------------------------


def test_a_full_slab_is_out_of_memory(
    worker: Worker, lane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output or input that does not fit under the cap raises OutOfMemory, which names the
    cap; what fits works."""
    monkeypatch.setenv("BRIDGE_SLAB_MAX_BYTES", str(32 << 20))
    with connect(worker.address, lane=lane) as session:
        program = prepare(session, "outer", floats(4096))
        with pytest.raises(OutOfMemory, match="BRIDGE_SLAB_MAX_BYTES"):
            session.run(program, [placed(session, [1.0] * 4096)])
        with pytest.raises(OutOfMemory):
            RemoteJaxFunction(session, name="total")(torch.ones(16 << 20))
        assert squares(session, 2.0) == [4.0]
        assert session.stats()["blocks"] == 0
        assert session.stats()["slab_bytes"] <= 32 << 20


def test_a_nonsensical_cap_is_refused(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A BRIDGE_SLAB_MAX_BYTES that is no number is an error that names the variable, before
    anything is connected."""
    monkeypatch.setenv("BRIDGE_SLAB_MAX_BYTES", "plenty")
    with pytest.raises(BridgeError, match="BRIDGE_SLAB_MAX_BYTES='plenty'"):
        connect(worker.address)


def test_the_workers_quota_is_out_of_memory(
    start: Callable[..., Worker], lane: str
) -> None:
    """A client that shares or sends more than the worker allows gets OutOfMemory, and what fits
    works."""
    worker = start(
        "--session-slab-bytes", "20M", BRIDGE_SLAB_MAX_BYTES=str(20 << 20)
    ).wait_until_ready()
    with connect(worker.address, lane=lane) as session:
        assert squares(session, 2.0) == [4.0]
        count = 8 << 20
        program = prepare(session, "total", floats(count))
        for _ in range(2):
            with pytest.raises(OutOfMemory):
                session.run(program, [session.pool.lease(4 * count)])
        assert squares(session, 3.0) == [9.0]
        assert session.stats()["blocks"] == 0


def test_residuals_past_the_budget_are_computed_again(
    worker: Worker, lane: str
) -> None:
    """The oldest residual goes when the budget is used up, and its backward gives the right
    gradient all the same."""
    with connect(worker.address, lane=lane) as session:
        f = RemoteJaxFunction(session, name="square")
        count = _BUDGET // 4 * 3 // 4
        xs = [torch.full((count,), float(i), requires_grad=True) for i in (1, 2, 3)]
        ys = [f(x) for x in xs]
        assert session.stats()["residuals"] == 1
        assert session.stats()["residual_bytes"] == 4 * count
        for x, y in zip(xs, ys, strict=True):
            y.sum().backward()
            assert torch.equal(x.grad, 2 * x)


def test_a_residual_larger_than_the_budget_is_computed_again(
    worker: Worker, lane: str
) -> None:
    """A residual that never fits is not kept, and its backward gives the right gradient all the
    same."""
    with connect(worker.address, lane=lane) as session:
        x = torch.full((_BUDGET,), 5.0, requires_grad=True)
        y = RemoteJaxFunction(session, name="square")(x)
        assert session.stats()["residuals"] == 0
        y.sum().backward()
        assert torch.equal(x.grad, 2 * x)


_WITHOUT_DESCRIPTORS = """
    import os, resource, sys, threading
    from bridge_client import connect
    from bridge_wire.errors import BridgeError, OutOfMemory
    from tests.calls import squares
    from tests.workers import Background

    def open_files():
        return len(os.listdir("/proc/self/fd"))

    def raises(kind, use):
        try:
            use()
        except kind as error:
            return str(error)
        raise AssertionError(f"no {kind.__name__}")

    address, lane = sys.argv[1:]
    session = connect(address, lane=lane)
    assert squares(session, 2.0) == [4.0]
    before = open_files()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(64)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare), limits[1]))
    held = []
    try:
        while True:
            held.append(os.dup(0))
    except OSError:
        pass
    print(raises(OutOfMemory, lambda: session.pool.lease(64 << 20)))
    print(raises(BridgeError, lambda: connect(address, lane=lane)))
    assert squares(session, 3.0) == [9.0]
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for fd in held + spare:
        os.close(fd)
    assert open_files() <= before, (open_files(), before)
    block = session.pool.lease(64 << 20)
    assert squares(session, 4.0) == [16.0]
    session.close()
"""


def test_running_out_of_descriptors_is_a_clear_error(worker: Worker, lane: str) -> None:
    """Without a free descriptor, new slabs and connections fail with a clear error, and what
    there is works on."""
    done = run_program(_WITHOUT_DESCRIPTORS, worker.address, lane)
    assert done.returncode == 0, done.stderr
    assert "open files" in done.stdout.splitlines()[0]


def test_a_worker_out_of_descriptors_refuses_and_recovers(
    start: Callable[..., Worker],
) -> None:
    """A worker without a free descriptor takes no new slab, and the client is told; later it
    takes it."""
    worker = start().wait_until_ready()
    with connect(worker.address, lane="local") as session:
        assert squares(session, 2.0) == [4.0]
        count = 8 << 20
        # Which takes descriptors too.
        program = prepare(session, "total", floats(count))
        limits = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
        # The lowest free number is out of bounds, whatever is open above it.
        taken = {int(fd) for fd in os.listdir(f"/proc/{worker.pid}/fd")}
        lowest = next(fd for fd in range(len(taken) + 1) if fd not in taken)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (lowest, limits[1]))
        with pytest.raises(BridgeError):
            session.run(program, [session.pool.lease(4 * count)])
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, limits)
        assert squares(session, 3.0) == [9.0]
        assert len(values(*session.run(program, [session.pool.lease(4 * count)]))) == 1


_WITHOUT_MEMFD = """
    import logging, os, sys
    del os.memfd_create
    from bridge_client import connect
    from bridge_wire.errors import LaneUnavailable
    from tests.calls import squares

    logged = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    with connect(sys.argv[1]) as session:
        assert (session.lane, session.memory) == ("grpc", "inline")
        assert squares(session, 3.0) == [9.0]
        assert squares(session, 4.0) == [16.0]
        assert session.stats()["fallbacks"] == 1
    assert len(logged) == 1, logged
    print(logged[0])
    for terms in ({"lane": "local"}, {"require": "memfd"}):
        try:
            connect(sys.argv[1], **terms)
        except LaneUnavailable as error:
            assert "memfd" in str(error)
        else:
            raise AssertionError(f"{terms} was granted")
"""


def test_without_memfd_the_bytes_travel_inline(worker: Worker) -> None:
    """Where the system has no memfd the client says so once and sends the bytes, unless it was
    told not to."""
    done = run_program(_WITHOUT_MEMFD, worker.address)
    assert done.returncode == 0, done.stderr
    assert "no memfd" in done.stdout


_WITHOUT_LINUX = """
    import os, socket, sys
    missing = (os, "memfd_create"), (os, "sched_getaffinity"), (socket, "MSG_CMSG_CLOEXEC")
    for module, name in missing:
        delattr(module, name)
    from bridge_client import connect
    from tests.calls import floats, placed, prepare, values
    with connect(sys.argv[1]) as session:
        assert (session.lane, session.memory) == ("grpc", "inline")
        square = prepare(session, "square", floats(2))
        assert values(*session.run(square, [placed(session, [2.0, 3.0])])) == [4.0, 9.0]
        from bridge_wire.memory.copying import copy
        source, target = session.pool.lease(8 << 20), session.pool.lease(8 << 20)
        source.buffer[-1] = 7
        copy(target.pointer, source.pointer, source.nbytes)
        assert target.buffer[-1] == 7
"""


def test_without_what_only_linux_has_the_bytes_travel_inline(worker: Worker) -> None:
    """On a system without memfds, core masks and close-on-exec descriptor passing, a client
    still works, over gRPC."""
    done = run_program(_WITHOUT_LINUX, worker.address)
    assert done.returncode == 0, done.stderr


def test_very_many_dropped_residuals_fit_in_what_is_sent(
    worker: Worker, lane: str
) -> None:
    """However many residuals a program has let go of since its last call, the next calls tell
    the worker."""
    with connect(worker.address, lane=lane) as session:
        session._unfinished.release_later(range(2**60, 2**60 + 300_000))
        for _ in range(3):
            assert squares(session, 2.0) == [4.0]
        assert not session._unfinished.to_release()


# Forks --------------------------------------------------------------------------------------------

_FORKING = """
    import os, sys
    from bridge_client import connect, spawn
    from bridge_wire.errors import ResidualGone
    from tests.calls import floats, placed, prepare, squares, values
    address, how, python = sys.argv[1:]
    if how == "spawned":
        session = spawn("tests.models:square", python=python)
    else:
        session = connect(address, lane=how)
    program = prepare(session, "square", floats(2))
    keeping = program.keeping((0,))
    pullback = keeping.pullback((0,), (0,))
    made, residual = session.run_keeping(keeping, [placed(session, [1.0, 2.0])])
    pids = []
    for child in range(2):
        pid = os.fork()
        if pid == 0:
            outputs = session.run(program, [placed(session, [child, 3.0])])
            assert values(*outputs) == [child * child, 9.0]
            assert squares(session, 4.0, 5.0, 6.0) == [16.0, 25.0, 36.0]
            try:
                session.run_pullback(pullback, residual, [placed(session, [1.0, 1.0])])
            except ResidualGone:
                pass
            else:
                raise AssertionError("a child has its parent's residual")
            sys.exit(0)
        pids.append(pid)
        assert values(*session.run(program, [placed(session, [7.0, 8.0])])) == [49.0, 64.0]
    for pid in pids:
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
    gradients = session.run_pullback(pullback, residual, [placed(session, [1.0, 1.0])])
    assert values(*gradients) == [2.0, 4.0]
    assert values(*made) == [1.0, 4.0]
    assert squares(session, 9.0) == [81.0]
"""


@pytest.mark.parametrize("how", ["local", "grpc", "spawned"])
def test_a_forked_child_has_a_session_of_its_own(worker: Worker, how: str) -> None:
    """A child calls over its own connection; neither its calls nor its end disturb the parent's
    session and worker."""
    done = run_program(_FORKING, worker.address, how, python_of(".venv-jax"))
    assert done.returncode == 0, done.stderr


_LOADING = """
    import sys, torch
    from torch.utils.data import DataLoader, Dataset
    from bridge_client import connect
    from bridge_client.torch import RemoteJaxFunction
    address, lane = sys.argv[1:]
    f = RemoteJaxFunction(connect(address, lane=lane), name="square")

    class Squares(Dataset):
        def __len__(self):
            return 16
        def __getitem__(self, i):
            return f(torch.tensor([float(i)]))

    x = torch.tensor([3.0], requires_grad=True)
    y = f(x)
    for epoch in range(2):
        loader = DataLoader(Squares(), batch_size=4, num_workers=2, multiprocessing_context="fork")
        batches = []
        for batch in loader:
            batches.append(batch)
            assert f(torch.tensor([2.0])).item() == 4.0
        assert torch.cat(batches).flatten().tolist() == [float(i * i) for i in range(16)]
    y.backward()
    assert x.grad.item() == 6.0
"""


def test_a_data_loader_may_call_the_function(worker: Worker, lane: str) -> None:
    """The forked workers of a DataLoader call a remote function while their parent does."""
    done = run_program(_LOADING, worker.address, lane, venv=".venv-torch")
    assert done.returncode == 0, done.stderr


# Spawning -----------------------------------------------------------------------------------------


def test_a_worker_that_is_not_ready_in_time_is_a_startup_timeout(
    temporary: Path,
) -> None:
    """Past startup_timeout_s the child is killed, StartupTimeout raised, and nothing left."""
    before = children()
    with pytest.raises(StartupTimeout, match=r"0\.05 s"):
        _spawn(startup_timeout_s=0.05)
    assert children() == before
    assert not list(temporary.iterdir())


def test_a_worker_that_ends_before_it_is_ready_is_a_crash(temporary: Path) -> None:
    """A child that ends early raises WorkerCrashed, with its exit status and last lines; nothing
    is left."""
    before = children()
    with pytest.raises(
        WorkerCrashed, match=r"status 2 [\s\S]*no attribute 'sqare'.*'square'"
    ):
        spawn("tests.models:sqare", python=python_of(".venv-jax"), cwd=ROOT)
    assert children() == before
    assert not list(temporary.iterdir())


def test_an_interpreter_that_is_not_there_is_a_crash(temporary: Path) -> None:
    """An interpreter that cannot be started raises WorkerCrashed, which names it."""
    with pytest.raises(WorkerCrashed, match="no-such-python"):
        spawn("tests.models:square", python=temporary / "no-such-python")
    assert not list(temporary.iterdir())


def test_missing_cwd_is_told(temporary: Path) -> None:
    """A cwd that is no directory is named, and not the interpreter."""
    with pytest.raises(CallerError, match=r"cwd='.*no-such' is not a directory"):
        spawn("m:f", python=python_of(".venv-jax"), cwd=temporary / "no-such")
    assert not list(temporary.iterdir())


def test_close_leaves_nothing_of_a_spawned_worker(temporary: Path) -> None:
    """A spawned worker listens in a directory of mode 0700; process, sockets and directory go
    with the session."""
    before = children()
    with _spawn() as session:
        (directory,) = temporary.iterdir()
        assert directory.stat().st_mode & 0o777 == 0o700
        assert session.address == f"unix:{directory}/worker.sock"
        (pid,) = children() - before
        assert squares(session, 2.0) == [4.0]
    assert not is_running(pid)
    assert children() == before
    assert not list(temporary.iterdir())


def test_a_spawned_workers_log_reaches_the_parent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The worker's log lines come out of the logger `bridge_client.worker`, at their level."""
    caplog.set_level(logging.DEBUG, logger="bridge_client.worker")
    with _spawn(args=["--log-level", "debug"]):
        pass
    told = [
        record for record in caplog.records if record.name == "bridge_client.worker"
    ]
    assert any(
        r.levelno == logging.DEBUG and "allocator" in r.getMessage() for r in told
    )
    assert any(r.levelno == logging.INFO and "draining" in r.getMessage() for r in told)


_PARENT = """
    import sys
    from bridge_client import spawn
    from tests.workers import children
    session = spawn("tests.models:square", python=sys.argv[1])
    print(*children(), flush=True)
    sys.stdin.read()
"""


def test_a_spawned_worker_ends_with_a_killed_parent(temporary: Path) -> None:
    """When its parent is killed, a spawned worker ends by itself, and removes what the parent
    has left."""
    with start_program(
        _PARENT, python_of(".venv-jax"), TMPDIR=str(temporary)
    ) as parent:
        (pid,) = map(int, parent.stdout.readline().split())
        assert is_running(pid)
        parent.kill()
        parent.wait()
    assert eventually(lambda: not is_running(pid))
    assert not list(temporary.iterdir())


_UNTIDY_MODULE = """
import logging.config, os, signal, subprocess, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
os.kill(os.getpid(), signal.SIGUSR1)
stderr = {"class": "logging.StreamHandler"}
root = {"handlers": ["e"], "level": "INFO"}
logging.config.dictConfig({"version": 1, "handlers": {"e": stderr}, "root": root})
child = subprocess.Popen(["sleep", "60"])
with open("child.pid", "w") as file:
    file.write(str(child.pid))
print("no end of line", end="", flush=True)
sys.stdout.close()
identity = abs
"""


def test_a_worker_is_spawned_and_ended_whatever_its_module_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither what a module prints, nor how it sets up logging, nor its own signals, nor a process
    that it leaves, nor a long TMPDIR, nor variables that are meant for another worker keep `spawn`
    from starting a worker, or `close` from ending it.
    """
    caplog.set_level(logging.INFO, logger="bridge_client.worker")
    (tmp_path / "untidy.py").write_text(_UNTIDY_MODULE)
    long = tmp_path / ("t" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    for name in ("TOKEN", "TOKEN_FILE", "FACTORY"):
        monkeypatch.setenv(f"BRIDGE_{name}", "1")
    session = spawn("untidy:identity", python=python_of(".venv-jax"), cwd=tmp_path)
    try:
        assert list(session.models) == ["identity"]
        assert values(
            *session.run(
                prepare(session, "identity", floats(1)), [placed(session, [-1.0])]
            )
        ) == [1.0]
        session.close()
    finally:
        os.kill(int((tmp_path / "child.pid").read_text()), signal.SIGKILL)
    assert not list(long.iterdir())
    assert "draining" in caplog.text


# The worker is told to end ------------------------------------------------------------------------


def test_a_drain_lets_calls_finish(
    start: Callable[..., Worker], gate: Gate, tmp_path: Path, lane: str
) -> None:
    """After SIGTERM calls under way finish, however large their outputs, new ones are refused, and
    the worker ends with status 0 and without its sockets.
    """
    worker = start().wait_until_ready()
    side = 8192
    with (
        connect(worker.address, lane=lane) as session,
        connect(worker.address, lane=lane, retry_s=0) as other,
    ):
        assert squares(other, 2.0) == [4.0]
        program = prepare(session, "gated_outer", floats(side), str(gate))
        running = Background(
            lambda: session.run(program, [placed(session, [1.0] * side)])
        )
        gate.wait_for_a_caller()
        worker.terminate()
        assert eventually(lambda: "draining" in worker.stderr)
        with pytest.raises(WorkerUnavailable):
            squares(other, 2.0)
        with pytest.raises(WorkerUnavailable):
            connect(worker.address, lane=lane)
        assert worker.process.poll() is None
        gate.open()
        (made,) = running.result()
        assert (
            made.buffer.tobytes()
            == placed(session, [4.0]).buffer.tobytes() * side * side
        )
        assert worker.wait() == 0
        assert not list(tmp_path.glob("*.sock*"))


def test_a_second_signal_ends_the_worker_at_once(
    start: Callable[..., Worker], gate: Gate
) -> None:
    """A second SIGTERM ends a worker that is still draining, with status 1."""
    worker = start().wait_until_ready()
    with connect(worker.address) as session:
        program = prepare(session, "gated", floats(1), str(gate))
        running = Background(lambda: session.run(program, [placed(session, [1.0])]))
        gate.wait_for_a_caller()
        worker.terminate()
        assert eventually(lambda: "draining" in worker.stderr)
        worker.terminate()
        assert worker.wait() == 1
        with pytest.raises(WorkerDied):
            running.result()


def test_a_signal_ends_a_worker_that_is_starting(
    start: Callable[..., Worker], gate: Gate, tmp_path: Path
) -> None:
    """A worker that imports or compiles has nothing to drain: SIGTERM ends it at once, with status
    0, and its sockets go.
    """
    worker = start(
        "--warmup", "gated_while_traced=float32[2,2]", BRIDGE_TEST_GATE=str(gate)
    )
    gate.wait_for_a_caller()
    worker.terminate()
    assert worker.wait() == 0
    assert not worker.is_ready
    assert not list(tmp_path.glob("*.sock*"))


_IMPATIENT = """
    import sys, threading
    from bridge_server import cli
    cli._LAST_S = 0.1
    threading.Thread(target=threading.Event().wait, name="for ever").start()
    models = ["--jax-model=tests.models:gated_while_traced"]
    sys.exit(cli.main([*models, "--drain-s=0.1", "--listen", sys.argv[1]]))
"""


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
def test_what_never_ends_does_not_keep_a_worker(
    gate: Gate, tmp_path: Path, is_busy: bool
) -> None:
    """A drained worker does not wait for threads that models have started, with status 0; past the
    time for draining it ends without the calls, with status 1.
    """
    address = f"unix:{tmp_path}/worker.sock"
    with start_program(
        _IMPATIENT, address, venv=".venv-jax", BRIDGE_TEST_GATE=str(gate)
    ) as program:
        assert "ready" in program.stdout.readline()
        with connect(address) as session:
            calling = (
                Background(lambda: prepare(session, "gated_while_traced", floats(1)))
                if is_busy
                else None
            )
            if calling is not None:
                gate.wait_for_a_caller()
            program.terminate()
            said = program.stderr.read()
            assert program.wait(30) == is_busy
            assert (
                "gave up on calls" if is_busy else "threads: ['MainThread', 'for ever']"
            ) in said
            if calling is not None:
                with pytest.raises(WorkerDied):
                    calling.result()


def test_a_signal_reaches_the_worker_in_any_of_its_threads(
    start: Callable[..., Worker],
) -> None:
    """The kernel hands a signal to any thread of a process: it ends the worker nevertheless."""
    worker = start().wait_until_ready()
    *_, last = sorted(int(thread) for thread in os.listdir(f"/proc/{worker.pid}/task"))
    assert last != worker.pid
    os.kill(last, signal.SIGTERM)
    assert worker.wait() == 0


def _health(channel: grpc.Channel, service: str = _SERVICE) -> int | None:
    try:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status
    except grpc.RpcError:
        return None


def test_health_tells_when_calls_are_welcome(
    start: Callable[..., Worker], gate: Gate, tmp_path: Path
) -> None:
    """A worker is NOT_SERVING until it is warm, SERVING then, also while a model computes, and
    NOT_SERVING when it drains.
    """
    warm_up = ["--warmup", "gated_while_traced=float32[2,2]"]
    worker = start(*warm_up, BRIDGE_TEST_GATE=str(gate))
    gate.wait_for_a_caller()
    with grpc.insecure_channel(f"unix:{tmp_path}/worker.sock") as channel:
        assert _health(channel) == _health(channel, "") == _NOT_SERVING
        assert not worker.is_ready
        gate.open()
        worker.wait_until_ready()
        assert _health(channel) == _health(channel, "") == _SERVING

        second = Gate(tmp_path / "second")
        with connect(worker.address) as session:
            program = prepare(session, "gated", floats(1), str(second))
            running = Background(
                lambda: values(*session.run(program, [placed(session, [1.0])]))
            )
            second.wait_for_a_caller()
            assert _health(channel) == _SERVING
            worker.terminate()
            assert eventually(lambda: _health(channel) == _NOT_SERVING)
            second.open()
            assert running.result() == [2.0]
    assert worker.wait() == 0


def test_what_was_warmed_up_is_not_traced_again(
    start: Callable[..., Worker], gate: Gate
) -> None:
    """A call of a signature given to --warmup needs no tracing."""
    gate.open()
    worker = start(
        "--warmup", "gated_while_traced=float32[2,2]", BRIDGE_TEST_GATE=str(gate)
    ).wait_until_ready()
    Path(str(gate)).unlink()
    with connect(worker.address, timeout_s=10.0) as session:
        x = torch.ones(2, 2, requires_grad=True)
        RemoteJaxFunction(session, name="gated_while_traced")(x).sum().backward()
        assert torch.equal(x.grad, torch.full((2, 2), 2.0))


def test_reflection_lists_the_service(worker: Worker) -> None:
    """Tools find the worker's services by gRPC reflection."""
    with grpc.insecure_channel(worker.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (reply,) = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
    assert {"bridge.v1.Bridge", "grpc.health.v1.Health"} <= {
        s.name for s in reply.list_services_response.service
    }


# The client ends ----------------------------------------------------------------------------------

_UNTIDY = """
    import sys, threading, torch
    from bridge_client import connect, spawn
    from bridge_client.torch import RemoteJaxFunction
    address, how, python = sys.argv[1:]
    if how == "spawned":
        session = spawn("tests.models:square", python=python)
    else:
        session = connect(address, lane=how)
    f = RemoteJaxFunction(session, name="square")
    x = torch.ones(1000, requires_grad=True)
    graph = f(x)
    kept = [f(torch.full((1000,), float(i))) for i in range(10)]
    graph.sum().backward(retain_graph=True)
    thread = threading.Thread(target=lambda: kept.append(f(x)))
    thread.start()
    thread.join()
    assert session.stats()["residuals"] == 2
"""


@pytest.mark.parametrize("how", ["local", "grpc", "spawned"])
def test_a_program_may_end_without_closing_anything(worker: Worker, how: str) -> None:
    """With a live session, live outputs and graphs, a program ends with status 0 and without a
    word."""
    done = run_program(
        _UNTIDY, worker.address, how, python_of(".venv-jax"), venv=".venv-torch"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert eventually(lambda: slabs_mapped(worker.pid) == 0)


def test_a_function_of_a_closed_session_says_so(worker: Worker) -> None:
    """Calling a function, or its backward, after its session was closed raises SessionClosed."""
    with connect(worker.address) as session:
        f = RemoteJaxFunction(session, name="square")
        x = _numbers()
        y = f(x)
    with pytest.raises(SessionClosed):
        f(x)
    with pytest.raises(SessionClosed):
        y.sum().backward()
    assert torch.equal(y, x * x)
