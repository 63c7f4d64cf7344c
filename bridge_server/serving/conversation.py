"""A lane's conversation: reads one request at a time and answers it before reading the next.

Requests come from a framed Unix socket or a gRPC stream. Imports no framework.
"""

import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence

from bridge_server.serving.meters import Meter
from bridge_server.serving.run_queue import Abandoned
from bridge_server.serving.session import Session, addressed, nbytes_of
from bridge_server.serving.sessions import Sessions
from bridge_server.turns import Turn, TurnByEvents, TurnByWords
from bridge_wire.errors import (
    BridgeError,
    InternalError,
    OutOfMemory,
    PeerError,
    ProgramGone,
    ProtocolError,
    encode,
    unexpected,
)
from bridge_wire.lane import inline
from bridge_wire.memory.pool import Block
from bridge_wire.pb import bridge_pb2 as pb

_log = logging.getLogger(__name__)

STUCK_S = 60.0  # longer than any client's GPU work lasts after the client's end
# Deadline for a connection's first request: each connection holds a thread.
ATTACH_S = 10.0
RAN = pb.LaneReply(ran=pb.Ran())
_DONE = pb.LaneReply(done=pb.Done())

Replies = Generator[pb.LaneReply, None, None]


class Conversation:
    """The dialogue with one client over one lane: the attached session, and its turn on a GPU."""

    def __init__(
        self,
        sessions: Sessions,
        requests: Iterator[pb.LaneRequest],
        take_descriptors: Callable[[], list[int]] = list,
        is_connected: Callable[[], bool] = lambda: True,
        is_abandoned: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_connected` reports whether the client may still be alive, `is_abandoned` whether it
        no longer waits for a reply."""
        self._sessions = sessions
        self._requests = requests
        self._take_descriptors = take_descriptors
        self._is_connected = is_connected
        self._is_abandoned = is_abandoned
        self._queue = sessions.queue
        self._count = 0
        self.run = 0  # the number of the run under way, if there is one
        self._session: Session | None = None
        # Whether chunks may follow of an inline run whose program is gone.
        self._skips_chunks = False
        self._turn: Turn | None = None
        self._meter: Meter  # from `attach` on

    def replies(self) -> Replies:
        """Answer requests until the client or an error ends the lane (see `_refused`)."""
        try:
            for request in self._requests:
                descriptors = self._take_descriptors()
                try:
                    session = self._session
                    if (
                        session is None
                        or not request.HasField("run")
                        or request.run.inline
                    ):
                        yield from self._answer(request, descriptors)
                        continue
                    # Hot path: as few function calls as possible.
                    self._sessions.begin(session, self)
                    try:
                        waited_s = self._queue.enter(session.client, self._is_abandoned)
                        self._meter.waited_s = waited_s
                        try:
                            self._count += 1
                            self.run = self._count
                            session.run(request.run, self._turn, self._meter)
                        finally:
                            self.run = 0
                            self._queue.leave(session.client)
                        yield self._timed() if request.run.timed else RAN
                    finally:  # after sending the reply, so that a drain does not cut it off
                        self._sessions.end(self)
                except GeneratorExit:  # the connection broke: nobody receives the reply
                    self._take_back(request)
                    raise
                except Abandoned:
                    return
                except Exception as error:
                    if (yield from self._refused(error)):
                        return
                finally:
                    for fd in descriptors:
                        os.close(fd)
        finally:
            self._end()

    def _answer(self, request: pb.LaneRequest, descriptors: list[int]) -> Replies:
        kind = request.WhichOneof("kind")
        if self._session is None:
            if kind != "attach":
                raise ProtocolError("the first request on a lane must be `attach`")
            self._session = self._sessions.attach(request.attach.session)
            self._meter = self._sessions.meters.open()
            yield _DONE
            return
        session = self._session
        if kind == "chunk" and self._skips_chunks:
            return
        self._skips_chunks = False
        match kind:
            case "run":
                yield from self._run_inline(session, request.run)
            case "release":
                session.residuals.drop(session, request.release.residuals)
                yield pb.LaneReply(usage=session.usage())
            case "peek":
                yield pb.LaneReply(peeked=session.peek(request.peek))
            case "share":
                session.add_slab(descriptors, request.share, self._sessions.slab_bytes)
                yield _DONE
            case "order":
                yield pb.LaneReply(ordered=self._order(session, request.order))
            case _:
                raise ProtocolError(f"a lane takes no {kind or 'empty'!r} request here")

    def _order(self, session: Session, order: pb.Order) -> pb.Ordered:
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.close()
        self._turn = session.take_turns(order, self._is_connected)
        if isinstance(self._turn, TurnByEvents):
            handle = self._turn.device.event_handle_of(self._turn.done)
            return pb.Ordered(event=handle)
        return pb.Ordered(by_words=isinstance(self._turn, TurnByWords))

    def _run_inline(self, session: Session, run: pb.Run) -> Replies:
        session.residuals.drop(session, run.released)
        try:
            program = session.program(run.program)
        except ProgramGone:  # so nobody knows how many bytes follow
            self._skips_chunks = not run.data
            raise
        named = addressed(run.inputs, nbytes_of(program.inputs))
        sizes = [nbytes for address, nbytes in named if not address]
        inputs = self._received(session, run.data, sizes)
        with self._sessions.running(session, self):
            waited_s = self._queue.enter(session.client, self._is_abandoned)
            self._meter.waited_s = waited_s
            try:
                self._count += 1
                self.run = self._count
                blocks = session.run_inline(run, inputs, self._turn, self._meter)
            finally:
                self.run = 0
                self._queue.leave(session.client)
            buffers = [block.buffer for block in blocks]
            reply = self._timed() if run.timed else pb.LaneReply(ran=pb.Ran())
            if inline.are_small(sum(map(len, buffers))):
                reply.ran.data = b"".join(buffers)
                yield reply
                return
            yield reply
            for chunk in inline.chunks_of(buffers):
                yield pb.LaneReply(chunk=chunk)

    def _timed(self) -> pb.LaneReply:
        """Return the reply to a run with the times of its parts."""
        meter = self._meter
        compute_s, copy_s = meter.last
        times = pb.Times(queue_s=meter.waited_s, compute_s=compute_s, copy_s=copy_s)
        return pb.LaneReply(ran=pb.Ran(times=times))

    def _received(
        self, session: Session, data: bytes, sizes: Sequence[int]
    ) -> list[Block]:
        chunks = self._chunks()
        try:
            blocks = [session.scratch.lease(nbytes) for nbytes in sizes]
        except OutOfMemory:
            # The chunks are already sent: skip them, so that the lane can continue.
            if not data:
                for nbytes in sizes:
                    for _ in inline.taken(nbytes, chunks):
                        pass
            raise
        inline.fill(blocks, data, chunks)
        return blocks

    def _chunks(self) -> Iterator[bytes]:
        for request in self._requests:
            if request.WhichOneof("kind") != "chunk":
                raise ProtocolError(
                    "an inline run must be followed by all bytes of its inputs"
                )
            yield request.chunk

    def _refused(self, error: Exception) -> Generator[pb.LaneReply, None, bool]:
        """Reply with an error; return whether the lane ends.

        | error                                     | the lane  |
        |-------------------------------------------|-----------|
        | PeerError: the client broke the contract  | ends      |
        | MemoryError, or a bug of the bridge       | ends      |
        | any other BridgeError, of this call alone | continues |
        | any error after the GPU has failed        | ends      |
        """
        if isinstance(error, PeerError):
            yield failed(error)
            return True
        if isinstance(error, BridgeError):
            with self._sessions.examined(error) as reply:
                yield pb.LaneReply(error=reply)
            return isinstance(error, InternalError) or self._sessions.has_failed
        if isinstance(error, MemoryError):
            yield failed(unexpected(error))
            return True
        _log.error("a request failed unexpectedly", exc_info=error)
        with self._sessions.examined(unexpected(error)) as reply:
            yield pb.LaneReply(error=reply)
        return True

    def _take_back(self, request: pb.LaneRequest) -> None:
        if self._session is not None and request.HasField("run"):
            self._session.take_back(request.run)

    def _end(self) -> None:
        if self._turn is not None and self._turn.is_stuck(STUCK_S):
            self._sessions.give_up("the GPU waits for a client that has ended")
            return
        if self._turn is not None:
            self._turn.close()  # before the client sees the end of its abandoned call
        if self._session is not None:
            self._sessions.meters.close(self._meter)
            self._sessions.detach(self._session)


def failed(error: BridgeError) -> pb.LaneReply:
    """Return the reply that carries an error."""
    return pb.LaneReply(error=encode(error))
