"""Calls on GPU memory between a client and a worker, on a GPU that is none: handles, order, and what is left behind."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge_client import Session, connect, lanes, spawn
from bridge_client.ordering import Ordering
from bridge_client.programs import Program
from bridge_server.turns import Turn
from bridge_wire import specs, trees
from bridge_wire.cuda_memory import FIRST_ADDRESS, UNIT, GpuPool, GpuSlab, copied_to_host
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import (
    BridgeError,
    CudaError,
    LaneUnavailable,
    OutOfMemory,
    ProtocolError,
)
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.pool import Block
from bridge_wire.specs import Spec
from tests.conftest import ROOT, eventually, python_of
from tests.gpu.faking import environment, installed

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
        self.pool.device.copy(block.pointer, ctypes.addressof(self.source), block.nbytes, self.stream)

    def read(self, block: Block) -> list[float]:
        """Return the values of a block when the stream has come to it."""
        self.pool.device.synchronize(self.stream)
        return list((ctypes.c_float * (block.nbytes // 4)).from_buffer_copy(self.raw(block)))

    def raw(self, block: Block) -> bytes:
        return copied_to_host(self.pool.device, block.pointer, block.nbytes)

    def run(self, program: Program, *inputs: Any, **options: Any) -> Any:
        return self.session.run(program, inputs, stream=self.stream, **options)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path, str]]:
    """A worker on a fake GPU: the fake, its directory, and the worker's address."""
    directory = tmp_path_factory.mktemp("cuda")
    with installed(directory) as fake:
        names = ("sine", "scaled", "refusing", "late", "gated")
        models = {name: f"tests.gpu.models:{name}" for name in names}
        with spawn(jax_model=models, python=python_of(".venv-jax"), cwd=ROOT, env=environment(directory)) as session:
            yield fake, directory, session.address  # type: ignore[attr-defined]


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
            items=[pb.Tree(tuple=pb.Tree.Sequence(items=[leaf] * len(inputs))), pb.Tree(dict=pb.Tree.Mapping())]
        )
    )
    assert trees.argument_paths(arguments)
    return session.prepare_call(pb.Call(model=model, arguments=arguments, inputs=map(specs.encode, inputs)))


def test_arrays_stay_on_the_gpu(on_gpu: Machine) -> None:
    """A call reads and writes the client's blocks there, over either lane, and nothing goes through the host."""
    program = prepared(on_gpu.session, "sine", FOUR)
    (made,) = on_gpu.run(program, on_gpu.put(0.0, 0.5, 1.0, 1.5))
    assert on_gpu.read(made) == pytest.approx([0.0, 0.958851, 1.682942, 1.994990], abs=1e-5)
    assert on_gpu.session.memory == "cuda_ipc"
    assert on_gpu.session.stats()["bytes_through_host"] == 0


def test_numbers_and_host_arrays_come_along(on_gpu: Machine) -> None:
    """A run takes what is on the host by the host's memory, or by value, beside what is on the GPU."""
    program = prepared(on_gpu.session, "scaled", FOUR, FOUR, NUMBER)
    host, number = on_gpu.session.pool.lease(16), on_gpu.session.pool.lease(8)
    host.buffer.cast("f")[:] = memoryview((ctypes.c_float * 4)(1, 2, 3, 4)).cast("B").cast("f")
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
    (gradient,) = on_gpu.session.run_pullback(pullback, residual, [on_gpu.put(1, 2, 3, 4)], stream=on_gpu.stream)
    assert on_gpu.read(gradient) == [2, 4, 6, 8]
    del gradient
    on_gpu.session.drop_residual(residual)
    assert on_gpu.session.stats()["blocks"] == 0


def _finds_late_input(machine: Machine, *, is_awaited: bool = True) -> bool:
    """Whether a call finds what is still on its way to its input when it is made; for as long as it is not awaited."""
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
    """Whether what comes on the stream after a call finds outputs that were still on their way at the reply."""
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


def test_without_the_clients_event_a_call_would_not_wait(on_gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees what it is meant to see."""
    monkeypatch.setattr(Ordering, "begin", lambda self, stream: None)
    assert not _finds_late_input(on_gpu, is_awaited=False)


def test_the_clients_work_waits_for_a_call(on_gpu: Machine) -> None:
    """On the GPU: the reply comes before the outputs do, and what the client does with them comes after both."""
    assert _finds_late_output(on_gpu)


def test_without_the_workers_event_the_client_would_not_wait(on_gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees what it is meant to see."""
    monkeypatch.setattr(Ordering, "end", lambda self, stream: None)
    assert not _finds_late_output(on_gpu, is_awaited=False)


@pytest.mark.parametrize("refused", ["ipcGetEventHandle", "ipcOpenEventHandle"])
def test_without_events_both_sides_wait_on_the_host(
    on_gpu: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refused: str
) -> None:
    """Where this process cannot make or open an event, calls are as right, and it is told why they are slower."""
    monkeypatch.setenv("FAKE_CUDA_FAILS", f"{refused}:801")
    with connect(on_gpu.session.address, lane=on_gpu.session.lane) as session:  # type: ignore[attr-defined]
        machine = Machine(on_gpu.fake, on_gpu.directory, session)
        assert _finds_late_input(machine) and _finds_late_output(machine)
    assert ("waits for the GPU on the host" in caplog.text and "801" in caplog.text) or "NotSupported" in caplog.text


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


def test_a_closed_session_has_been_unmapped_by_the_worker_before_its_memory_is_freed(on_gpu: Machine) -> None:
    """To free what another process has mapped is undefined in CUDA."""
    test_arrays_stay_on_the_gpu(on_gpu)
    assert on_gpu.fake.held()["openmem"] >= 1
    before = on_gpu.fake.held()
    on_gpu.session.close()
    after = on_gpu.fake.held()
    assert after["openmem"] == before["openmem"] - 1 and after["bytes"] < before["bytes"]


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


def test_a_client_killed_while_the_gpu_waits_for_it_ends_the_worker(machine: Any, caplog: Any) -> None:
    """What waits for the dead on a stream waits forever, and so does all behind it: another process takes over."""
    _, directory, _ = machine
    models, env = {"sine": "tests.gpu.models:sine"}, environment(directory)
    with spawn(jax_model=models, python=python_of(".venv-jax"), cwd=ROOT, env=env) as session:
        address = session.address  # type: ignore[attr-defined]
        done = subprocess.run([sys.executable, "-c", _DYING, address], cwd=ROOT, env=os.environ | env)
        assert done.returncode == -signal.SIGKILL
        assert eventually(session._host.has_ended)  # type: ignore[attr-defined]
        assert session.gpu_pool() is not None  # of the next worker: the session had not looked for one yet
        (made,) = session.run(prepared(session, "sine", FOUR), [session.pool.lease(16)])
        assert len(bytes(made)) == 16


def test_a_stream_that_goes_on_is_not_stuck(local: Machine) -> None:
    """Also where a client is killed between its record and its request, and other lanes keep the stream busy."""
    fake, device = local.fake, local.pool.device
    turn = Turn(device, b"", local.stream)
    turn._ready, turn._done = device.new_event(), device.new_event()
    never = device.new_stream()
    held = fake.hold(never)
    device.record(turn._ready, never)
    try:
        for _ in range(8):
            fake.sleep(local.stream, 0.05)
        assert not turn.is_stuck(5.0)
        device.wait(turn._ready, local.stream)
        assert turn.is_stuck(0.1)
    finally:
        held.set()
        turn.close()
        device.destroy_stream(never)


def test_a_session_is_closed_when_the_gpu_is_done_with_it(on_gpu: Machine) -> None:
    """The worker waits on the GPU for this process, which must not end before, nor destroy what is waited for."""
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
    link = local.session._require_link()  # type: ignore[attr-defined]
    lane = link.take(local.session.pool)
    slab = GpuSlab(memoryview(b""), 0, FIRST_ADDRESS + (1 << 40), UNIT, -1, BAD_HANDLES[bad])
    with pytest.raises((CudaError, ProtocolError)) as raised:
        lane.share_on_gpu(slab)
    assert BAD_HANDLES[bad].hex() not in str(raised.value) or not BAD_HANDLES[bad]
    if isinstance(raised.value, CudaError):
        link.give_back(lane)
    test_arrays_stay_on_the_gpu(local)


def test_opening_a_handle_may_take_as_long_as_the_gpus_work(on_gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA may open it behind the other process's kernels: what has a few seconds otherwise is given minutes there."""
    limits: list[float] = []
    for kind in (lanes.LocalLane, lanes.GrpcLane):
        ask = kind.ask
        monkeypatch.setattr(
            kind, "ask", lambda lane, request, limit, ask=ask: limits.append(limit) or ask(lane, request, limit)
        )
    with connect(on_gpu.session.address, lane=on_gpu.session.lane, require="cuda_ipc"):  # type: ignore[attr-defined]
        pass
    assert len(limits) >= 2 and min(limits) >= 120


def test_more_memory_than_the_handle_has_is_refused(local: Machine) -> None:
    """The worker asks CUDA how much lies behind a handle, and believes no client."""
    link = local.session._require_link()  # type: ignore[attr-defined]
    (slab,) = local.pool.slabs
    pointer = local.pool.device.allocate(UNIT)
    handle = local.pool.device.handle_of(pointer)
    lane = link.take(local.session.pool)
    beyond = GpuSlab(memoryview(b""), 0, slab.base + (1 << 40), 2 * UNIT, -1, handle)
    with pytest.raises(CudaError, match="2097152 bytes, but 4194304"):
        lane.share_on_gpu(beyond)
    link.give_back(lane)
    local.pool.device.free(pointer)
    test_arrays_stay_on_the_gpu(local)


def test_a_worker_without_a_gpu_shares_none(jax_worker: Session) -> None:
    """It is an error where it is required, and otherwise the host's memory it is."""
    with pytest.raises(LaneUnavailable, match="run on no GPU"):
        connect(jax_worker.address, require="cuda_ipc")  # type: ignore[attr-defined]
    with connect(jax_worker.address) as session:  # type: ignore[attr-defined]
        assert session.memory == "memfd" and session.gpu_pool() is None


def test_a_client_that_sees_no_gpu_says_why(machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its tensors on a GPU go through the host, counted and logged once; where that is forbidden, it is an error."""
    _, _, address = machine
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    from bridge_wire import cuda

    cuda.device_of.cache_clear()
    with pytest.raises(LaneUnavailable, match="cuda_ipc"):
        connect(address, require="cuda_ipc")
    with connect(address) as session:
        assert session.memory == "memfd" and session.gpu_pool() is None
        session.note_staged(100)
        session.note_staged(20)
        assert (session.stats()["bytes_through_host"], session.stats()["fallbacks"]) == (120, 1)
    cuda.device_of.cache_clear()
