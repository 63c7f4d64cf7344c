"""Random, truncated, mutated and well-formed input for the decoders and for the worker's lanes.

`python -m tests.fuzz [--inputs N] [--seed S] [--first I]`. Input I of seed S is always the same, so
a failure is had again with `--seed S --first I --inputs 1`. The worker here is real but for its
runtime, which echoes bytes instead of importing a framework; it reads and writes the memory it is
given, so that a wrong address kills this process.

For every input: nothing but a BridgeError comes out, as a reply and never as
InternalError; the sessions, residuals and descriptors are back where they were; and a good client
is served afterwards.
"""

import argparse
import contextlib
import ctypes
import os
import random
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from bridge_server.runtime import Description, Model, Preparation, Program, Runtime
from bridge_server.serving import conversation, local_lanes
from bridge_server.serving.programs import Programs
from bridge_server.serving.service import Service
from bridge_server.serving.sessions import Sessions
from bridge_server.turns import Turn
from bridge_wire import errors, specs, trees
from bridge_wire.classes import Classes
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import BridgeError, PeerError, ProtocolError, StructureError
from bridge_wire.lane import frames
from bridge_wire.memory.slabs import PAGE, create_slab
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

SLAB = 16 * PAGE
BASE = 4 * PAGE
_MAX_DEPTH = 12
_CHECK_EVERY = 500

_EDGES = [
    0,
    1,
    2,
    3,
    7,
    63,
    64,
    4095,
    PAGE,
    BASE,
    BASE + 64,
    BASE + SLAB - 64,
    BASE + SLAB,
    SLAB,
]
_EDGES += [
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 64,
    2**64 - 1,
    -1,
    -2,
    -(2**31),
    -(2**63),
]
_WORDS = [
    "",
    "echo",
    "x",
    "P",
    "fields",
    "_x",
    "__class__",
    "__init__",
    "class",
    "a b",
    "é",
    "\ufb01",
    "fi",
    "x" * 300,
]
_SIGNED = {FieldDescriptor.CPPTYPE_INT32: 32, FieldDescriptor.CPPTYPE_INT64: 64}
_UNSIGNED = {FieldDescriptor.CPPTYPE_UINT32: 32, FieldDescriptor.CPPTYPE_UINT64: 64}


class Fault(AssertionError):
    """Something that must not happen has happened."""


# Input --------------------------------------------------------------------------------------------


def integer(rng: random.Random, bits: int, *, signed: bool) -> int:
    """Return a number of that type, near an edge more often than not."""
    value = (
        rng.choice(_EDGES)
        if rng.random() < 0.8
        else rng.getrandbits(rng.randrange(1, 65))
    )
    value &= 2**bits - 1
    return value - 2**bits if signed and value >> (bits - 1) else value


def scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    """Return a value for a field that holds no message."""
    kind = field.cpp_type
    if kind in _SIGNED:
        return integer(rng, _SIGNED[kind], signed=True)
    if kind in _UNSIGNED:
        return integer(rng, _UNSIGNED[kind], signed=False)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return (
            rng.choice([0, *range(1, 21), 99])
            if rng.random() < 0.9
            else integer(rng, 32, signed=True)
        )
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_DOUBLE:
        return rng.choice([0.0, -0.0, 1.5, float("inf"), float("nan")])
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.randbytes(rng.choice([0, 1, 8, 32, 100]))
    return rng.choice(_WORDS)


def fill(message: Message, rng: random.Random, depth: int = 0) -> Message:
    """Give a message random contents of its own grammar."""
    for field in message.DESCRIPTOR.fields:
        if field.containing_oneof is None and rng.random() < 0.7:
            fill_field(message, field, rng, depth)
    for oneof in message.DESCRIPTOR.oneofs:
        if rng.random() < 0.95:
            fill_field(message, rng.choice(oneof.fields), rng, depth)
    return message


def fill_field(
    message: Message, field: FieldDescriptor, rng: random.Random, depth: int
) -> None:
    if field.message_type is not None and depth >= _MAX_DEPTH:
        return
    value = getattr(message, field.name)
    if field.is_repeated:
        for _ in range(
            rng.choice([0, 1, 1, 2, 2, 3, 9]) if depth < 6 else rng.randrange(2)
        ):
            if field.message_type is None:
                value.append(scalar(rng, field))
            else:
                fill(value.add(), rng, depth + 1)
    elif field.message_type is None:
        setattr(message, field.name, scalar(rng, field))
    else:
        value.SetInParent()
        fill(value, rng, depth + 1)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with something cut off, turned over, put in, left out or doubled."""
    edited = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(edited) + 1)
        way = rng.randrange(5)
        if way == 0:
            del edited[at:]
        elif way == 1 and at < len(edited):
            edited[at] ^= 1 << rng.randrange(8)
        elif way == 2:
            edited[at:at] = rng.randbytes(rng.choice([1, 2, 9]))
        elif way == 3:
            del edited[at : at + rng.choice([1, 2, 9])]
        else:
            edited[at:at] = edited[at : at + rng.choice([1, 5, 30])]
    return bytes(edited)


def serialized(kind: type[Message], rng: random.Random) -> bytes:
    """Return bytes that are, or nearly are, or are not at all, such a message."""
    way = rng.random()
    if way < 0.1:
        return rng.randbytes(rng.choice([0, 1, 3, 10, 100, 1000]))
    data = fill(kind(), rng).SerializeToString()
    return data if way < 0.6 else mutated(data, rng)


def pieces(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """Cut the bytes somewhere, as a socket may."""
    while data:
        length = rng.choice([1, 2, 5, 64, len(data)])
        yield data[:length]
        data = data[length:]


# Decoders -----------------------------------------------------------------------------------------

_LANE_MESSAGES: list[type[Message]] = [pb.LaneRequest, pb.LaneReply]
_MESSAGES: list[type[Message]] = [
    *_LANE_MESSAGES,
    pb.PrepareRequest,
    pb.PrepareEvent,
    pb.DescribeReply,
    pb.Tree,
    pb.Spec,
]


def fuzz_frames(rng: random.Random) -> None:
    """Cut a stream into messages: those that were framed, as far as the stream is whole."""
    payloads = [
        serialized(rng.choice(_LANE_MESSAGES), rng) for _ in range(rng.randrange(4))
    ]
    stream = b"".join(map(frames.encode, payloads))
    is_whole = rng.random() < 0.5
    decoder, received = frames.FrameDecoder(), []
    refused = False
    try:
        for piece in pieces(stream if is_whole else mutated(stream, rng), rng):
            message = decoder.feed(piece)
            while message is not None:
                received.append(message)
                message = decoder.next()
    except ProtocolError:
        refused = True
    if is_whole and (refused or received != payloads):
        raise Fault(f"{payloads} came as {received}")
    for message in received:
        with contextlib.suppress(DecodeError):
            decode_all_in(pb.LaneRequest.FromString(message))


def fuzz_messages(rng: random.Random) -> None:
    """Parse a message, and decode every spec, tree and error in it."""
    kind = rng.choice(_MESSAGES)
    try:
        message = kind.FromString(serialized(kind, rng))
    except DecodeError:
        return
    decode_all_in(message)


def decode_all_in(message: Message) -> None:
    if isinstance(message, pb.Spec):
        decode_spec(message)
    elif isinstance(message, pb.Tree):
        decode_tree(message)
        return
    elif isinstance(message, pb.Error):
        errors.decode(message)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in [value] if isinstance(value, Message) else value:
                decode_all_in(item)


def decode_spec(message: pb.Spec) -> None:
    with contextlib.suppress(ProtocolError):
        spec = specs.decode(message)
        if not 0 <= spec.nbytes < 2**63 or specs.decode(specs.encode(spec)) != spec:
            raise Fault(f"the spec {spec} was made of {message}")


def decode_tree(tree: pb.Tree) -> None:
    """Decode a tree with its own number of leaves and with another one, which must be refused."""
    with contextlib.suppress(ProtocolError):
        trees.argument_paths(tree)
    with contextlib.suppress(ProtocolError, StructureError):
        count = len(trees.leaf_paths(tree, "x"))
        trees.build(tree, [Leaf()] * count, Classes())
        try:
            trees.build(tree, [Leaf()] * (count + 1), Classes())
        except (ProtocolError, StructureError):
            return
        raise Fault("a tree was built with more leaves than it has")


class Leaf:
    """Stands for an array."""


# The worker ---------------------------------------------------------------------------------------


class EchoProgram(Program):
    """Returns its inputs' bytes; the pullback of one returns those of the inputs it kept."""

    def __init__(self, inputs: tuple[Spec, ...], wrt: tuple[int, ...] | None) -> None:
        self.inputs = self.outputs = inputs
        self.output_nbytes = tuple(spec.nbytes for spec in inputs)
        self.result = trees.flat(len(inputs))
        self.wrt = wrt
        self.residual_nbytes = (
            None if wrt is None else sum(inputs[i].nbytes for i in wrt)
        )

    def run(self, inputs: Sequence[Any], residual: Any) -> tuple[Sequence[Any], Any]:
        outputs = [bytes(view) for view in inputs]
        return outputs, None if self.wrt is None else {i: outputs[i] for i in self.wrt}


class EchoPullback(Program):
    """Returns the inputs `wrt` that an EchoProgram kept."""

    def __init__(
        self, origin: EchoProgram, wrt: Sequence[int], outputs: Sequence[int]
    ) -> None:
        self.inputs = tuple(origin.outputs[i] for i in outputs)
        self.outputs = tuple(origin.inputs[i] for i in wrt)
        self.output_nbytes = tuple(spec.nbytes for spec in self.outputs)
        self.result = trees.flat(len(self.outputs))
        self.pullback_of = origin
        self._wrt = tuple(wrt)

    def run(self, inputs: Sequence[Any], residual: Any) -> tuple[Sequence[Any], Any]:
        for view in inputs:
            bytes(view)
        return [residual[i] for i in self._wrt], None


class EchoRuntime(Runtime):
    """A framework whose arrays are raw memory."""

    def __init__(self) -> None:
        self._classes = Classes()

    def describe(self) -> Description:
        return Description("echo", "0", x64=True)

    def adapt(self, name: str, target: Any) -> Model:
        return Model(
            name=name,
            doc="",
            methods={},
            parameters=(),
            values=(),
            apply=lambda values, args, kwargs: args,
        )

    def prepare_call(self, model: Model, call: pb.Call) -> Preparation:
        inputs = specs.decode_all(call.inputs)
        paths = trees.argument_paths(call.arguments)
        if len(paths) != len(inputs):
            raise ProtocolError("leaves and specs differ in number")
        trees.build(call.arguments, paths, self._classes)
        wrt = tuple(call.keep.inputs) if call.HasField("keep") else None
        if wrt is not None and any(i >= len(inputs) for i in wrt):
            raise ProtocolError("keeps what is no input")
        yield "tracing"
        return EchoProgram(inputs, wrt)

    def prepare_parameters(self, model: Model) -> Program:
        return EchoProgram((), None)

    def prepare_pullback(
        self, program: Program, wrt: Sequence[int], outputs: Sequence[int]
    ) -> Preparation:
        assert isinstance(program, EchoProgram) and program.wrt is not None
        if not set(wrt) <= set(program.wrt) or any(
            i >= len(program.outputs) for i in outputs
        ):
            raise ProtocolError("a pullback of what was not kept")
        yield "compiling"
        return EchoPullback(program, wrt, outputs)

    def view(
        self, pointer: int, spec: Spec, owner: Any, turn: Turn | None = None
    ) -> Any:
        view = (
            (ctypes.c_ubyte * spec.nbytes).from_address(pointer)
            if spec.nbytes
            else (ctypes.c_ubyte * 0)()
        )
        view._owner = owner
        return view

    def write(
        self, array: Any, pointer: int, nbytes: int, turn: Turn | None = None
    ) -> None:
        if len(array) != nbytes:
            raise Fault(
                f"an output of {len(array)} bytes goes where {nbytes} have room"
            )
        ctypes.memmove(pointer, array, nbytes)


class Aborted(Exception):
    """The exception that gRPC raises when a call is aborted."""


class Context:
    """As much of a gRPC context as the service uses."""

    def __init__(self) -> None:
        self.error = pb.Error()

    def set_trailing_metadata(self, metadata: Iterable[tuple[str, bytes]]) -> None:
        self.error = pb.Error.FromString(dict(metadata)[errors.TRAILER])

    def abort(self, code: object, details: str) -> None:
        raise Aborted


class Stream:
    """One end of a lane in memory: frames as bytes, cut as a socket may, and the descriptors
    that come with them."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._pieces: list[tuple[bytes, list[int]]] = []
        self._decoder = frames.FrameDecoder()
        self._descriptors: list[int] = []

    def send(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        self._pieces += [(piece, []) for piece in pieces(frame, self._rng)]
        if self._pieces:
            self._pieces[-1][1].extend(descriptors)
        else:
            self._descriptors.extend(descriptors)

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        message = self._decoder.next()
        while message is None:
            if not self._pieces:
                return None
            piece, descriptors = self._pieces.pop(0)
            self._descriptors += descriptors
            message = self._decoder.feed(piece)
        return message

    def take_descriptors(self) -> list[int]:
        taken, self._descriptors = self._descriptors, []
        return taken

    def close(self) -> None:
        for fd in self.take_descriptors() + [
            fd for _, descriptors in self._pieces for fd in descriptors
        ]:
            os.close(fd)


class Target:
    """A worker's sessions, programs and service over the echoing runtime, and clients good and
    bad."""

    def __init__(self) -> None:
        # Sessions' scratch memory is made for each of them: little of it, and soon full.
        os.environ["BRIDGE_SLAB_MAX_BYTES"] = str(SLAB)
        self._slab = create_slab(SLAB, BASE)
        self._bad_files = [
            os.memfd_create("unsealed"),
            os.open(tempfile.gettempdir(), os.O_RDONLY),
            *os.pipe(),
        ]
        runtime = EchoRuntime()
        programs = Programs(runtime, {"echo": runtime.adapt("echo", None)})
        self.sessions = Sessions(runtime, residual_bytes=8 * PAGE, slab_bytes=4 * SLAB)
        self._service = Service(runtime, programs, self.sessions, "")
        self._baseline = len(os.listdir("/proc/self/fd"))

    def close(self) -> None:
        for fd in self._bad_files:
            os.close(fd)
        self._slab.close()

    def fuzz(self, rng: random.Random) -> None:
        """Let a client say something between right and senseless, from its first word to its
        last."""
        token = self.sessions.open().token
        sizes = [integer(rng, 12, signed=False) for _ in range(rng.randrange(4))]
        prepared = [
            self._prepare(request) for request in self._preparations(rng, token, sizes)
        ]
        stream = Stream(rng)
        for frame, descriptors in self._sentences(rng, token, prepared, len(sizes)):
            stream.send(frame, descriptors)
        if rng.random() < 0.05:
            self.sessions.close(token)
        replies = self._replies(stream)
        with (
            contextlib.closing(stream),
            contextlib.closing(replies),
            contextlib.suppress(PeerError),
        ):
            for reply in replies:
                check_reply(reply)
                if rng.random() < 0.02:  # the client has gone
                    break
        self.sessions.close(token)

    def check(self) -> None:
        """Check that no resource of the bad clients is left, and that a good client is served."""
        sessions = self.sessions
        if sessions._by_token or sessions._running:
            raise Fault(
                f"{len(sessions._by_token)} sessions and {len(sessions._running)} calls are left"
            )
        if sessions.residuals.count or sessions.residuals.nbytes:
            raise Fault(f"{sessions.residuals.count} residuals are left")
        descriptors = len(os.listdir("/proc/self/fd"))
        if descriptors > self._baseline:  # fewer is somebody else's doing
            raise Fault(f"{descriptors} descriptors are open, not {self._baseline}")
        self._serve_a_good_client()

    def _serve_a_good_client(self) -> None:
        token = self.sessions.open().token
        spec = Spec(BY_NAME["float32"], (25,))
        keep = self._prepare(
            pb.PrepareRequest(session=token, call=call_of([spec], keep=True))
        )
        pull = self._prepare(
            pb.PrepareRequest(
                session=token, pullback=pb.Pullback(program=keep, wrt=[0], outputs=[0])
            )
        )
        data = os.urandom(100)
        self._slab.view[:100], self._slab.view[128:228] = data, bytes(100)
        stream = Stream(random.Random(0))
        run = pb.Run(program=keep, inputs=[BASE], outputs=[BASE + 128], residual=1)
        for request, descriptors in [
            (pb.LaneRequest(attach=pb.Attach(session=token)), []),
            (
                pb.LaneRequest(share=pb.Share(base=BASE, nbytes=SLAB)),
                [os.dup(self._slab.fd)],
            ),
            (pb.LaneRequest(run=run), []),
            (
                pb.LaneRequest(
                    run=pb.Run(program=pull, residual=1, inline=True, data=bytes(100))
                ),
                [],
            ),
            (pb.LaneRequest(release=pb.Release(residuals=[1])), []),
            (pb.LaneRequest(peek=pb.Peek(address=BASE, nbytes=100)), []),
        ]:
            stream.send(frames.encode(request.SerializeToString()), descriptors)
        with contextlib.closing(stream):
            replies = list(self._replies(stream))
        kinds = [reply.WhichOneof("kind") for reply in replies]
        if kinds != ["done", "done", "ran", "ran", "usage", "peeked"]:
            raise Fault(
                f"a good client was answered {kinds}: {[reply.error for reply in replies]}"
            )
        if (
            bytes(self._slab.view[128:228]) != data
            or replies[3].ran.data != data
            or replies[4].usage.residuals
        ):
            raise Fault("a good client received other bytes than its own")

    def _replies(self, stream: Stream) -> Generator[pb.LaneReply, None, None]:
        requests = local_lanes._requests(stream)
        return conversation.Conversation(
            self.sessions, requests, stream.take_descriptors
        ).replies()

    def _prepare(self, request: pb.PrepareRequest) -> int:
        """Return the program's name, or 0 when the service has refused."""
        context, program = Context(), 0
        try:
            for event in self._service.Prepare(request, context):
                program = event.prepared.program
                if event.WhichOneof("kind") == "error":
                    check_error(event.error)
        except Aborted:
            check_error(context.error)
        return program

    def _preparations(
        self, rng: random.Random, token: bytes, sizes: list[int]
    ) -> Iterator[pb.PrepareRequest]:
        inputs = [
            Spec(rng.choice([BY_NAME["int8"], BY_NAME["float64"]]), (size,))
            for size in sizes
        ]
        yield pb.PrepareRequest(session=token, call=call_of(inputs, keep=False))
        yield pb.PrepareRequest(session=token, call=call_of(inputs, keep=True))
        yield pb.PrepareRequest(
            session=token,
            pullback=pb.Pullback(program=2, wrt=range(len(inputs)), outputs=[]),
        )
        with contextlib.suppress(DecodeError):
            request = pb.PrepareRequest.FromString(serialized(pb.PrepareRequest, rng))
            if rng.random() < 0.9:
                request.session = token
            if rng.random() < 0.8 and request.WhichOneof("what") == "call":
                request.call.model = "echo"
            yield request

    def _sentences(
        self, rng: random.Random, token: bytes, programs: list[int], arity: int
    ) -> Iterator[tuple[bytes, list[int]]]:
        """Yield a conversation's frames with their descriptors: mostly sensible ones."""
        if rng.random() < 0.97:
            yield (
                frames.encode(
                    pb.LaneRequest(attach=pb.Attach(session=token)).SerializeToString()
                ),
                [],
            )
        if rng.random() < 0.9:
            yield (
                frames.encode(
                    pb.LaneRequest(
                        share=pb.Share(base=BASE, nbytes=SLAB)
                    ).SerializeToString()
                ),
                [os.dup(self._slab.fd)],
            )
        for _ in range(rng.choice([1, 2, 5, 10])):
            way = rng.random()
            request = pb.LaneRequest()
            if way < 0.5:
                request.run.CopyFrom(self._run(rng, programs, arity))
            elif way < 0.6:
                request.share.CopyFrom(
                    pb.Share(
                        base=integer(rng, 64, signed=False),
                        nbytes=rng.choice([SLAB, PAGE]),
                    )
                )
            elif way < 0.65:
                address = rng.choice(
                    [BASE, BASE + SLAB - 64, integer(rng, 64, signed=False)]
                )
                request.peek.CopyFrom(
                    pb.Peek(address=address, nbytes=integer(rng, 32, signed=False))
                )
            else:
                fill(request, rng)
            data = request.SerializeToString()
            frame = frames.encode(mutated(data, rng) if rng.random() < 0.15 else data)
            yield (
                (mutated(frame, rng) if rng.random() < 0.03 else frame),
                self._descriptors(rng, request),
            )
            if request.run.inline:
                for _ in range(rng.randrange(4)):
                    chunk = pb.LaneRequest(
                        chunk=bytes(rng.choice([0, 1, 63, 64, 4095, PAGE, 8 * PAGE]))
                    )
                    yield frames.encode(chunk.SerializeToString()), []

    def _run(self, rng: random.Random, programs: list[int], arity: int) -> pb.Run:
        """Return the run of one of the programs, the first two of which have `arity` inputs and
        as many outputs."""
        run = pb.Run(
            program=rng.choice(programs),
            inline=rng.random() < 0.3,
            residual=rng.randrange(4),
        )
        if rng.random() < 0.2:
            run.data = bytes(rng.choice([1, 63, 64, 128, 4095, PAGE]))
        run.inputs.extend(self._addresses(rng, arity))
        run.outputs.extend(self._addresses(rng, arity))
        run.released.extend(rng.randrange(5) for _ in range(rng.randrange(2)))
        return run

    def _addresses(self, rng: random.Random, arity: int) -> list[int]:
        count = arity if rng.random() < 0.9 else rng.randrange(4)
        good = [BASE, BASE + 64, BASE + PAGE, BASE + SLAB // 2]
        return [
            rng.choice(good) if rng.random() < 0.9 else integer(rng, 64, signed=False)
            for _ in range(count)
        ]

    def _descriptors(self, rng: random.Random, request: pb.LaneRequest) -> list[int]:
        if request.WhichOneof("kind") == "share":
            count = rng.choice([0, 1, 1, 1, 1, 2])
        else:
            count = int(rng.random() < 0.05)
        files = [self._slab.fd] * 4 + self._bad_files
        return [os.dup(rng.choice(files)) for _ in range(count)]


def call_of(inputs: Sequence[Spec], *, keep: bool) -> pb.Call:
    """Return the call of the echo with these inputs as its positional arguments."""
    arguments = trees.arguments(
        trees.flat(len(inputs)), pb.Tree(dict=pb.Tree.Mapping())
    )
    call = pb.Call(model="echo", arguments=arguments, inputs=map(specs.encode, inputs))
    if keep:
        call.keep.inputs.extend(range(len(inputs)))
    return call


def check_reply(reply: pb.LaneReply) -> None:
    if reply.WhichOneof("kind") is None:
        raise Fault("a reply says nothing")
    if reply.WhichOneof("kind") == "error":
        check_error(reply.error)


def check_error(error: pb.Error) -> None:
    decoded = errors.decode(error)
    if isinstance(decoded, errors.InternalError) or type(decoded) is BridgeError:
        raise Fault(f"the worker answered {error.kind}: {error.message}")


# The run ------------------------------------------------------------------------------------------


def run(
    inputs: int,
    seed: int,
    first: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> None:
    """Feed that many inputs, from number `first` on.

    Raises:
      Fault: an input has had an effect that it must not have.
    """
    # A refusal that is logged would only be noise; an unexpected exception comes back as
    # InternalError.
    with (
        mock.patch.dict(os.environ),
        contextlib.closing(Target()) as target,
        silenced(),
    ):
        kinds = [fuzz_frames, fuzz_messages, target.fuzz]
        for index in progress(range(first, first + inputs)):
            try:
                kinds[index % len(kinds)](random.Random(f"{seed}/{index}"))
                if index % _CHECK_EVERY == 0 or index == first + inputs - 1:
                    target.check()
            except Exception as error:
                raise Fault(
                    f"input {index} of seed {seed}: {type(error).__name__}: {error}"
                ) from error


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    with mock.patch.object(conversation._log, "disabled", True):
        yield


def _with_progress_bar(numbers: Iterable[int]) -> Iterable[int]:
    try:
        from tqdm import tqdm
    except ImportError:
        return numbers
    return tqdm(
        numbers, unit=" inputs", smoothing=0.05, disable=not sys.stderr.isatty()
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument(
        "--seed", type=int, default=None, help="by default another one each time"
    )
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first input"
    )
    options = parser.parse_args(argv)
    seed = (
        random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    )
    try:
        run(options.inputs, seed, options.first, _with_progress_bar)
    except Fault as fault:
        print(f"fuzz: FAULT: {fault}", file=sys.stderr)
        raise
    print(f"fuzz: {options.inputs} inputs of seed {seed}: no fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
