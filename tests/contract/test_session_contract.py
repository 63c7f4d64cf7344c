"""The contract of a session, without any framework on the client's side: the same on every lane."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bridge_client import Session, connect
from bridge_client.inproc import host
from bridge_wire.errors import (
    CallerError,
    CallTimeout,
    LaneUnavailable,
    RemoteModelError,
    ResidualGone,
    SessionClosed,
    UnknownModel,
    WorkerUnavailable,
)
from bridge_wire.memory.pool import Block
from bridge_wire.pb import bridge_pb2 as pb
from tests import models as hosted
from tests.calls import SCALAR, floats, placed, prepare, squares, values
from tests.conftest import eventually
from tests.server.torch_server import models as torch_models
from tests.workers import Background, Gate, Worker, models, serving

_STATS = {
    "calls",
    "bytes_copied",
    "bytes_through_host",
    "blocks",
    "slab_bytes",
    "residuals",
    "residual_bytes",
    "fallbacks",
    "restarts",
    "gpu_lanes_by_words",
    "gpu_lanes_by_events",
    "gpu_lanes_by_host",
}
_GIB = 1 << 30
_HOSTED = ("square", "outer", "total", "refusing", "failing", "gated")
_REMOTE = ("local", "grpc", "tcp", "local to torch", "grpc to torch")
_MEMORY = {"local": "memfd", "grpc": "inline", "inproc": "dlpack"}

remote_only = pytest.mark.parametrize("lane", _REMOTE, indirect=True)


@pytest.fixture(scope="module")
def tcp_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker that listens on TCP."""
    with serving(
        tmp_path_factory.mktemp("tcp"), "--listen", "127.0.0.1:0", *models(*_HOSTED)
    ) as worker:
        yield worker


@pytest.fixture(params=[*_REMOTE, "inproc", "inproc to torch"])
def lane(request: pytest.FixtureRequest) -> str:
    """Each lane; gRPC over a Unix socket and over TCP; to a worker with JAX models, and to one
    with torch models."""
    return request.param


@pytest.fixture
def connected(
    lane: str, jax_worker: Session, torch_worker: Session, tcp_worker: Worker
) -> Callable[[], Session]:
    """Makes sessions over the lane, or in this process."""
    if lane == "inproc":
        return lambda: host(jax_model={name: getattr(hosted, name) for name in _HOSTED})
    if lane == "inproc to torch":
        return lambda: host(
            torch_model={name: getattr(torch_models, name) for name in _HOSTED}
        )
    workers = {
        "tcp": tcp_worker,
        "local to torch": torch_worker,
        "grpc to torch": torch_worker,
    }
    address = workers.get(lane, jax_worker).address
    return lambda: connect(
        address, lane="local" if lane.startswith("local") else "grpc"
    )


@pytest.fixture
def session(connected: Callable[[], Session]) -> Iterator[Session]:
    """A session over the lane."""
    with connected() as session:
        yield session


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate that does not stay shut after the test."""
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


# What a session tells -----------------------------------------------------------------------------


def test_the_lane_and_the_memory_kind_are_what_was_asked_for(
    session: Session, lane: str
) -> None:
    """A local lane shares memory, a gRPC lane sends the bytes, and in one process arrays are
    handed over."""
    expected = "grpc" if lane == "tcp" else lane.partition(" ")[0]
    assert (session.lane, session.memory) == (expected, _MEMORY[expected])


def test_models_have_names_docstrings_and_arguments(session: Session) -> None:
    """A session knows each model's name, docstring and positional arguments."""
    model = session.models["gated"]
    assert model.name == "gated"
    assert model.doc.startswith("Twice the input")
    assert model.arguments == ("x", "gate", "when")
    assert model.parameters == ()
    assert session.model("gated") == model


def test_models_cannot_be_changed(session: Session) -> None:
    """The mapping of the models is read-only."""
    with pytest.raises(TypeError):
        session.models["another"] = session.models["square"]


def test_an_unknown_model_is_named_with_those_there_are(session: Session) -> None:
    """Asking for a model that is not hosted raises UnknownModel, here and on the worker."""
    with pytest.raises(UnknownModel, match=r"'sqare'.*'square'"):
        session.model("sqare")
    with pytest.raises(UnknownModel, match=r"'sqare'.*'square'"):
        prepare(session, "sqare", SCALAR)
    assert squares(session, 3.0) == [9.0]


def test_a_model_must_be_named_where_there_are_several(session: Session) -> None:
    """Not naming a model where several are hosted raises UnknownModel."""
    with pytest.raises(UnknownModel, match="name="):
        session.model(None)


def test_stats_count_what_a_session_does(session: Session, lane: str) -> None:
    """The statistics have the documented keys, and count calls and the bytes that were copied by
    either side."""
    before = session.stats()
    assert set(before) == _STATS
    assert (before["calls"], before["bytes_copied"], before["fallbacks"]) == (0, 0, 0)
    program = prepare(session, "outer", floats(8))
    made = session.run(program, [placed(session, [1.0] * 8)], copied=32)
    after = session.stats()
    assert after["calls"] == 1
    outputs = 8 * 8 * 4
    by_lane = {"local": outputs, "grpc": outputs + 8 * 4, "inproc": 0}
    assert after["bytes_copied"] == 32 + by_lane[session.lane]
    assert (after["blocks"], len(made)) == (1, 1)
    assert after["slab_bytes"] >= outputs


# Calls --------------------------------------------------------------------------------------------


def test_a_run_returns_the_outputs(session: Session) -> None:
    """The outputs of a run lie in blocks of the session."""
    program = prepare(session, "square", floats(3))
    assert program.outputs == (floats(3),)
    (made,) = session.run(program, [placed(session, [1.0, 2.0, -3.0])])
    assert isinstance(made, Block)
    assert values(made) == [1.0, 4.0, 9.0]


def test_a_program_runs_many_times(session: Session) -> None:
    """A program reads its inputs anew at each run, in the same block too."""
    program = prepare(session, "square", floats(2))
    block = placed(session, [1.0, 2.0])
    assert values(*session.run(program, [block])) == [1.0, 4.0]
    block.buffer[:] = placed(session, [5.0, 6.0]).buffer
    assert values(*session.run(program, [block])) == [25.0, 36.0]


def test_scalars_and_empty_arrays_pass(session: Session) -> None:
    """Arrays of no dimension and of no elements are inputs and outputs like any other."""
    assert values(
        *session.run(prepare(session, "square", SCALAR), [placed(session, [3.0])])
    ) == [9.0]
    empty = prepare(session, "square", floats(0, 4))
    (made,) = session.run(empty, [session.pool.lease(0)])
    assert made.nbytes == 0
    assert values(
        *session.run(prepare(session, "total", floats(0)), [session.pool.lease(0)])
    ) == [0.0]


def test_a_pullback_returns_the_cotangents(session: Session) -> None:
    """A run that keeps a residual can be pulled back, as often as one likes."""
    program = prepare(session, "square", floats(3))
    (made,), residual = session.run_keeping(
        program.keeping((0,)), [placed(session, [1.0, 2.0, 3.0])]
    )
    assert values(made) == [1.0, 4.0, 9.0]
    pullback = program.keeping((0,)).pullback((0,), (0,))
    for scale in (1.0, 10.0):
        (cotangent,) = session.run_pullback(
            pullback, residual, [placed(session, [scale] * 3)]
        )
        assert values(cotangent) == [2 * scale, 4 * scale, 6 * scale]


def test_a_vjp_program_needs_no_residual(session: Session) -> None:
    """The vjp of a program runs on its inputs and cotangents."""
    vjp = prepare(session, "square", floats(2)).vjp((0,), (0,))
    (cotangent,) = session.run(
        vjp, [placed(session, [3.0, 4.0]), placed(session, [1.0, 2.0])]
    )
    assert values(cotangent) == [6.0, 16.0]


def test_a_dropped_residual_goes_with_the_next_request(session: Session) -> None:
    """A residual lives on the worker until it is dropped; its pullback then raises ResidualGone."""
    program = prepare(session, "square", floats(256))
    keeping = program.keeping((0,))
    pullback = keeping.pullback((0,), (0,))
    ids = [
        session.run_keeping(keeping, [placed(session, [1.0] * 256)])[1]
        for _ in range(3)
    ]
    stats = session.stats()
    # Torch's holds but the input, which is the client's.
    kept = 0 if session.framework == "torch" else 1024
    assert (stats["residuals"], stats["residual_bytes"]) == (3, 3 * kept)
    session.drop_residual(ids[0])
    session.drop_residual(ids[0])
    assert session.stats()["residuals"] == 2
    with pytest.raises(ResidualGone):
        session.run_pullback(pullback, ids[0], [placed(session, [1.0] * 256)])
    session.drop_residual(ids[1])
    assert (
        values(*session.run_pullback(pullback, ids[2], [placed(session, [1.0] * 256)]))
        == [2.0] * 256
    )
    session.drop_residual(ids[2])
    stats = session.stats()
    assert (stats["residuals"], stats["residual_bytes"]) == (0, 0)


def test_the_inputs_of_a_residual_stay_leased(session: Session) -> None:
    """The block of an input that a residual may alias is not reused before the residual is
    dropped."""
    keeping = prepare(session, "square", floats(1024)).keeping((0,))
    made, residual = session.run_keeping(keeping, [placed(session, [3.0] * 1024)])
    assert session.stats()["blocks"] == 2
    others = [placed(session, [0.0] * 1024) for _ in range(8)]
    (cotangent,) = session.run_pullback(
        keeping.pullback((0,), (0,)), residual, [placed(session, [1.0] * 1024)]
    )
    assert values(cotangent) == [6.0] * 1024
    del made, others, cotangent
    session.drop_residual(residual)
    assert session.stats()["blocks"] == 0


def test_blocks_return_to_the_pool(session: Session) -> None:
    """Many calls need no more memory than one, and leave no block leased."""
    program = prepare(session, "outer", floats(64))
    session.run(program, [placed(session, [1.0] * 64)])
    slab_bytes = session.stats()["slab_bytes"]
    for _ in range(50):
        session.run(program, [placed(session, [1.0] * 64)])
    stats = session.stats()
    assert (stats["calls"], stats["blocks"], stats["slab_bytes"]) == (51, 0, slab_bytes)


def test_memory_grows_with_the_need(session: Session) -> None:
    """Blocks in slabs that were added after the first call are as good as the first."""
    assert squares(session, 2.0) == [4.0]
    slab_bytes = session.stats()["slab_bytes"]
    held = session.pool.lease(slab_bytes)
    count = 1 << 16
    (made,) = session.run(
        prepare(session, "square", floats(count)), [placed(session, [2.0] * count)]
    )
    assert values(made) == [4.0] * count
    assert session.stats()["slab_bytes"] > slab_bytes
    del held


def test_an_error_while_tracing_is_the_models(session: Session) -> None:
    """What a model raises while it is traced arrives as RemoteModelError, with its type and
    traceback."""
    with pytest.raises(RemoteModelError, match="no arrays of shape") as caught:
        prepare(session, "refusing", floats(2, 3))
    assert caught.value.remote_type == "builtins.ValueError"
    assert "in refusing" in caught.value.remote_traceback
    assert squares(session, 2.0) == [4.0]


def test_an_error_while_running_is_the_models(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """What a model raises while it runs arrives as RemoteModelError; the same lane serves on,
    and no block is lost."""
    # A log record of JAX's would hold the frames of the call: in one process also those that hold
    # the blocks.
    caplog.set_level("CRITICAL", "jax._src.callback")
    program = prepare(session, "failing", floats(2))
    for _ in range(3):
        with pytest.raises(RemoteModelError, match="not to my taste"):
            session.run(program, [placed(session, [1.0, 2.0])])
    assert squares(session, 2.0) == [4.0]
    assert session.stats()["blocks"] == 0


@remote_only
def test_a_call_past_its_time_raises_call_timeout(session: Session, gate: Gate) -> None:
    """A call that takes longer than timeout_s raises CallTimeout, and later calls work."""
    program = prepare(session, "gated", floats(1), str(gate))
    with pytest.raises(CallTimeout, match=r"0\.2 s"):
        session.run(program, [placed(session, [1.0])], timeout_s=0.2)
    assert squares(session, 2.0) == [4.0]
    gate.open()
    assert values(*session.run(program, [placed(session, [1.0])], timeout_s=30.0)) == [
        2.0
    ]


@remote_only
def test_the_timeout_of_a_session_is_that_of_its_calls(
    connected: Callable[[], Session], gate: Gate
) -> None:
    """A call without a timeout_s of its own has the session's."""
    with connected() as session:
        program = prepare(session, "gated", floats(1), str(gate))
        session.timeout_s = 0.2
        with pytest.raises(CallTimeout):
            session.run(program, [placed(session, [1.0])])


# Side by side -------------------------------------------------------------------------------------


def test_threads_call_at_once(session: Session) -> None:
    """Calls of several threads on one session each get their own result."""
    program = prepare(session, "square", floats(64))
    start = threading.Barrier(4)

    def calls(thread: int) -> bool:
        start.wait()
        for i in range(25):
            number = float(100 * thread + i)
            if (
                values(*session.run(program, [placed(session, [number] * 64)]))
                != [number**2] * 64
            ):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(calls, range(4)))
    assert session.stats()["calls"] == 100
    assert session.stats()["blocks"] == 0


def test_threads_prepare_at_once(session: Session) -> None:
    """Several threads may ask for the same new program at the same time."""
    start = threading.Barrier(4)

    def call(_: int) -> list[float]:
        start.wait()
        return squares(session, *range(17))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(4))) == [[float(i * i) for i in range(17)]] * 4


def test_calls_of_one_session_run_side_by_side(
    session: Session, gate: Gate, tmp_path: Path
) -> None:
    """While two calls are under way on a session, a third one comes and goes."""
    gates = [gate, Gate(tmp_path / "second")]
    programs = [prepare(session, "gated", floats(1), str(gate)) for gate in gates]
    running = [
        Background(
            lambda program=program: values(
                *session.run(program, [placed(session, [4.0])])
            )
        )
        for program in programs
    ]
    for each in gates:
        each.wait_for_a_caller()
    assert squares(session, 5.0) == [25.0]
    for each in gates:
        each.open()
    assert [call.result() for call in running] == [[8.0], [8.0]]


def test_sessions_do_not_wait_for_each_other(
    connected: Callable[[], Session], gate: Gate
) -> None:
    """A call under way on one session does not hold up another session."""
    with connected() as first, connected() as second:
        program = prepare(first, "gated", floats(1), str(gate))
        running = Background(
            lambda: values(*first.run(program, [placed(first, [4.0])]))
        )
        gate.wait_for_a_caller()
        assert squares(second, 6.0) == [36.0]
        gate.open()
        assert running.result() == [8.0]


def test_sessions_share_no_residuals(connected: Callable[[], Session]) -> None:
    """A session neither sees nor reads what another one keeps, and keeps its own when the other
    ends."""
    with connected() as first:
        keeping = prepare(first, "square", floats(2)).keeping((0,))
        _, residual = first.run_keeping(keeping, [placed(first, [1.0, 2.0])])
        with connected() as second:
            theirs = (
                prepare(second, "square", floats(2)).keeping((0,)).pullback((0,), (0,))
            )
            with pytest.raises(ResidualGone):
                second.run_pullback(theirs, residual, [placed(second, [1.0, 1.0])])
            assert second.stats()["residuals"] == 0
        (made,) = first.run_pullback(
            keeping.pullback((0,), (0,)), residual, [placed(first, [1.0, 1.0])]
        )
        assert values(made) == [2.0, 4.0]


# The end ------------------------------------------------------------------------------------------


def test_close_is_idempotent(connected: Callable[[], Session]) -> None:
    """A session can be closed again."""
    session = connected()
    assert squares(session, 2.0) == [4.0]
    session.close()
    session.close()


def test_a_session_is_a_context_manager(connected: Callable[[], Session]) -> None:
    """Leaving the block closes the session, by an exception too."""
    with pytest.raises(KeyError), connected() as session:
        raise KeyError("anything")
    with pytest.raises(SessionClosed):
        _ = session.models


def test_a_closed_session_says_so(connected: Callable[[], Session]) -> None:
    """Whatever needs the worker raises SessionClosed after close."""
    session = connected()
    program = prepare(session, "square", floats(1))
    keeping = program.keeping((0,))
    block = placed(session, [1.0])
    (_,), residual = session.run_keeping(keeping, [block])
    pullback = keeping.pullback((0,), (0,))
    session.close()
    uses: list[Callable[[], object]] = [
        lambda: session.models,
        lambda: session.model("square"),
        lambda: session.lane,
        lambda: session.memory,
        lambda: session.x64,
        lambda: session.prepare_call(pb.Call(model="square")),
        lambda: session.run(program, [block]),
        lambda: session.run_keeping(keeping, [block]),
        lambda: session.run_pullback(pullback, residual, [block]),
        lambda: session.pool.lease(4),
    ]
    for use in uses:
        with pytest.raises(SessionClosed):
            use()


def test_outputs_outlive_the_session(connected: Callable[[], Session]) -> None:
    """The blocks of a closed session keep their contents."""
    with connected() as session:
        (made,) = session.run(
            prepare(session, "square", floats(2)), [placed(session, [3.0, 4.0])]
        )
    assert values(made) == [9.0, 16.0]


def test_close_ends_a_call_under_way(
    connected: Callable[[], Session], gate: Gate
) -> None:
    """A call that is under way when its session is closed raises; it neither hangs nor returns
    garbage."""
    session = connected()
    program = prepare(session, "gated", floats(1), str(gate))
    running = Background(
        lambda: values(*session.run(program, [placed(session, [4.0])]))
    )
    gate.wait_for_a_caller()
    closing = Background(session.close)
    assert eventually(lambda: session.is_closed)
    gate.open()
    closing.result()
    with contextlib.suppress(SessionClosed, WorkerUnavailable):
        assert running.result() == [8.0]


@remote_only
def test_a_preparation_that_finds_its_connection_ended_makes_a_new_one(
    session: Session,
) -> None:
    """Where another thread has just ended the connection, nothing was sent, and nobody sees
    gRPC's ValueError."""
    assert squares(session, 3.0) == [9.0]
    session._link.abort()
    assert squares(session, 2.0, 3.0) == [4.0, 9.0]


# Which lane ---------------------------------------------------------------------------------------


def test_shared_memory_is_found_over_tcp_too(tcp_worker: Worker) -> None:
    """A client on the worker's host that connects over TCP gets the local lane."""
    with connect(tcp_worker.address, require="memfd") as session:
        assert (session.lane, session.memory) == ("local", "memfd")
        assert squares(session, 3.0) == [9.0]
        assert session.stats()["fallbacks"] == 0


def test_requiring_memfd_over_grpc_is_an_error(jax_worker: Session) -> None:
    """`require="memfd"` and `lane="grpc"` exclude each other."""
    with pytest.raises(LaneUnavailable, match="memfd"):
        connect(jax_worker.address, lane="grpc", require="memfd")


@pytest.mark.parametrize("forced", [None, "local", "grpc"])
def test_requiring_cuda_of_a_worker_without_it_is_an_error(
    jax_worker: Session, forced: str | None
) -> None:
    """`require="cuda_ipc"` is an error where no CUDA memory can be shared."""
    with pytest.raises(LaneUnavailable, match="cuda_ipc"):
        connect(jax_worker.address, lane=forced, require="cuda_ipc")


def test_unknown_lanes_and_memory_kinds_are_refused() -> None:
    """A misspelt `lane` or `require`, or a time limit that is none, is an error before anything
    is connected."""
    for limit in (0, -1, float("nan"), float("inf")):
        with pytest.raises(CallerError, match="timeout_s="):
            connect("unix:/nowhere", timeout_s=limit)
    with pytest.raises(CallerError, match="lane='tcp'"):
        connect("unix:/nowhere", lane="tcp")
    with pytest.raises(CallerError, match="require='shm'"):
        connect("unix:/nowhere", require="shm")
    with pytest.raises(CallerError, match="address"):
        connect("nowhere")


def test_nobody_at_the_address_is_worker_unavailable(tmp_path: Path) -> None:
    """Connecting to where no worker listens raises WorkerUnavailable."""
    for address in (f"unix:{tmp_path}/none.sock", "127.0.0.1:1"):
        with pytest.raises(WorkerUnavailable):
            connect(address)


# Size ---------------------------------------------------------------------------------------------


def test_a_gibibyte_passes_by_value_in_both_directions(tcp_worker: Worker) -> None:
    """1 GiB over gRPC is whole and in order, as an input and as an output."""
    with connect(tcp_worker.address, lane="grpc") as session:
        sent = session.pool.lease(_GIB)
        one = placed(session, [1.0]).buffer
        # One number in each chunk; the rest of a fresh slab is zero.
        for start in range(0, _GIB, 1 << 20):
            sent.buffer[start : start + 4] = one
        (received,) = session.run(prepare(session, "total", floats(_GIB // 4)), [sent])
        assert values(received) == [1024.0]
        del sent, received

        side = 1 << 14
        numbers = [float(i % 127) for i in range(side)]
        (received,) = session.run(
            prepare(session, "outer", floats(side)), [placed(session, numbers)]
        )
        assert received.nbytes == _GIB
        shown = received.buffer.cast("f")
        # A prime stride meets every row, and every column in time.
        assert all(
            shown[i] == numbers[i // side] * numbers[i % side]
            for i in range(0, side * side, 4093)
        )
        del shown, received
