"""Local lanes: framed Unix sockets, one thread per lane; only for the worker's own user.

Imports no framework.
"""

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Iterator

from google.protobuf.message import DecodeError

from bridge_server.serving.conversation import ATTACH_S, RAN, Conversation, failed
from bridge_server.serving.sessions import Sessions
from bridge_wire.errors import PeerError, ProtocolError, Unauthenticated
from bridge_wire.lane.framed_socket import FramedSocket
from bridge_wire.pb import bridge_pb2 as pb

_log = logging.getLogger(__name__)

_BACKLOG = 128
_RAN_BYTES = RAN.SerializeToString()


class LocalLanes:
    """Accepts local lanes on a Unix socket; a lane needs the worker's user and a session token."""

    def __init__(self, path: str, sessions: Sessions) -> None:
        self.path = path
        self._sessions = sessions
        self._open: set[FramedSocket] = set()
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        os.chmod(path, 0o600)
        self._listener.listen(_BACKLOG)
        self._thread = threading.Thread(
            target=self._accept, name="local-lanes", daemon=True
        )

    def start(self) -> None:
        """Start accepting lanes."""
        self._thread.start()

    def close(self) -> None:
        """End every lane and remove the socket."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        with self._lock:
            lanes = list(self._open)
        for lane in lanes:
            # a running call still writes to its client's blocks, so the client must not see the end
            lane.stop_receiving()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._listener.fileno() < 0 or error.errno in (
                    errno.EINVAL,
                    errno.EBADF,
                ):
                    return  # closed by `close`
                _log.warning("cannot accept a local lane: %s", error.strerror)
                # Likely out of descriptors: wait until some are closed.
                threading.Event().wait(0.1)
                continue
            lane = FramedSocket(connection, takes_descriptors=True)
            with self._lock:
                self._open.add(lane)
            try:
                threading.Thread(
                    target=self._serve, args=(lane,), name="local-lane", daemon=True
                ).start()
            except RuntimeError as error:  # the system's thread limit
                _log.warning("cannot serve a local lane: %s", error)
                self._forget(lane)

    def _serve(self, lane: FramedSocket) -> None:
        try:
            if lane.peer_uid() != os.geteuid():
                raise Unauthenticated("a local lane serves the worker's own user only")
            conversation = Conversation(
                self._sessions,
                _requests(lane),
                lane.take_descriptors,
                lane.is_connected,
                lane.is_half_closed,
            )
            with contextlib.closing(conversation.replies()) as replies:
                for reply in replies:
                    lane.send(_RAN_BYTES if reply is RAN else reply.SerializeToString())
        except PeerError as error:
            self._refuse(lane, error)
        except OSError:
            pass  # the peer is gone; the conversation has released its resources
        finally:
            self._forget(lane)

    def _forget(self, lane: FramedSocket) -> None:
        with self._lock:
            self._open.discard(lane)
        lane.close()

    def _refuse(self, lane: FramedSocket, error: PeerError) -> None:
        _log.warning("ending a local lane: %s", error)
        with contextlib.suppress(OSError):
            lane.send(failed(error).SerializeToString())


def _requests(lane: FramedSocket) -> Iterator[pb.LaneRequest]:
    limit_s: float | None = ATTACH_S
    while (message := lane.receive(limit_s)) is not None:
        limit_s = None
        try:
            yield pb.LaneRequest.FromString(message)
        except DecodeError as error:
            raise ProtocolError("a frame holds no LaneRequest") from error
