"""Tensors on a GPU: over the session's memory there, used on torch's current stream. The only
module that needs torch with CUDA.

If the worker shares no memory on a GPU, tensors go through the host. If it computes on another GPU
that this process can use, they go through memory there.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge_client.arguments import Values
from bridge_client.session import Session
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import CallerError, CudaError
from bridge_wire.memory.cuda_memory import GpuPool
from bridge_wire.memory.pool import Block
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)

# The names in NumPy's protocol, and so in CUDA's array interface.
_TYPESTRS: Mapping[str, str] = {
    name: f"{'<' if dtype.itemsize > 1 else '|'}{kind}{dtype.itemsize}"
    for name, dtype in BY_NAME.items()
    for prefix, kind in (
        ("bool", "b"),
        ("int", "i"),
        ("uint", "u"),
        ("float", "f"),
        ("complex", "c"),
    )
    if name.removeprefix(prefix).isdecimal() or name == prefix
}
_BYTES = "|u1"


class OnGpu(NamedTuple):
    """A run with tensors on a GPU: the outputs' device, and the run's memory and stream."""

    device: torch.device
    # None: the run is the host's, and the tensors are brought there and back.
    pool: GpuPool | None
    stream: int | None
    stays: bool  # whether the pool is on that device

    def tensor_over(self, block: Block, spec: Spec) -> Tensor:
        """Return the tensor whose storage is a block of the pool; the lease ends with it."""
        assert self.pool is not None, "a run on the host has its outputs there"
        return tensor_over(self.pool, block, spec)

    def brought_back(
        self, outputs: Sequence[Tensor], session: Session
    ) -> Sequence[Tensor]:
        """Return the outputs of the run on their device."""
        if self.stays:
            return outputs
        if self.pool is None:
            session.note_staged(sum(y.nbytes for y in outputs))
        return [y.to(self.device) for y in outputs]


def run_of(session: Session, inputs: Values) -> OnGpu:
    """Return the run for these inputs, of which at least one is on a GPU.

    Its outputs belong on the device of the first.
    """
    first = next(filter(is_on_gpu, inputs))
    pool = session.gpu_pool()
    if pool is None:
        return OnGpu(first.device, None, None, stays=False)
    ordinal = pool.device.gpu.ordinal
    stream = current_stream(ordinal)
    return OnGpu(first.device, pool, stream, stays=index_of(first) == ordinal)


def is_on_gpu(value: Any) -> bool:
    """Whether a value is a tensor on a GPU."""
    return isinstance(value, Tensor) and value.is_cuda


def index_of(tensor: Tensor) -> int:
    """Return the number of the GPU that a tensor is on."""
    return tensor.get_device()


@contextlib.contextmanager
def allocate_in(session: Session) -> Iterator[None]:
    """Let torch allocate this thread's CUDA tensors inside the context in memory that the session
    shares with its worker. After the context, calls pass them without a copy. The memory stays
    reserved for such tensors until the session is closed.

    This is torch.cuda.use_mem_pool, on the worker's GPU only.

    Raises:
      CallerError: the session shares no memory on a GPU.
    """
    shared = session.gpu_pool()
    if shared is None:
        raise CallerError(
            "this session shares no memory on a GPU; look at session.memory, or connect with"
            " require="
        )
    try:
        pool = shared.lenders.pop()  # reuses the memory of its dead tensors
    except IndexError:
        pool = torch.cuda.MemPool()
    try:
        with torch.cuda.use_mem_pool(pool, shared.device.gpu.ordinal):
            yield
    finally:
        shared.lenders.append(pool)
    try:
        for segment in pool.snapshot():
            shared.adopt(segment["address"], segment["total_size"])
    except CudaError as error:  # such as expandable segments, which have no handle
        _log.warning(
            "tensors made in allocate_in are copied for each call after all, since %s",
            error,
        )


def current_stream(index: int) -> int:
    """Return torch's current stream of a device, as CUDA knows it.

    Raises:
      CallerError: the stream is being captured.
    """
    if torch.cuda.is_current_stream_capturing():
        raise CallerError(
            "a CUDA graph is being captured, and no graph can replay a call, which a worker"
            " answers; leave the call out of the capture"
        )
    return int(torch._C._cuda_getCurrentRawStream(index))


def address_in(pool: GpuPool, value: Tensor) -> int | None:
    """Return the address of a tensor that lies row-major in the pool's memory; else None."""
    if (
        index_of(value) != pool.device.gpu.ordinal
        or not value.is_contiguous()
        or value.is_conj()
        or value.is_neg()
    ):
        return None
    return pool.address_of(value.data_ptr(), value.nbytes)


def tensor_over(pool: GpuPool, block: Block, spec: Spec) -> Tensor:
    """Return the tensor whose storage is a block of a pool: the lease ends with the storage."""
    device = torch.device("cuda", pool.device.gpu.ordinal)
    dtype = getattr(torch, spec.dtype.name)
    if block.nbytes == 0:
        return torch.empty(spec.shape, dtype=dtype, device=device)
    typestr = _TYPESTRS.get(spec.dtype.name)
    if typestr is not None:
        return torch.as_tensor(_Array(block, spec.shape, typestr), device=device)
    storage = torch.as_tensor(
        _Array(block, (block.nbytes,), _BYTES), device=device
    ).untyped_storage()
    # Autograd sees no view.
    return torch.empty(0, dtype=dtype, device=device).set_(storage).resize_(spec.shape)


class _Array:
    """A block in the form of CUDA's array interface.

    A tensor made of it keeps it, and so the lease.
    """

    def __init__(self, block: Block, shape: tuple[int, ...], typestr: str) -> None:
        self._block = block
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": typestr,
            "data": (block.pointer, False),
            "strides": None,
        }
