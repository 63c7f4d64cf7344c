"""Worker sessions: everything one client owns here, and its end.

A session is opened over gRPC, lives while at least one lane is attached to it, and ends with the last lane, however
that ends. So a killed client leaves nothing behind.
"""

import contextlib
import ctypes
import hmac
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bridge_server.runtime import Program, Runtime
from bridge_server.turns import Turn
from bridge_wire.allocator import ALIGNMENT
from bridge_wire.cuda import Device, device_of
from bridge_wire.cuda_memory import GpuSlab, copied_to_host, end_what_is_left, open_received
from bridge_wire.errors import (
    BridgeError,
    CudaError,
    InternalError,
    OutOfMemory,
    ProtocolError,
    RemoteModelError,
    ResidualGone,
    SessionClosed,
    Unauthenticated,
    WorkerDraining,
    encode,
)
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.pool import Block, Pool
from bridge_wire.slabs import Slab, map_received
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)

_MAX_SESSIONS = 4096
_MAX_SLABS = 1024
_MAX_PROGRAMS = 16384
_MAX_CACHED = 16384
_MAX_RESIDUALS = 1 << 20
_MOST_PEEKED = 4096  # bytes
_OF_THE_GPU = (RemoteModelError, OutOfMemory, CudaError, InternalError)  # what its failure may be told by
_UNATTACHED_S = 60.0
_TOKEN_BYTES = 32
_DRAIN_POLL_S = 0.02
_UNMAPPED_S = 2.0


class _Kept(NamedTuple):
    program: Program
    value: Any
    nbytes: int


class _Place(NamedTuple):
    """Where an array lies in this process, in memory that the owner keeps. An empty one lies nowhere."""

    pointer: int
    nbytes: int
    owner: Slab | Block | None
    is_on_gpu: bool


_NOWHERE = _Place(0, 0, None, False)


class _Plan(NamedTuple):
    """A checked run: where its arrays lie, and views of those inputs that are in host memory."""

    program: Program
    inputs: Sequence[_Place]
    views: Sequence[Any]
    outputs: Sequence[_Place]
    is_on_gpu: bool


def addressed(named: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return the address and the size of each array of an inline run; 0 is the address of what travels by value."""
    if named and len(named) != len(sizes):
        raise ProtocolError(f"an inline run names {len(named)} addresses; its program has {len(sizes)} such arrays")
    return list(zip(named or [0] * len(sizes), sizes, strict=True))


def nbytes_of(specs: Sequence[Spec]) -> list[int]:
    """Return the sizes of arrays."""
    return [spec.nbytes for spec in specs]


def _is_on_gpu(place: _Place, spec: Spec) -> bool:
    if place.is_on_gpu and spec.weak:
        raise ProtocolError("a Python number lies in GPU memory, where the host cannot read it")
    return place.is_on_gpu


class Residuals:
    """What the worker keeps between forwards and their VJPs, for all sessions within one byte budget.

    Past the budget, or past a number of them, since they may have no bytes at all, the oldest is dropped: its session
    is then told ResidualGone, and recomputes.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: OrderedDict[tuple[Session, int], _Kept] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def keep(self, session: "Session", id: int, kept: _Kept) -> None:
        """Keep a residual under the session's name for it, and evict the oldest ones as needed."""
        with self._lock:
            if (session, id) in self._kept:
                raise ProtocolError(f"the residual {id} exists already; a residual's id is never reused")
            self._kept[session, id] = kept
            self._total += kept.nbytes
            while self._total > self._budget or len(self._kept) > _MAX_RESIDUALS:
                _, oldest = self._kept.popitem(last=False)
                self._total -= oldest.nbytes

    def find(self, session: "Session", id: int) -> _Kept:
        """Return a residual, which stays kept."""
        kept = self._kept.get((session, id))
        if kept is None:
            raise ResidualGone("the residual is not here any more; run the vjp program on the inputs instead")
        return kept

    def drop(self, session: "Session", ids: Sequence[int]) -> None:
        """Forget residuals; unknown ones were evicted before."""
        with self._lock:
            for id in ids:
                kept = self._kept.pop((session, id), None)
                if kept is not None:
                    self._total -= kept.nbytes

    def drop_all(self, session: "Session") -> None:
        """Forget all residuals of a session."""
        self.drop(session, [id for owner, id in list(self._kept) if owner is session])

    def usage(self, session: "Session") -> tuple[int, int]:
        """Return the number of the session's residuals and their bytes."""
        with self._lock:
            sizes = [kept.nbytes for (owner, _), kept in self._kept.items() if owner is session]
        return len(sizes), sum(sizes)


@dataclass(slots=True, eq=False)
class Session:
    """One client's slabs, programs and views. Its lanes are served side by side, each by a thread of its own."""

    token: bytes
    runtime: Runtime
    residuals: Residuals
    created: float = field(default_factory=time.monotonic)
    lanes: int = 0
    is_closed: bool = False
    ended: threading.Event = field(default_factory=threading.Event)  # nothing of it is left
    slabs: tuple[Slab, ...] = ()
    programs: dict[int, Program] = field(default_factory=dict)
    # Where the bytes of inline calls go; a client whose tensors come by address never uses it.
    scratch: Pool = field(default_factory=lambda: Pool(shareable=False))
    _views: dict[tuple[int, Spec], Any] = field(default_factory=dict)
    _plans: dict[tuple[int, tuple[int, ...], tuple[int, ...]], "_Plan"] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_slab(self, descriptors: list[int], share: pb.Share, max_bytes: int) -> None:
        """Map a slab that the client hands over: by a handle, or by a descriptor, which is taken off the list."""
        if share.cuda_handle:
            slab: Slab = open_received(self._device("memory"), share.cuda_handle, share.nbytes, share.base)
        elif len(descriptors) == 1:
            slab = map_received(descriptors.pop(), share.nbytes, share.base)
        else:
            raise ProtocolError(f"a slab comes with a handle or exactly one descriptor, not with {len(descriptors)}")
        with self._lock:
            if len(self.slabs) >= _MAX_SLABS or slab.nbytes > max_bytes - sum(s.nbytes for s in self.slabs):
                raise OutOfMemory(f"a session may share at most {max_bytes} bytes in {_MAX_SLABS} slabs here")
            if slab.base > 2**63 - slab.nbytes:
                raise ProtocolError("a slab lies beyond the end of the address space")
            for other in self.slabs:
                if slab.base < other.base + other.nbytes and other.base < slab.base + slab.nbytes:
                    raise ProtocolError("a slab overlaps another one of this session")
            self.slabs = (*self.slabs, slab)

    def take_turns(self, order: pb.Order) -> Turn:
        """Return how a lane takes turns with the client on the GPU; it must be closed."""
        return Turn(self._device("work"), order.event, self.runtime.stream())

    def _device(self, what: str) -> Device:
        gpu = self.runtime.gpu()
        if gpu is None:
            raise CudaError(f"the models of this worker run on no GPU, so that it shares no {what} there")
        return device_of(gpu.uuid)

    def add_program(self, program: Program) -> int:
        """Return this session's name for a program."""
        with self._lock:
            if len(self.programs) >= _MAX_PROGRAMS:
                raise OutOfMemory(f"a session may prepare at most {_MAX_PROGRAMS} programs; pad to fewer shapes")
            id = len(self.programs) + 1
            self.programs[id] = program
        return id

    def program(self, id: int) -> Program:
        program = self.programs.get(id)
        if program is None:
            raise ProtocolError(f"this session has prepared no program {id}")
        return program

    def run(self, request: pb.Run, turn: Turn | None) -> None:
        """Run a program on the client's blocks. Those on a GPU take the lane's turn there."""
        if request.released:
            self.residuals.drop(self, request.released)
        # A training loop names the same few combinations of blocks again and again.
        key = (request.program, tuple(request.inputs), tuple(request.outputs))
        plan = self._plans.get(key) or self._plan(*key)
        if plan.is_on_gpu:
            self._run_in_turn(plan, request.residual, turn)
        else:
            self._run(plan.program, request.residual, plan.views, plan.outputs, None)

    def take_back(self, request: pb.Run) -> None:
        """Drop what a run has kept. For one that the client has given up: it may have released the residual before."""
        program = self.programs.get(request.program)
        if program is not None and program.residual_nbytes is not None:
            self.residuals.drop(self, [request.residual])

    def run_inline(self, request: pb.Run, received: Sequence[Block], turn: Turn | None) -> list[Block]:
        """Run a program on what was received by value, in blocks of `scratch`, and on the client's blocks on a GPU.

        Return the outputs that go by value, in blocks of `scratch`. A residual that aliases an input keeps its block.
        """
        program = self.program(request.program)
        named = addressed(request.outputs, program.output_nbytes)
        leaving = [self.scratch.lease(nbytes) for address, nbytes in named if not address]
        sources = self._places(addressed(request.inputs, nbytes_of(program.inputs)), received)
        targets = self._places(named, leaving)
        views = [
            None if _is_on_gpu(place, spec) else self.runtime.view(place.pointer, spec, place.owner)
            for place, spec in zip(sources, program.inputs, strict=True)
        ]
        plan = _Plan(program, sources, views, targets, any(place.is_on_gpu for place in (*sources, *targets)))
        if plan.is_on_gpu:
            self._run_in_turn(plan, request.residual, turn)
        else:
            self._run(program, request.residual, views, targets, None)
        return leaving

    def _run_in_turn(self, plan: _Plan, residual: int, turn: Turn | None) -> None:
        if turn is None:
            raise ProtocolError("a lane must send `order` before it runs a program on GPU memory")
        turn.begin()
        try:
            views = [
                self.runtime.view(place.pointer, spec, place.owner, turn) if place.is_on_gpu else view
                for place, spec, view in zip(plan.inputs, plan.program.inputs, plan.views, strict=True)
            ]
            self._run(plan.program, residual, views, plan.outputs, turn)
            turn.end()
        except BaseException:
            turn.finish()  # on hearing of the error, the client takes its blocks back
            raise

    def _run(
        self, program: Program, residual: int, inputs: Sequence[Any], targets: Sequence[_Place], turn: Turn | None
    ) -> None:
        """Run a program on views, and write its outputs to their places."""
        read = None
        if program.pullback_of is not None:
            kept = self.residuals.find(self, residual)
            if kept.program is not program.pullback_of:
                raise ProtocolError(f"the residual {residual} was kept by another program")
            read = kept.value
        outputs, value = program.run(inputs, read)
        write = self.runtime.write
        for output, (pointer, nbytes, _, is_on_gpu) in zip(outputs, targets, strict=True):
            if nbytes:
                write(output, pointer, nbytes, turn if is_on_gpu else None)
        if (kept_nbytes := program.residual_nbytes) is not None:
            if residual == 0:
                raise ProtocolError("the run of a program that keeps a residual must name it; 0 is no name")
            self.residuals.keep(self, residual, _Kept(program, value, kept_nbytes))

    def _plan(self, name: int, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> _Plan:
        """Check a run's addresses, and return what it comes to."""
        program = self.program(name)
        if len(inputs) != len(program.inputs) or len(outputs) != len(program.outputs):
            raise ProtocolError(
                f"a run names {len(inputs)} inputs and {len(outputs)} outputs; "
                f"its program has {len(program.inputs)} and {len(program.outputs)}"
            )
        sources = [self._locate(address, spec.nbytes) for address, spec in zip(inputs, program.inputs, strict=True)]
        views = [self._view(*named) for named in zip(inputs, sources, program.inputs, strict=True)]
        targets = [self._locate(*named) for named in zip(outputs, program.output_nbytes, strict=True)]
        plan = _Plan(program, sources, views, targets, any(place.is_on_gpu for place in (*sources, *targets)))
        if not any(spec.weak for spec in program.inputs):  # a number must be read anew at each run
            if len(self._plans) >= _MAX_CACHED:
                self._plans.clear()
            self._plans[name, inputs, outputs] = plan
        return plan

    def _view(self, address: int, place: _Place, spec: Spec) -> Any:
        """Return the view of an input in host memory; of one on a GPU each run makes its own."""
        if _is_on_gpu(place, spec):
            return None
        view = self._views.get((address, spec))
        if view is None:
            view = self.runtime.view(place.pointer, spec, place.owner)
            if not spec.weak:
                if len(self._views) >= _MAX_CACHED:
                    self._views.clear()
                self._views[address, spec] = view
        return view

    def _places(self, named: Sequence[tuple[int, int]], by_value: Sequence[Block]) -> list[_Place]:
        """Return where arrays lie: those that have an address on the GPU, and the others in these blocks."""
        blocks = iter(by_value)
        places = []
        for address, nbytes in named:
            if address:
                places.append(self._locate(address, nbytes))
                if not places[-1].is_on_gpu:
                    raise ProtocolError("an inline run names an address in host memory")
            else:
                block = next(blocks)
                places.append(_Place(block.pointer, nbytes, block, False))
        return places

    def _locate(self, address: int, nbytes: int) -> _Place:
        """Return where a block of the client lies in this process."""
        if nbytes == 0:
            return _NOWHERE
        if address % ALIGNMENT:
            raise ProtocolError(f"a block is not aligned to {ALIGNMENT} bytes")
        for slab in self.slabs:
            # In this order nothing can overflow or wrap, whatever the numbers.
            if slab.base <= address and nbytes <= slab.nbytes and address - slab.base <= slab.nbytes - nbytes:
                return _Place(slab.pointer + (address - slab.base), nbytes, slab, isinstance(slab, GpuSlab))
        raise ProtocolError(f"no shared slab holds a block of {nbytes} bytes at the given address")

    def peek(self, request: pb.Peek) -> bytes:
        """Return what this process sees in a few bytes of the client's."""
        if request.nbytes > _MOST_PEEKED:
            raise ProtocolError(f"{request.nbytes} bytes are too many to peek at; at most {_MOST_PEEKED}")
        place = self._locate(request.address, request.nbytes)
        if place.is_on_gpu:
            return copied_to_host(self._device("memory"), place.pointer, place.nbytes)
        return ctypes.string_at(place.pointer, place.nbytes)

    def usage(self) -> pb.Usage:
        """Return what the worker holds for this session."""
        count, nbytes = self.residuals.usage(self)
        shared = sum(slab.nbytes for slab in self.slabs) + self.scratch.slab_bytes
        return pb.Usage(residuals=count, residual_bytes=nbytes, slab_bytes=shared)

    def discard(self) -> None:
        """Let go of everything. Only when no lane is attached any more."""
        self.is_closed = True
        self.residuals.drop_all(self)
        self._plans.clear()
        self._views.clear()
        self.programs.clear()
        self.slabs = ()
        self.scratch.close()
        end_what_is_left()


class Sessions:
    """All sessions of a worker."""

    def __init__(
        self, runtime: Runtime, *, residual_bytes: int, slab_bytes: int, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        """Begin without any. `on_failure` is called once the worker's GPU takes no more work of this process."""
        self.slab_bytes = slab_bytes
        self.residuals = Residuals(residual_bytes)
        self.is_draining = False
        self.has_failed = False
        self._on_failure = on_failure
        self._runtime = runtime
        self._by_token: dict[bytes, Session] = {}
        self._running: set[object] = set()
        self._lock = threading.Lock()

    def open(self) -> Session:
        """Return a new session with a fresh token."""
        self.refuse_if_draining()
        with self._lock:
            self._forget_unattached()
            if len(self._by_token) >= _MAX_SESSIONS:
                raise OutOfMemory(f"the worker has {_MAX_SESSIONS} sessions already")
            session = Session(secrets.token_bytes(_TOKEN_BYTES), self._runtime, self.residuals)
            session.scratch.limit(self.slab_bytes)
            self._by_token[session.token] = session
        return session

    def find(self, token: bytes) -> Session:
        """Return the session of a token.

        Raises:
          Unauthenticated: no session has it, or that session has ended.
        """
        session = self._by_token.get(token)
        if session is None or session.is_closed or not hmac.compare_digest(session.token, token):
            raise Unauthenticated("the session token is not valid here; open a session first")
        return session

    def attach(self, token: bytes) -> Session:
        """Tie a lane to the session of a token; `detach` must follow."""
        with self._lock:
            session = self.find(token)
            session.lanes += 1
        return session

    def detach(self, session: Session) -> None:
        """Untie a lane; the last one ends the session."""
        with self._lock:
            session.lanes -= 1
            ended = session.lanes == 0
            if ended:
                session.is_closed = True
        if ended:
            self._end(session)

    def close(self, token: bytes) -> None:
        """End a session as soon as its lanes have gone; it takes no more calls from now on.

        Of one with memory on a GPU, wait for that: the client must not free what is still mapped here.
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
        _log.debug("a session ended; %d remain", len(self._by_token))

    def refuse_if_draining(self) -> None:
        if self.is_draining:
            raise WorkerDraining("the worker is shutting down and takes no new work; connect to another one")

    @contextlib.contextmanager
    def running(self, session: Session) -> Iterator[None]:
        """Mark one call or preparation as under way: a drain waits for it."""
        call = object()
        self.begin(session, call)
        try:
            yield
        finally:
            self.end(call)

    def begin(self, session: Session, call: object) -> None:
        """Note that `call` is under way; `end` must follow. Takes no lock: sets are atomic."""
        if session.is_closed:
            raise SessionClosed("the session was closed")
        self._running.add(call)
        if self.is_draining:  # checked last, so that a drain that has begun since sees the call or stops it
            self._running.discard(call)
            self.refuse_if_draining()

    def end(self, call: object) -> None:
        """Note that a call has finished."""
        self._running.discard(call)

    @contextlib.contextmanager
    def examined(self, error: BridgeError) -> Iterator[pb.Error]:
        """Give the error to answer a request with. If the GPU has failed, the worker ends when that has been sent.

        As a message: a variable with the error itself would hold, by the traceback, all that the call has used.
        """
        if not isinstance(error, _OF_THE_GPU) or not self._runtime.has_failed():
            yield encode(error)
            return
        self.has_failed = self.is_draining = True
        _log.critical("the GPU takes no more work of this process, which ends for another to take its place: %s", error)
        try:
            yield encode(
                CudaError(
                    "the worker's GPU has failed, and takes no more work of that process. It ends; a spawned or "
                    f"supervised one is started anew, and serves the next call: {error.args[0]}"
                )
            )
        finally:
            self._on_failure()

    def drain(self, grace_s: float) -> bool:
        """Take no more work, and wait for the calls under way; return whether all have finished."""
        self.is_draining = True
        deadline = time.monotonic() + grace_s
        while self._running and time.monotonic() < deadline:
            time.sleep(_DRAIN_POLL_S)
        return not self._running

    def _forget_unattached(self) -> None:
        now = time.monotonic()
        for token, session in list(self._by_token.items()):
            if session.lanes == 0 and now - session.created > _UNATTACHED_S:
                del self._by_token[token]
