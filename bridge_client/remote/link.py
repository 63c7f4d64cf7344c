"""A link: one life of the connection to a worker.

A session outlives its links; a restarted worker gets a new one.
"""

import contextlib
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from bridge_client.progress import logged_when_slow
from bridge_client.remote.gpu import Ordering
from bridge_client.remote.grpc_lane import GrpcLane, from_rpc
from bridge_client.remote.lanes import Lane, Stale
from bridge_client.remote.local_lane import LocalLane
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
    # A shared pool would make a new link wait out the back-off of the dead one.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM-encoded certificates: the authority that signed the worker's, and optionally one's own
    with its key."""

    root_certificates: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """How to connect: see `connect`."""

    token: str | None = None
    tls: Tls | None = None
    lane: str | None = None
    require: str | None = None


class Link:
    """A gRPC channel, the session it opened on the worker, and idle lanes. Thread-safe."""

    def __init__(self, address: str, terms: Terms, on_fallback: Callable[[str], None]) -> None:
        """Connect, open a session and attach a first lane.

        `on_fallback` is told why the tensors will travel by value, if they will.

        Raises:
          WorkerUnavailable: no worker answers at the address.
          LaneUnavailable: the terms demand a lane or memory kind that cannot be had.
        """
        self.address = address
        self._shared: set[int] = set()  # by their bases, the host's slabs
        self._shared_on_gpu: set[int] = set()
        self._share_lock = threading.Lock()
        self.ways: Counter[str] = (
            Counter()
        )  # of the lanes that are in order with a GPU, as `Ordering.way` says
        self.has_lost_outputs = False  # of calls that the worker had answered before it died
        self._watches: list[Watch] = []  # one, when a lane is watched
        self._metadata = _authorization(terms.token)
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
            self._make_lane, first = self._choose_lane(opened.local_lane, terms, on_fallback)
        except BaseException:
            self._channel.close()
            raise
        self.lane_name, self.memory = first.name, first.memory
        # Idle lanes, the warmest last. As long as one is attached, the worker keeps the session.
        self._idle: list[Lane] = [first]
        # A link that is forgotten ends as well: the worker must not keep the session of a module
        # nobody has.
        self._end = weakref.finalize(self, _end, self._idle, self._channel, self._watches)
        self._end.atexit = False

    def prepare(
        self, request: pb.PrepareRequest, what: str, timeout_s: float | None
    ) -> pb.Prepared:
        """Have a program prepared; logs when that takes long.

        Raises:
          Stale: the worker no longer knows the session.
        """
        request.session = self.token
        phase = "starting"
        try:
            with logged_when_slow(what) as progress:
                for event in self._stub.Prepare(request, timeout=timeout_s):
                    kind = event.WhichOneof("kind")
                    if kind == "prepared":
                        prepared: pb.Prepared = event.prepared
                        return prepared
                    if kind == "error":
                        raise decode(event.error)
                    phase = progress.phase = event.progress.phase
        except grpc.RpcError as error:
            if not self._end.alive:  # another thread has ended the link
                raise Stale from error
            raised = from_rpc(error, during_call=phase != "starting")
            if isinstance(raised, WorkerUnavailable) and not isinstance(raised, WorkerDied):
                raise Stale from raised
            raise raised from error
        except (
            Unauthenticated
        ) as error:  # another worker, or another life of it, answers at the address
            raise Stale from error
        raise WorkerDied("the worker ended a preparation without a result")

    def take(self, pool: Pool, timeout_s: float | None = None, gpu: GpuPool | None = None) -> Lane:
        """Take a lane for one call, with every slab of the pool shared over it. It must be given
        back, or abandoned.

        For a call on a GPU, that pool's slabs are shared too, and the lane is in order with the
        GPU.

        Raises:
          Stale: no lane can be had; the link is dead.
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
            except BaseException:  # nobody knows whether the worker has the slab now
                lane.close()
                self.abort()
                raise
        return lane

    def give_back(self, lane: Lane) -> None:
        """Return a lane that is ready for the next call."""
        self._idle.append(lane)
        if not self._end.alive:  # the link was ended during the call: nobody would close the lane
            _close(self._idle)

    def close(self) -> None:
        """Say goodbye to the worker and end every connection. Idempotent; a worker that is gone
        does not matter.

        Where a GPU's memory is shared, the worker has unmapped it when this returns, if it could be
        reached.
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
        for ordering in orderings:  # now the worker uses nothing of it any more
            ordering.close()
        end_what_is_left()

    def abort(self) -> None:
        """End every connection without a word."""
        self._end()

    def _wait_for_gpu(self) -> None:
        """Wait until what the worker waits for on the GPU is done: it must not wait for a
        process that has ended."""
        deadline = time.monotonic() + _GPU_S
        for lane in list(self._idle):
            while lane.ordering is not None and not lane.ordering.is_done and not lane.has_ended():
                if time.monotonic() > deadline:
                    return
                time.sleep(_GPU_POLL_S)

            if lane.ordering is not None and lane.has_ended():
                self.worker_has_gone(lane.ordering)

    def _taken_from_lanes(self) -> list[Ordering]:
        """Take the orderings of the idle lanes, which let go of what is the worker's while that
        still has it."""
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
        """Have a lane be in order with the GPU, and hear of the worker's end also when all
        threads wait for that."""
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
        if not self._end.alive:
            raise Stale

    def _new_lane(self) -> Lane:
        self._refuse_if_ended()
        try:
            return self._make_lane()
        except (OSError, Unauthenticated, WorkerUnavailable) as error:
            raise Stale from error

    def _share(self, lane: Lane, pool: Pool, timeout_s: float | None) -> None:
        assert isinstance(lane, LocalLane), "only such a lane carries descriptors"
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
        except (CudaError, OutOfMemory):  # the worker's answer: it does not have the slab
            self.give_back(lane)
            raise
        except BaseException:
            lane.close()
            self.abort()
            raise

    def _choose_lane(
        self, advertised: str, terms: Terms, on_fallback: Callable[[str], None]
    ) -> tuple[Callable[[], Lane], Lane]:
        def by_grpc() -> Lane:
            return GrpcLane(self._stub, self.token)

        def by_socket() -> Lane:
            return LocalLane(path, self.token)

        if terms.require == "cuda_ipc" and not self.description.gpu.uuid:
            raise LaneUnavailable("require='cuda_ipc': the models of this worker run on no GPU")
        if terms.lane == "grpc":
            if terms.require == "memfd":
                raise LaneUnavailable(f"require={terms.require!r} cannot be had with lane='grpc'")
            return by_grpc, by_grpc()
        path = self._lane_path(advertised)
        reason = ""
        if not memfd_works():
            reason = "this system has no memfd, or forbids it"
        elif not path:
            reason = "the worker offers no local lane"
        else:
            try:
                return by_socket, by_socket()
            except (OSError, BridgeError, Stale) as error:
                reason = f"its local lane cannot be reached ({error or type(error).__name__})"
        if terms.lane == "local" or terms.require == "memfd":
            raise LaneUnavailable(f"the worker shares no memory with this process: {reason}")
        on_fallback(reason)
        return by_grpc, by_grpc()

    def _lane_path(self, advertised: str) -> str:
        if self.address.startswith("unix:") and advertised:
            # The worker may see the directory under another path, as from inside a container.
            directory = os.path.dirname(self.address.removeprefix("unix:"))
            return os.path.join(directory, os.path.basename(advertised))
        return advertised

    def _unary(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=_CONNECT_S)
        except grpc.RpcError as error:
            raise from_rpc(error) from error


class _Authorized:
    """A stub whose every call carries the same metadata, and raises Stale once the channel is
    closed."""

    def __init__(self, stub: BridgeStub, metadata: Sequence[tuple[str, str]]) -> None:
        self._stub = stub
        self._metadata = metadata

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._stub, name)

        def call(request: Any, timeout: float | None = None) -> Any:
            try:
                return method(request, timeout=timeout, metadata=self._metadata)
            except ValueError as error:  # gRPC's, of a channel that another thread has closed
                raise Stale from error

        return call


def _end(lanes: list[Lane], channel: grpc.Channel, watches: list[Watch]) -> None:
    _close(lanes)
    channel.close()
    for watch in watches:
        watch.close()


def _close(lanes: list[Lane]) -> None:
    with contextlib.suppress(IndexError):  # two threads may be at it
        while True:
            lanes.pop().close()


def open_channel(address: str, tls: Tls | None) -> grpc.Channel:
    """Return a channel to a worker, which connects by itself when it is used."""
    options = list(_CHANNEL_OPTIONS)
    if is_loopback(address.rpartition(":")[0]):
        options.append(
            ("grpc.enable_http_proxy", 0)
        )  # that of http_proxy would look for the worker on its own host
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(tls.root_certificates, tls.key, tls.certificate)
    return grpc.secure_channel(address, credentials, options=options)


def _authorization(token: str | None) -> tuple[tuple[str, str], ...]:
    """Return the headers that present a token, without the line's end that it may have in its
    file."""
    if token is None or not (token := token.strip()):
        return ()
    if not (token.isascii() and token.isprintable()):  # gRPC would say that no worker answers
        raise CallerError(
            "the token has characters that are not printable ASCII, as no worker's has"
        )
    return (("authorization", f"Bearer {token}"),)
