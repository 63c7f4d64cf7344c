"""Sessions with a worker process: calls and residuals over whichever link to it is alive."""

import atexit
import contextlib
import logging
import operator
import os
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from bridge_client.programs import Program, model_tag, shapes_of
from bridge_client.remote.lanes import ENDS_LANE, Lane, Stale
from bridge_client.remote.link import Link, Terms
from bridge_client.session import Placed, Session, checked_limit, closed, lanes_by_way
from bridge_wire import trees
from bridge_wire.errors import (
    BridgeError,
    CallerError,
    CallTimeout,
    DTypeError,
    LaneUnavailable,
    ModelChanged,
    PeerError,
    ResidualGone,
    SpecError,
    StructureError,
    UnknownModel,
    WorkerDied,
    WorkerUnavailable,
)
from bridge_wire.memory.cuda import device_of
from bridge_wire.memory.cuda_memory import GpuPool, end_what_is_left, is_on_gpu
from bridge_wire.memory.pool import Block, Pool
from bridge_wire.memory.slabs import memfd_works
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import decode_all

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_MOST_UNCOUNTED = 1000
_MOST_RELEASED = 100_000  # by one message, which has to fit in a frame
_address_of = operator.attrgetter("address")


class Host(Protocol):
    """Where the worker is, and who keeps it running."""

    def address(self) -> str:
        """Return the worker's address, starting it first if that is this process's task."""

    def has_ended(self) -> bool:
        """Whether a worker that this process has started is gone, so that `address` would start
        another one."""

    def close(self) -> None:
        """End a worker that this process has started. Idempotent."""


class _Residual(NamedTuple):
    """What keeps alive the blocks that a residual on the worker may alias."""

    link: Link
    inputs: Sequence[Placed]
    stream: int | None  # on which the inputs' blocks are used


class _Abandoned(NamedTuple):
    """A call that was given up: its blocks must not be reused before the worker lets go of them."""

    lane: Lane
    leases: tuple[Any, ...]
    residual: int  # which the call may keep yet, so it is released afterwards; 0: none


class RemoteSession(Session):
    """A connection to one worker. Made by `connect` and `spawn`.

    In a forked child the session starts afresh with a connection and memory of its own.
    """

    def __init__(self, host: Host, terms: Terms, timeout_s: float | None) -> None:
        super().__init__()
        self.timeout_s = checked_limit(timeout_s)
        self._host = host
        self._terms = terms
        self._calls = self._bytes_copied = self._fallbacks = 0
        self._start_afresh()
        _sessions.add(self)
        self._require_link()
        if terms.require == "cuda_ipc" and self.gpu_pool() is None:
            self.close()
            raise LaneUnavailable(f"require='cuda_ipc': {self._no_gpu}")

    def _start_afresh(self) -> None:
        self.pool = Pool(shareable=memfd_works())
        self._gpu: GpuPool | None = None
        self._no_gpu = ""
        self._link: Link | None = None
        self._lock = threading.Lock()
        self._residuals: dict[int, _Residual] = {}
        self._dropped: deque[int] = deque()
        self._uncounted: deque[int] = (
            deque()
        )  # the bytes that each call has copied: to append takes no lock
        self._abandoned: list[_Abandoned] = []
        self._changed_models: set[str] = set()  # which were reported

    @property
    def framework(self) -> str:
        return self._require_link().description.framework

    @property
    def x64(self) -> bool:
        return self._require_link().description.x64

    @property
    def lane(self) -> str:
        return self._require_link().lane_name

    @property
    def memory(self) -> str:
        memory = self._require_link().memory
        return memory if self.gpu_pool() is None else "cuda_ipc"

    def gpu_pool(self) -> GpuPool | None:
        if self._gpu is None and not self._no_gpu:
            self._over_link(self._look_for_gpu_once)
        return self._gpu

    def _look_for_gpu_once(self, link: Link) -> None:
        with self._closing:
            if self._gpu is None and not self._no_gpu and not self._is_closed:
                self._look_for_gpu(link)

    def _look_for_gpu(self, link: Link) -> None:
        """Share a first slab with the worker on its GPU, or find out why that cannot be, but for a
        worker that is gone: another one may take its place.
        """
        about = link.description.gpu
        if not about.uuid:
            self._no_gpu = "the worker's models run on no GPU"
            return
        gpu: GpuPool | None = None
        try:
            gpu = GpuPool(device_of(about.uuid))
            gpu.lease(1)
            link.give_back(link.take(self.pool, None, gpu))
        except (BridgeError, Stale) as error:
            if gpu is not None:
                gpu.close()
            if isinstance(error, Stale | WorkerUnavailable | CallTimeout | CallerError):
                raise
            self._no_gpu = str(error)
        else:
            self._gpu = gpu

    @property
    def address(self) -> str:
        """Where the worker listens."""
        return self._require_link().address

    def prepare(self, program: Program, timeout_s: float | None = None) -> Program:
        self._over_link(self._name_of, program, timeout_s)
        return program

    def shapes(self, call: pb.Call, inputs: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
        request = pb.PrepareRequest(shapes=shapes_of(call, inputs))
        what = f"shapes of model {call.model!r}"
        prepared = self._over_link(lambda link: link.prepare(request, what, self.timeout_s))
        return [tuple(shape.sizes) for shape in prepared.shapes]

    def drop_residual(self, id: int) -> None:
        if self._residuals.pop(id, None) is not None:
            self._dropped.append(id)

    def stats(self) -> Mapping[str, int]:
        with self._lock:
            self._sweep_abandoned()
        usage = self._usage()
        with self._lock:
            self._count()
            return {
                "calls": self._calls,
                "bytes_copied": self._bytes_copied,
                "bytes_through_host": self._bytes_through_host,
                "blocks": sum(pool.live_blocks() for pool in self._pools()),
                "slab_bytes": sum(pool.slab_bytes for pool in self._pools()),
                "residuals": usage.residuals,
                "residual_bytes": usage.residual_bytes,
                "fallbacks": self._fallbacks + bool(self._bytes_through_host),
            } | lanes_by_way(Counter() if self._link is None else self._link.ways)

    def _pools(self) -> list[Pool]:
        return [self.pool] if self._gpu is None else [self.pool, self._gpu]

    def _described(self) -> Sequence[pb.Model]:
        return self._require_link().description.models

    def _release(self) -> None:
        with self._closing:
            link, self._link = self._link, None
        if link is not None:
            link.close()
        while self._abandoned:
            self._abandoned.pop().lane.close()
        self._residuals.clear()
        if self._gpu is not None:
            self._gpu.close()
        self._host.close()
        _sessions.discard(self)

    def __reduce__(self) -> tuple[Callable[..., "RemoteSession"], tuple[Any, ...]]:
        # A session cannot travel, but whoever unpickles it can make its own with the same worker.
        return _reconnect, (self.address, self._terms, self.timeout_s)

    # Links ----------------------------------------------------------------------------------------

    def _over_link(self, action: Callable[..., _T], *args: Any) -> _T:
        """Act over the link; over a new one if the old one turns out to have been dead before
        anything was sent."""
        link = self._link or self._require_link()
        try:
            return action(link, *args)
        except Stale:
            self._forget(link)
        link = self._require_link()
        try:
            return action(link, *args)
        except Stale as error:
            self._forget(link)
            raise WorkerUnavailable(
                "the worker went away again right after it was reached"
            ) from error

    def _require_link(self) -> Link:
        link = self._link
        if link is not None:
            return link
        with self._closing:
            if self._is_closed:
                raise closed()
            if self._link is None:
                self._link = self._new_link()
                self.pool.limit(self._link.slab_bytes)
            return self._link

    def _new_link(self) -> Link:
        try:
            return Link(self._host.address(), self._terms, self._note_fallback)
        except WorkerUnavailable:
            if not self._host.has_ended():
                raise
        return Link(self._host.address(), self._terms, self._note_fallback)

    def _forget(self, link: Link) -> None:
        with self._closing:
            is_new = self._link is link
            if is_new:
                self._link = None
        link.settle()
        link.abort()
        end_what_is_left()
        if is_new and link.has_lost_outputs:
            raise WorkerDied(
                "the worker died before its GPU had written the outputs of earlier calls, which are"
                " NaN, or -1 where they are integers: run these calls again; the next call"
                " reconnects"
            )

    def _note_fallback(self, reason: str) -> None:
        if self._fallbacks == 0:
            _log.warning("tensors travel by value over gRPC, since %s", reason)
        self._fallbacks += 1

    # Calls ----------------------------------------------------------------------------------------

    def _run(
        self,
        program: Program,
        inputs: Sequence[Placed],
        residual: int,
        copied: int,
        timeout_s: float | None,
        make: Callable[[list[Block]], _T],
        stream: int | None,
    ) -> _T:
        if (link := self._link) is not None:
            try:
                return self._run_over(
                    link, program, inputs, residual, copied, timeout_s, make, stream
                )
            except Stale:
                self._forget(link)
        return self._over_link(
            self._run_over, program, inputs, residual, copied, timeout_s, make, stream
        )

    def _run_over(
        self,
        link: Link,
        program: Program,
        inputs: Sequence[Placed],
        residual: int,
        copied: int,
        timeout_s: float | None,
        make: Callable[[list[Block]], _T],
        stream: int | None,
    ) -> _T:
        kept: _Residual | None = None
        if residual:
            if not program.is_pullback:
                self._residuals[residual] = _Residual(link, inputs, stream)
            elif (kept := self._residuals.get(residual)) is None or kept.link is not link:
                raise ResidualGone("the residual belongs to an earlier life of the worker")
        named, name = program.name
        if named is not link:
            name = self._name_of(link, program, timeout_s)
        gpu = None if stream is None else self._gpu
        if gpu is None:
            outputs = list(map(self.pool.lease, program.output_nbytes))
        else:
            outputs = [gpu.lease(nbytes, stream or 0) for nbytes in program.output_nbytes]
        released = self._take_dropped() if self._dropped else None
        request = pb.LaneRequest()
        run = request.run
        run.program = name
        run.inputs.extend(map(_address_of, inputs))
        run.outputs.extend(map(_address_of, outputs))
        run.residual = residual
        if released:
            run.released.extend(released)
        payload = None if link.memory == "memfd" else self._payload(program, inputs)
        lane: Lane | None = None
        try:
            limit_s = timeout_s or program.timeout_s or self.timeout_s
            lane = link.take(self.pool, limit_s, gpu)
            if lane.ordering is None or stream is None:
                made = lane.run(request, payload, outputs, limit_s, make)
            else:
                run.turn = lane.ordering.begin(stream)
                made = lane.run(request, payload, outputs, limit_s, make)
                lane.ordering.end(stream, outputs)
                if kept is not None and kept.stream not in (None, stream):
                    lane.ordering.end(
                        kept.stream
                    )  # the pullback may have read the inputs of that run
        except BaseException as error:
            self._dropped.extend(released or ())
            if lane is not None:
                keeps = residual if program.keeps_residual else 0
                self._after_failure(link, error, _Abandoned(lane, (inputs, outputs), keeps))
            raise
        link.give_back(lane)
        if payload is not None:
            copied += sum(map(len, payload))
        self._uncounted.append(copied + program.outputs_nbytes)
        if self._abandoned or len(self._uncounted) > _MOST_UNCOUNTED:
            with self._lock:
                self._sweep_abandoned()
                self._count()
        return made

    def _name_of(self, link: Link, program: Program, timeout_s: float | None) -> int:
        """Return the worker's name for a program, which it prepares if it is new on this link."""
        named, name = program.name
        if named is link:
            return name
        request = pb.PrepareRequest()
        request.CopyFrom(program.request)
        if program.origin is not None and program.is_pullback:
            request.pullback.program = self._name_of(link, program.origin, timeout_s)
        model = request.call.model or request.parameters.model
        what = f"model {model!r}" if model else "a pullback"
        is_known = program.identity.link not in (None, link)
        try:
            prepared = link.prepare(request, what, timeout_s or program.timeout_s or self.timeout_s)
        except (SpecError, DTypeError, StructureError, UnknownModel) as error:
            if is_known:
                raise ModelChanged(
                    f"{what} has served such calls before the worker was restarted: {error}"
                ) from error
            raise
        if prepared.fingerprint:
            self._check_model(program, prepared, what, is_known=is_known)
        program.adopt(link, prepared)
        return program.name[1]

    def _check_model(
        self, program: Program, prepared: pb.Prepared, what: str, *, is_known: bool
    ) -> None:
        """Compare what a restarted worker serves to what it has served before.

        Raises:
          ModelChanged: the program is tied to the model of an earlier call, or the outputs have
            other types.
        """
        if program.tag and model_tag(prepared.fingerprint) != program.tag:
            raise ModelChanged(
                f"the worker serves another {what} than the one that ran this call's forward, so it"
                " cannot compute the gradient; call the function again"
            )
        outputs = decode_all(prepared.outputs)
        results = [trees.without_origins(result) for result in (prepared.result, program.result)]
        if program.outputs and (outputs != program.outputs or results[0] != results[1]):
            raise ModelChanged(
                f"{what} returned {', '.join(map(str, program.outputs))} before the worker was"
                f" restarted, and now returns {', '.join(map(str, outputs))} or another structure;"
                " make a new function of it"
            )
        if not is_known or prepared.fingerprint == program.identity.fingerprint:
            return
        with self._lock:
            is_reported = what in self._changed_models
            self._changed_models.add(what)
        if not is_reported:
            _log.warning(
                "%s is another one since the worker was restarted: results differ from earlier"
                " calls",
                what,
            )

    def _payload(self, program: Program, inputs: Sequence[Placed]) -> list[memoryview]:
        return [
            self.pool.view(placed.address, spec.nbytes)
            for placed, spec in zip(inputs, program.inputs, strict=True)
            if not is_on_gpu(placed.address)
        ]

    def _after_failure(self, link: Link, error: BaseException, call: _Abandoned) -> None:
        """Put the lane back if it can still be used; else keep the call's blocks until the
        worker lets go of them."""
        if isinstance(error, BridgeError) and not isinstance(error, ENDS_LANE):
            link.give_back(call.lane)
        elif isinstance(error, Stale | PeerError | WorkerDied):
            if call.lane.ordering is not None and not isinstance(error, PeerError):
                link.worker_has_gone(call.lane.ordering)
            call.lane.close()
        elif call.lane.abandon():  # CallTimeout; or KeyboardInterrupt, for one
            with self._lock:
                self._abandoned.append(call)

    def _count(self) -> None:
        while self._uncounted:
            self._bytes_copied += self._uncounted.popleft()
            self._calls += 1

    def _sweep_abandoned(self) -> None:
        ended = [call for call in self._abandoned if call.lane.has_ended()]
        self._abandoned = [call for call in self._abandoned if call not in ended]
        for call in ended:
            call.lane.close()
            if call.residual:
                self._dropped.append(call.residual)

    def _take_dropped(self) -> list[int]:
        taken: list[int] = []
        while self._dropped and len(taken) < _MOST_RELEASED:
            taken.append(self._dropped.popleft())
        return taken

    def _usage(self) -> pb.Usage:
        link = self._link
        if link is None:
            return pb.Usage()
        try:
            lane = link.take(self.pool)
        except (Stale, BridgeError):  # a worker that is gone holds nothing
            return pb.Usage()
        dropped = self._take_dropped()
        try:
            usage = lane.release(dropped)
        except BaseException as error:
            self._dropped.extend(dropped)
            lane.close()
            if isinstance(error, Stale | BridgeError):
                return pb.Usage()
            raise
        link.give_back(lane)
        return usage


@dataclass(frozen=True, slots=True)
class Fixed:
    """A worker that somebody else runs."""

    at: str

    def address(self) -> str:
        return self.at

    def has_ended(self) -> bool:
        return False

    def close(self) -> None:
        pass


def _reconnect(address: str, terms: Terms, timeout_s: float | None) -> RemoteSession:
    return RemoteSession(Fixed(address), terms, timeout_s)


_sessions: "weakref.WeakSet[RemoteSession]" = weakref.WeakSet()
# What a forked child must neither use nor finalize: it belongs to the parent, and gRPC's threads
# are not here.
_of_the_parent: list[Any] = []


def _after_fork_in_child() -> None:
    for session in list(_sessions):
        _of_the_parent.append((session._link, session._abandoned, session.pool, session._gpu))
        session._forget_threads()
        session._start_afresh()


@atexit.register
def _close_all() -> None:
    for session in list(_sessions):
        with contextlib.suppress(Exception):
            session.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
