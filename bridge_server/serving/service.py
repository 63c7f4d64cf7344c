"""The gRPC service: every RPC except the local clients' hot path. Imports no framework."""

import contextlib
import logging
import platform
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence

import grpc

from bridge_server.process import malloc
from bridge_server.process.tokens import Grant
from bridge_server.runtime import Model, Preparation, Program, Runtime
from bridge_server.serving.admission import MAX_PROBES
from bridge_server.serving.conversation import Conversation
from bridge_server.serving.programs import Programs
from bridge_server.serving.rights import check_models, grant_of, hide_models
from bridge_server.serving.session import Session
from bridge_server.serving.sessions import Sessions
from bridge_wire import PROTOCOLS, __version__, specs
from bridge_wire.doctor import namespaces
from bridge_wire.errors import (
    BridgeError,
    OutOfMemory,
    ProtocolError,
    Unauthenticated,
    VersionMismatch,
    abort,
    unexpected,
)
from bridge_wire.memory.copying import usable_cores
from bridge_wire.memory.cuda import Gpu
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.pb.bridge_pb2_grpc import BridgeServicer
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)

_LONGEST_LOGGED = 200  # characters of a client's text
_LAST_BYTES_S = 0.5  # for replies that gRPC has not sent yet
# Each open lane and each running preparation holds a thread; other calls need free threads.
MAX_LANES = 768
MAX_PREPARATIONS = 256
MAX_THREADS = MAX_LANES + MAX_PREPARATIONS + MAX_PROBES + 128


class Service(BridgeServicer):
    """Translates RPCs into calls on sessions and programs.

    Every RPC may run in several threads at once.
    """

    def __init__(
        self, runtime: Runtime, programs: Programs, sessions: Sessions, local_lane: str
    ) -> None:
        self._runtime = runtime
        self._programs = programs
        self._sessions = sessions
        self._local_lane = local_lane
        self._lanes: dict[Conversation, grpc.ServicerContext] = {}
        self._free_lanes = threading.Semaphore(MAX_LANES)
        self._free_preparations = threading.Semaphore(MAX_PREPARATIONS)

    def Describe(
        self, request: pb.DescribeRequest, context: grpc.ServicerContext
    ) -> pb.DescribeReply:
        about = self._runtime.describe()
        return pb.DescribeReply(
            version=__version__,
            framework=about.framework,
            framework_version=about.version,
            python_version=platform.python_version(),
            x64=about.x64,
            devices=about.devices,
            models=[
                _described(model, self._programs.signatures[name])
                for name, model in self._programs.models.items()
                if grant_of(context).admits(name)
            ],
            allocator=malloc.chosen(),
            cores=usable_cores(),
            gpu=_described_gpu(self._runtime.gpu()),
            revision=self._programs.revision,
            namespaces=[
                pb.Namespace(kind=kind, digest=digest)
                for kind, digest in namespaces.digests().items()
            ],
        )

    def Open(
        self, request: pb.OpenRequest, context: grpc.ServicerContext
    ) -> pb.OpenReply:
        try:
            protocol = _negotiated(request)
            session = self._sessions.open()
            session.owner = grant_of(context).name
        except BridgeError as error:
            abort(context, error)
        client = request.client[:_LONGEST_LOGGED]
        _log.info("session %d: %r from %s", session.number, client, context.peer())
        return pb.OpenReply(
            protocol=protocol,
            session=session.token,
            local_lane=self._local_lane,
            slab_bytes=self._sessions.slab_bytes,
        )

    def Prepare(
        self, request: pb.PrepareRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.PrepareEvent]:
        if not self._free_preparations.acquire(blocking=False):
            abort(
                context,
                OutOfMemory(
                    f"the worker already prepares {MAX_PREPARATIONS} programs; try again later"
                ),
            )
        try:
            yield from self._prepared(request, grant_of(context))
        finally:
            self._free_preparations.release()

    def _prepared(
        self, request: pb.PrepareRequest, grant: Grant
    ) -> Iterator[pb.PrepareEvent]:
        try:
            session = self._session_of(request.session, grant)
            check_models(request, grant, self._programs.models)
            with self._sessions.running(session, object()):
                if request.HasField("shapes"):
                    yield pb.PrepareEvent(
                        progress=pb.PrepareEvent.Progress(phase="tracing")
                    )
                    yield pb.PrepareEvent(
                        prepared=pb.Prepared(
                            shapes=self._programs.shapes(request.shapes)
                        )
                    )
                    return
                program = yield from _as_events(
                    self._preparation(request, session.program)
                )
                fingerprint = (
                    self._programs.fingerprint(request.call)
                    if request.HasField("call")
                    else b""
                )
            yield pb.PrepareEvent(
                prepared=pb.Prepared(
                    program=session.add_program(program),
                    result=program.result,
                    outputs=[specs.encode(spec) for spec in program.outputs],
                    fingerprint=fingerprint,
                    recipes=self._programs.recipes(program),
                )
            )
        except BridgeError as error:
            with self._sessions.examined(error) as found:
                yield pb.PrepareEvent(error=found)
        except Exception as error:
            _log.exception("a preparation failed unexpectedly")
            with self._sessions.examined(unexpected(error)) as found:
                yield pb.PrepareEvent(error=found)

    def Lane(
        self, request_iterator: Iterator[pb.LaneRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.LaneReply]:
        if not self._free_lanes.acquire(blocking=False):
            abort(
                context,
                OutOfMemory(
                    f"the worker already serves {MAX_LANES} lanes over gRPC; try again later"
                ),
            )
        conversation = Conversation(
            self._sessions,
            self._owned(request_iterator, grant_of(context)),
            is_abandoned=lambda: not context.is_active(),
        )
        self._lanes[conversation] = context
        try:
            yield from conversation.replies()
        finally:
            del self._lanes[conversation]
            self._free_lanes.release()

    def end_idle_lanes(self) -> None:
        """Cancel the lanes without a call under way, so that their clients know that no call of
        theirs has run; only while the sessions are draining."""
        lanes = list(self._lanes.items())
        if lanes:
            time.sleep(_LAST_BYTES_S)
        for conversation, context in lanes:
            if not self._sessions.is_running(conversation):
                context.cancel()

    def Close(
        self, request: pb.CloseRequest, context: grpc.ServicerContext
    ) -> pb.CloseReply:
        with contextlib.suppress(Unauthenticated):
            session = self._session_of(request.session, grant_of(context))
            self._sessions.close(session.token)
        return pb.CloseReply()

    def Measure(
        self, request: pb.MeasureRequest, context: grpc.ServicerContext
    ) -> pb.Statistics:
        numbers = self._sessions.statistics()
        hide_models(numbers, grant_of(context), self._programs.models)
        return numbers

    def _session_of(self, token: bytes, grant: Grant) -> Session:
        """Return the session of a token.

        Raises:
          Unauthenticated: there is none, or it was opened with another client's token.
        """
        session = self._sessions.find(token)
        if session.owner != grant.name:
            raise Unauthenticated(
                "the session token is not valid here; open a session first"
            )
        return session

    def _owned(
        self, requests: Iterator[pb.LaneRequest], grant: Grant
    ) -> Iterator[pb.LaneRequest]:
        """Yield the requests of a lane, none of which can attach to another client's session."""
        for request in requests:
            if request.HasField("attach"):
                try:
                    self._session_of(request.attach.session, grant)
                except Unauthenticated:  # the answer is that for an unknown session
                    request.attach.session = b""
            yield request
            break
        yield from requests

    def _preparation(
        self, request: pb.PrepareRequest, program_of: Callable[[int], Program]
    ) -> Preparation:
        kind = request.WhichOneof("what")
        if kind == "call":
            return self._programs.call(request.call)
        if kind == "parameters":
            return self._programs.parameters(request.parameters)
        if kind == "pullback":
            return self._programs.pullback(
                program_of(request.pullback.program), request.pullback
            )
        raise ProtocolError(
            "a Prepare request must name a call, parameters, a pullback or shapes"
        )


def _as_events(preparation: Preparation) -> Generator[pb.PrepareEvent, None, Program]:
    """Yield a preparation's phases as events; return its program."""
    while True:
        try:
            phase = next(preparation)
        except StopIteration as finished:
            program: Program = finished.value
            return program
        yield pb.PrepareEvent(progress=pb.PrepareEvent.Progress(phase=phase))


def _negotiated(request: pb.OpenRequest) -> int:
    oldest, newest = PROTOCOLS
    chosen = min(newest, request.newest_protocol)
    if chosen < max(oldest, request.oldest_protocol):
        raise VersionMismatch(
            f"the client speaks protocols {request.oldest_protocol} to {request.newest_protocol},"
            f" this worker {oldest} to {newest}; install matching releases of torch-jax-bridge on"
            " both sides"
        )
    return chosen


def _described_gpu(gpu: Gpu | None) -> pb.Gpu | None:
    return None if gpu is None else pb.Gpu(uuid=gpu.uuid, name=gpu.name)


def _described(model: Model, signatures: Sequence[tuple[Spec, ...]]) -> pb.Model:
    described = model.description
    described.signatures.extend(
        pb.Signature(inputs=map(specs.encode, arrays)) for arrays in signatures
    )
    return described
