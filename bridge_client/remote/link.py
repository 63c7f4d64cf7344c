"""Link: one connection to one worker process, with its gRPC channel and lanes.

A session outlives its links: after a worker's restart, the session opens a new link. No framework
is imported here.
"""

import contextlib
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from bridge_client.progress import shown_when_slow
from bridge_client.remote import spans
from bridge_client.remote.gpu import Ordering
from bridge_client.remote.grpc_lane import GrpcLane, from_rpc
from bridge_client.remote.lanes import Lane, Stale
from bridge_client.remote.local_lane import LocalLane
from bridge_client.remote.retrying import Policy
from bridge_client.remote.watching import Watch
from bridge_wire import PROTOCOLS, __version__
from bridge_wire.addresses import is_loopback
from bridge_wire.errors import (
    BridgeError,
    CallerError,
    CudaError,
    LaneUnavailable,
    OutOfMemory,
    Unauthenticated,
    WorkerDied,
    WorkerUnavailable,
    decode,
)
from bridge_wire.memory.cuda_memory import GpuPool, end_what_is_left
from bridge_wire.memory.cuda_words import WORDS
from bridge_wire.memory.pool import Pool
from bridge_wire.memory.slabs import memfd_works
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.pb.bridge_pb2_grpc import BridgeStub

_CONNECT_S = 10.0
_GOODBYE_S = 1.0
_UNMAPPED_S = 3.0
_GPU_S, _GPU_POLL_S = 30.0, 0.001
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # With a shared pool, a new link would wait for the back-off of the dead link.
    ("grpc.use_local_subchannel_pool", 1),
    # A vanished host answers no ping: its calls end after 15 s at the latest.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM-encoded certificates: the authority of the worker's certificate, and optionally the
    client's certificate with its key."""

    root_certificates: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """Options of a connection: see `connect`."""

    token: str | None = None
    tls: Tls | None = None
    lane: str | None = None
    require: str | None = None
    token_file: str | None = None
    policy: Policy = field(default_factory=Policy)
    require_revision: bool = False

    def current_token(self) -> str | None:
        """Return the token, from its file if there is one: the file may have a new one by now.

        Raises:
          CallerError: the file cannot be read, or has hashes of tokens.
        """
        if self.token_file is None:
            return self.token
        try:
            with open(self.token_file, errors="replace") as file:
                token = file.read()
        except OSError as error:
            raise CallerError(
                f"cannot read the token file {self.token_file}: {error.strerror}"
            ) from error
        if " sha256:" in token or not token.strip():
            raise CallerError(
                f"the token file {self.token_file} is empty or has hashes for a worker; name"
                " a file with the token itself"
            )
        return token


class Link:
    """A gRPC channel, its session on the worker, and idle lanes. Thread-safe."""

    def __init__(
        self,
        address: str,
        terms: Terms,
        on_fallback: Callable[[str], None],
    ) -> None:
        """Connect, open a session and attach a first lane.

        `on_fallback` receives the reason if tensors must travel by value.

        Raises:
          WorkerUnavailable: no worker answers at the address.
          LaneUnavailable: the terms require an unavailable lane or memory kind.
        """
        self.address = address
        self._shared: set[int] = set()  # bases of shared host slabs
        self._shared_on_gpu: set[int] = set()
        self._share_lock = threading.Lock()
        # Number of GPU lanes by `Ordering.way`.
        self.ways: Counter[str] = Counter()
        self._lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
        self.is_retired = False
        # Whether answered calls lost outputs by the worker's death.
        self.has_lost_outputs = False
        self._watches: list[
            Watch
        ] = []  # at most one, created with the first watched lane
        self._metadata = _authorization(terms.current_token())
        self._channel = open_channel(address, terms.tls)
        self._stub = _Authorized(BridgeStub(self._channel), self._metadata)
        try:
            self.description: pb.DescribeReply = self._unary(
                self._stub.Describe, pb.DescribeRequest()
            )
            oldest, newest = PROTOCOLS
            opened: pb.OpenReply = self._unary(
                self._stub.Open,
                pb.OpenRequest(
                    oldest_protocol=oldest,
                    newest_protocol=newest,
                    client=f"torch-jax-bridge {__version__}",
                ),
            )
            self.token = opened.session
            self.slab_bytes = opened.slab_bytes
            self._make_lane, first = self._choose_lane(
                opened.local_lane, terms, on_fallback
            )
        except BaseException:
            self._channel.close()
            raise
        self.lane_name, self.memory = first.name, first.memory
        # Idle lanes, the most recently used last. The worker keeps the session while a lane is
        # attached.
        self._idle: list[Lane] = [first]
        self._lanes.add(first)
        # Also ends an unreferenced link: the worker must not keep the session of a deleted module.
        self._end = weakref.finalize(
            self, _end, self._idle, self._channel, self._watches, self._stub
        )
        self._end.atexit = False

    def prepare(
        self,
        request: pb.PrepareRequest,
        what: str,
        timeout_s: float | None,
    ) -> pb.Prepared:
        """Let the worker prepare a program; log progress of a slow preparation.

        Raises:
          Stale: the worker no longer has the session.
        """
        request.session = self.token
        phase, begin_ns = "starting", time.time_ns()
        phases: list[tuple[str, int]] = []
        try:
            with shown_when_slow(what) as progress:
                for event in self._stub.Prepare(request, timeout=timeout_s):
                    kind = event.WhichOneof("kind")
                    if kind == "prepared":
                        prepared: pb.Prepared = event.prepared
                        if spans.are_wanted():
                            spans.of_preparation(what, self.address, begin_ns, phases)
                        return prepared
                    if kind == "error":
                        raise decode(event.error)
                    phase = progress.phase = event.progress.phase
                    phases.append((phase, time.time_ns()))
        except grpc.RpcError as error:
            if not self._end.alive:  # another thread has ended the link
                raise Stale from error
            raised = from_rpc(error, during_call=phase != "starting")
            if isinstance(raised, WorkerUnavailable) and not isinstance(
                raised, WorkerDied
            ):
                raise Stale from raised
            raise raised from error
        # Another worker, or the restarted worker, answers at the address.
        except Unauthenticated as error:
            raise Stale from error
        raise WorkerDied(
            "the worker ended a preparation without a result; the next call retries"
        )

    def measure(self) -> pb.Statistics:
        """Return what the worker has done since its start."""
        measured: pb.Statistics = self._unary(self._stub.Measure, pb.MeasureRequest())
        return measured

    def take(
        self,
        pool: Pool,
        timeout_s: float | None = None,
        gpu: GpuPool | None = None,
    ) -> Lane:
        """Take a lane for one call, after sharing all slabs of the pool.

        The caller must give the lane back, or abandon it. For a call on a GPU, this method also
        shares the slabs of `gpu` and orders the lane with the GPU.

        Raises:
          Stale: there is no lane, since the link is dead.
        """
        try:
            lane = self._idle.pop()
        except IndexError:
            lane = self._new_lane()
        if gpu is not None:
            self._share_on_gpu(lane, gpu)
        if len(self._shared) < len(pool.slabs) and lane.memory == "memfd":
            try:
                self._share(lane, pool, timeout_s)
            except BaseException:  # the worker may or may not have the slab now
                lane.close()
                self.abort()
                raise
        return lane

    def give_back(self, lane: Lane) -> None:
        """Return a lane that is ready for the next call."""
        self._idle.append(lane)
        # The link ended during the call and no longer closes its lanes.
        if self.is_retired or not self._end.alive:
            _close(self._idle)
            self._end_if_unused()

    def retire(self) -> None:
        """End the link after the calls under way, since its worker takes no more."""
        self.is_retired = True
        _close(self._idle)
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        with self._share_lock:
            is_unused = all(lane.is_closed for lane in self._lanes)
        if is_unused:
            self.abort()

    def close(self) -> None:
        """Close the session on the worker and all connections. Idempotent; ignores a dead worker.

        On return, a reachable worker has unmapped the shared GPU memory.
        """
        patience_s, orderings = _GOODBYE_S, []
        if self._shared_on_gpu:
            patience_s = _UNMAPPED_S
            self._wait_for_gpu()
            orderings = self._taken_from_lanes()
            _close(self._idle)  # the worker unmaps when no lane is left
        with contextlib.suppress(grpc.RpcError, Stale):
            self._stub.Close(pb.CloseRequest(session=self.token), timeout=patience_s)
        self.abort()
        for ordering in orderings:  # the worker no longer uses their resources
            ordering.close()
        end_what_is_left()

    def abort(self) -> None:
        """Close all connections without notice to the worker."""
        self._end()

    def _wait_for_gpu(self) -> None:
        """Wait until the worker's GPU waits are over: it must not wait for an ended process."""
        deadline = time.monotonic() + _GPU_S
        for lane in list(self._idle):
            while (
                lane.ordering is not None
                and not lane.ordering.is_done
                and not lane.has_ended()
            ):
                if time.monotonic() > deadline:
                    return
                time.sleep(_GPU_POLL_S)

            if lane.ordering is not None and lane.has_ended():
                self.worker_has_gone(lane.ordering)

    def _taken_from_lanes(self) -> list[Ordering]:
        """Take the idle lanes' orderings, and release the worker's resources while the worker
        still has them."""
        taken = []
        for lane in list(self._idle):
            ordering, lane.ordering = lane.ordering, None
            if ordering is not None:
                with contextlib.suppress(CudaError):
                    ordering.let_go()
                taken.append(ordering)
        return taken

    def settle(self) -> None:
        """End the waits for a worker that is gone."""
        for lane in list(self._idle):
            if lane.ordering is not None:
                self.worker_has_gone(lane.ordering)

    def worker_has_gone(self, ordering: Ordering) -> None:
        """End a lane's waits for a worker that is gone, and note whether outputs are lost."""
        with contextlib.suppress(CudaError):
            ordering.worker_has_gone()
        self.has_lost_outputs |= ordering.has_lost_outputs

    def _watched(self) -> Watch:
        with self._share_lock:
            self._refuse_if_ended()
            if not self._watches:
                self._watches.append(Watch())
            return self._watches[0]

    def _order(self, lane: Lane, gpu: GpuPool, share: Callable[[], None]) -> None:
        """Order a lane with the GPU, and detect the worker's end even if all threads wait for the
        worker."""
        ordering = lane.order(gpu, share)
        self.ways[ordering.way] += 1
        link, waiting = weakref.ref(self), weakref.ref(ordering)

        def act() -> None:
            found, ordering = link(), waiting()
            if found is not None and ordering is not None:
                found.worker_has_gone(ordering)

        if ordering.way == WORDS:
            lane.when_worker_goes(self._watched, act)

    def _refuse_if_ended(self) -> None:
        if self.is_retired or not self._end.alive:
            raise Stale

    def _new_lane(self) -> Lane:
        self._refuse_if_ended()
        try:
            lane = self._make_lane()
            with self._share_lock:
                self._lanes.add(lane)
            return lane
        except (OSError, Unauthenticated, WorkerUnavailable) as error:
            raise Stale from error

    def _share(self, lane: Lane, pool: Pool, timeout_s: float | None) -> None:
        assert isinstance(lane, LocalLane), "only a local lane carries descriptors"
        with self._share_lock:
            self._refuse_if_ended()
            for slab in pool.slabs:
                if slab.base not in self._shared:
                    lane.share(slab, timeout_s)
                    self._shared.add(slab.base)

    def _share_on_gpu(self, lane: Lane, gpu: GpuPool) -> None:
        def share() -> None:
            if len(self._shared_on_gpu) == len(gpu.slabs):
                return
            with self._share_lock:
                self._refuse_if_ended()
                for slab in gpu.slabs:
                    if slab.base not in self._shared_on_gpu:
                        lane.share_on_gpu(slab)
                        self._shared_on_gpu.add(slab.base)

        try:
            share()
            if lane.ordering is None:
                self._order(lane, gpu, share)
        except (
            CudaError,
            OutOfMemory,
        ):
            # By the worker's answer, it does not have the slab.
            self.give_back(lane)
            raise
        except BaseException:
            lane.close()
            self.abort()
            raise

    def _choose_lane(
        self,
        advertised: str,
        terms: Terms,
        on_fallback: Callable[[str], None],
    ) -> tuple[Callable[[], Lane], Lane]:
        def by_grpc() -> Lane:
            return GrpcLane(self._stub, self.token)

        def by_socket() -> Lane:
            return LocalLane(path, self.token)

        def first_by_grpc() -> Lane:
            try:
                return by_grpc()
            # The worker has ended since Open, or its successor does not know the session.
            except (Unauthenticated, WorkerDied) as error:
                raise Stale from error

        if terms.require == "cuda_ipc" and not self.description.gpu.uuid:
            raise LaneUnavailable(
                "require='cuda_ipc': the models of this worker run on no GPU; start the worker on a"
                " GPU, or drop require"
            )
        if terms.lane == "grpc":
            if terms.require == "memfd":
                raise LaneUnavailable(
                    f"require={terms.require!r} is impossible with lane='grpc'; drop one of them"
                )
            return by_grpc, first_by_grpc()
        path = self._lane_path(advertised)
        reason = ""
        if not memfd_works():
            reason = "this system has no memfd, or forbids memfds"
        elif not path:
            reason = "the worker offers no local lane"
        else:
            try:
                return by_socket, by_socket()
            except (OSError, BridgeError, Stale) as error:
                reason = (
                    f"its local lane is unreachable ({error or type(error).__name__})"
                )
        lane = first_by_grpc()  # fails if the reason is the worker's end
        if terms.lane == "local" or terms.require == "memfd":
            lane.close()
            raise LaneUnavailable(
                f"the worker shares no memory with this process: {reason}"
            )
        on_fallback(reason)
        return by_grpc, lane

    def _lane_path(self, advertised: str) -> str:
        if self.address.startswith("unix:") and advertised:
            # The worker may see the directory under another path, as in a container.
            directory = os.path.dirname(self.address.removeprefix("unix:"))
            return os.path.join(directory, os.path.basename(advertised))
        return advertised

    def _unary(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=_CONNECT_S)
        except grpc.RpcError as error:
            # gRPC's own error would stand before, in twenty lines.
            raise from_rpc(error, address=self.address) from None


class _Authorized:
    """A stub that adds metadata to each call, and raises Stale after the channel is closed."""

    def __init__(self, stub: BridgeStub, metadata: Sequence[tuple[str, str]]) -> None:
        self._stub = stub
        self._metadata = metadata
        self.is_closed = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._stub, name)

        def call(request: Any, timeout: float | None = None) -> Any:
            try:
                return method(request, timeout=timeout, metadata=self._metadata)
            except (
                ValueError
            ) as error:  # gRPC's error if another thread has closed the channel
                raise Stale from error

        return call


def _end(
    lanes: list[Lane],
    channel: grpc.Channel,
    watches: list[Watch],
    stub: _Authorized,
) -> None:
    _close(lanes)
    stub.is_closed = True
    channel.close()
    for watch in watches:
        watch.close()


def _close(lanes: list[Lane]) -> None:
    with contextlib.suppress(IndexError):  # two threads may close lanes at once
        while True:
            lanes.pop().close()


def open_channel(address: str, tls: Tls | None) -> grpc.Channel:
    """Return a channel to a worker; the channel connects on first use."""
    options = list(_CHANNEL_OPTIONS)
    if is_loopback(address.rpartition(":")[0]):
        # A proxy from http_proxy would look for the worker on the proxy's host.
        options.append(("grpc.enable_http_proxy", 0))
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(
        tls.root_certificates, tls.key, tls.certificate
    )
    return grpc.secure_channel(address, credentials, options=options)


def _authorization(token: str | None) -> tuple[tuple[str, str], ...]:
    """Return the authorization header of a token, stripped of its file's trailing newline."""
    if token is None or not (token := token.strip()):
        return ()
    # gRPC would misreport such a token as an unavailable worker.
    if not (token.isascii() and token.isprintable()):
        raise CallerError(
            "the token must be printable ASCII; check the file or variable it is from"
        )
    return (("authorization", f"Bearer {token}"),)
