"""Local lane: frames over a Unix socket, tensors in slabs mapped by both sides. No framework."""

import operator
import socket
import weakref
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from bridge_client.remote.gpu import Ordering
from bridge_client.remote.lanes import HANDSHAKE_S, Call, Lane, Stale, raise_if_failed
from bridge_client.remote.watching import Watch
from bridge_wire.errors import CallTimeout, ProtocolError, WorkerDied
from bridge_wire.lane.framed_socket import FramedSocket
from bridge_wire.memory.cuda_memory import leave
from bridge_wire.memory.cuda_words import WORDS
from bridge_wire.memory.slabs import Slab
from bridge_wire.pb import bridge_pb2 as pb

_RAN = pb.LaneReply(ran=pb.Ran())
_RAN_BYTES = _RAN.SerializeToString()
_address_of = operator.attrgetter("address")


class LocalLane(Lane):
    """Frames over a Unix socket; the tensors stay in place, in slabs mapped by both sides."""

    name = "local"
    memory = "memfd"

    def __init__(self, path: str, token: bytes) -> None:
        """Connect and attach.

        Raises:
          OSError: no worker listens at the path.
          BridgeError: the worker refused.
        """
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.connect(path)
        except OSError:
            connected.close()
            raise
        self._socket = FramedSocket(connected)
        try:
            self._exchange(pb.LaneRequest(attach=pb.Attach(session=token)), HANDSHAKE_S)
            self._socket.offer_mailbox()
        except BaseException:
            self._socket.close()
            raise

    def share(self, slab: Slab, timeout_s: float | None) -> None:
        """Share a slab with the worker, within `timeout_s` and at most HANDSHAKE_S seconds."""
        request = pb.LaneRequest(share=pb.Share(base=slab.base, nbytes=slab.nbytes))
        self._exchange(
            request, min(timeout_s or HANDSHAKE_S, HANDSHAKE_S), descriptors=(slab.fd,)
        )

    def _run(self, request: pb.LaneRequest, call: Call) -> Any:
        request.run.inputs.extend(map(_address_of, call.run.inputs))
        request.run.outputs.extend(map(_address_of, call.outputs))
        self._send(request)
        outputs = call.run.make(call.outputs)
        reply = self._receive(call.timeout_s)
        if call.timed:
            self.times = reply.ran.times
        return outputs

    def ask(
        self, request: pb.LaneRequest, timeout_s: float = HANDSHAKE_S
    ) -> pb.LaneReply:
        return self._exchange(request, timeout_s)

    def when_worker_goes(
        self, watch: Callable[[], Watch], action: Callable[[], None]
    ) -> None:
        connection = weakref.ref(self._socket)

        def ended() -> None:
            found = connection()
            # The descriptor's number may belong to another socket by now.
            if found is not None and found.fileno() >= 0 and not found.is_connected():
                action()

        watch().add(self._socket.fileno(), ended)

    def abandon(self) -> bool:
        # The worker sees the end of the stream after the call, and only then closes its side.
        self._socket.half_close()
        return True

    def has_ended(self) -> bool:
        return self._socket.has_ended()

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        ordering = self.ordering
        if ordering is None or ordering.way != WORDS:
            super().close()
            self._socket.close()
            return
        # A closed connection looks like a dead client: the worker would stop waiting for the
        # client's GPU work.
        self.ordering = None
        self._socket.half_close()
        leave(_end_socket, (ordering, self._socket))

    def _exchange(
        self,
        request: pb.LaneRequest,
        timeout_s: float,
        descriptors: tuple[int, ...] = (),
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
            raise CallTimeout(
                f"the worker gave no answer within {timeout_s} s"
            ) from None
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
        if message == _RAN_BYTES:  # fast path of nearly all replies
            return _RAN
        try:
            reply = pb.LaneReply.FromString(message)
        except DecodeError as error:
            raise ProtocolError(
                "the worker sent a frame that is no LaneReply"
            ) from error
        return raise_if_failed(reply)


def _end_socket(left: tuple[Ordering, FramedSocket]) -> None:
    """Close a lane's socket after its GPU work, or after the worker has closed its side."""
    ordering, connection = left
    if connection.has_ended() or ordering.is_done:
        ordering.close()
        connection.close()
    else:
        leave(_end_socket, left)
