"""Lane: interface of connections to a worker that serve one call at a time.

A lane belongs to the call that took the lane from its link. `local_lane` and `grpc_lane` implement
the two kinds. No framework is imported here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bridge_client.remote.gpu import Ordering
from bridge_client.remote.watching import Watch
from bridge_client.session import Run
from bridge_wire.errors import (
    CallTimeout,
    InternalError,
    PeerError,
    WorkerDied,
    decode,
)
from bridge_wire.memory.cuda_memory import GpuPool, GpuSlab
from bridge_wire.memory.pool import Block, Pool
from bridge_wire.pb import bridge_pb2 as pb

# Time limit of requests independent of the models' work: attach, share, release.
HANDSHAKE_S = 10.0
# Time limit of opening a handle: CUDA may wait for the kernels of either process (pytorch#15937).
GPU_HANDSHAKE_S = 180.0


class Stale(Exception):
    """The connection was dead before the request was sent: a retry on a new lane is safe."""


# After these errors a lane is not used again: the worker has ended it, or still runs the call.
ENDS_LANE = (PeerError, InternalError, WorkerDied, CallTimeout)


class Call(NamedTuple):
    """A run over one link."""

    run: Run
    program: int  # the worker's id for the program
    outputs: list[Block]
    released: Sequence[int]  # residuals that the worker may free
    timeout_s: float | None
    pool: Pool  # holds the inputs in host memory
    timed: bool = False  # whether the worker says how long the parts took


class Lane(ABC):
    """One attached connection.

    After an exception other than a plain BridgeError, the lane must not be used again.
    """

    name: str
    memory: str
    # Ordering with this process's GPU work; set by the first call with GPU memory.
    ordering: Ordering | None = None
    is_closed = False
    times: pb.Times | None = None  # of the last run, if it was timed

    def run(self, call: Call) -> Any:
        """Run a program; return the value of `call.run.make`, called while the worker computes.

        Raises:
          Stale: nothing was sent.
          WorkerDied, CallTimeout: the request was sent, but no reply came.
        """
        run, ordering = call.run, self.ordering
        request = pb.LaneRequest()
        message = request.run
        message.program = call.program
        message.residual = run.residual
        if call.timed:
            message.timed = True
        if call.released:
            message.released.extend(call.released)
        if run.stream is None or ordering is None:
            return self._run(request, call)
        message.turn = ordering.begin(run.stream)
        outputs = self._run(request, call)
        ordering.end(run.stream, call.outputs)
        return outputs

    def free_after(self, stream: int | None, used: int) -> None:
        """Make a stream wait for the last run, which was on `used`, before it reuses memory."""
        if self.ordering is not None and stream is not None and stream != used:
            self.ordering.end(stream)

    @abstractmethod
    def _run(self, request: pb.LaneRequest, call: Call) -> Any:
        """Add the tensors' addresses or bytes to the request, send it and receive the reply."""

    def bytes_by_value(self, call: Call) -> int:
        """Return the number of input bytes that the lane sends in messages."""
        return 0

    @abstractmethod
    def ask(
        self, request: pb.LaneRequest, timeout_s: float = HANDSHAKE_S
    ) -> pb.LaneReply:
        """Send a request that models cannot delay; GPU requests pass a longer `timeout_s`."""

    def ask_about_gpu(self, request: pb.LaneRequest) -> pb.LaneReply:
        """Send a request that the models' GPU work may delay."""
        return self.ask(request, GPU_HANDSHAKE_S)

    def release(self, residuals: Sequence[int]) -> pb.Usage:
        """Release residuals, and return the worker's usage for the session."""
        return self.ask(pb.LaneRequest(release=pb.Release(residuals=residuals))).usage

    def peek(self, address: int, nbytes: int) -> bytes:
        """Return a few bytes of shared memory as the worker reads them."""
        return self.ask_about_gpu(
            pb.LaneRequest(peek=pb.Peek(address=address, nbytes=nbytes))
        ).peeked

    def share_on_gpu(self, slab: GpuSlab) -> None:
        """Share a GPU slab with the worker."""
        share = pb.Share(base=slab.base, nbytes=slab.nbytes, cuda_handle=slab.handle)
        self.ask_about_gpu(pb.LaneRequest(share=share))

    def order(self, pool: GpuPool, share: Callable[[], None]) -> Ordering:
        """Return the ordering of this lane's calls with this process's GPU work.

        `share` sends the pool's new slabs to the worker.
        """

        def ask(request: pb.LaneRequest) -> pb.LaneReply:
            share()
            return self.ask_about_gpu(request)

        if self.ordering is None:
            self.ordering = Ordering(pool, ask)
        return self.ordering

    @abstractmethod
    def when_worker_goes(
        self, watch: Callable[[], Watch], action: Callable[[], None]
    ) -> None:
        """Register an action for the end of the connection or the worker's death.

        A separate thread calls `action`, which must hold no strong references.
        """

    @abstractmethod
    def abandon(self) -> bool:
        """Abandon the pending call.

        Returns whether the worker may still access the call's blocks.
        """

    @abstractmethod
    def has_ended(self) -> bool:
        """Whether the worker has released an abandoned call. Never blocks."""

    @abstractmethod
    def close(self) -> None:
        """End the connection. Idempotent; never blocks."""
        ordering, self.ordering = self.ordering, None
        if ordering is not None:
            ordering.close()


def raise_if_failed(reply: pb.LaneReply) -> pb.LaneReply:
    """Return a reply, or raise the worker's error."""
    if reply.HasField("error"):
        raise decode(reply.error)
    return reply
