"""The gRPC service: everything but the hot path of local clients."""

import contextlib
import hmac
import logging
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

import grpc

from bridge_server import allocator_choice
from bridge_server.lanes import ATTACH_S, serve
from bridge_server.programs import Programs
from bridge_server.runtime import Model, Preparation, Program, Runtime
from bridge_server.sessions import Sessions
from bridge_wire import PROTOCOLS, __version__, namespaces, specs
from bridge_wire.copying import usable_cores
from bridge_wire.cuda import Gpu
from bridge_wire.errors import (
    BridgeError,
    OutOfMemory,
    ProtocolError,
    Unauthenticated,
    VersionMismatch,
    abort,
    unexpected,
)
from bridge_wire.frames import MAX_FRAME
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.pb.bridge_pb2_grpc import BridgeServicer
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)

# Each of these holds a thread while it is open or under way, and other calls must find one.
MAX_LANES = 768
MAX_PREPARATIONS = 256
MAX_PROBES = 128
MAX_THREADS = 1280

_BRIDGE, _HEALTH = "/bridge.v1.Bridge/", "/grpc.health.v1.Health/"
_T = TypeVar("_T")
_Behavior = Callable[[Iterator[Any], grpc.ServicerContext], Any]  # of a method whose requests are a stream


class Service(BridgeServicer):
    """Translates RPCs into calls on sessions and programs. Every RPC may run in several threads at once."""

    def __init__(self, runtime: Runtime, programs: Programs, sessions: Sessions, local_lane: str) -> None:
        self._runtime = runtime
        self._programs = programs
        self._sessions = sessions
        self._local_lane = local_lane
        self._free_lanes = threading.Semaphore(MAX_LANES)
        self._free_preparations = threading.Semaphore(MAX_PREPARATIONS)

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        about = self._runtime.describe()
        return pb.DescribeReply(
            version=__version__,
            framework=about.framework,
            framework_version=about.version,
            python_version=platform.python_version(),
            x64=about.x64,
            devices=about.devices,
            models=[
                _described(model, self._programs.signatures[name]) for name, model in self._programs.models.items()
            ],
            allocator=allocator_choice.chosen(),
            cores=usable_cores(),
            gpu=_described_gpu(self._runtime.gpu()),
            namespaces=[pb.Namespace(kind=kind, digest=digest) for kind, digest in namespaces.digests().items()],
        )

    def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:
        try:
            protocol = _negotiated(request)
            session = self._sessions.open()
        except BridgeError as error:
            abort(context, error)
        _log.debug("opened a session for %r", request.client[:200])
        return pb.OpenReply(
            protocol=protocol, session=session.token, local_lane=self._local_lane, slab_bytes=self._sessions.slab_bytes
        )

    def Prepare(self, request: pb.PrepareRequest, context: grpc.ServicerContext) -> Iterator[pb.PrepareEvent]:
        if not self._free_preparations.acquire(blocking=False):
            abort(context, OutOfMemory(f"the worker prepares {MAX_PREPARATIONS} programs already; try again later"))
        try:
            yield from self._prepared(request)
        finally:
            self._free_preparations.release()

    def _prepared(self, request: pb.PrepareRequest) -> Iterator[pb.PrepareEvent]:
        try:
            session = self._sessions.find(request.session)
            with self._sessions.running(session):
                if request.HasField("shapes"):
                    yield pb.PrepareEvent(progress=pb.PrepareEvent.Progress(phase="tracing"))
                    yield pb.PrepareEvent(prepared=pb.Prepared(shapes=self._programs.shapes(request.shapes)))
                    return
                program = yield from _as_events(self._preparation(request, session.program))
            yield pb.PrepareEvent(
                prepared=pb.Prepared(
                    program=session.add_program(program),
                    result=program.result,
                    outputs=[specs.encode(spec) for spec in program.outputs],
                )
            )
        except BridgeError as error:
            with self._sessions.examined(error) as found:
                yield pb.PrepareEvent(error=found)
        except Exception as error:
            _log.exception("a preparation failed unexpectedly")
            with self._sessions.examined(unexpected(error)) as found:
                yield pb.PrepareEvent(error=found)

    def Lane(self, request_iterator: Iterator[pb.LaneRequest], context: grpc.ServicerContext) -> Iterator[pb.LaneReply]:
        if not self._free_lanes.acquire(blocking=False):
            abort(context, OutOfMemory(f"the worker serves {MAX_LANES} lanes over gRPC already; try again later"))
        try:
            yield from serve(request_iterator, self._sessions)
        finally:
            self._free_lanes.release()

    def Close(self, request: pb.CloseRequest, context: grpc.ServicerContext) -> pb.CloseReply:
        self._sessions.close(request.session)
        return pb.CloseReply()

    def _preparation(self, request: pb.PrepareRequest, program_of: Callable[[int], Program]) -> Preparation:
        kind = request.WhichOneof("what")
        if kind == "call":
            return self._programs.call(request.call)
        if kind == "parameters":
            return self._programs.parameters(request.parameters)
        if kind == "pullback":
            return self._programs.pullback(program_of(request.pullback.program), request.pullback)
        raise ProtocolError("a Prepare request names nothing to prepare")


class Entrance(grpc.ServerInterceptor):
    """Lets in calls that carry the worker's token, if it has one. Health probes pass without it.

    gRPC gives a call a thread when its headers have come. So that whoever sends no more than these, or holds a probe
    open, keeps nobody else from being served, a call must go on within ATTACH_S, and there may be so many probes.
    """

    def __init__(self, token: str | None) -> None:
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._free_probes = threading.Semaphore(MAX_PROBES)
        self._awaited = _Awaited()

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        if not (details.method.startswith(_HEALTH) or self._is_known(details)):
            return _REFUSAL
        handler = continuation(details)
        if handler is None:  # there is no such method
            return None
        make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else _UNARY_RESPONSE
        serve = self._prompt(handler)
        return make(
            serve if details.method.startswith(_BRIDGE) else self._counted(serve),
            request_deserializer=_lane_request if details.method == f"{_BRIDGE}Lane" else handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _is_known(self, details: grpc.HandlerCallDetails) -> bool:
        given = str(dict(details.invocation_metadata).get("authorization", ""))
        return self._expected is None or hmac.compare_digest(given.encode(), self._expected)

    def _prompt(self, handler: grpc.RpcMethodHandler) -> _Behavior:
        """Return what a handler does with a stream of requests, of which the first must come in time."""
        kinds = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
        serve = next(filter(None, kinds))

        def prompt(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            if handler.request_streaming:
                return serve(self._awaited.all_of(requests, context), context)
            request = self._awaited.first_of(requests, context)
            if request is None:
                abort(context, ProtocolError("a call has ended without a request"))
            return serve(request, context)

        return prompt

    def _counted(self, serve: _Behavior) -> _Behavior:
        def counted(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            if not self._free_probes.acquire(blocking=False):
                abort(context, OutOfMemory(f"the worker answers {MAX_PROBES} probes already; try again later"))
            if not context.add_callback(self._free_probes.release):
                self._free_probes.release()  # the call has ended already
            return serve(requests, context)

        return counted


def _refuse(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
    abort(context, Unauthenticated("the worker's token is missing or wrong; pass token="))


def _lane_request(message: bytes) -> pb.LaneRequest:
    if len(message) > MAX_FRAME:
        raise ProtocolError(f"a lane's message of {len(message)} bytes; the limit is {MAX_FRAME}, as of a frame")
    return pb.LaneRequest.FromString(message)


_UNARY_RESPONSE = grpc.stream_unary_rpc_method_handler
_REFUSAL: Any = grpc.stream_stream_rpc_method_handler(_refuse)  # of a stream, so as to wait for no request


class _Awaited:
    """The calls whose first request is awaited, for ATTACH_S at most. One thread watches them all, while there are any.

    Not a timer for each, which would start a thread for each: that takes as long as the call itself.
    """

    def __init__(self) -> None:
        self._calls: deque[tuple[float, list[grpc.ServicerContext]]] = deque()  # the oldest first
        self._is_watched = False
        self._lock = threading.Lock()

    def first_of(self, requests: Iterator[_T], context: grpc.ServicerContext) -> _T | None:
        """Return a call's first request, or None if it has ended without one; end it if none comes in time."""
        awaited = [context]
        with self._lock:
            self._calls.append((time.monotonic() + ATTACH_S, awaited))
            if not self._is_watched:
                threading.Thread(target=self._watch, name="awaited-requests", daemon=True).start()
                self._is_watched = True
        try:
            return next(requests, None)
        except grpc.RpcError:
            return None
        finally:
            awaited.clear()

    def all_of(self, requests: Iterator[_T], context: grpc.ServicerContext) -> Iterator[_T]:
        """Yield a client's requests, the first of them in time; one that breaks off has ended."""
        first = self.first_of(requests, context)
        if first is not None:
            yield first
            with contextlib.suppress(grpc.RpcError):
                yield from requests

    def _watch(self) -> None:
        while True:
            with self._lock:
                if not self._calls:
                    self._is_watched = False
                    return
                deadline, awaited = self._calls.popleft()
            time.sleep(max(0.0, deadline - time.monotonic()))
            for context in list(awaited):
                context.cancel()


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
            f"the client speaks protocols {request.oldest_protocol} to {request.newest_protocol}, this worker "
            f"{oldest} to {newest}; install matching releases of torch-jax-bridge on both sides"
        )
    return chosen


def _described_gpu(gpu: Gpu | None) -> pb.Gpu | None:
    return None if gpu is None else pb.Gpu(uuid=gpu.uuid, name=gpu.name)


def _described(model: Model, signatures: Sequence[tuple[Spec, ...]]) -> pb.Model:
    described = model.description
    described.signatures.extend(pb.Signature(inputs=map(specs.encode, arrays)) for arrays in signatures)
    return described
