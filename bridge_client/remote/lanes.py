"""The interface of lanes: connections to a worker that serve one call at a time.

A lane belongs to the call that took it from its link. `local_lane` and `grpc_lane` are the two
kinds.
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

# For what no model's work can delay: attaching, sharing, releasing.
HANDSHAKE_S = 10.0
# For what CUDA may keep waiting for the kernels of either process (pytorch#15937): opening a
# handle.
GPU_HANDSHAKE_S = 180.0


class Stale(Exception):
    """The connection was dead before the request went out, so it is safe to send it again over a
    new one."""


# After these the worker has ended the lane.
ENDS_LANE = (PeerError, InternalError, WorkerDied, CallTimeout)


class Call(NamedTuple):
    """A run over one link."""

    run: Run
    program: int  # the worker's number for the program
    outputs: list[Block]
    released: Sequence[int]  # residuals that the worker may free
    timeout_s: float | None
    pool: Pool  # of the inputs in host memory


class Lane(ABC):
    """One attached connection.

    After an exception other than a plain BridgeError it must not be used again.
    """

    name: str
    memory: str
    # With this process's work on the GPU, from the first call with memory there.
    ordering: Ordering | None = None

    def run(self, call: Call) -> Any:
        """Run a program; return the value of `call.run.make`, called while the worker computes.

        Raises:
          Stale: nothing was sent.
          WorkerDied, CallTimeout: something was sent, and no reply came.
        """
        run, ordering = call.run, self.ordering
        request = pb.LaneRequest()
        message = request.run
        message.program = call.program
        message.residual = run.residual
        if call.released:
            message.released.extend(call.released)
        if run.stream is None or ordering is None:
            return self._run(request, call)
        message.turn = ordering.begin(run.stream)
        outputs = self._run(request, call)
        ordering.end(run.stream, call.outputs)
        return outputs

    def free_after(self, stream: int) -> None:
        """Have a stream wait for the last run, which has read memory that is reused there."""
        if self.ordering is not None:
            self.ordering.end(stream)

    @abstractmethod
    def _run(self, request: pb.LaneRequest, call: Call) -> Any:
        """Write the tensors' addresses or bytes into the request, and exchange it for the reply."""

    def bytes_by_value(self, call: Call) -> int:
        """Return how many bytes of the inputs the lane sends in messages."""
        return 0

    @abstractmethod
    def ask(self, request: pb.LaneRequest, timeout_s: float = HANDSHAKE_S) -> pb.LaneReply:
        """Ask for what no model's work can delay, but for that of a GPU, which gets `timeout_s`."""

    def ask_about_gpu(self, request: pb.LaneRequest) -> pb.LaneReply:
        """Ask for what the work of models on a GPU may delay."""
        return self.ask(request, GPU_HANDSHAKE_S)

    def release(self, residuals: Sequence[int]) -> pb.Usage:
        """Release residuals, and return what the worker holds for the session."""
        return self.ask(pb.LaneRequest(release=pb.Release(residuals=residuals))).usage

    def peek(self, address: int, nbytes: int) -> bytes:
        """Return what the worker sees in a few bytes that were shared with it."""
        return self.ask_about_gpu(
            pb.LaneRequest(peek=pb.Peek(address=address, nbytes=nbytes))
        ).peeked

    def share_on_gpu(self, slab: GpuSlab) -> None:
        """Hand a GPU's slab over to the worker."""
        share = pb.Share(base=slab.base, nbytes=slab.nbytes, cuda_handle=slab.handle)
        self.ask_about_gpu(pb.LaneRequest(share=share))

    def order(self, pool: GpuPool, share: Callable[[], None]) -> Ordering:
        """Return how this lane's calls and this process's work on the GPU wait for each other.
        `share` hands over the pool's slabs, which may have become more.
        """

        def ask(request: pb.LaneRequest) -> pb.LaneReply:
            share()
            return self.ask_about_gpu(request)

        if self.ordering is None:
            self.ordering = Ordering(pool, ask)
        return self.ordering

    @abstractmethod
    def when_worker_goes(self, watch: Callable[[], Watch], action: Callable[[], None]) -> None:
        """Have a thread act when the worker ends the connection, or dies.

        `action` holds nothing alive.
        """

    @abstractmethod
    def abandon(self) -> bool:
        """Give up on the call under way.

        Returns whether the worker may still touch the call's blocks.
        """

    @abstractmethod
    def has_ended(self) -> bool:
        """Whether the worker has let go of an abandoned call. Never blocks."""

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
