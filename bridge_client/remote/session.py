"""RemoteSession: a session with a worker process, over its current link. Imports no framework."""

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from bridge_client.programs import Program, model_tag, shapes_of
from bridge_client.remote import spans
from bridge_client.remote.lanes import ENDS_LANE, Call, Lane, Stale
from bridge_client.remote.link import Link, Terms
from bridge_client.remote.retrying import RETRIED, Attempts
from bridge_client.remote.unfinished import Forward, Unfinished
from bridge_client.session import Run, Session, checked_limit, closed, lanes_by_way
from bridge_wire import trees
from bridge_wire.errors import (
    BridgeError,
    CallerError,
    CallTimeout,
    DTypeError,
    LaneUnavailable,
    ModelChanged,
    PeerError,
    ProgramGone,
    ResidualGone,
    SpecError,
    StructureError,
    UnknownModel,
    WorkerBusy,
    WorkerDied,
    WorkerDraining,
    WorkerUnavailable,
)
from bridge_wire.memory.cuda import device_of
from bridge_wire.memory.cuda_memory import GpuPool, end_what_is_left
from bridge_wire.memory.pool import Pool
from bridge_wire.memory.slabs import memfd_works
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import decode_all

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_MOST_EVICTIONS = 8  # of a program between its preparation and its run


class Host(Protocol):
    """Source of a worker: its address, and its process if spawned here."""

    def address(self) -> str:
        """Return the worker's address; a spawning source starts the worker first."""

    def has_ended(self) -> bool:
        """Whether a worker started by this process has exited, so that `address` starts a new
        worker."""

    def account(self) -> str:
        """Return how the last worker ended, as far as this process knows."""

    def restarts(self) -> int:
        """Return how often a worker was started again after its end."""

    def close(self) -> None:
        """Shut down a worker started by this process. Idempotent."""


class RemoteSession(Session):
    """A session with one worker, created by `connect` or `spawn`.

    In a forked child, the session restarts with a new connection and new memory.
    """

    def __init__(self, host: Host, terms: Terms, timeout_s: float | None) -> None:
        super().__init__()
        self.timeout_s = checked_limit(timeout_s)
        self._host = host
        self._terms = terms
        self._fallbacks = 0
        self._revision: str | None = None  # of the last link's worker
        self._start_afresh()
        _sessions.add(self)
        self._over_link(lambda link: link)
        if terms.require == "cuda_ipc" and self.gpu_pool() is None:
            self.close()
            raise LaneUnavailable(f"require='cuda_ipc': {self._no_gpu}")

    def __repr__(self) -> str:
        link = self._link
        if self.is_closed or link is None:
            state = "closed" if self.is_closed else "not connected"
            return f"<RemoteSession, {state}>"
        models = [model.name for model in link.description.models]
        return (
            f"RemoteSession({link.address!r}, framework={link.description.framework!r},"
            f" models={models}, lane={link.lane_name!r}, memory={link.memory!r})"
        )

    def _start_afresh(self) -> None:
        self.pool = Pool(shareable=memfd_works())
        self._gpu: GpuPool | None = None
        self._no_gpu = ""
        self._link: Link | None = None
        self._lock = threading.Lock()
        self._unfinished = Unfinished()
        self._changed_models: set[str] = set()  # already reported in the log

    @property
    def framework(self) -> str:
        return self._description.framework

    @property
    def x64(self) -> bool:
        return self._description.x64

    @property
    def worker(self) -> dict[str, Any]:
        """The worker's framework, versions, devices, x64, revision and address, by name."""
        about = self._description
        return {
            "address": self._current_link().address,
            "framework": about.framework,
            "framework_version": about.framework_version,
            "python_version": about.python_version,
            "version": about.version,
            "devices": list(about.devices),
            "x64": about.x64,
            "revision": about.revision,
        }

    @property
    def revision(self) -> str:
        """The worker's --revision; empty if it has none."""
        return self._description.revision

    @property
    def lane(self) -> str:
        return self._current_link().lane_name

    @property
    def memory(self) -> str:
        memory = self._current_link().memory
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
        """Share a first slab on the worker's GPU, or note the reason for a failure.

        A dead worker is no such reason: a new worker may replace it.
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
        """The worker's address."""
        return self._current_link().address

    def prepare(self, program: Program, timeout_s: float | None = None) -> Program:
        limit_s = timeout_s or program.timeout_s or self.timeout_s
        try:
            self._over_link(self._name_of, program, limit_s, limit_s=limit_s)
        except ProgramGone:
            self._again(program, self._name_of, program, limit_s, limit_s=limit_s)
        return program

    def shapes(
        self, call: pb.Call, inputs: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[str]]:
        request = pb.PrepareRequest(shapes=shapes_of(call, inputs))
        what = f"shapes of model {call.model!r}"
        prepared = self._over_link(
            lambda link: link.prepare(request, what, self.timeout_s)
        )
        return [tuple(shape.sizes) for shape in prepared.shapes]

    def drop_residual(self, id: int) -> None:
        self._unfinished.drop(id)

    def measure(self) -> pb.Statistics:
        """Return what the worker has done since its start, for all of its clients."""
        return self._over_link(Link.measure)

    def stats(self) -> Mapping[str, int]:
        self._unfinished.sweep()
        usage = self._usage()
        calls, bytes_copied = self._unfinished.totals()
        return {
            "calls": calls,
            "bytes_copied": bytes_copied,
            "bytes_through_host": self._bytes_through_host,
            "blocks": sum(pool.live_blocks() for pool in self._pools()),
            "slab_bytes": sum(pool.slab_bytes for pool in self._pools()),
            "residuals": usage.residuals,
            "residual_bytes": usage.residual_bytes,
            "fallbacks": self._fallbacks + bool(self._bytes_through_host),
            "restarts": self._host.restarts(),
        } | lanes_by_way(Counter() if self._link is None else self._link.ways)

    def _pools(self) -> list[Pool]:
        return [self.pool] if self._gpu is None else [self.pool, self._gpu]

    def _described(self) -> Sequence[pb.Model]:
        return self._description.models

    def _release(self) -> None:
        with self._closing:
            link, self._link = self._link, None
        if link is not None:
            link.close()
        self._unfinished.close()
        if self._gpu is not None:
            self._gpu.close()
        self._host.close()
        _sessions.discard(self)

    def __reduce__(self) -> tuple[Callable[..., "RemoteSession"], tuple[Any, ...]]:
        # Pickles the address: the unpickling process opens its own session with the same worker.
        return _reconnect, (self.address, self._terms, self.timeout_s)

    # Links ----------------------------------------------------------------------------------------

    def _over_link(
        self,
        action: Callable[..., _T],
        *args: Any,
        limit_s: float | None = None,
    ) -> _T:
        """Act over the link, and over a new link if the call did not run or may be repeated.

        `limit_s` is the time limit of the call, by default the session's.
        """
        attempts: Attempts | None = None
        while True:
            link = self._link
            try:
                if link is None:
                    link = self._require_link()
                return action(link, *args)
            except RETRIED as error:
                if self._is_closed:
                    raise closed() from error
                if attempts is None:
                    attempts = self._attempts(limit_s or self.timeout_s)
                if link is not None:
                    self._leave(link, error)
                attempts.next(error)

    def _again(
        self,
        program: Program,
        action: Callable[..., _T],
        *args: Any,
        limit_s: float | None,
    ) -> _T:
        """Prepare a program again that the worker has evicted, and act over the link."""
        for _ in range(_MOST_EVICTIONS):
            program.forget()
            with contextlib.suppress(ProgramGone):
                return self._over_link(action, *args, limit_s=limit_s)
        return self._over_link(action, *args, limit_s=limit_s)

    def _attempts(self, limit_s: float | None) -> Attempts:
        policy = self._terms.policy
        is_first = self._revision is None
        within_s = policy.wait_s if is_first else policy.retry_s
        if limit_s is not None:
            within_s = min(within_s, limit_s)
        is_limited = limit_s is not None
        return Attempts(within_s, policy.retries, is_limited=is_limited)

    def _leave(self, link: Link, error: BaseException) -> None:
        """Take a link out of use after an error of a call; a busy worker's link stays."""
        is_refused = isinstance(error, WorkerDraining)
        if is_refused or (link.is_retired and isinstance(error, Stale)):
            self._retire(link)
        elif not isinstance(error, WorkerBusy):
            self._forget(link)
        if isinstance(error, WorkerDied) and (account := self._host.account()):
            error.args = (f"{error}; {account}",)

    def _current_link(self) -> Link:
        return self._link or self._over_link(lambda link: link)

    @property
    def _description(self) -> pb.DescribeReply:
        return self._current_link().description

    def _require_link(self) -> Link:
        link = self._link
        if link is not None:
            return link
        with self._closing:
            if self._is_closed:
                raise closed()
            if self._link is None:
                link = self._new_link()
                self._check_revision(link)
                self._link = link
                self.pool.limit(link.slab_bytes)
            return self._link

    def _new_link(self) -> Link:
        try:
            return self._connected()
        except WorkerUnavailable:
            if not self._host.has_ended():
                raise
        return self._connected()

    def _connected(self) -> Link:
        address = self._host.address()
        try:
            return Link(address, self._terms, self._note_fallback)
        except CallTimeout as error:
            # A restarted container may have another IP address, and none answers at the old one.
            raise WorkerUnavailable(
                f"nothing at {address} has answered a connection in time; check that a worker runs"
                " there"
            ) from error

    def _check_revision(self, link: Link) -> None:
        """Compare a new link's revision with the previous link's.

        Raises:
          ModelChanged: they differ, and the terms require the same revision.
        """
        before, now = self._revision, link.description.revision
        if before not in (None, now):
            change = f"the worker's models were of revision {before!r}, and are now of {now!r}"
            if self._terms.require_revision:
                link.close()
                raise ModelChanged(f"{change}; open a new session for this revision")
            _log.warning("%s: results may differ from earlier calls", change)
        self._revision = now

    def _retire(self, link: Link) -> None:
        """Take a draining worker's link out of use; calls under way still finish there."""
        with self._closing:
            if self._link is link:
                self._link = None
        link.retire()

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
                "the worker died before its GPU had written the outputs of earlier calls: these"
                " outputs are NaN, integers -1; repeat the earlier calls, the next call reconnects"
            )

    def _note_fallback(self, reason: str) -> None:
        if self._fallbacks == 0:
            _log.warning("tensors travel by value over gRPC, since %s", reason)
        self._fallbacks += 1

    # Calls ----------------------------------------------------------------------------------------

    def _run(self, run: Run) -> Any:
        limit_s = run.timeout_s or run.program.timeout_s
        try:
            return self._over_link(self._run_over, run, limit_s=limit_s)
        except ProgramGone:
            return self._again(run.program, self._run_over, run, limit_s=limit_s)

    def _run_over(self, link: Link, run: Run) -> Any:
        forward = self._forward_of(link, run)
        call = self._call(link, run)
        lane: Lane | None = None
        try:
            lane = link.take(
                self.pool, call.timeout_s, None if run.stream is None else self._gpu
            )
            if call.timed:
                outputs = self._timed(link, lane, call)
            else:
                outputs = lane.run(call)
            if forward is not None and run.stream is not None:
                # The pullback may have read the forward's inputs.
                lane.free_after(forward.stream, run.stream)
        except BaseException as error:
            self._unfinished.release_later(call.released)
            if lane is not None:
                self._after_failure(link, error, lane, call)
            raise
        link.give_back(lane)
        copied = run.copied + lane.bytes_by_value(call)
        self._unfinished.count(copied + run.program.outputs_nbytes)
        return outputs

    def _timed(self, link: Link, lane: Lane, call: Call) -> Any:
        begin_ns = time.time_ns()
        outputs = lane.run(call)
        spans.of_run(call.run.program, link.address, begin_ns, lane.times)
        return outputs

    def _forward_of(self, link: Link, run: Run) -> Forward | None:
        """Return the forward run of a pullback's residual; record a run that keeps a residual.

        Raises:
          ResidualGone: the forward run used another link.
        """
        if not run.residual:
            return None
        if not run.program.is_pullback:
            self._unfinished.keep(run.residual, Forward(link, run.inputs, run.stream))
            return None
        forward = self._unfinished.forward(run.residual)
        if forward is None or forward.link is not link:
            raise ResidualGone("the worker has restarted since it kept the residual")
        return forward

    def _call(self, link: Link, run: Run) -> Call:
        """Prepare the program on this link if needed, and lease blocks for its outputs."""
        program, gpu = run.program, None if run.stream is None else self._gpu
        timeout_s = run.timeout_s or program.timeout_s or self.timeout_s
        named, name = program.name
        if named is not link:
            name = self._name_of(link, program, timeout_s)
        if gpu is None:
            outputs = self.pool.lease_all(program.output_nbytes)
        else:
            outputs = [
                gpu.lease(nbytes, run.stream or 0) for nbytes in program.output_nbytes
            ]
        return Call(
            run,
            name,
            outputs,
            self._unfinished.to_release(),
            timeout_s,
            self.pool,
            spans.are_wanted(),
        )

    def _name_of(self, link: Link, program: Program, timeout_s: float | None) -> int:
        """Return the worker's id for a program, after preparing the program on this link if
        needed."""
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
            prepared = link.prepare(request, what, timeout_s)
        except (SpecError, DTypeError, StructureError, UnknownModel) as error:
            if is_known:
                raise ModelChanged(
                    f"{what} served this call before the worker's restart, but now fails: {error}"
                ) from error
            raise
        if prepared.fingerprint:
            self._check_model(program, prepared, what, is_known=is_known)
        program.adopt(link, prepared)
        return program.name[1]

    def _check_model(
        self,
        program: Program,
        prepared: pb.Prepared,
        what: str,
        *,
        is_known: bool,
    ) -> None:
        """Compare a restarted worker's program with the earlier one.

        Raises:
          ModelChanged: the program requires the model of an earlier call, or the output types
            differ.
        """
        if program.tag and model_tag(prepared.fingerprint) != program.tag:
            raise ModelChanged(
                f"the worker now serves another {what} than in this call's forward pass, so it"
                " cannot compute the gradient; call the function again"
            )
        outputs = decode_all(prepared.outputs)
        results = [
            trees.without_origins(result)
            for result in (prepared.result, program.result.tree)
        ]
        if program.outputs and (outputs != program.outputs or results[0] != results[1]):
            raise ModelChanged(
                f"{what} returned {', '.join(map(str, program.outputs))} before the worker's"
                f" restart, and now returns {', '.join(map(str, outputs))} or another structure;"
                " create a new function for the model"
            )
        if not is_known or prepared.fingerprint == program.identity.fingerprint:
            return
        if self._terms.require_revision:
            raise ModelChanged(
                f"{what} has changed with the worker's restart; open a new session for this model"
            )
        with self._lock:
            is_reported = what in self._changed_models
            self._changed_models.add(what)
        if not is_reported:
            _log.warning(
                "%s has changed with the worker's restart: results differ from earlier calls",
                what,
            )

    def _after_failure(
        self,
        link: Link,
        error: BaseException,
        lane: Lane,
        call: Call,
    ) -> None:
        """Give back a usable lane; otherwise keep the call's blocks until the worker releases
        them."""
        if isinstance(error, BridgeError) and not isinstance(error, ENDS_LANE):
            link.give_back(lane)
        elif isinstance(error, Stale | PeerError | WorkerDied):
            if lane.ordering is not None and not isinstance(error, PeerError):
                link.worker_has_gone(lane.ordering)
            lane.close()
        elif lane.abandon():  # CallTimeout, or for example KeyboardInterrupt
            self._unfinished.abandon(lane, call)
        if link.is_retired:
            link.retire()

    def _usage(self) -> pb.Usage:
        link = self._link
        if link is None:
            return pb.Usage()
        try:
            lane = link.take(self.pool)
        except (Stale, BridgeError):  # a dead worker holds nothing
            return pb.Usage()
        dropped = self._unfinished.to_release()
        try:
            usage = lane.release(dropped)
        except BaseException as error:
            self._unfinished.release_later(dropped)
            lane.close()
            if isinstance(error, Stale | BridgeError):
                return pb.Usage()
            raise
        link.give_back(lane)
        return usage


@dataclass(frozen=True, slots=True)
class Fixed:
    """A worker at a fixed address, not started by this process."""

    at: str

    def address(self) -> str:
        return self.at

    def has_ended(self) -> bool:
        return False

    def account(self) -> str:
        return ""

    def restarts(self) -> int:
        return 0

    def close(self) -> None:
        pass


def _reconnect(address: str, terms: Terms, timeout_s: float | None) -> RemoteSession:
    return RemoteSession(Fixed(address), terms, timeout_s)


_sessions: "weakref.WeakSet[RemoteSession]" = weakref.WeakSet()
# Parent's objects that a forked child must neither use nor finalize, since gRPC's threads do not
# survive the fork.
_of_the_parent: list[Any] = []


def _after_fork_in_child() -> None:
    for session in list(_sessions):
        _of_the_parent.append(
            (session._link, session._unfinished, session.pool, session._gpu)
        )
        session._forget_threads()
        session._start_afresh()


@atexit.register
def _close_all() -> None:
    for session in list(_sessions):
        with contextlib.suppress(Exception):
            session.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
