"""gRPC lane: a bidirectional stream with the tensors' bytes in its messages. No framework."""

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from bridge_client.remote.lanes import HANDSHAKE_S, Call, Lane, Stale, raise_if_failed
from bridge_client.remote.watching import Watch
from bridge_client.remote.worker_addresses import unavailable
from bridge_wire.errors import (
    TRAILER,
    BridgeError,
    CallTimeout,
    Unauthenticated,
    WorkerDied,
    WorkerDraining,
    WorkerUnavailable,
    decode,
)
from bridge_wire.lane import inline
from bridge_wire.memory.cuda_memory import is_on_gpu
from bridge_wire.memory.pool import Block
from bridge_wire.pb import bridge_pb2 as pb


class GrpcLane(Lane):
    """A gRPC stream with the tensors' bytes in chunks after each message. Works between hosts."""

    name = "grpc"
    memory = "inline"

    def __init__(self, stub: Any, token: bytes) -> None:
        """Open the stream and attach.

        Raises:
          BridgeError: the worker refused or is unreachable.
        """
        self._outgoing: queue.SimpleQueue[Iterator[pb.LaneRequest] | None] = (
            queue.SimpleQueue()
        )
        self._stub = stub
        self._call = stub.Lane(_flattened(self._outgoing))
        try:
            with self._deadline(HANDSHAKE_S):
                self._exchange(iter([pb.LaneRequest(attach=pb.Attach(session=token))]))
        except BaseException:
            self.close()
            raise

    def _run(self, request: pb.LaneRequest, call: Call) -> Any:
        _address_on_gpu(request.run, call)
        by_value = [block for block in call.outputs if not is_on_gpu(block.address)]
        limit: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if call.timeout_s is not None:
            limit = self._deadline(call.timeout_s)
        with limit:
            self._send(_with_bytes(request, self._payload(call)))
            outputs = call.run.make(call.outputs)
            self._receive_outputs(by_value)
            return outputs

    def bytes_by_value(self, call: Call) -> int:
        described = zip(call.run.inputs, call.run.program.inputs, strict=True)
        return sum(
            spec.nbytes for placed, spec in described if not is_on_gpu(placed.address)
        )

    def _payload(self, call: Call) -> list[memoryview]:
        described = zip(call.run.inputs, call.run.program.inputs, strict=True)
        return [
            call.pool.view(placed.address, spec.nbytes)
            for placed, spec in described
            if not is_on_gpu(placed.address)
        ]

    @contextlib.contextmanager
    def _deadline(self, timeout_s: float) -> Iterator[None]:
        """Cancel the stream at a deadline, since gRPC sets no deadline on an open stream."""
        # Acquired once: either by the end of the call or by the deadline.
        over = threading.Lock()

        def expire() -> None:
            if over.acquire(blocking=False):
                self._call.cancel()

        timer = threading.Timer(timeout_s, expire)
        timer.daemon = True
        timer.start()
        failure: WorkerUnavailable | None = None
        try:
            yield
        except WorkerUnavailable as error:
            failure = error
        finally:
            timer.cancel()
            in_time = over.acquire(blocking=False)
        # This frame is part of the failure's traceback: the cycle would keep the call's blocks.
        failed, failure = failure, None
        if not in_time:
            del failed
            raise CallTimeout(
                f"the worker gave no answer within {timeout_s} s"
            ) from None
        if failed is not None:
            try:
                raise failed
            finally:
                del failed

    def _receive_outputs(self, blocks: Sequence[Block]) -> None:
        ran = self._receive().ran
        self.times = ran.times
        # From here on the call has run, however the stream ends.
        rest = (self._receive(has_run=True).chunk for _ in itertools.count())
        inline.fill(blocks, ran.data, rest)

    def ask(
        self, request: pb.LaneRequest, timeout_s: float = HANDSHAKE_S
    ) -> pb.LaneReply:
        with self._deadline(timeout_s):
            return self._exchange(iter([request]))

    def when_worker_goes(
        self, watch: Callable[[], Watch], action: Callable[[], None]
    ) -> None:
        call = self._call

        def ended() -> None:
            # This side cancels by closing.
            if call.code() is not grpc.StatusCode.CANCELLED:
                action()

        call.add_callback(ended)

    def abandon(self) -> bool:
        self._end_stream()
        # The worker cannot access tensors sent by value. There is no signal for its release of GPU
        # memory.
        return self.ordering is not None

    def has_ended(self) -> bool:
        return self.ordering is None

    def close(self) -> None:
        super().close()
        self._end_stream()

    def _end_stream(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._outgoing.put(None)
            self._call.cancel()

    def _exchange(self, requests: Iterator[pb.LaneRequest]) -> pb.LaneReply:
        self._send(requests)
        return self._receive()

    def _send(self, requests: Iterator[pb.LaneRequest]) -> None:
        if not self._call.is_active():
            raise Stale
        self._outgoing.put(requests)

    def _receive(self, *, has_run: bool = False) -> pb.LaneReply:
        try:
            reply = next(self._call)
        except StopIteration:
            raise WorkerDied(
                "the worker ended the stream during a call; the next call reconnects"
            ) from None
        except grpc.RpcError as error:
            # The error object is the stream: with a traceback, a reference cycle would keep the
            # call's blocks alive.
            if not has_run and self._is_cancelled_by_worker(error):
                raise WorkerDraining(
                    "the worker has shut down without running this call"
                ) from error.with_traceback(None)
            raise from_rpc(error, during_call=True) from error.with_traceback(None)
        return raise_if_failed(reply)

    def _is_cancelled_by_worker(self, error: Any) -> bool:
        """Whether the worker cancelled the lane: it does so while it drains, without a call under
        way."""
        is_cancelled = error.code() is grpc.StatusCode.CANCELLED
        return is_cancelled and not (self.is_closed or self._stub.is_closed)


def from_rpc(
    error: Any, *, during_call: bool = False, address: str = "its address"
) -> BridgeError:
    """Return the BridgeError of a grpc.RpcError: the error sent by the worker, or a connection
    error."""
    for key, value in error.trailing_metadata() or ():
        if key == TRAILER:
            return decode(pb.Error.FromString(value))
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return CallTimeout("the worker gave no answer in time")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return Unauthenticated(details)
    if during_call:
        return WorkerDied(
            f"the connection to the worker broke during a call ({code.name}); the next call"
            " reconnects"
        )
    return unavailable(address, details or code.name)


def _flattened(
    outgoing: "queue.SimpleQueue[Iterator[pb.LaneRequest] | None]",
) -> Iterator[pb.LaneRequest]:
    while (requests := outgoing.get()) is not None:
        yield from requests


def _address_on_gpu(message: pb.Run, call: Call) -> None:
    """Add the addresses of GPU tensors; 0 means a tensor sent by value."""
    message.inline = True
    for field, tensors in (
        (message.inputs, call.run.inputs),
        (message.outputs, call.outputs),
    ):
        addresses = [x.address if is_on_gpu(x.address) else 0 for x in tensors]
        if any(addresses):
            field.extend(addresses)


def _with_bytes(
    request: pb.LaneRequest, inputs: Sequence[memoryview]
) -> Iterator[pb.LaneRequest]:
    if inline.are_small(sum(map(len, inputs))):
        request.run.data = b"".join(inputs)
        yield request
        return
    yield request
    for chunk in inline.chunks_of(inputs):
        yield pb.LaneRequest(chunk=chunk)
