"""Clients that break the contract, against a real worker: each gets an error for itself, and the
worker serves on.

After every test the worker must still serve a session that was open all along and a new one, over
either lane, and must hold no more descriptors and slabs than before, and nothing may have surprised
it.
"""

import contextlib
import fcntl
import os
import queue
import random
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc

import bridge_client
from bridge_client.remote.grpc_lane import from_rpc
from bridge_server.process.tokens import Tokens
from bridge_server.runtime import Model
from bridge_server.serving.admission import Entrance
from bridge_server.serving.local_lanes import LocalLanes
from bridge_server.serving.programs import Programs
from bridge_server.serving.residuals import Kept, Residuals
from bridge_server.serving.service import Service
from bridge_server.serving.sessions import Sessions
from bridge_wire import specs, trees
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import (
    BridgeError,
    InternalError,
    OutOfMemory,
    ProtocolError,
    RemoteModelError,
    ResidualGone,
    SpecError,
    Unauthenticated,
    UnknownModel,
    WorldError,
    decode,
)
from bridge_wire.lane.framed_socket import FramedSocket
from bridge_wire.lane.frames import CHUNK, MAX_FRAME, encode
from bridge_wire.memory.slabs import PAGE, Slab, create_slab
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.pb.bridge_pb2_grpc import BridgeStub, add_BridgeServicer_to_server
from bridge_wire.specs import Spec
from tests.conftest import eventually
from tests.workers import Worker, held_by, models, serving

FLOATS = Spec(BY_NAME["float32"], (16,))
BASE = 1 << 20
SLAB = 4 * PAGE
ZEROS = b"\0" * FLOATS.nbytes


def call_of(
    *inputs: pb.Spec,
    model: str = "sine",
    keep: Sequence[int] | None = None,
    **fields: object,
) -> pb.Call:
    """Return the call of a model with these positional inputs."""
    arguments = trees.arguments(
        trees.flat(len(inputs)), pb.Tree(dict=pb.Tree.Mapping())
    )
    call = pb.Call(
        **{"model": model, "arguments": arguments, "inputs": inputs} | fields
    )
    if keep is not None:
        call.keep.SetInParent()
        call.keep.inputs.extend(keep)
    return call


SINE = call_of(specs.encode(FLOATS))
KEPT_SINE = call_of(specs.encode(FLOATS), keep=[0])


# Clients of the bare protocol ---------------------------------------------------------------------


class LocalLane:
    """Speaks to the local lane, sense or nonsense."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(f"{address.removeprefix('unix:')}.lane")
        self._framed = FramedSocket(self.socket)

    def say(
        self, *requests: pb.LaneRequest, descriptors: Sequence[int] = ()
    ) -> pb.LaneReply | None:
        """Send the requests; return the first reply, or None when the worker has ended the lane."""
        # The worker may have refused one before the next was sent.
        with contextlib.suppress(BrokenPipeError):
            for request in requests:
                self._framed.send(request.SerializeToString(), tuple(descriptors))
        return self.hear()

    def shout(self, data: bytes) -> None:
        """Send bytes as they are. The worker may have hung up."""
        with contextlib.suppress(OSError):
            self.socket.sendall(data)

    def hear(self) -> pb.LaneReply | None:
        message = self._framed.receive(20)
        return None if message is None else pb.LaneReply.FromString(message)

    def end(self) -> None:
        """Say that nothing more will come."""
        self._framed.half_close()

    def close(self) -> None:
        self._framed.close()


class GrpcLane:
    """Speaks to the gRPC lane, sense or nonsense."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method: Any = channel.stream_stream(
            "/bridge.v1.Bridge/Lane", response_deserializer=pb.LaneReply.FromString
        )
        self.call = method(iter(self._outgoing.get, None), timeout=20)

    def say(
        self, *requests: pb.LaneRequest, descriptors: Sequence[int] = ()
    ) -> pb.LaneReply | None:
        for request in requests:
            self.shout(request.SerializeToString())
        return self.hear()

    def shout(self, data: bytes) -> None:
        self._outgoing.put(data)

    def hear(self) -> pb.LaneReply | None:
        return next(self.call, None)

    def end(self) -> None:
        self._outgoing.put(None)

    def close(self) -> None:
        self.end()
        self.call.cancel()


@dataclass
class Client:
    """A session of the bare protocol, and one lane attached to it."""

    token: bytes
    lane: LocalLane | GrpcLane
    stub: BridgeStub
    slab: Slab

    def prepare(self, call: pb.Call | None = None, **what: object) -> int:
        """Prepare a program and return its name."""
        request = pb.PrepareRequest(session=self.token, call=call, **what)
        try:
            events = list(self.stub.Prepare(request, timeout=60))
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        if events[-1].WhichOneof("kind") == "error":
            raise decode(events[-1].error)
        return events[-1].prepared.program

    def share(
        self,
        base: int = BASE,
        nbytes: int = SLAB,
        descriptors: Sequence[int] | None = None,
    ) -> pb.LaneReply:
        """Hand over the client's slab, or something else in its place."""
        fds = [self.slab.fd] if descriptors is None else descriptors
        request = pb.LaneRequest(share=pb.Share(base=base, nbytes=nbytes))
        reply = self.lane.say(request, descriptors=fds)
        assert reply is not None
        return reply

    def run(
        self,
        program: int,
        inputs: Sequence[int],
        outputs: Sequence[int],
        residual: int = 0,
    ) -> pb.LaneReply:
        run = pb.Run(program=program, inputs=inputs, outputs=outputs, residual=residual)
        reply = self.lane.say(pb.LaneRequest(run=run))
        assert reply is not None
        return reply

    def run_inline(
        self, program: int, chunks: Sequence[bytes], residual: int = 0
    ) -> pb.LaneReply:
        """Run a program whose outputs are small enough to come with the reply."""
        run = pb.LaneRequest(
            run=pb.Run(program=program, inline=True, residual=residual)
        )
        reply = self.lane.say(run, *(pb.LaneRequest(chunk=chunk) for chunk in chunks))
        assert reply is not None
        return reply

    def refused(
        self, reply: pb.LaneReply | None, kind: type[BridgeError] = ProtocolError
    ) -> str:
        """Check that a reply is an error of that kind that gives nothing away; return its text."""
        assert reply is not None, "the worker hung up without a word"
        assert reply.WhichOneof("kind") == "error", reply
        error = decode(reply.error)
        assert type(error) is kind, error
        self.check_discretion(reply.error)
        return reply.error.message

    def check_discretion(self, error: pb.Error) -> None:
        """Check that an error carries no token, path or handle."""
        text = f"{error.message} {error.traceback}"
        for secret in (
            self.token.hex(),
            repr(self.token)[2:-1],
            ".sock",
            ".lane",
            "/tmp",
            "memfd:",
            "/proc",
        ):
            assert secret not in text
        assert error.traceback == "" or error.kind == "RemoteModelError"


# The worker, and what must hold after each attack -------------------------------------------------


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker that hosts functions of one array, and one of any structure."""
    directory = tmp_path_factory.mktemp("attacked")
    with serving(
        directory,
        *models("sine", "identity", "outer"),
        f"--listen=unix:{directory}/w.sock",
    ) as worker:
        yield worker


@pytest.fixture(scope="module")
def channel(worker: Worker) -> Iterator[grpc.Channel]:
    """A channel to the worker, without limits of its own."""
    options = [
        ("grpc.max_send_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    with contextlib.closing(
        grpc.insecure_channel(worker.address, options=options)
    ) as channel:
        BridgeStub(channel).Describe(
            pb.DescribeRequest(), wait_for_ready=True, timeout=20
        )
        yield channel


@pytest.fixture(scope="module")
def bystander(worker: Worker) -> Iterator[bridge_client.Session]:
    """A session that is there before the attacks and stays until after them."""
    with bridge_client.connect(worker.address) as session:
        check_served(session)
        yield session


def check_served(session: bridge_client.Session) -> None:
    """Check that a session's call returns the right numbers."""
    program = session.prepare_call(SINE)
    block = session.pool.lease(FLOATS.nbytes)
    block.buffer[:] = struct.pack("<16f", *[0.5] * 16)
    [output] = session.run(program, [block])
    assert struct.unpack("<16f", output.buffer) == pytest.approx(
        [2 * 0.479425538604203] * 16, rel=1e-6
    )


@pytest.fixture(scope="module")
def slab() -> Iterator[Slab]:
    """The one slab that all the clients here hand over; the worker maps it anew for each."""
    slab = create_slab(SLAB, BASE)
    yield slab
    slab.close()


@pytest.fixture(autouse=True)
def worker_serves_on(
    worker: Worker, bystander: bridge_client.Session, slab: Slab
) -> Iterator[None]:
    """After each test the worker serves old and new sessions, and holds what it held before."""
    before, logged = held_by(worker.pid), len(worker.stderr)
    yield
    check_served(bystander)
    for lane in ("local", "grpc"):
        with bridge_client.connect(worker.address, lane=lane) as session:
            check_served(session)

    def is_back() -> bool:
        now = held_by(worker.pid)
        return (
            now["descriptors"] <= before["descriptors"]
            and now["slabs"] <= before["slabs"]
        )

    assert eventually(is_back), (
        f"the worker held {before} before the test and {held_by(worker.pid)} after it"
    )
    for line in worker.stderr[logged:].splitlines():
        assert "unexpected" not in line and "Exception in thread" not in line, line


Opened = Callable[..., contextlib.AbstractContextManager[Client]]


@pytest.fixture
def opened(worker: Worker, channel: grpc.Channel, slab: Slab) -> Opened:
    """Makes clients: `with opened("local") as client`, and `attached=False` for one whose lane
    says nothing yet."""

    @contextlib.contextmanager
    def opened(kind: str, *, attached: bool = True) -> Iterator[Client]:
        stub = BridgeStub(channel)
        token = stub.Open(
            pb.OpenRequest(oldest_protocol=1, newest_protocol=1), timeout=20
        ).session
        lane = LocalLane(worker.address) if kind == "local" else GrpcLane(channel)
        with contextlib.closing(lane):
            if attached:
                reply = lane.say(pb.LaneRequest(attach=pb.Attach(session=token)))
                assert reply is not None and reply.WhichOneof("kind") == "done"
            yield Client(token, lane, stub, slab)

    return opened


@pytest.fixture
def client(opened: Opened) -> Iterator[Client]:
    """A client of the local lane."""
    with opened("local") as client:
        yield client


@pytest.fixture
def client_of(opened: Opened, lane: str) -> Iterator[Client]:
    """A client of either lane."""
    with opened(lane) as client:
        yield client


@pytest.fixture
def stranger(opened: Opened, lane: str) -> Iterator[Client]:
    """A client whose lane of either kind is not attached yet."""
    with opened(lane, attached=False) as client:
        yield client


# Frames -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 4, 5, 20])
def test_frame_that_is_cut_short_ends_the_lane(client: Client, length: int) -> None:
    """A client that stops in the middle of a frame has said nothing; its lane ends."""
    client.lane.shout(
        encode(
            pb.LaneRequest(release=pb.Release(residuals=range(50))).SerializeToString()
        )[:length]
    )
    client.lane.end()
    assert client.lane.hear() is None


@pytest.mark.parametrize("length", [MAX_FRAME + 1, 2**31, 2**32 - 1])
def test_oversized_frame_is_refused(client: Client, length: int) -> None:
    """A frame over the limit is a ProtocolError as soon as it is announced, and the lane ends."""
    client.lane.shout(struct.pack("<I", length))
    client.refused(client.lane.hear())
    assert client.lane.hear() is None


def test_frame_that_holds_no_request_is_refused(client: Client) -> None:
    """A frame of bytes that are no LaneRequest is a ProtocolError, and the lane ends."""
    client.lane.shout(encode(b"\xff" * 40))
    client.refused(client.lane.hear())
    assert client.lane.hear() is None


def test_random_bytes_end_the_lane(opened: Opened) -> None:
    """Random bytes on the local lane, before attaching and after, give a ProtocolError or the
    lane's end, no more."""
    for seed in range(30):
        rng = random.Random(seed)
        with opened("local", attached=seed % 2 == 0) as client:
            client.lane.shout(rng.randbytes(rng.choice([1, 5, 300, 100_000])))
            client.lane.end()
            reply = client.lane.hear()
            if reply is not None:
                client.refused(reply)
                assert client.lane.hear() is None


NO_REQUESTS = {
    "random": b"\xff" * 40,
    "cut": b"\x0a\xff",
    "longer than a frame": pb.LaneRequest(
        release=pb.Release(residuals=[5] * MAX_FRAME)
    ).SerializeToString(),
    "oversized": bytes(65 << 20),
}


@pytest.mark.parametrize("payload", NO_REQUESTS.values(), ids=NO_REQUESTS)
def test_no_message_on_the_grpc_lane_ends_it(opened: Opened, payload: bytes) -> None:
    """What is no LaneRequest, or is larger than a message may be, ends a gRPC lane with gRPC's
    own error."""
    with opened("grpc") as client:
        client.lane.shout(payload)
        with pytest.raises(grpc.RpcError) as raised:
            client.lane.hear()
        assert raised.value.code() in (
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        )


def test_silent_connections_cost_nothing_lasting(worker: Worker) -> None:
    """Many connections that never say a word are forgotten when they go."""
    silent = [LocalLane(worker.address) for _ in range(50)]
    for lane in silent:
        lane.close()


# The mailbox --------------------------------------------------------------------------------------


def raw_slot(
    memory: Slab, message: bytes, *, number: int = 1, length: int | None = None
) -> None:
    """Leave a message for the worker, or what is none."""
    words = memory.view[:4096].cast("Q")
    memory.view[128 : 128 + len(message)] = message
    words[1] = len(message) if length is None else length
    words[0] = number


@pytest.fixture
def mailbox(client: Client) -> Iterator[Slab]:
    """The memory of a mailbox that the worker has taken from the client."""
    memory = create_slab(8192, 0)
    socket.send_fds(client.lane.socket, [encode(b"")], [memory.fd])
    memory.close()
    assert eventually(lambda: memory.view[72] != 0)
    yield memory


RELEASE = pb.LaneRequest(release=pb.Release(residuals=[1])).SerializeToString()


def test_mailbox_serves_like_the_socket(client: Client, mailbox: Slab) -> None:
    """A request that lies in the mailbox is answered, over the socket where the client never
    looks there."""
    raw_slot(mailbox, RELEASE)
    client.lane.shout(encode(b""))
    reply = client.lane.hear()
    assert reply is not None and reply.WhichOneof("kind") == "usage"


@pytest.mark.parametrize("length", [4096, 2**31, 2**63, 2**64 - 1])
def test_mailbox_with_a_wrong_length_is_refused(
    client: Client, mailbox: Slab, length: int
) -> None:
    """A message longer than a slot is a ProtocolError, and the lane ends."""
    raw_slot(mailbox, RELEASE, length=length)
    client.lane.shout(encode(b""))
    client.refused(client.lane.hear())
    assert client.lane.hear() is None


@pytest.mark.parametrize("number", [2, 2**63, 2**64 - 1])
def test_mailbox_with_a_wrong_number_has_a_message(
    client: Client, mailbox: Slab, number: int
) -> None:
    """Numbers are compared and nothing else: a wrong one is a message like any other."""
    raw_slot(mailbox, RELEASE, number=number)
    client.lane.shout(encode(b""))
    reply = client.lane.hear()
    assert reply is not None and reply.WhichOneof("kind") == "usage"


def test_mailbox_of_random_bytes_ends_the_lane(opened: Opened) -> None:
    """Random bytes all over the mailbox give a ProtocolError or the lane's end, no more."""
    for seed in range(10):
        memory = create_slab(8192, 0)
        memory.view[:] = random.Random(seed).randbytes(8192)
        with opened("local") as client:
            socket.send_fds(client.lane.socket, [encode(b"")], [memory.fd])
            memory.close()
            client.lane.shout(encode(b""))
            client.lane.end()
            while (reply := client.lane.hear()) is not None:
                client.refused(reply)


@pytest.mark.parametrize("nbytes", [0, 4096, 1 << 20])
def test_mailbox_of_another_size_is_refused(client: Client, nbytes: int) -> None:
    """A descriptor that comes with an empty frame is a sealed memfd of 8192 bytes, or a
    ProtocolError."""
    fd = os.memfd_create("other")
    os.ftruncate(fd, nbytes)
    socket.send_fds(client.lane.socket, [encode(b"")], [fd])
    os.close(fd)
    client.refused(client.lane.hear())
    assert client.lane.hear() is None


# Sessions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", ["random", "empty", "shortened", "extended", "one bit"]
)
def test_wrong_token_is_refused(stranger: Client, change: str) -> None:
    """A token that was never given out, however near to a real one, is Unauthenticated, and the
    lane ends."""
    token = stranger.token
    wrong = {
        "random": os.urandom(32),
        "empty": b"",
        "shortened": token[:-1],
        "extended": token + b"\0",
        "one bit": token[:-1] + bytes([token[-1] ^ 1]),
    }[change]
    stranger.refused(
        stranger.lane.say(pb.LaneRequest(attach=pb.Attach(session=wrong))),
        Unauthenticated,
    )
    assert stranger.lane.hear() is None


def test_token_of_a_closed_session_is_refused(stranger: Client) -> None:
    """After Close a session's token is worth nothing, on a lane or in Prepare."""
    stranger.stub.Close(pb.CloseRequest(session=stranger.token), timeout=20)
    attach = pb.LaneRequest(attach=pb.Attach(session=stranger.token))
    stranger.refused(stranger.lane.say(attach), Unauthenticated)
    with pytest.raises(Unauthenticated):
        stranger.prepare(SINE)


@pytest.mark.parametrize("token", [b"", os.urandom(32)], ids=["empty", "random"])
def test_preparation_with_a_wrong_token_is_refused(
    client: Client, token: bytes
) -> None:
    """Prepare takes no token that was never given out; Close ignores it."""
    client.stub.Close(pb.CloseRequest(session=token), timeout=20)
    client.token = token
    with pytest.raises(Unauthenticated):
        client.prepare(SINE)


@pytest.mark.parametrize("whose", ["own", "other"])
def test_second_attach_is_refused(opened: Opened, lane: str, whose: str) -> None:
    """An attached lane cannot be attached again, neither to its own session nor to another one."""
    with opened(lane) as client, opened(lane) as other:
        token = (client if whose == "own" else other).token
        client.refused(client.lane.say(pb.LaneRequest(attach=pb.Attach(session=token))))
        assert client.lane.hear() is None
        assert other.lane.say(pb.LaneRequest(release=pb.Release())) is not None


@pytest.mark.parametrize(
    "request_",
    [
        pb.LaneRequest(),
        pb.LaneRequest(run=pb.Run(program=1)),
        pb.LaneRequest(release=pb.Release(residuals=[1])),
        pb.LaneRequest(share=pb.Share(base=BASE, nbytes=SLAB)),
        pb.LaneRequest(chunk=b"x"),
        pb.LaneRequest(peek=pb.Peek()),
    ],
    ids=["nothing", "run", "release", "share", "chunk", "peek"],
)
def test_lane_must_be_attached_first(
    stranger: Client, request_: pb.LaneRequest
) -> None:
    """Any other first request than `attach` is a ProtocolError, and its descriptor is closed."""
    descriptors = [stranger.slab.fd] if request_.WhichOneof("kind") == "share" else []
    stranger.refused(stranger.lane.say(request_, descriptors=descriptors))
    assert stranger.lane.hear() is None


@pytest.mark.parametrize(
    "request_",
    [pb.LaneRequest(), pb.LaneRequest(chunk=b"x" * 100)],
    ids=["nothing", "chunk"],
)
def test_what_is_no_request_here_is_refused(
    client_of: Client, request_: pb.LaneRequest
) -> None:
    """A request of no kind, and a chunk in place of a request, are ProtocolErrors, and the lane
    ends."""
    client_of.refused(client_of.lane.say(request_))
    assert client_of.lane.hear() is None


def test_session_sees_nothing_of_another(opened: Opened) -> None:
    """Another session's slabs, residuals and programs do not exist for a session that names
    them."""
    with opened("local") as one:
        one.share()
        program = one.prepare(KEPT_SINE)
        assert (
            one.run(program, [BASE], [BASE + PAGE], residual=5).WhichOneof("kind")
            == "ran"
        )
        with opened("local") as other:
            assert "no program" in other.refused(other.run(program, [BASE], [BASE]))
        with opened("local") as other:
            program = other.prepare(KEPT_SINE)
            pullback = other.prepare(
                pullback=pb.Pullback(program=program, wrt=[0], outputs=[0])
            )
            other.refused(other.run_inline(pullback, [ZEROS], residual=5), ResidualGone)
            other.refused(other.run(program, [BASE], [BASE], residual=6))
        usage = one.lane.say(pb.LaneRequest(release=pb.Release()))
        assert usage is not None and usage.usage.residuals == 1, (
            "the others' attempts took nothing away"
        )


# Memory -------------------------------------------------------------------------------------------


SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def memfd(nbytes: int = SLAB, seals: int = SEALS) -> int:
    fd = os.memfd_create("attack", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def shared_memory_file() -> int:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(SLAB)
        return os.dup(file.fileno())


NO_SLABS: dict[str, Callable[[], list[int]]] = {
    "no descriptor": lambda: [],
    "two descriptors": lambda: [memfd(), memfd()],
    "unsealed memfd": lambda: [memfd(seals=0)],
    "memfd that may shrink": lambda: [
        memfd(seals=fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    ],
    "memfd that nobody may write to": lambda: [memfd(seals=SEALS | fcntl.F_SEAL_WRITE)],
    "memfd of another size": lambda: [memfd(2 * SLAB)],
    "empty memfd": lambda: [memfd(0)],
    "pipe": lambda: [pipe()],
    "directory": lambda: [os.open("/", os.O_RDONLY)],
    "file": lambda: [os.open(__file__, os.O_RDONLY)],
    "file of shared memory": lambda: [shared_memory_file()],
    "device": lambda: [os.open("/dev/zero", os.O_RDWR)],
    "socket": lambda: [socket.socket(socket.AF_UNIX).detach()],
}


@pytest.mark.parametrize("make", NO_SLABS.values(), ids=NO_SLABS)
def test_what_is_no_slab_is_refused(
    client: Client, make: Callable[[], list[int]]
) -> None:
    """Anything but one sealed memfd of the announced size is a ProtocolError, and the lane ends."""
    descriptors = make()
    try:
        client.refused(client.share(descriptors=descriptors))
    finally:
        for fd in descriptors:
            os.close(fd)
    assert client.lane.hear() is None


@pytest.mark.parametrize(
    ("address", "nbytes"),
    [
        (BASE - 64, 64),
        (BASE + SLAB, 64),
        (BASE + SLAB - 64, 128),
        (2**64 - 64, 64),
        (BASE, 4097),
        (BASE, 2**32 - 1),
    ],
    ids=[
        "before",
        "after",
        "across the end",
        "at the end of the address space",
        "too many",
        "most of all",
    ],
)
def test_peek_beyond_what_was_shared_is_refused(
    client: Client, address: int, nbytes: int
) -> None:
    """A look at memory outside the session's slabs, or at more than 4096 bytes, is a
    ProtocolError."""
    client.share()
    client.refused(
        client.lane.say(pb.LaneRequest(peek=pb.Peek(address=address, nbytes=nbytes)))
    )


def test_peek_shows_what_the_client_has_written(client: Client) -> None:
    """The worker returns the bytes of the client's slab as it sees them, and none for none."""
    client.share()
    written = os.urandom(256)
    client.slab.view[PAGE : PAGE + 256] = written
    for nbytes in (0, 1, 256):
        reply = client.lane.say(
            pb.LaneRequest(peek=pb.Peek(address=BASE + PAGE, nbytes=nbytes))
        )
        assert reply is not None and reply.peeked == written[:nbytes]


def test_grpc_lane_takes_no_slab(opened: Opened) -> None:
    """A slab over gRPC, where no descriptor can come with it, is a ProtocolError."""
    with opened("grpc") as client:
        client.refused(client.share())


@pytest.mark.parametrize(
    "base",
    [BASE, BASE + SLAB - PAGE, BASE - SLAB + PAGE, BASE + 64],
    ids=["same", "from its end", "into its beginning", "inside"],
)
def test_overlapping_slab_is_refused(client: Client, base: int) -> None:
    """A second slab that shares an address with the first is a ProtocolError."""
    assert client.share().WhichOneof("kind") == "done"
    assert "overlaps" in client.refused(client.share(base=base))


@pytest.mark.parametrize(
    "base", [2**63, 2**64 - PAGE, 2**64 - SLAB, 2**63 - SLAB + PAGE]
)
def test_slab_beyond_the_address_space_is_refused(client: Client, base: int) -> None:
    """A slab whose addresses would overflow is a ProtocolError."""
    client.refused(client.share(base=base))


@pytest.mark.parametrize("nbytes", [0, 1, SLAB - 1, 2 * SLAB, 2**63, 2**64 - 1])
def test_slab_of_another_size_than_announced_is_refused(
    client: Client, nbytes: int
) -> None:
    """A size that is not the memfd's own is a ProtocolError."""
    client.refused(client.share(nbytes=nbytes))


@pytest.mark.parametrize("place", ["input", "output"])
@pytest.mark.parametrize(
    "address",
    [
        0,
        64,
        BASE - 64,
        BASE + SLAB - 32,
        BASE + SLAB,
        BASE + 1,
        BASE + 32,
        2**63,
        2**64 - 64,
        2**64 - 1,
    ],
)
def test_address_outside_the_slabs_is_refused(
    client: Client, place: str, address: int
) -> None:
    """A block in no slab, beyond its slab's end, or not aligned is a ProtocolError, and no byte
    is written."""
    client.share()
    program = client.prepare(SINE)
    client.slab.view[:] = b"\xaa" * SLAB
    inputs, outputs = ([address], [BASE]) if place == "input" else ([BASE], [address])
    client.refused(client.run(program, inputs, outputs))
    assert bytes(client.slab.view) == b"\xaa" * SLAB
    assert client.lane.hear() is None


def test_last_block_of_a_slab_is_not_outside(client: Client) -> None:
    """The guard is exact: a block that ends where its slab ends is served."""
    client.share()
    last = BASE + SLAB - FLOATS.nbytes
    assert client.run(client.prepare(SINE), [last], [last]).WhichOneof("kind") == "ran"


# Programs and runs --------------------------------------------------------------------------------

F32, I64 = pb.DTYPE_FLOAT32, pb.DTYPE_INT64
T = pb.Transform
ARRAY = specs.encode(FLOATS)
LEAF = pb.Tree(leaf=pb.Tree.Leaf())


def transformed(*transforms: pb.Transform) -> pb.Call:
    return call_of(ARRAY, transforms=transforms)


BAD_CALLS = {
    "negative size": call_of(pb.Spec(dtype=F32, shape=[-1])),
    "most negative size": call_of(pb.Spec(dtype=F32, shape=[-(2**63)])),
    "overflowing size": call_of(pb.Spec(dtype=F32, shape=[2**62])),
    "overflowing product": call_of(pb.Spec(dtype=F32, shape=[2**32, 2**32])),
    "overflow behind a zero": call_of(pb.Spec(dtype=F32, shape=[0, 2**62, 2**62])),
    "too many dimensions": call_of(pb.Spec(dtype=F32, shape=[1] * 100)),
    "no dtype": call_of(pb.Spec(shape=[1])),
    "unknown dtype": call_of(pb.Spec(dtype=99, shape=[1])),
    "number with a shape": call_of(
        pb.Spec(dtype=pb.DTYPE_FLOAT64, shape=[3], weak=True)
    ),
    "fewer specs than leaves": pb.Call(model="sine", arguments=SINE.arguments),
    "more specs than leaves": call_of(ARRAY, inputs=[ARRAY] * 3),
    "no arguments": pb.Call(model="sine", inputs=[ARRAY]),
    "arguments of no kind": call_of(ARRAY, arguments=pb.Tree()),
    "arguments that are a leaf": call_of(ARRAY, arguments=LEAF),
    "class with a bad name": call_of(
        ARRAY,
        model="identity",
        arguments=trees.arguments(
            pb.Tree(
                tuple=pb.Tree.Sequence(
                    items=[
                        pb.Tree(
                            namedtuple=pb.Tree.Record(name="os.system", items=[LEAF])
                        )
                    ]
                )
            ),
            pb.Tree(dict=pb.Tree.Mapping()),
        ),
    ),
    "kept input that is none": call_of(ARRAY, keep=[1]),
    "kept input far away": call_of(ARRAY, keep=[2**32 - 1]),
    "kept twice": call_of(ARRAY, keep=[0, 0]),
    "transform of no kind": transformed(T()),
    "vjp of no input": transformed(T(vjp=T.Vjp(wrt=[7], outputs=[0]))),
    "vjp of no output": transformed(T(vjp=T.Vjp(wrt=[0], outputs=[2**31]))),
    "vjp of an input twice": transformed(T(vjp=T.Vjp(wrt=[0, 0], outputs=[0]))),
    "jvp of no input": transformed(T(jvp=T.Jvp(wrt=[7], outputs=[0]))),
    "jvp of no output": transformed(T(jvp=T.Jvp(wrt=[0], outputs=[9]))),
    "vmap over no axis": transformed(T(vmap=T.Vmap(axes=[5], size=2))),
    "vmap over a negative axis": transformed(T(vmap=T.Vmap(axes=[-2], size=2))),
    "vmap of too few inputs": transformed(T(vmap=T.Vmap(axes=[], size=2))),
    "vmap of negative size": transformed(T(vmap=T.Vmap(axes=[0], size=-1))),
    "vmap of overflowing size": transformed(T(vmap=T.Vmap(axes=[0], size=2**62))),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_impossible_call_is_refused_when_it_is_prepared(
    client: Client, call: pb.Call
) -> None:
    """A call whose shapes, structure or transforms cannot be is a typed error, before any data
    moves."""
    with pytest.raises(BridgeError) as raised:
        client.prepare(call)
    assert type(raised.value) is not BridgeError and not isinstance(
        raised.value, InternalError | RemoteModelError
    )
    client.check_discretion(pb.Error(message=str(raised.value)))
    assert client.lane.say(pb.LaneRequest(release=pb.Release())) is not None, (
        "the session goes on"
    )


def test_array_beyond_all_memory_harms_nobody(client_of: Client) -> None:
    """A call of the largest array that a spec can name is refused at Prepare, or at Run for want
    of memory."""
    try:
        program = client_of.prepare(call_of(pb.Spec(dtype=F32, shape=[2**61 - 1])))
    except BridgeError as error:
        assert not isinstance(error, InternalError)
        return
    run = pb.LaneRequest(run=pb.Run(program=program, inline=True))
    for request in (run, pb.LaneRequest(chunk=ZEROS)):
        client_of.lane.shout(
            request.SerializeToString()
            if isinstance(client_of.lane, GrpcLane)
            else _framed(request)
        )
    client_of.lane.end()  # the worker may wait for the rest of the bytes before it refuses
    client_of.refused(client_of.lane.hear())


def test_model_that_would_overflow_harms_nobody(client: Client) -> None:
    """A call whose input has a size that can be, and whose result has not, is refused; the
    compiler never sees it."""
    with pytest.raises(BridgeError) as raised:
        client.prepare(call_of(pb.Spec(dtype=F32, shape=[2**33]), model="outer"))
    assert not isinstance(raised.value, InternalError | WorldError)


def test_unknown_model_is_refused_without_a_trace_of_paths(client: Client) -> None:
    """A model that is not hosted is UnknownModel: nothing is looked up by a client's word."""
    for name in ("", "os.system", "tests.models:echo", "../../etc/passwd"):
        with pytest.raises(UnknownModel):
            client.prepare(call_of(ARRAY, model=name))
        with pytest.raises(UnknownModel):
            client.prepare(parameters=pb.Parameters(model=name))


@pytest.mark.parametrize(
    ("call", "sizes", "kind"),
    [
        (SINE, [], ProtocolError),
        (SINE, [["d0", "d1"]], ProtocolError),
        (SINE, [["-1"]], ProtocolError),
        (SINE, [["d0 + 1"]], ProtocolError),
        (SINE, [["__import__('os')"]], ProtocolError),
        (KEPT_SINE, [["d0"]], ProtocolError),
        (transformed(T(vjp=T.Vjp(wrt=[0], outputs=[0]))), [["d0"]], ProtocolError),
        (call_of(ARRAY, model="nobody"), [["d0"]], UnknownModel),
    ],
)
def test_impossible_question_for_shapes_is_refused(
    client: Client, call: pb.Call, sizes: list[list[str]], kind: type[BridgeError]
) -> None:
    """Shapes are told of a plain call of a hosted model whose inputs have sizes that are numbers
    or names."""
    with pytest.raises(kind):
        client.prepare(
            shapes=pb.Shapes(call=call, inputs=[pb.Shape(sizes=each) for each in sizes])
        )


def test_preparation_of_nothing_is_refused(client: Client) -> None:
    """A Prepare that names nothing is a ProtocolError."""
    with pytest.raises(ProtocolError):
        client.prepare()


def test_impossible_pullback_is_refused(client: Client) -> None:
    """A pullback of no program, of one that keeps nothing, or to and from what there is not, is
    a ProtocolError."""
    plain, kept = client.prepare(SINE), client.prepare(KEPT_SINE)
    for program, wrt, outputs in [
        (0, [0], [0]),
        (99, [0], [0]),
        (2**64 - 1, [0], [0]),
        (plain, [0], [0]),
        (kept, [1], [0]),
        (kept, [0], [1]),
        (kept, [2**32 - 1], [2**32 - 1]),
    ]:
        with pytest.raises(ProtocolError):
            client.prepare(
                pullback=pb.Pullback(program=program, wrt=wrt, outputs=outputs)
            )


@pytest.mark.parametrize("program", [0, 2, 2**64 - 1])
@pytest.mark.parametrize("inline", [False, True], ids=["shared", "inline"])
def test_unknown_program_is_refused(
    client_of: Client, program: int, inline: bool
) -> None:
    """A run of a program that the session has not prepared is a ProtocolError, and the lane
    ends."""
    client_of.prepare(SINE)
    client_of.refused(
        client_of.lane.say(pb.LaneRequest(run=pb.Run(program=program, inline=inline)))
    )
    assert client_of.lane.hear() is None


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [([], [BASE]), ([BASE], []), ([BASE] * 2, [BASE]), ([BASE], [BASE] * 1000)],
)
def test_wrong_number_of_blocks_is_refused(
    client: Client, inputs: list[int], outputs: list[int]
) -> None:
    """A run that names more or fewer blocks than its program has arrays is a ProtocolError."""
    client.share()
    client.refused(client.run(client.prepare(SINE), inputs, outputs))


# Residuals ----------------------------------------------------------------------------------------


def test_reused_residual_id_is_refused(client_of: Client) -> None:
    """A residual's id that is taken already is a ProtocolError, and the first residual was not
    replaced."""
    program = client_of.prepare(KEPT_SINE)
    assert (
        client_of.run_inline(program, [ZEROS], residual=3).WhichOneof("kind") == "ran"
    )
    assert "use a fresh id" in client_of.refused(
        client_of.run_inline(program, [ZEROS], residual=3)
    )


def test_residual_without_a_name_is_refused(client_of: Client) -> None:
    """The run of a program that keeps a residual must name it: 0 is a ProtocolError."""
    client_of.refused(
        client_of.run_inline(client_of.prepare(KEPT_SINE), [ZEROS], residual=0)
    )


def test_residual_of_another_program_is_refused(client_of: Client) -> None:
    """A pullback that names a residual which another program kept is a ProtocolError."""
    shorter = Spec(BY_NAME["float32"], (3,))
    first = client_of.prepare(KEPT_SINE)
    second = client_of.prepare(call_of(specs.encode(shorter), keep=[0]))
    pullback = client_of.prepare(
        pullback=pb.Pullback(program=second, wrt=[0], outputs=[0])
    )
    client_of.run_inline(first, [ZEROS], residual=1)
    client_of.refused(
        client_of.run_inline(pullback, [bytes(shorter.nbytes)], residual=1)
    )


@pytest.mark.parametrize("residual", [0, 2, 2**64 - 1])
def test_residual_that_is_not_there_is_gone(client_of: Client, residual: int) -> None:
    """A pullback of a residual that was never kept, or was released, is ResidualGone; the lane
    goes on."""
    program = client_of.prepare(KEPT_SINE)
    pullback = client_of.prepare(
        pullback=pb.Pullback(program=program, wrt=[0], outputs=[0])
    )
    client_of.run_inline(program, [ZEROS], residual=1)
    client_of.refused(
        client_of.run_inline(pullback, [ZEROS], residual=residual), ResidualGone
    )
    assert (
        client_of.run_inline(pullback, [ZEROS], residual=1).WhichOneof("kind") == "ran"
    )


def test_double_release_is_ignored(client_of: Client) -> None:
    """Releasing a residual twice, in one request or in two, counts once; ids that never were
    count nothing."""
    program = client_of.prepare(KEPT_SINE)
    for residual in (1, 2):
        client_of.run_inline(program, [ZEROS], residual=residual)
    for released, left in [([1, 1, 99, 2**64 - 1], 1), ([1], 1), ([2], 0), ([1, 2], 0)]:
        reply = client_of.lane.say(
            pb.LaneRequest(release=pb.Release(residuals=released))
        )
        assert reply is not None
        assert (reply.usage.residuals, reply.usage.residual_bytes > 0) == (
            left,
            left > 0,
        )


# Inline runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunks",
    [[ZEROS + b"x"], [ZEROS[:-1], b"xy"], [b""], [ZEROS[:5], b""], [bytes(CHUNK + 1)]],
    ids=[
        "too long",
        "too long in parts",
        "empty",
        "empty in the middle",
        "over the limit",
    ],
)
def test_chunk_of_another_size_is_refused(
    client_of: Client, chunks: list[bytes]
) -> None:
    """Chunks that are empty, or more than an input lacks, are a ProtocolError, and the lane
    ends."""
    client_of.refused(client_of.run_inline(client_of.prepare(SINE), chunks))
    assert client_of.lane.hear() is None


@pytest.mark.parametrize(
    "data",
    [b"x", ZEROS[:-1], ZEROS + b"x"],
    ids=["a byte", "one too few", "one too many"],
)
def test_data_of_another_size_is_refused(client_of: Client, data: bytes) -> None:
    """An inline run whose data are not exactly the bytes of its inputs is a ProtocolError, and
    the lane ends."""
    run = pb.Run(program=client_of.prepare(SINE), inline=True, data=data)
    client_of.refused(client_of.lane.say(pb.LaneRequest(run=run)))
    assert client_of.lane.hear() is None


@pytest.mark.parametrize("chunks", [[], [ZEROS[:-1]]], ids=["none", "all but one byte"])
def test_request_in_place_of_missing_bytes_is_refused(
    client_of: Client, chunks: list[bytes]
) -> None:
    """An inline run that is followed by another request before all its bytes have come is a
    ProtocolError."""
    run = pb.LaneRequest(run=pb.Run(program=client_of.prepare(SINE), inline=True))
    missing = pb.LaneRequest(release=pb.Release())
    reply = client_of.lane.say(
        run, *(pb.LaneRequest(chunk=chunk) for chunk in chunks), missing
    )
    client_of.refused(reply)
    assert client_of.lane.hear() is None


def test_end_in_place_of_missing_bytes_ends_the_lane(client_of: Client) -> None:
    """A client that ends in the middle of an inline run is told so, if it still listens, and
    forgotten."""
    run = pb.LaneRequest(run=pb.Run(program=client_of.prepare(SINE), inline=True))
    client_of.lane.shout(
        run.SerializeToString()
        if isinstance(client_of.lane, GrpcLane)
        else _framed(run)
    )
    client_of.lane.end()
    client_of.refused(client_of.lane.hear())
    assert client_of.lane.hear() is None


def test_chunks_after_a_shared_run_are_refused(client: Client) -> None:
    """Bytes that follow a run which was not inline are no request."""
    client.share()
    assert client.run(client.prepare(SINE), [BASE], [BASE]).WhichOneof("kind") == "ran"
    client.refused(client.lane.say(pb.LaneRequest(chunk=ZEROS)))


def _framed(request: pb.LaneRequest) -> bytes:
    return encode(request.SerializeToString())


# Of a worker without any model: to these, none matters.
SESSIONS = Sessions(None, residual_bytes=0, slab_bytes=1 << 20)
SESSION = SESSIONS.open()
PROGRAM: Any = None


# What many could use up ---------------------------------------------------------------------------


def structured(name: str, count: int) -> pb.Call:
    """Return a call with an array and that many namedtuples, each of a class of its own."""
    classes = [
        pb.Tree(namedtuple=pb.Tree.Record(name=f"{name}{i}")) for i in range(count)
    ]
    structure = pb.Tree(tuple=pb.Tree.Sequence(items=[LEAF, *classes]))
    arguments = trees.arguments(
        pb.Tree(tuple=pb.Tree.Sequence(items=[structure])),
        pb.Tree(dict=pb.Tree.Mapping()),
    )
    return call_of(ARRAY, model="identity", arguments=arguments)


def test_client_that_invents_classes_does_not_use_up_those_of_others(
    opened: Opened,
) -> None:
    """However many classes one session has named, another session's first one is served."""
    with opened("local") as greedy, contextlib.suppress(ProtocolError):
        for i in range(3):
            greedy.prepare(structured(f"Greedy{i}_", 500))
    with opened("local") as modest:
        assert modest.prepare(structured("Modest", 1)) == 1


def test_slabs_of_one_client_do_not_use_up_the_worker_s_descriptors(
    client: Client, worker: Worker
) -> None:
    """A mapped slab costs the worker no descriptor: one client with very many of them does not
    lock out the others."""
    before = held_by(worker.pid)
    for i in range(100):
        assert client.share(base=BASE + i * SLAB).WhichOneof("kind") == "done"
    after = held_by(worker.pid)
    assert after["descriptors"] - before["descriptors"] < 10


def test_descriptors_of_a_message_that_never_ends_are_refused(
    client: Client, worker: Worker
) -> None:
    """Descriptors that come with parts of a message do not use up the worker's: the lane ends
    after a few."""
    before = held_by(worker.pid)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.lane.shout(struct.pack("<I", CHUNK))
        for _ in range(10):
            socket.send_fds(client.lane.socket, [b"x"], [client.slab.fd] * 4)
    client.refused(client.lane.hear())
    assert eventually(
        lambda: held_by(worker.pid)["descriptors"] <= before["descriptors"]
    )


VMAP, JVP = T(vmap=T.Vmap(axes=[-1], size=1)), T(jvp=T.Jvp(wrt=[0], outputs=[0]))
CONSTANT = pb.Tree(value=pb.Value(none=True))
ENDLESS = {
    "a derivative of 17 steps; the worker's limit is 16": transformed(*[JVP] * 17),
    "a call with 33 transforms; the worker's limit is 32": transformed(*[VMAP] * 33),
    "a call with 16385 arrays; the worker's limit is 16384": call_of(*[ARRAY] * 16385),
    "the arguments have more than 131072 containers and values": call_of(
        arguments=trees.arguments(
            pb.Tree(tuple=pb.Tree.Sequence(items=[CONSTANT] * 131072)),
            pb.Tree(dict=pb.Tree.Mapping()),
        )
    ),
}


@pytest.mark.parametrize(
    ("said", "call"),
    ENDLESS.items(),
    ids=["derivative", "transforms", "arrays", "arguments"],
)
def test_call_that_would_take_all_time_and_memory_is_refused(
    client: Client, said: str, call: pb.Call
) -> None:
    """A call that nobody could wait for, or that would end the worker, is refused before it is
    traced."""
    with pytest.raises(SpecError, match=said):
        client.prepare(call)


@pytest.mark.parametrize(
    ("name", "fields"), [("x" * 256, []), ("C", [f"f{i}" for i in range(1001)])]
)
def test_class_of_endless_size_is_refused(
    client: Client, name: str, fields: list[str]
) -> None:
    """A class whose name, or whose making, would take the worker's memory or time is a
    ProtocolError."""
    record = pb.Tree(
        namedtuple=pb.Tree.Record(name=name, fields=fields, items=[LEAF] * len(fields))
    )
    arguments = trees.arguments(
        pb.Tree(tuple=pb.Tree.Sequence(items=[record])), pb.Tree(dict=pb.Tree.Mapping())
    )
    with pytest.raises(ProtocolError, match="a tree names a class"):
        client.prepare(
            call_of(*[ARRAY] * len(fields), model="identity", arguments=arguments)
        )


def test_sessions_that_nobody_attaches_to_leave_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where there are as many sessions as there may be, a new one takes the place of the oldest
    without a lane; those with a lane stay.
    """
    monkeypatch.setattr("bridge_server.serving.sessions._MAX_SESSIONS", 3)
    sessions = Sessions(None, residual_bytes=0, slab_bytes=1 << 20)
    first, second = sessions.open(), sessions.open()
    sessions.attach(first.token)
    third, fourth = sessions.open(), sessions.open()
    for session in (first, third, fourth):
        assert sessions.find(session.token) is session
    with pytest.raises(Unauthenticated):
        sessions.attach(second.token)
    for session in (third, fourth):
        sessions.attach(session.token)
    with pytest.raises(OutOfMemory, match="already has 3 sessions"):
        sessions.open()


def test_residuals_of_no_bytes_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little each residual takes, the oldest goes when there are too many of them."""
    monkeypatch.setattr("bridge_server.serving.residuals._MOST", 3)
    residuals = Residuals(1 << 20)
    for id in range(5):
        residuals.keep(SESSION, id, Kept(PROGRAM, None, 0))
    for id in (0, 1):
        with pytest.raises(ResidualGone):
            residuals.find(SESSION, id)
    assert residuals.usage(SESSION) == (3, 0)


def test_residuals_that_are_not_there_hold_nobody_up() -> None:
    """A client that releases what it never had, without end, does so while others keep and drop
    theirs."""
    residuals = Residuals(1 << 20)
    residuals.keep(SESSION, 7, Kept(PROGRAM, None, 5))

    def ids() -> Iterator[int]:
        for id in range(10):
            assert not residuals._lock.locked()
            yield id

    residuals.drop(SESSION, ids())
    assert residuals.usage(SESSION) == (0, 0)


def test_programs_that_nobody_asks_for_any_more_are_forgotten() -> None:
    """The worker remembers so many programs, and the first to go is the one that was asked for
    longest ago."""
    prepared: list[str] = []

    class Preparing:
        def prepare_call(self, model: Model, call: pb.Call) -> Iterator[str]:
            yield "tracing"
            prepared.append(call.model)
            return Empty()  # type: ignore[return-value]

    class Empty:
        result = trees.flat(0)
        output_nbytes = ()

    names = "abc"
    programs = Programs(Preparing(), {name: object() for name in names}, max_programs=2)
    for name in "abacab":
        for _ in programs.call(pb.Call(model=name)):
            pass
    assert "".join(prepared) == "abcb", "a was asked for again before c came"


def test_connection_that_says_nothing_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local lane without a first request holds its thread for so long only."""
    monkeypatch.setattr("bridge_server.serving.local_lanes.ATTACH_S", 0.1)
    lanes = LocalLanes(f"{tmp_path}/w.sock.lane", SESSIONS)
    lanes.start()
    with (
        contextlib.closing(lanes),
        contextlib.closing(LocalLane(f"unix:{tmp_path}/w.sock")) as silent,
    ):
        assert silent.hear() is None


def test_silent_lanes_over_grpc_leave_threads_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be so many lanes over gRPC; other calls have threads left, and the silent ones
    end in time."""
    monkeypatch.setattr("bridge_server.serving.service.MAX_LANES", 2)
    monkeypatch.setattr("bridge_server.serving.admission.ATTACH_S", 3.0)
    with ThreadPoolExecutor(3) as threads:
        server = grpc.server(threads, interceptors=[Entrance(Tokens())])
        service = Service(None, None, SESSIONS, "")
        add_BridgeServicer_to_server(service, server)
        address = f"unix:{tmp_path}/g.sock"
        server.add_insecure_port(address)
        server.start()
        with contextlib.closing(grpc.insecure_channel(address)) as channel:
            silent = [GrpcLane(channel) for _ in range(2)]
            assert eventually(lambda: service._free_lanes._value == 0)
            refused = GrpcLane(channel)
            with pytest.raises(grpc.RpcError) as raised:
                refused.hear()
            assert type(from_rpc(raised.value)) is OutOfMemory
            token = (
                BridgeStub(channel)
                .Open(pb.OpenRequest(oldest_protocol=1, newest_protocol=1), timeout=20)
                .session
            )
            for lane in silent:
                with pytest.raises(grpc.RpcError):
                    lane.hear()
            served = GrpcLane(channel)
            reply = served.say(pb.LaneRequest(attach=pb.Attach(session=token)))
            assert reply is not None and reply.WhichOneof("kind") == "done"
            for lane in (*silent, refused, served):
                lane.close()
        server.stop(None).wait()


def test_calls_without_a_request_leave_threads_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of calls that stop after their headers, those without the token end at once, there may be so
    many probes, and all end in time. There may be so many preparations, too.
    """
    monkeypatch.setattr("bridge_server.serving.admission.MAX_PROBES", 1)
    monkeypatch.setattr("bridge_server.serving.service.MAX_PREPARATIONS", 0)
    monkeypatch.setattr("bridge_server.serving.admission.ATTACH_S", 3.0)
    opening, checking = "/bridge.v1.Bridge/Open", "/grpc.health.v1.Health/Check"
    known = (("authorization", "Bearer known"),)
    with ThreadPoolExecutor(3) as threads:
        server = grpc.server(threads, interceptors=[Entrance(Tokens(token="known"))])
        add_BridgeServicer_to_server(Service(None, None, SESSIONS, ""), server)
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
        address = f"unix:{tmp_path}/g.sock"
        server.add_insecure_port(address)
        server.start()
        unheard: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        with contextlib.closing(grpc.insecure_channel(address)) as channel:

            def begun(method: str, metadata: Any = ()) -> Any:
                return channel.stream_unary(method).future(
                    iter(unheard.get, None), metadata=metadata
                )

            for _ in range(5):
                assert type(from_rpc(begun(opening).exception(20))) is Unauthenticated
            probe = begun(checking)
            assert eventually(
                lambda: type(from_rpc(begun(checking).exception(20))) is OutOfMemory
            )
            silent = begun(opening, known)
            request = pb.OpenRequest(oldest_protocol=1, newest_protocol=1)
            assert BridgeStub(channel).Open(request, metadata=known, timeout=20).session
            with pytest.raises(grpc.RpcError) as raised:
                next(
                    BridgeStub(channel).Prepare(
                        pb.PrepareRequest(), metadata=known, timeout=20
                    )
                )
            assert type(from_rpc(raised.value)) is OutOfMemory
            for call in (probe, silent):
                assert call.exception(20).code() in (
                    grpc.StatusCode.CANCELLED,
                    grpc.StatusCode.UNKNOWN,
                )
            for _ in range(20):
                unheard.put(None)
        server.stop(None).wait()
