"""Calls on GPU memory between a client and a worker, on a GPU that is none: handles, order, and
what is left behind."""

import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge_client import Session, connect, spawn
from bridge_client.programs import Program
from bridge_client.remote.gpu import Ordering
from bridge_client.remote.grpc_lane import GrpcLane
from bridge_client.remote.local_lane import LocalLane
from bridge_server.turns import TurnByEvents, TurnByWords
from bridge_wire import specs, trees
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import (
    BridgeError,
    CallerError,
    CudaError,
    LaneUnavailable,
    OutOfMemory,
    ProtocolError,
    WorkerDied,
)
from bridge_wire.memory.cuda_memory import (
    FIRST_ADDRESS,
    UNIT,
    GpuPool,
    GpuSlab,
    copied_to_host,
    copy_to_device,
    end_what_is_left,
)
from bridge_wire.memory.cuda_words import FIRST, Words
from bridge_wire.memory.pool import Block
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec
from tests.conftest import ROOT, eventually, python_of
from tests.gpu.faking import environment, installed

by_words = pytest.mark.parametrize("way", ["words"], indirect=True)
FOUR = Spec(BY_NAME["float32"], (4,))
NUMBER = Spec(BY_NAME["float64"], (), weak=True)


class Machine:
    """A machine with a GPU that is none, a worker there, and a session with it."""

    def __init__(self, fake: Any, directory: Path, session: Session) -> None:
        self.fake = fake
        self.directory = directory
        self.session = session
        self.stream = self.pool.device.new_stream()

    @property
    def pool(self) -> GpuPool:
        pool = self.session.gpu_pool()
        assert pool is not None
        return pool

    def put(self, *values: float) -> Block:
        """Return a block with float32 values, which are on their way on the stream."""
        source = (ctypes.c_float * len(values))(*values)
        block = self.pool.lease(ctypes.sizeof(source), self.stream)
        self.write(block, *values)
        self.pool.device.synchronize(self.stream)
        return block

    def write(self, block: Block, *values: float) -> None:
        """Put a copy of values to a block on the stream."""
        self.source = (ctypes.c_float * len(values))(*values)
        self.pool.device.copy(
            block.pointer, ctypes.addressof(self.source), block.nbytes, self.stream
        )

    def read(self, block: Block) -> list[float]:
        """Return the values of a block when the stream has come to it."""
        self.pool.device.synchronize(self.stream)
        return list(
            (ctypes.c_float * (block.nbytes // 4)).from_buffer_copy(self.raw(block))
        )

    def raw(self, block: Block) -> bytes:
        return copied_to_host(self.pool.device, block.pointer, block.nbytes)

    def run(self, program: Program, *inputs: Any, **options: Any) -> Any:
        return self.session.run(program, inputs, stream=self.stream, **options)


@pytest.fixture(scope="module")
def machine(
    tmp_path_factory: pytest.TempPathFactory, way: str
) -> Iterator[tuple[Any, Path, str]]:
    """A worker on a fake GPU: the fake, its directory, and the worker's address."""
    directory = tmp_path_factory.mktemp("cuda")
    with installed(directory) as fake:
        names = ("sine", "scaled", "refusing", "late", "gated")
        models = {name: f"tests.gpu.models:{name}" for name in names}
        with spawn(
            jax_model=models,
            python=python_of(".venv-jax"),
            cwd=ROOT,
            env=environment(directory),
        ) as session:
            yield fake, directory, session.address


@pytest.fixture(params=["local", "grpc"])
def on_gpu(machine: Any, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A new session with that worker over each lane."""
    fake, directory, address = machine
    with connect(address, lane=request.param, require="cuda_ipc") as session:
        yield Machine(fake, directory, session)


@pytest.fixture
def local(machine: Any) -> Iterator[Machine]:
    """A new session over the local lane."""
    fake, directory, address = machine
    with connect(address, lane="local") as session:
        yield Machine(fake, directory, session)


def prepared(session: Session, model: str, *inputs: Spec) -> Program:
    """Return the program of a call with arrays of these types."""
    leaf = pb.Tree(leaf=pb.Tree.Leaf())
    arguments = pb.Tree(
        tuple=pb.Tree.Sequence(
            items=[
                pb.Tree(tuple=pb.Tree.Sequence(items=[leaf] * len(inputs))),
                pb.Tree(dict=pb.Tree.Mapping()),
            ]
        )
    )
    assert trees.argument_paths(arguments)
    return session.prepare_call(
        pb.Call(model=model, arguments=arguments, inputs=map(specs.encode, inputs))
    )


def test_arrays_stay_on_the_gpu(on_gpu: Machine) -> None:
    """A call reads and writes the client's blocks there, over either lane, and nothing goes
    through the host."""
    program = prepared(on_gpu.session, "sine", FOUR)
    (made,) = on_gpu.run(program, on_gpu.put(0.0, 0.5, 1.0, 1.5))
    assert on_gpu.read(made) == pytest.approx(
        [0.0, 0.958851, 1.682942, 1.994990], abs=1e-5
    )
    assert on_gpu.session.memory == "cuda_ipc"
    assert on_gpu.session.stats()["bytes_through_host"] == 0


def test_numbers_and_host_arrays_come_along(on_gpu: Machine) -> None:
    """A run takes what is on the host by the host's memory, or by value, beside what is on the
    GPU."""
    program = prepared(on_gpu.session, "scaled", FOUR, FOUR, NUMBER)
    host, number = on_gpu.session.pool.lease(16), on_gpu.session.pool.lease(8)
    host.buffer.cast("f")[:] = (
        memoryview((ctypes.c_float * 4)(1, 2, 3, 4)).cast("B").cast("f")
    )
    ctypes.c_double.from_address(number.pointer).value = 0.5
    (made,) = on_gpu.run(program, on_gpu.put(10, 10, 10, 10), host, number)
    assert on_gpu.read(made) == [5, 10, 15, 20]


def test_a_residual_keeps_its_inputs_on_the_gpu(on_gpu: Machine) -> None:
    """A forward's blocks are leased until its residual goes, and its pullback runs there too."""
    program = prepared(on_gpu.session, "sine", FOUR).keeping((0,))
    x = on_gpu.put(0, 0, 0, 0)
    made, residual = on_gpu.session.run_keeping(program, [x], stream=on_gpu.stream)
    del x, made
    assert on_gpu.session.stats()["blocks"] == 1
    pullback = program.pullback((0,), (0,))
    (gradient,) = on_gpu.session.run_pullback(
        pullback, residual, [on_gpu.put(1, 2, 3, 4)], stream=on_gpu.stream
    )
    assert on_gpu.read(gradient) == [2, 4, 6, 8]
    del gradient
    on_gpu.session.drop_residual(residual)
    assert on_gpu.session.stats()["blocks"] == 0


def _finds_late_input(machine: Machine, *, is_awaited: bool = True) -> bool:
    """Whether a call finds what is still on its way to its input when it is made; for as long as
    it is not awaited."""
    program = prepared(machine.session, "sine", FOUR)
    x = machine.put(0, 0, 0, 0)
    machine.run(program, x)
    busy = machine.fake.hold(machine.stream)
    machine.write(x, 1, 1, 1, 1)
    if is_awaited:
        threading.Timer(0.2, busy.set).start()
    (made,) = machine.run(program, x)
    busy.set()
    return machine.read(made) == pytest.approx([1.682942] * 4, abs=1e-5)


def _finds_late_output(machine: Machine, *, is_awaited: bool = True) -> bool:
    """Whether what comes on the stream after a call finds outputs that were still on their way
    at the reply."""
    gate = machine.fake.directory().parent / "gate"
    program = prepared(machine.session, "late", FOUR)
    x = machine.put(1, 2, 3, 4)
    if is_awaited:
        threading.Timer(0.2, gate.touch).start()
    try:
        (made,) = machine.run(program, x)
        return machine.read(made) == [2, 3, 4, 5]
    finally:
        gate.touch()
        assert eventually(lambda: machine.read(made) == [2, 3, 4, 5])
        gate.unlink()


def test_a_call_waits_for_the_clients_work(on_gpu: Machine) -> None:
    """On the GPU: what is on its way to an input when the call is made is what the model sees."""
    assert _finds_late_input(on_gpu)


def test_in_order_with_another_stream_a_call_would_not_wait(
    on_gpu: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above sees what it is meant to see."""
    begin, idle = Ordering.begin, on_gpu.pool.device.new_stream()
    monkeypatch.setattr(Ordering, "begin", lambda self, stream: begin(self, idle))
    assert not _finds_late_input(on_gpu, is_awaited=False)


def test_the_clients_work_waits_for_a_call(on_gpu: Machine) -> None:
    """On the GPU: the reply comes before the outputs do, and what the client does with them
    comes after both."""
    assert _finds_late_output(on_gpu)


def test_unless_its_stream_waits_the_client_would_not(
    on_gpu: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above sees what it is meant to see."""
    monkeypatch.setattr(Ordering, "end", lambda self, stream, outputs: None)
    assert not _finds_late_output(on_gpu, is_awaited=False)


@pytest.mark.parametrize(
    "refused",
    [
        "ipcGetEventHandle",
        "ipcOpenEventHandle",
        "streamWaitValue64",
        "streamWriteValue64",
    ],
)
def test_what_cuda_refuses_here_is_done_another_way(
    on_gpu: Machine,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refused: str,
) -> None:
    """Words, or else events, or else both sides wait on the host: calls are as right, and the
    log says why."""
    monkeypatch.setenv("FAKE_CUDA_FAILS", f"{refused}:801")
    with connect(on_gpu.session.address, lane=on_gpu.session.lane) as session:
        machine = Machine(on_gpu.fake, on_gpu.directory, session)
        assert _finds_late_input(machine) and _finds_late_output(machine)
        if refused.startswith("ipc"):
            expected = "words" if way == "words" else "host"
        else:
            expected = "events"
        stats = session.stats()
        assert [
            stats[f"gpu_lanes_by_{each}"] for each in ("words", "events", "host")
        ] == [int(each == expected) for each in ("words", "events", "host")]
    if expected == "host":
        assert (
            "waits for the GPU on the host" in caplog.text
            and "NotSupported" in caplog.text
        )


@pytest.mark.parametrize("chosen", ["words", "events", "host"])
def test_a_user_chooses_how_lanes_are_in_order(
    on_gpu: Machine, way: str, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    """By BRIDGE_GPU_ORDER, which names the first way that is tried."""
    monkeypatch.setenv("BRIDGE_GPU_ORDER", chosen)
    with connect(on_gpu.session.address, lane=on_gpu.session.lane) as session:
        machine = Machine(on_gpu.fake, on_gpu.directory, session)
        assert _finds_late_input(machine) and _finds_late_output(machine)
        expected = "events" if (chosen, way) == ("words", "events") else chosen
        assert session.stats()[f"gpu_lanes_by_{expected}"] == 1
    monkeypatch.setenv("BRIDGE_GPU_ORDER", "luck")
    with (
        connect(on_gpu.session.address) as session,
        pytest.raises(CallerError, match="expected one of words, events"),
    ):
        session.gpu_pool()


def test_a_model_that_raises_leaves_nothing_behind(on_gpu: Machine) -> None:
    """The error comes as from any run, and the next call works."""
    program = prepared(on_gpu.session, "refusing", FOUR)
    x = on_gpu.put(1, 2, 3, 4)
    with pytest.raises(BridgeError, match="not today"):
        on_gpu.run(program, x)
    del x
    assert on_gpu.session.stats()["blocks"] == 0
    test_arrays_stay_on_the_gpu(on_gpu)


def test_a_full_gpu_is_out_of_memory_and_the_next_call_works(on_gpu: Machine) -> None:
    """Nothing was sent."""
    on_gpu.pool.limit(UNIT)
    calls = on_gpu.session.stats()["calls"]
    with pytest.raises(OutOfMemory, match="at most"):
        on_gpu.pool.lease(64 << 20)
    assert on_gpu.session.stats()["calls"] == calls
    test_arrays_stay_on_the_gpu(on_gpu)


def test_a_closed_session_has_been_unmapped_by_the_worker_before_its_memory_is_freed(
    on_gpu: Machine,
) -> None:
    """To free what another process has mapped is undefined in CUDA."""
    test_arrays_stay_on_the_gpu(on_gpu)
    assert on_gpu.fake.held()["openmem"] >= 1
    before = on_gpu.fake.held()
    on_gpu.session.close()
    after = on_gpu.fake.held()
    assert (
        after["openmem"] == before["openmem"] - 1 and after["bytes"] < before["bytes"]
    )


_DYING = """
import os, signal, sys
import fake_cuda
from bridge_client import connect
from tests.gpu.test_sessions import FOUR, prepared

session = connect(sys.argv[1], require="cuda_ipc")
pool, program = session.gpu_pool(), prepared(session, "sine", FOUR)
stream = pool.device.new_stream()
fake_cuda.hold(stream)
session.run(program, [session.pool.lease(16)], stream=stream)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_client_killed_while_the_gpu_waits_for_it(machine: Any, way: str) -> None:
    """The worker writes its word in its place, at once. But the event of a dead process comes
    never, and all behind it on the stream waits forever: another process takes over.
    """
    _, directory, _ = machine
    models, env = {"sine": "tests.gpu.models:sine"}, environment(directory)
    with spawn(
        jax_model=models, python=python_of(".venv-jax"), cwd=ROOT, env=env
    ) as session:
        address, first = session.address, session._host._process.pid
        done = subprocess.run(
            [sys.executable, "-c", _DYING, address], cwd=ROOT, env=os.environ | env
        )
        assert done.returncode == -signal.SIGKILL
        assert way == "words" or eventually(session._host.has_ended)
        # Of the next worker: the session had not looked for one yet.
        assert session.gpu_pool() is not None
        begun = time.monotonic()
        (made,) = session.run(prepared(session, "sine", FOUR), [session.pool.lease(16)])
        assert len(bytes(made)) == 16
        assert (session._host._process.pid == first) == (way == "words")
        assert way == "events" or time.monotonic() - begun < 10


_DYING_IN_A_CALL = """
import os, signal, sys, threading
import fake_cuda
from bridge_client import connect
from tests.gpu.test_sessions import FOUR, prepared

session = connect(sys.argv[1], require="cuda_ipc", lane="local")
pool, program = session.gpu_pool(), prepared(session, "sine", FOUR)
stream = pool.device.new_stream()
x = pool.lease(16, stream)
session.run(program, [x], stream=stream)
fake_cuda.hold(stream)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
session.run(program, [x], stream=stream)
"""


@by_words
def test_a_client_killed_while_the_workers_host_waits_for_it(
    machine: Any, way: str
) -> None:
    """As where a framework names no stream for what it imports: the wait ends with the client's
    connection."""
    _, directory, _ = machine
    models, env = {"sine": "tests.gpu.models:sine"}, environment(directory)
    with spawn(
        jax_model=models, python=python_of(".venv-jax"), cwd=ROOT, env=env
    ) as session:
        address, first = session.address, session._host._process.pid
        done = subprocess.run(
            [sys.executable, "-c", _DYING_IN_A_CALL, address],
            cwd=ROOT,
            env=os.environ | env,
        )
        assert done.returncode == -signal.SIGKILL
        client = Machine(machine[0], directory, session)
        (made,) = client.run(prepared(session, "sine", FOUR), client.put(0, 0, 0, 0))
        assert client.read(made) == [0, 0, 0, 0]
        assert session._host._process.pid == first
        assert eventually(lambda: machine[0].held(directory / "gpus")["openmem"] <= 2)


@by_words
@pytest.mark.parametrize("lane", ["local", "grpc"])
def test_a_worker_killed_while_the_gpu_waits_for_it(
    machine: Any, way: str, lane: str, caplog: Any
) -> None:
    """By words the client's stream goes on at once, whatever the client's threads wait for; what
    the worker had not written is NaN, and the next call says so. The call after that reaches
    another worker.
    """
    fake, directory, _ = machine
    models = {name: f"tests.gpu.models:{name}" for name in ("late", "sine")}
    worker = {
        "python": python_of(".venv-jax"),
        "cwd": ROOT,
        "env": environment(directory),
    }
    with (
        spawn(jax_model=models, **worker) as spawned,
        connect(spawned.address, lane=lane) as session,
    ):
        client = Machine(fake, directory, session)
        late, x = prepared(session, "late", FOUR), client.put(1, 2, 3, 4)
        (made,) = client.run(late, x)
        assert client.pool.device.is_busy(client.stream)
        spawned._host._process.kill()
        begun = time.monotonic()
        values = client.read(made)  # blocks this thread until the stream goes on
        assert time.monotonic() - begun < 5
        assert all(math.isnan(value) for value in values)
        assert "had written the outputs of 1 calls" in caplog.text
        with pytest.raises(WorkerDied, match="these outputs are NaN"):
            client.run(late, x)
        # Starts another worker.
        spawned.run(prepared(spawned, "sine", FOUR), [spawned.pool.lease(16)])


@by_words
def test_words_of_ended_lanes_serve_again_only_when_nobody_writes_them(
    local: Machine,
) -> None:
    """A client whose GPU has still to come to a call leaves them alone for good."""
    pool, session = local.pool, local.session
    program, x = prepared(session, "sine", FOUR), local.put(1, 2, 3, 4)
    local.run(program, x)
    local.pool.device.synchronize(local.stream)
    link = session._require_link()
    (lane,) = link._idle
    block = lane.ordering._by._block
    lane.ordering.close()
    end_what_is_left()
    assert pool._spare_words == [block]
    held = local.fake.hold(local.stream)
    try:
        lane.ordering = Ordering(pool, lane.ask_about_gpu)
        assert pool._spare_words == [] and lane.ordering._by._block is block
        lane.ordering.begin(local.stream)
        lane.ordering.close()
        end_what_is_left()
        assert pool._spare_words == [] and session.stats()["blocks"] == 1
    finally:
        held.set()


@by_words
def test_calls_of_a_lane_from_several_streams_keep_their_order(local: Machine) -> None:
    """A call on an idle stream does not let an earlier one of the lane begin, whose inputs are
    still on their way."""
    device, program = local.pool.device, prepared(local.session, "sine", FOUR)
    other, x, y = device.new_stream(), local.put(0, 0, 0, 0), local.put(0, 0, 0, 0)
    local.run(program, x)
    link = local.session._require_link()
    (lane,) = link._idle
    ordering = lane.ordering
    held = local.fake.hold(local.stream)
    first = ordering.begin(local.stream)
    second = ordering.begin(other)
    words = ordering._by._words
    device.synchronize(words.stream)
    assert second == first + 1 and words.mine() < first
    held.set()
    device.synchronize(other)
    assert words.mine() == second
    assert y.nbytes == 16
    ordering._by._begun = ordering._by._ended  # no call has come of them


def test_a_stream_that_goes_on_is_not_stuck(local: Machine) -> None:
    """With an event of a client that was killed: not before a run waits for it, whatever else
    keeps the stream busy."""
    fake, device = local.fake, local.pool.device
    ready, never = device.new_event(), device.new_stream()
    turn = TurnByEvents(device, ready, local.stream)
    held = fake.hold(never)
    device.record(ready, never)
    try:
        for _ in range(8):
            fake.sleep(local.stream, 0.05)
        assert not turn.is_stuck(5.0)
        turn.begin()
        assert turn.is_stuck(0.1)
    finally:
        held.set()
        turn.close()
        device.destroy_stream(never)


def test_a_session_is_closed_when_the_gpu_is_done_with_it(on_gpu: Machine) -> None:
    """The worker waits on the GPU for this process, which must not end before, nor destroy what
    is waited for."""
    program = prepared(on_gpu.session, "sine", FOUR)
    busy = on_gpu.fake.hold(on_gpu.stream)
    (made,) = on_gpu.run(program, on_gpu.session.pool.lease(16))
    closing = threading.Thread(target=on_gpu.session.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    busy.set()
    closing.join()
    assert made.nbytes == 16 and eventually(lambda: not on_gpu.fake.held()["openevent"])


BAD_HANDLES = {
    "nothing": b"",
    "63 bytes": bytes(63),
    "65 bytes": bytes(65),
    "zeros": bytes(64),
    "random bytes": bytes(range(64)),
}


@pytest.mark.parametrize("bad", BAD_HANDLES)
def test_a_bad_handle_is_refused_and_the_worker_lives(local: Machine, bad: str) -> None:
    """The error says what is wrong and carries no handle; the lane goes on."""
    link = local.session._require_link()
    lane = link.take(local.session.pool)
    slab = GpuSlab(
        memoryview(b""), 0, FIRST_ADDRESS + (1 << 40), UNIT, -1, BAD_HANDLES[bad]
    )
    with pytest.raises((CudaError, ProtocolError)) as raised:
        lane.share_on_gpu(slab)
    assert BAD_HANDLES[bad].hex() not in str(raised.value) or not BAD_HANDLES[bad]
    if isinstance(raised.value, CudaError):
        link.give_back(lane)
    test_arrays_stay_on_the_gpu(local)


def test_opening_a_handle_may_take_as_long_as_the_gpus_work(
    on_gpu: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA may open it behind the other process's kernels: what has a few seconds otherwise is
    given minutes there."""
    limits: list[float] = []
    for kind in (LocalLane, GrpcLane):
        ask = kind.ask
        monkeypatch.setattr(
            kind,
            "ask",
            lambda lane, request, limit, ask=ask: (
                limits.append(limit) or ask(lane, request, limit)
            ),
        )
    with connect(on_gpu.session.address, lane=on_gpu.session.lane, require="cuda_ipc"):
        pass
    assert len(limits) >= 2 and min(limits) >= 120


@pytest.mark.parametrize(
    "bad", ["unaligned", "on the host", "beyond the slab", "in the middle of nowhere"]
)
def test_words_that_lie_wrong_are_refused(local: Machine, bad: str) -> None:
    """Before the worker touches anything; the lane ends, and the next call works."""
    host = local.session.pool.lease(256)
    (slab,) = local.pool.slabs
    words = {
        "unaligned": slab.base + 64,
        "on the host": host.address,
        "beyond the slab": slab.base + slab.nbytes - 128,
        "in the middle of nowhere": slab.base + (1 << 50),
    }[bad]
    lane = local.session._require_link().take(local.session.pool)
    with pytest.raises(ProtocolError):
        lane.ask(pb.LaneRequest(order=pb.Order(words=words)))
    lane.close()
    test_arrays_stay_on_the_gpu(local)


@pytest.mark.parametrize("way", ["events"], indirect=True)
def test_an_opened_event_is_not_used_after_its_owner_has_destroyed_it(
    on_gpu: Machine,
) -> None:
    """CUDA leaves that undefined: either side destroys its copy before the other one can destroy
    the event."""
    before = on_gpu.fake.held()
    for _ in range(3):
        with connect(on_gpu.session.address, lane=on_gpu.session.lane) as session:
            client = Machine(on_gpu.fake, on_gpu.directory, session)
            client.run(prepared(session, "sine", FOUR), client.put(1, 2, 3, 4))
        end_what_is_left()
    assert eventually(lambda: on_gpu.fake.held()["openevent"] <= before["openevent"])
    assert on_gpu.fake.held()["undefined"] == before["undefined"]


def test_what_a_lane_holds_is_let_go_before_its_stream_waits_for_the_client(
    local: Machine, way: str
) -> None:
    """Else the worker's host would wait for the client's GPU, too."""
    device, stream = local.pool.device, local.pool.device.new_stream()
    event, client, memory = (
        device.new_event(),
        device.new_stream(),
        device.allocate(UNIT),
    )
    words = Words(device, memory, device.new_urgent_stream(), is_clients=True)
    words.clear()
    copy_to_device(device, memory, bytes([FIRST]))
    turn = (
        TurnByWords(device, memory, stream)
        if way == "words"
        else TurnByEvents(device, event, stream)
    )
    held = local.fake.hold(client)
    device.record(event, client)
    try:
        for _ in range(70):
            turn.copy(memory + 4096, memory + 8192, 16, object())
        beginning = threading.Thread(target=turn.begin, args=(2,), daemon=True)
        beginning.start()
        beginning.join(5)
        assert not beginning.is_alive() and turn._held == []
    finally:
        held.set()
        copy_to_device(device, memory, bytes([2]))
        turn.close()
        words.close()
        for each in (stream, client):
            device.synchronize(each)
            device.destroy_stream(each)
        device.free(memory)


def test_more_memory_than_the_handle_has_is_refused(local: Machine) -> None:
    """The worker asks CUDA how much lies behind a handle, and believes no client."""
    link = local.session._require_link()
    (slab,) = local.pool.slabs
    pointer = local.pool.device.allocate(UNIT)
    handle = local.pool.device.handle_of(pointer)
    lane = link.take(local.session.pool)
    beyond = GpuSlab(memoryview(b""), 0, slab.base + (1 << 40), 2 * UNIT, -1, handle)
    with pytest.raises(
        CudaError, match="2097152 bytes, but the peer announced 4194304"
    ):
        lane.share_on_gpu(beyond)
    link.give_back(lane)
    local.pool.device.free(pointer)
    test_arrays_stay_on_the_gpu(local)


def test_a_worker_without_a_gpu_shares_none(jax_worker: Session) -> None:
    """It is an error where it is required, and otherwise the host's memory it is."""
    with pytest.raises(LaneUnavailable, match="run on no GPU"):
        connect(jax_worker.address, require="cuda_ipc")
    with connect(jax_worker.address) as session:
        assert session.memory == "memfd" and session.gpu_pool() is None


def test_a_client_that_sees_no_gpu_says_why(
    machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its tensors on a GPU go through the host, counted and logged once; where that is
    forbidden, it is an error."""
    _, _, address = machine
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    from bridge_wire.memory import cuda

    cuda.device_of.cache_clear()
    with pytest.raises(LaneUnavailable, match="cuda_ipc"):
        connect(address, require="cuda_ipc")
    with connect(address) as session:
        assert session.memory == "memfd" and session.gpu_pool() is None
        session.note_staged(100)
        session.note_staged(20)
        assert (
            session.stats()["bytes_through_host"],
            session.stats()["fallbacks"],
        ) == (120, 1)
    cuda.device_of.cache_clear()
