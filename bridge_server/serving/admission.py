"""gRPC interceptor: authenticates calls, enforces a deadline for the first message, limits probes.

Imports no framework.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from bridge_server.process.tokens import ANYONE, Grant, Tokens
from bridge_server.serving.audit import Audit
from bridge_server.serving.conversation import ATTACH_S
from bridge_server.serving.rights import note_grant
from bridge_wire.errors import (
    BridgeError,
    OutOfMemory,
    PeerError,
    ProtocolError,
    Unauthenticated,
    abort,
)
from bridge_wire.lane.frames import MAX_FRAME
from bridge_wire.pb import bridge_pb2 as pb

MAX_PROBES = 128  # concurrent probes: each holds a thread

_BRIDGE, _HEALTH = "/bridge.v1.Bridge/", "/grpc.health.v1.Health/"
_T = TypeVar("_T")
# The behavior of a method with a request stream.
_Behavior = Callable[[Iterator[Any], grpc.ServicerContext], Any]


class Entrance(grpc.ServerInterceptor):
    """Admits calls with one of the worker's tokens, if it has any. Health probes need no token.

    gRPC assigns a thread to a call as soon as its headers arrive. A client that sends headers only,
    or holds probes open, would starve other clients. Therefore the first message must arrive within
    ATTACH_S, and at most MAX_PROBES probes run at a time.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._audit = Audit()
        self._free_probes = threading.Semaphore(MAX_PROBES)
        self._awaited = _Awaited()

    def intercept_service(
        self, continuation: Any, details: grpc.HandlerCallDetails
    ) -> Any:
        is_probe = details.method.startswith(_HEALTH)
        try:
            grant = ANYONE if is_probe else self._tokens.admit(_token_in(details))
        except Unauthenticated as error:
            return self._refusal(details.method, str(error))
        handler = continuation(details)
        if handler is None:  # unknown method
            return None
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else _UNARY_RESPONSE
        )
        serve = self._prompt(handler)
        if not is_probe:
            serve = self._noted(serve, details.method, grant)
        decode = (
            _lane_request
            if details.method == f"{_BRIDGE}Lane"
            else handler.request_deserializer
        )
        return make(
            serve if details.method.startswith(_BRIDGE) else self._counted(serve),
            request_deserializer=_tolerant(decode),
            response_serializer=handler.response_serializer,
        )

    def _refusal(self, method: str, reason: str) -> Any:
        def refuse(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            self._audit.refuse(context, method, reason.partition(";")[0])
            abort(context, Unauthenticated(reason))

        # With a request stream, since a unary handler would wait for the request.
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _noted(self, serve: _Behavior, method: str, grant: Grant) -> _Behavior:
        """Return a behavior that logs the admission and passes the grant to the method."""

        def noted(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            self._audit.admit(context, method, grant)
            note_grant(context, grant)
            return serve(requests, context)

        return noted

    def _prompt(self, handler: "grpc.RpcMethodHandler[Any, Any]") -> _Behavior:
        """Return a handler's behavior with a deadline for the first request of the stream."""
        kinds = (
            handler.unary_unary,
            handler.unary_stream,
            handler.stream_unary,
            handler.stream_stream,
        )
        serve = next(filter(None, kinds))

        def stream(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            try:
                yield from serve(self._awaited.all_of(requests, context), context)
            except PeerError as error:
                abort(context, error)

        def prompt(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            request = self._awaited.first_of(requests, context)
            if request is None:
                request = ProtocolError(
                    "the call ended without a request; expected one"
                )
            if isinstance(request, BridgeError):
                abort(context, request)
            try:
                return serve(request, context)
            except NotImplementedError:  # of a method that gRPC's package declares only
                context.abort(
                    grpc.StatusCode.UNIMPLEMENTED,
                    "the worker does not implement this method",
                )

        return stream if handler.request_streaming else prompt

    def _counted(self, serve: _Behavior) -> _Behavior:
        def counted(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            if not self._free_probes.acquire(blocking=False):
                abort(
                    context,
                    OutOfMemory(
                        f"the worker already answers {MAX_PROBES} probes; try again later"
                    ),
                )
            if not context.add_callback(self._free_probes.release):
                self._free_probes.release()  # the call has ended already
            return serve(requests, context)

        return counted


def _token_in(details: grpc.HandlerCallDetails) -> str:
    """Return the token of a call's header `authorization`, or an empty text."""
    for key, value in details.invocation_metadata or ():
        if key == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            return token if scheme == "Bearer" else ""
    return ""


def _tolerant(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return a decoder that returns a ProtocolError as the request, and does not raise it.

    gRPC would write the exception's traceback to the log, at any client's will.
    """

    def decoded(message: bytes) -> Any:
        try:
            return decode(message)
        except DecodeError as error:
            return ProtocolError(f"the request cannot be decoded: {error}")
        except ProtocolError as error:
            return error

    return decoded


def _lane_request(message: bytes) -> pb.LaneRequest:
    if len(message) > MAX_FRAME:
        raise ProtocolError(
            f"a lane message has {len(message)} bytes; the limit is {MAX_FRAME}, as for a frame"
        )
    return pb.LaneRequest.FromString(message)


_UNARY_RESPONSE = grpc.stream_unary_rpc_method_handler


class _Awaited:
    """Cancels calls without a first request after ATTACH_S. One thread watches all waiting calls.

    A timer per call would start a thread per call, which takes as long as the call itself.
    """

    def __init__(self) -> None:
        # The oldest first.
        self._calls: deque[tuple[float, list[grpc.ServicerContext]]] = deque()
        self._is_watched = False
        self._lock = threading.Lock()

    def first_of(
        self, requests: Iterator[_T], context: grpc.ServicerContext
    ) -> _T | None:
        """Return a call's first request, or None if the call ends without a request.

        Cancel the call after ATTACH_S.
        """
        awaited = [context]
        with self._lock:
            self._calls.append((time.monotonic() + ATTACH_S, awaited))
            if not self._is_watched:
                threading.Thread(
                    target=self._watch, name="awaited-requests", daemon=True
                ).start()
                self._is_watched = True
        try:
            return next(requests, None)
        except grpc.RpcError:
            return None
        finally:
            awaited.clear()

    def all_of(
        self, requests: Iterator[_T], context: grpc.ServicerContext
    ) -> Iterator[_T]:
        """Yield a client's requests, the first within ATTACH_S; a broken stream counts as ended."""
        request = self.first_of(requests, context)
        with contextlib.suppress(grpc.RpcError):
            while request is not None:
                if isinstance(request, BridgeError):
                    raise request
                yield request
                request = next(requests, None)

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
