"""Registry of a worker's sessions: opens, attaches, drains and ends them. Imports no framework.

A client opens a session over gRPC. The session lives while at least one lane is attached, and ends
with the last lane, even after a crash of the client. So a killed client leaves nothing behind.
"""

import contextlib
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator

from bridge_server.runtime import Runtime
from bridge_server.serving.meters import Meters
from bridge_server.serving.residuals import Residuals
from bridge_server.serving.run_queue import RunQueue
from bridge_server.serving.session import Session
from bridge_wire.errors import (
    BridgeError,
    CudaError,
    InternalError,
    OutOfMemory,
    RemoteModelError,
    SessionClosed,
    Unauthenticated,
    WorkerDraining,
    encode,
)
from bridge_wire.memory.cuda_memory import GpuSlab
from bridge_wire.pb import bridge_pb2 as pb

_log = logging.getLogger(__name__)

_MAX_SESSIONS = 4096
# The errors that may come from a failed GPU.
_OF_THE_GPU = (RemoteModelError, OutOfMemory, CudaError, InternalError)
_UNATTACHED_S = 60.0
_TOKEN_BYTES = 32
_LONGEST_LOGGED = 500  # characters of an error's text
_DRAIN_POLL_S = 0.02
_UNMAPPED_S = 2.0


class Sessions:
    """All sessions of a worker."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        residual_bytes: int,
        slab_bytes: int,
        max_runs: int | None = None,
        max_waiting: int = 1024,
        slow_s: float = math.inf,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin without sessions.

        `on_failure` is called once this process's CUDA context is unusable.
        """
        self.slab_bytes = slab_bytes
        self.residuals = Residuals(residual_bytes)
        is_on_gpu = runtime is not None and runtime.gpu() is not None
        self.queue = RunQueue(max_runs, max_waiting, may_grow=not is_on_gpu)
        self.meters = Meters(slow_s)
        self.is_draining = False
        self.has_failed = False
        self._on_failure = on_failure
        self._runtime = runtime
        self._opened = 0
        self._by_token: dict[bytes, Session] = {}
        self._running: set[object] = set()
        self._lock = threading.Lock()

    def open(self) -> Session:
        """Return a new session with a fresh token."""
        self.refuse_if_draining()
        with self._lock:
            self._forget_unattached()
            if len(self._by_token) >= _MAX_SESSIONS:
                raise OutOfMemory(
                    f"the worker already has {_MAX_SESSIONS} sessions with lanes; try again later"
                )
            session = Session(
                secrets.token_bytes(_TOKEN_BYTES), self._runtime, self.residuals
            )
            session.scratch.limit(self.slab_bytes)
            self._opened += 1
            session.number = self._opened
            self._by_token[session.token] = session
        return session

    def find(self, token: bytes) -> Session:
        """Return the session of a token.

        Raises:
          Unauthenticated: no session has the token, or the session has ended.
        """
        session = self._by_token.get(token)
        if session is None or session.is_closed:
            raise Unauthenticated(
                "the session token is not valid here; open a session first"
            )
        return session

    def attach(self, token: bytes) -> Session:
        """Attach a lane to the session of a token; `detach` must follow."""
        with self._lock:
            session = self.find(token)
            session.lanes += 1
        return session

    def detach(self, session: Session) -> None:
        """Detach a lane; the last lane ends the session."""
        with self._lock:
            session.lanes -= 1
            ended = session.lanes == 0
            if ended:
                session.is_closed = True
        if ended:
            self._end(session)

    def close(self, token: bytes) -> None:
        """Refuse further calls of a session, and end the session after its last lane.

        If the session has GPU memory, wait for the end: the client must not free memory that this
        process still maps.
        """
        with self._lock:
            session = self._by_token.get(token)
            if session is None:
                return
            ended = session.lanes == 0 and not session.is_closed
            session.is_closed = True
        if ended:
            self._end(session)
        elif any(isinstance(slab, GpuSlab) for slab in session.slabs):
            session.ended.wait(_UNMAPPED_S)

    def _end(self, session: Session) -> None:
        session.discard()
        with self._lock:
            self._by_token.pop(session.token, None)
        session.ended.set()
        _log.info(
            "session %d has ended; %d remain", session.number, len(self._by_token)
        )

    def refuse_if_draining(self) -> None:
        if self.is_draining:
            raise WorkerDraining(
                "the worker is shutting down and takes no new work; connect to another worker"
            )

    @contextlib.contextmanager
    def running(
        self,
        session: Session,
        call: object,
    ) -> Iterator[None]:
        """Mark one call or preparation as running, so that a drain waits for its end."""
        self.begin(session, call)
        try:
            yield
        finally:
            self.end(call)

    def is_running(self, call: object) -> bool:
        """Whether `call` has begun and not ended."""
        return call in self._running

    def runs(self) -> list[tuple[object, int]]:
        """Return the runs under way, each by its lane's conversation and its number there."""
        found = [(call, getattr(call, "run", 0)) for call in list(self._running)]
        return [run for run in found if run[1]]

    def begin(self, session: Session, call: object) -> None:
        """Mark `call` as running; `end` must follow. Takes no lock: set operations are atomic."""
        if session.is_closed:
            raise SessionClosed("the session was closed")
        self._running.add(call)
        # Checked after the registration: a concurrent drain either waits for the call or stops it.
        if self.is_draining:
            self._running.discard(call)
            self.refuse_if_draining()

    def end(self, call: object) -> None:
        """Mark a call as finished."""
        self._running.discard(call)

    @contextlib.contextmanager
    def examined(self, error: BridgeError) -> Iterator[pb.Error]:
        """Yield the reply for an error. After a GPU failure the worker ends once the reply is sent.

        The reply is a message: a variable with the exception would keep the traceback, and with the
        traceback every array of the call.
        """
        self._note(error)
        if not isinstance(error, _OF_THE_GPU) or not self._runtime.has_failed():
            yield encode(error)
            return
        self._note_failure(str(error))
        try:
            yield encode(
                CudaError(
                    "the worker's GPU has failed and rejects further work of this process. The"
                    " worker exits; if it was spawned or is supervised, a new worker serves the"
                    f" next call: {error.args[0]}"
                )
            )
        finally:
            self._on_failure()

    def _note(self, error: BridgeError) -> None:
        """Count an error that is about to be sent; log a model's error under a name of its own."""
        self.meters.note_error(type(error).__name__)
        if isinstance(error, RemoteModelError):
            error.request = f"request {secrets.token_hex(4)}"
            _log.info(
                "%s: a model raised %s: %s",
                error.request,
                error.remote_type,
                str(error.args[0])[:_LONGEST_LOGGED],
            )

    def give_up(self, reason: str) -> None:
        """Make the worker exit, since its GPU rejects further work of this process."""
        self._note_failure(reason)
        self._on_failure()

    def _note_failure(self, reason: str) -> None:
        self.has_failed = self.is_draining = True
        _log.critical(
            "the GPU rejects further work of this process; the worker exits, so that a new one can"
            " replace it: %s",
            reason,
        )

    def statistics(self) -> pb.Statistics:
        """Return what the worker has done since its start, and its sizes at present."""
        numbers = self.meters.read()
        sessions = list(self._by_token.values())
        numbers.sessions = len(sessions)
        numbers.slab_bytes = sum(session.shared_bytes() for session in sessions)
        self.queue.describe(numbers)
        numbers.residuals = self.residuals.count
        numbers.residual_bytes = self.residuals.nbytes
        numbers.evictions = self.residuals.evictions
        return numbers

    def drain(self, grace_s: float) -> bool:
        """Refuse new work and wait for the running calls; return whether all have finished."""
        self.is_draining = True
        deadline = time.monotonic() + grace_s
        while self._running and time.monotonic() < deadline:
            time.sleep(_DRAIN_POLL_S)
        return not self._running

    def _forget_unattached(self) -> None:
        """Remove sessions without a lane after _UNATTACHED_S; at the limit, the oldest first.

        Otherwise a client that opens sessions in a loop would use up all sessions.
        """
        now = time.monotonic()
        waiting = [
            session
            for session in list(self._by_token.values())
            if session.lanes == 0 and not session.is_closed
        ]
        surplus = len(self._by_token) - _MAX_SESSIONS + 1
        for i, session in enumerate(waiting):  # the oldest session first
            if i < surplus or now - session.created > _UNATTACHED_S:
                del self._by_token[session.token]
