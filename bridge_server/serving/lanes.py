"""Serves the lanes: one thread per connection, which answers one request after the other.

`serve` is the whole conversation, as a generator from requests to replies; a gRPC stream and a
framed Unix socket are two ways to feed it.
"""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence

from google.protobuf.message import DecodeError

from bridge_server.serving.session import Session, addressed, nbytes_of
from bridge_server.serving.sessions import Sessions
from bridge_server.serving.turns import Turn, TurnByEvents, TurnByWords
from bridge_wire.errors import (
    BridgeError,
    OutOfMemory,
    PeerError,
    ProtocolError,
    Unauthenticated,
    encode,
    unexpected,
)
from bridge_wire.lane.framed_socket import FramedSocket
from bridge_wire.lane.frames import CHUNK, SMALL
from bridge_wire.memory.pool import Block
from bridge_wire.pb import bridge_pb2 as pb

_log = logging.getLogger(__name__)

_BACKLOG = 128
STUCK_S = 60.0  # far more than a client has on its GPU when it ends, or gives a call up
ATTACH_S = 10.0  # a connection that has said nothing by then is ended: each holds a thread


def serve(
    requests: Iterator[pb.LaneRequest],
    sessions: Sessions,
    take_descriptors: Callable[[], list[int]] = list,
    is_connected: Callable[[], bool] = lambda: True,
) -> Generator[pb.LaneReply, None, None]:
    """Answer one connection's requests until the peer ends it, or breaks the contract.

    `is_connected` says whether the peer may still be there, as far as is known.
    """
    session: Session | None = None
    turn: Turn | None = None
    try:
        for request in requests:
            descriptors = take_descriptors()
            try:
                if session is None:
                    session = _attach(request, sessions)
                    yield _DONE
                elif (
                    request.HasField("run") and not request.run.inline
                ):  # the hot path, with as few calls as can be
                    call = object()
                    sessions.begin(session, call)
                    try:
                        session.run(request.run, turn)
                        yield _RAN
                    finally:  # after the reply has gone, so that a drain does not cut it off
                        sessions.end(call)
                elif request.HasField("order"):
                    if turn is not None:
                        turn.close()
                        turn = None
                    turn = session.take_turns(request.order, is_connected)
                    yield pb.LaneReply(ordered=_ordered(session, turn))
                else:
                    yield from _answer(request, requests, session, sessions, turn, descriptors)
            except PeerError as error:
                yield _failed(error)
                return
            except BridgeError as error:
                with sessions.examined(error) as found:
                    yield pb.LaneReply(error=found)
                if sessions.has_failed:
                    return
            except MemoryError as error:
                yield _failed(unexpected(error))
                return
            except Exception as error:
                _log.exception("a request failed unexpectedly")
                with sessions.examined(unexpected(error)) as found:
                    yield pb.LaneReply(error=found)
                return
            except GeneratorExit:  # nobody is there to take the answer
                if session is not None and request.HasField("run"):
                    session.take_back(request.run)
                raise
            finally:
                for fd in descriptors:
                    os.close(fd)
    finally:
        if turn is not None and turn.is_stuck(STUCK_S):
            sessions.give_up("a client has ended on which the GPU waits")
        else:
            if turn is not None:
                turn.close()  # and only then does the client see the end of a call that it gave up
            if session is not None:
                sessions.detach(session)


def _ordered(session: Session, turn: Turn) -> pb.Ordered:
    if isinstance(turn, TurnByEvents):
        return pb.Ordered(event=turn.device.event_handle_of(turn.done))
    return pb.Ordered(by_words=isinstance(turn, TurnByWords))


def _attach(request: pb.LaneRequest, sessions: Sessions) -> Session:
    if request.WhichOneof("kind") != "attach":
        raise ProtocolError("the first request on a lane must be `attach`")
    return sessions.attach(request.attach.session)


def _answer(
    request: pb.LaneRequest,
    requests: Iterator[pb.LaneRequest],
    session: Session,
    sessions: Sessions,
    turn: Turn | None,
    descriptors: list[int],
) -> Iterator[pb.LaneReply]:
    kind = request.WhichOneof("kind")
    if kind == "run":
        yield from _run_inline(request.run, requests, session, sessions, turn)
    elif kind == "release":
        session.residuals.drop(session, request.release.residuals)
        yield pb.LaneReply(usage=session.usage())
    elif kind == "peek":
        yield pb.LaneReply(peeked=session.peek(request.peek))
    elif kind == "share":
        session.add_slab(descriptors, request.share, sessions.slab_bytes)
        yield _DONE
    else:
        raise ProtocolError(f"a lane takes no {kind or 'empty'!r} request here")


def _run_inline(
    run: pb.Run,
    requests: Iterator[pb.LaneRequest],
    session: Session,
    sessions: Sessions,
    turn: Turn | None,
) -> Iterator[pb.LaneReply]:
    session.residuals.drop(session, run.released)
    program = session.program(run.program)
    sizes = [
        nbytes
        for address, nbytes in addressed(run.inputs, nbytes_of(program.inputs))
        if not address
    ]
    inputs = _receive_inputs(run.data, sizes, requests, session)
    with sessions.running(session):
        outputs = session.run_inline(run, inputs, turn)
        if sum(block.nbytes for block in outputs) <= SMALL:
            yield pb.LaneReply(ran=pb.Ran(data=b"".join(block.buffer for block in outputs)))
            return
        yield _RAN
        for block in outputs:
            for start in range(0, block.nbytes, CHUNK):
                yield pb.LaneReply(chunk=bytes(block.buffer[start : start + CHUNK]))


def _receive_inputs(
    data: bytes, sizes: Sequence[int], requests: Iterator[pb.LaneRequest], session: Session
) -> list[Block]:
    if data and len(data) != sum(sizes):
        raise ProtocolError(
            f"an inline run with {len(data)} bytes of data for inputs of {sum(sizes)} bytes"
        )
    try:
        blocks = [session.scratch.lease(nbytes) for nbytes in sizes]
    except OutOfMemory:
        if data:
            raise
        for nbytes in sizes:  # the chunks are on their way: take them, so that the lane can go on
            for _ in _chunks(nbytes, requests):
                pass
        raise
    start = 0
    for block in blocks:
        if data:
            block.buffer[:] = data[start : start + block.nbytes]
            start += block.nbytes
            continue
        filled = 0
        for chunk in _chunks(block.nbytes, requests):
            block.buffer[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
    return blocks


def _chunks(nbytes: int, requests: Iterator[pb.LaneRequest]) -> Iterator[bytes]:
    """Yield the chunks of one input."""
    missing = nbytes
    while missing:
        request = next(requests, None)
        if request is None or request.WhichOneof("kind") != "chunk":
            raise ProtocolError("an inline run was not followed by all of its inputs' bytes")
        chunk = request.chunk
        if not 0 < len(chunk) <= min(CHUNK, missing):
            raise ProtocolError(f"a chunk of {len(chunk)} bytes where {missing} were missing")
        missing -= len(chunk)
        yield chunk


def _failed(error: BridgeError) -> pb.LaneReply:
    return pb.LaneReply(error=encode(error))


_DONE = pb.LaneReply(done=pb.Done())
_RAN = pb.LaneReply(ran=pb.Ran())
_RAN_BYTES = _RAN.SerializeToString()


class LocalLanes:
    """Accepts local lanes on a Unix socket: from the worker's own user only, each with a session
    token."""

    def __init__(self, path: str, sessions: Sessions) -> None:
        self.path = path
        self._sessions = sessions
        self._open: set[FramedSocket] = set()
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        os.chmod(path, 0o600)
        self._listener.listen(_BACKLOG)
        self._thread = threading.Thread(target=self._accept, name="local-lanes", daemon=True)

    def start(self) -> None:
        """Begin to accept."""
        self._thread.start()

    def close(self) -> None:
        """End every lane, and remove the socket."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        with self._lock:
            lanes = list(self._open)
        for lane in lanes:
            # a call under way still writes to its client's blocks: that must not see an end yet
            lane.stop_receiving()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._listener.fileno() < 0 or error.errno in (
                    22,
                    9,
                ):  # EINVAL, EBADF: closed by `close`
                    return
                _log.warning("a local lane could not be accepted: %s", error.strerror)
                threading.Event().wait(0.1)  # out of descriptors, most likely: let some be closed
                continue
            lane = FramedSocket(connection, takes_descriptors=True)
            with self._lock:
                self._open.add(lane)
            try:
                threading.Thread(
                    target=self._serve, args=(lane,), name="local-lane", daemon=True
                ).start()
            except RuntimeError as error:  # there are as many threads as the system allows
                _log.warning("a local lane could not be served: %s", error)
                self._forget(lane)

    def _serve(self, lane: FramedSocket) -> None:
        try:
            if lane.peer_uid() != os.geteuid():
                raise Unauthenticated("a local lane serves the worker's own user only")
            serving = serve(
                _requests(lane), self._sessions, lane.take_descriptors, lane.is_connected
            )
            with contextlib.closing(serving) as replies:
                for reply in replies:
                    lane.send(_RAN_BYTES if reply is _RAN else reply.SerializeToString())
        except PeerError as error:
            self._refuse(lane, error)
        except OSError:
            pass  # the peer is gone; `serve` has let go of what it owned
        finally:
            self._forget(lane)

    def _forget(self, lane: FramedSocket) -> None:
        with self._lock:
            self._open.discard(lane)
        lane.close()

    def _refuse(self, lane: FramedSocket, error: PeerError) -> None:
        _log.warning("ending a local lane: %s", error)
        with contextlib.suppress(OSError):
            lane.send(_failed(error).SerializeToString())


def _requests(lane: FramedSocket) -> Iterator[pb.LaneRequest]:
    limit_s: float | None = ATTACH_S
    while (message := lane.receive(limit_s)) is not None:
        limit_s = None
        try:
            yield pb.LaneRequest.FromString(message)
        except DecodeError as error:
            raise ProtocolError("a frame holds no LaneRequest") from error
