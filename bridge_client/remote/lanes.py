"""The two ways to signal a call: frames over a Unix socket beside shared memory, or a gRPC stream
with inline bytes.

A lane serves one call at a time and belongs to whoever took it from its link.
"""

import contextlib
import queue
import socket
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from bridge_client.remote.gpu import Ordering
from bridge_client.remote.watching import Watch
from bridge_wire.errors import (
    TRAILER,
    BridgeError,
    CallTimeout,
    InternalError,
    PeerError,
    ProtocolError,
    Unauthenticated,
    WorkerDied,
    WorkerUnavailable,
    decode,
)
from bridge_wire.lane.framed_socket import FramedSocket
from bridge_wire.lane.frames import CHUNK, SMALL
from bridge_wire.memory.cuda_memory import GpuPool, GpuSlab, is_on_gpu, leave
from bridge_wire.memory.cuda_words import WORDS
from bridge_wire.memory.pool import Block
from bridge_wire.memory.slabs import Slab
from bridge_wire.pb import bridge_pb2 as pb

_T = TypeVar("_T")

# For what no model's work can delay: attaching, sharing, releasing.
_HANDSHAKE_S = 10.0
# For what CUDA may keep waiting for the kernels of either process (pytorch#15937): opening a
# handle.
GPU_HANDSHAKE_S = 180.0


_RAN = pb.LaneReply(ran=pb.Ran())
_RAN_BYTES = _RAN.SerializeToString()


class Stale(Exception):
    """The connection was dead before the request went out, so it is safe to send it again over a
    new one."""


# After these the worker has ended the lane.
ENDS_LANE = (PeerError, InternalError, WorkerDied, CallTimeout)


class Lane(ABC):
    """One attached connection.

    After an exception other than a plain BridgeError it must not be used again.
    """

    name: str
    memory: str
    ordering: Ordering | None = (
        None  # with this process's work on the GPU, once it has called with memory there
    )

    @abstractmethod
    def run(
        self,
        request: pb.LaneRequest,
        inputs: Sequence[memoryview] | None,
        outputs: list[Block],
        timeout_s: float | None,
        make: Callable[[list[Block]], _T],
    ) -> _T:
        """Run a program whose inputs and outputs lie where the request says; return what `make`
        makes of the outputs.

        That is called while the worker computes, before the outputs have their values. `inputs`
        views the inputs' memory, for a lane that sends bytes.

        Raises:
          Stale: nothing was sent.
          WorkerDied, CallTimeout: something was sent, and no reply came.
        """

    @abstractmethod
    def ask(self, request: pb.LaneRequest, timeout_s: float = _HANDSHAKE_S) -> pb.LaneReply:
        """Ask for what no model's work can delay, but for that of a GPU, which gets `timeout_s`."""

    def ask_about_gpu(self, request: pb.LaneRequest) -> pb.LaneReply:
        """Ask for what the work of models on a GPU may delay."""
        return self.ask(request, GPU_HANDSHAKE_S)

    def release(self, residuals: Sequence[int]) -> pb.Usage:
        """Release residuals, and return what the worker holds for the session."""
        return self.ask(pb.LaneRequest(release=pb.Release(residuals=residuals))).usage

    def peek(self, address: int, nbytes: int) -> bytes:
        """Return what the worker sees in a few bytes that were shared with it."""
        return self.ask_about_gpu(
            pb.LaneRequest(peek=pb.Peek(address=address, nbytes=nbytes))
        ).peeked

    def share_on_gpu(self, slab: GpuSlab) -> None:
        """Hand a GPU's slab over to the worker."""
        share = pb.Share(base=slab.base, nbytes=slab.nbytes, cuda_handle=slab.handle)
        self.ask_about_gpu(pb.LaneRequest(share=share))

    def order(self, pool: GpuPool, share: Callable[[], None]) -> Ordering:
        """Return how this lane's calls and this process's work on the GPU wait for each other.
        `share` hands over the pool's slabs, which may have become more.
        """

        def ask(request: pb.LaneRequest) -> pb.LaneReply:
            share()
            return self.ask_about_gpu(request)

        if self.ordering is None:
            self.ordering = Ordering(pool, ask)
        return self.ordering

    @abstractmethod
    def when_worker_goes(self, watch: Callable[[], Watch], action: Callable[[], None]) -> None:
        """Have a thread act when the worker ends the connection, or dies.

        `action` holds nothing alive.
        """

    @abstractmethod
    def abandon(self) -> bool:
        """Give up on the call under way.

        Returns whether the worker may still touch the call's blocks.
        """

    @abstractmethod
    def has_ended(self) -> bool:
        """Whether the worker has let go of an abandoned call. Never blocks."""

    @abstractmethod
    def close(self) -> None:
        """End the connection. Idempotent; never blocks."""
        ordering, self.ordering = self.ordering, None
        if ordering is not None:
            ordering.close()


def _end_socket(left: tuple[Ordering, FramedSocket]) -> None:
    """Close a lane's socket once its calls are done on the GPU, or the worker has ended its
    side."""
    ordering, connection = left
    if connection.has_ended() or ordering.is_done:
        ordering.close()
        connection.close()
    else:
        leave(_end_socket, left)


class LocalLane(Lane):
    """Frames over a Unix socket; the tensors stay where they are, in slabs that both sides map."""

    name = "local"
    memory = "memfd"

    def __init__(self, path: str, token: bytes) -> None:
        """Connect and attach.

        Raises:
          OSError: nobody listens there.
          BridgeError: the worker refused.
        """
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.connect(path)
        except OSError:
            connected.close()
            raise
        self._socket = FramedSocket(connected)
        self._is_closed = False
        try:
            self._exchange(pb.LaneRequest(attach=pb.Attach(session=token)), _HANDSHAKE_S)
            self._socket.offer_mailbox()
        except BaseException:
            self._socket.close()
            raise

    def share(self, slab: Slab, timeout_s: float | None) -> None:
        """Hand a slab over to the worker, within `timeout_s` and at most a few seconds."""
        request = pb.LaneRequest(share=pb.Share(base=slab.base, nbytes=slab.nbytes))
        self._exchange(
            request, min(timeout_s or _HANDSHAKE_S, _HANDSHAKE_S), descriptors=(slab.fd,)
        )

    def run(
        self,
        request: pb.LaneRequest,
        inputs: Sequence[memoryview] | None,
        outputs: list[Block],
        timeout_s: float | None,
        make: Callable[[list[Block]], _T],
    ) -> _T:
        self._send(request)
        made = make(outputs)
        self._receive(timeout_s)
        return made

    def ask(self, request: pb.LaneRequest, timeout_s: float = _HANDSHAKE_S) -> pb.LaneReply:
        return self._exchange(request, timeout_s)

    def when_worker_goes(self, watch: Callable[[], Watch], action: Callable[[], None]) -> None:
        connection = weakref.ref(self._socket)

        def ended() -> None:
            found = connection()
            # The descriptor's number may be another socket's by now.
            if found is not None and found.fileno() >= 0 and not found.is_connected():
                action()

        watch().add(self._socket.fileno(), ended)

    def abandon(self) -> bool:
        # The worker sees the end of the stream once it has finished the call, and only then ends
        # its own side.
        self._socket.half_close()
        return True

    def has_ended(self) -> bool:
        return self._socket.has_ended()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        ordering = self.ordering
        if ordering is None or ordering.way != WORDS:
            super().close()
            self._socket.close()
            return
        # The worker takes a client whose connection has ended for dead, and waits no longer for its
        # GPU.
        self.ordering = None
        self._socket.half_close()
        leave(_end_socket, (ordering, self._socket))

    def _exchange(
        self, request: pb.LaneRequest, timeout_s: float, descriptors: tuple[int, ...] = ()
    ) -> pb.LaneReply:
        self._send(request, descriptors)
        return self._receive(timeout_s)

    def _send(self, request: pb.LaneRequest, descriptors: tuple[int, ...] = ()) -> None:
        try:
            self._socket.send(request.SerializeToString(), descriptors)
        except OSError as error:
            raise Stale from error

    def _receive(self, timeout_s: float | None) -> pb.LaneReply:
        try:
            message = self._socket.receive(timeout_s)
        except TimeoutError:
            raise CallTimeout(f"the worker gave no answer within {timeout_s} s") from None
        except OSError as error:
            raise WorkerDied(
                "the connection to the worker broke during a call; the next call reconnects"
            ) from error
        if message is None:
            if self._socket.has_unread():
                raise Stale
            raise WorkerDied(
                "the worker ended the connection during a call; the next call reconnects"
            )
        if message == _RAN_BYTES:  # as nearly always
            return _RAN
        try:
            reply = pb.LaneReply.FromString(message)
        except DecodeError as error:
            raise ProtocolError("the worker sent a frame that holds no LaneReply") from error
        return _raise_if_failed(reply)


class GrpcLane(Lane):
    """A gRPC stream; the bytes of the tensors follow each message in chunks.

    Works between hosts.
    """

    name = "grpc"
    memory = "inline"

    def __init__(self, stub: Any, token: bytes) -> None:
        """Open the stream and attach.

        Raises:
          BridgeError: the worker refused, or cannot be reached.
        """
        self._outgoing: queue.SimpleQueue[Iterator[pb.LaneRequest] | None] = queue.SimpleQueue()
        self._is_closed = False
        self._call = stub.Lane(_flattened(self._outgoing))
        try:
            with self._deadline(_HANDSHAKE_S):
                self._exchange(iter([pb.LaneRequest(attach=pb.Attach(session=token))]))
        except BaseException:
            self.close()
            raise

    def run(
        self,
        request: pb.LaneRequest,
        inputs: Sequence[memoryview] | None,
        outputs: list[Block],
        timeout_s: float | None,
        make: Callable[[list[Block]], _T],
    ) -> _T:
        assert inputs is not None, "a lane that sends bytes is given them"
        request.run.inline = True
        by_value = [block for block in outputs if not is_on_gpu(block.address)]
        for addresses in (request.run.inputs, request.run.outputs):
            addresses[:] = [address if is_on_gpu(address) else 0 for address in addresses]
            if not any(addresses):
                del addresses[:]
        with self._deadline(timeout_s) if timeout_s is not None else contextlib.nullcontext():
            self._send(_inline(request, inputs))
            made = make(outputs)
            self._receive_outputs(by_value)
            return made

    @contextlib.contextmanager
    def _deadline(self, timeout_s: float) -> Iterator[None]:
        """End the stream when the time is up: a stream that is open already takes no deadline of
        its own."""
        over = (
            threading.Lock()
        )  # taken by whichever comes first, the end of the call or that of its time

        def expire() -> None:
            if over.acquire(blocking=False):
                self._call.cancel()

        timer = threading.Timer(timeout_s, expire)
        timer.daemon = True
        timer.start()
        failure: WorkerDied | None = None
        try:
            yield
        except WorkerDied as error:
            failure = error
        finally:
            timer.cancel()
            in_time = over.acquire(blocking=False)
        if not in_time:
            raise CallTimeout(f"the worker gave no answer within {timeout_s} s") from None
        if failure is not None:
            raise failure

    def _receive_outputs(self, outputs: Sequence[Block]) -> None:
        data = self._receive().ran.data
        if data and len(data) != sum(block.nbytes for block in outputs):
            raise _miscounted()
        start = 0
        for block in outputs:
            if data:
                block.buffer[:] = data[start : start + block.nbytes]
                start += block.nbytes
                continue
            filled = 0
            while filled < block.nbytes:
                chunk = self._receive().chunk
                if not 0 < len(chunk) <= block.nbytes - filled:
                    raise _miscounted()
                block.buffer[filled : filled + len(chunk)] = chunk
                filled += len(chunk)

    def ask(self, request: pb.LaneRequest, timeout_s: float = _HANDSHAKE_S) -> pb.LaneReply:
        with self._deadline(timeout_s):
            return self._exchange(iter([request]))

    def when_worker_goes(self, watch: Callable[[], Watch], action: Callable[[], None]) -> None:
        call = self._call

        def ended() -> None:
            if call.code() is not grpc.StatusCode.CANCELLED:  # by this side
                action()

        call.add_callback(ended)

    def abandon(self) -> bool:
        self._end_stream()
        # What travels by value the worker cannot touch. Of the GPU's memory nobody tells when it
        # lets go.
        return self.ordering is not None

    def has_ended(self) -> bool:
        return self.ordering is None

    def close(self) -> None:
        super().close()
        self._end_stream()

    def _end_stream(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._outgoing.put(None)
            self._call.cancel()

    def _exchange(self, requests: Iterator[pb.LaneRequest]) -> pb.LaneReply:
        self._send(requests)
        return self._receive()

    def _send(self, requests: Iterator[pb.LaneRequest]) -> None:
        if not self._call.is_active():
            raise Stale
        self._outgoing.put(requests)

    def _receive(self) -> pb.LaneReply:
        try:
            reply = next(self._call)
        except StopIteration:
            raise WorkerDied(
                "the worker ended the stream during a call; the next call reconnects"
            ) from None
        except grpc.RpcError as error:
            # The error is the stream itself: with a traceback it would be a cycle that keeps the
            # call's blocks.
            raise from_rpc(error, during_call=True) from error.with_traceback(None)
        return _raise_if_failed(reply)


def from_rpc(error: Any, *, during_call: bool = False) -> BridgeError:
    """Return the bridge's error for a grpc.RpcError: the worker's own where it sent one, else
    the connection's."""
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
    return WorkerUnavailable(f"no worker answers ({code.name}: {details})")


def _flattened(
    outgoing: "queue.SimpleQueue[Iterator[pb.LaneRequest] | None]",
) -> Iterator[pb.LaneRequest]:
    while (requests := outgoing.get()) is not None:
        yield from requests


def _inline(request: pb.LaneRequest, inputs: Sequence[memoryview]) -> Iterator[pb.LaneRequest]:
    if sum(map(len, inputs)) <= SMALL:
        request.run.data = b"".join(inputs)
        yield request
        return
    yield request
    for buffer in inputs:
        for start in range(0, len(buffer), CHUNK):
            yield pb.LaneRequest(chunk=bytes(buffer[start : start + CHUNK]))


def _miscounted() -> ProtocolError:
    return ProtocolError("the worker sent more or fewer bytes than its outputs have")


def _raise_if_failed(reply: pb.LaneReply) -> pb.LaneReply:
    if reply.HasField("error"):
        raise decode(reply.error)
    return reply
