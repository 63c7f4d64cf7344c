"""Who comes in over gRPC, and how long it may take: before any service sees a call."""

import contextlib
import hmac
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from bridge_server.serving.conversation import ATTACH_S
from bridge_wire.errors import OutOfMemory, ProtocolError, Unauthenticated, abort
from bridge_wire.lane.frames import MAX_FRAME
from bridge_wire.pb import bridge_pb2 as pb

MAX_PROBES = 128  # at a time: each holds a thread

_BRIDGE, _HEALTH = "/bridge.v1.Bridge/", "/grpc.health.v1.Health/"
_T = TypeVar("_T")
_Behavior = Callable[
    [Iterator[Any], grpc.ServicerContext], Any
]  # of a method whose requests are a stream


class Entrance(grpc.ServerInterceptor):
    """Lets in calls that carry the worker's token, if it has one. Health probes pass without it.

    gRPC gives a call a thread when its headers have come. So that whoever sends no more than these,
    or holds a probe open, keeps nobody else from being served, a call must go on within ATTACH_S,
    and there may be so many probes.
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
        make = (
            grpc.stream_stream_rpc_method_handler if handler.response_streaming else _UNARY_RESPONSE
        )
        serve = self._prompt(handler)
        return make(
            serve if details.method.startswith(_BRIDGE) else self._counted(serve),
            request_deserializer=_lane_request
            if details.method == f"{_BRIDGE}Lane"
            else handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _is_known(self, details: grpc.HandlerCallDetails) -> bool:
        given = str(dict(details.invocation_metadata).get("authorization", ""))
        return self._expected is None or hmac.compare_digest(given.encode(), self._expected)

    def _prompt(self, handler: grpc.RpcMethodHandler) -> _Behavior:
        """Return what a handler does with a stream of requests, of which the first must come in
        time."""
        kinds = (
            handler.unary_unary,
            handler.unary_stream,
            handler.stream_unary,
            handler.stream_stream,
        )
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
                abort(
                    context,
                    OutOfMemory(f"the worker answers {MAX_PROBES} probes already; try again later"),
                )
            if not context.add_callback(self._free_probes.release):
                self._free_probes.release()  # the call has ended already
            return serve(requests, context)

        return counted


def _refuse(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
    abort(context, Unauthenticated("the worker's token is missing or wrong; pass token="))


def _lane_request(message: bytes) -> pb.LaneRequest:
    if len(message) > MAX_FRAME:
        raise ProtocolError(
            f"a lane's message of {len(message)} bytes; the limit is {MAX_FRAME}, as of a frame"
        )
    return pb.LaneRequest.FromString(message)


_UNARY_RESPONSE = grpc.stream_unary_rpc_method_handler
_REFUSAL: Any = grpc.stream_stream_rpc_method_handler(
    _refuse
)  # of a stream, so as to wait for no request


class _Awaited:
    """The calls whose first request is awaited, for ATTACH_S at most. One thread watches them all,
    while there are any.

    Not a timer for each, which would start a thread for each: that takes as long as the call
      itself.
    """

    def __init__(self) -> None:
        self._calls: deque[tuple[float, list[grpc.ServicerContext]]] = deque()  # the oldest first
        self._is_watched = False
        self._lock = threading.Lock()

    def first_of(self, requests: Iterator[_T], context: grpc.ServicerContext) -> _T | None:
        """Return a call's first request, or None if it has ended without one; end it if none
        comes in time."""
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
