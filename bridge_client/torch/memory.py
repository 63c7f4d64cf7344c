"""Tensors and the session's memory: inputs placed in it, outputs made of it."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from bridge_client.arguments import NUMBERS, Values, pack_number
from bridge_client.session import Placed, Session
from bridge_client.torch import gpu
from bridge_client.torch.families import AnyProgram
from bridge_client.torch.gpu import OnGpu
from bridge_client.torch.pytrees import mapped
from bridge_wire.dtypes import BY_NAME, NARROWED, NEEDS_X64, TURN_ON_X64, DType
from bridge_wire.errors import DTypeError, SpecError, StructureError
from bridge_wire.memory.copying import copy
from bridge_wire.memory.dlpack import keep_owners_by
from bridge_wire.memory.pool import MANY, Block, Parts
from bridge_wire.specs import Spec

keep_owners_by(lambda buffer: to_dlpack(torch.frombuffer(buffer, dtype=torch.uint8)))

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name) for name in BY_NAME
}
DTYPES: Mapping[torch.dtype, DType] = {
    dtype: BY_NAME[name] for name, dtype in TORCH_DTYPES.items()
}


# Exact types of tensors whose storage is as large as it says.
_WITH_MEMORY = {Tensor, torch.nn.Parameter}


class _InSlab(NamedTuple):
    """A tensor that lies in the session's memory already. By its storage, which keeps no autograd
    graph alive."""

    address: int
    storage: torch.UntypedStorage


def place(
    program: AnyProgram, inputs: Values
) -> tuple[list[Placed], int, OnGpu | None]:
    """Return each input in the session's memory, in the program's types; the number of bytes
    copied; and the run's use of a GPU, if an input is on one."""
    pool = program.session.pool
    lease = pool.lease if len(inputs) < MANY else Parts(pool).lease
    placed: list[Placed] = []
    copied = 0
    for value, spec in zip(inputs, program.inputs, strict=True):
        # The pointer last: empty tensors have none, nor have the zeros without memory that forward
        # mode makes.
        if (
            not spec.weak
            and value.is_cpu
            and value.layout is torch.strided
            and DTYPES.get(value.dtype) is spec.dtype
            and value.is_contiguous()
            and not (value.is_conj() or value.is_neg())
            and (pointer := value.data_ptr())
        ):
            nbytes = value.nbytes
            storage = value.untyped_storage()
            address = pool.address_of(pointer, nbytes)
            if address is not None:
                placed.append(_InSlab(address, storage))
                continue
            if storage.nbytes() < nbytes + value.storage_offset() * value.itemsize:
                _check_memory(value, program.labels[len(placed)])
            block = lease(nbytes)
            copy(block.pointer, pointer, nbytes, block, value)
        elif not spec.weak and value.is_cuda:
            return _place_beside_gpu(program, inputs)
        else:
            block = _converted(
                value, spec, program.labels[len(placed)], program.session
            )
        placed.append(block)
        copied += block.nbytes
    return placed, copied, None


def _converted(value: Any, spec: Spec, label: str, session: Session) -> Block:
    """Return a Python number, or a host tensor whose elements have another layout or type, in the
    host's pool."""
    if spec.weak:
        block = session.pool.lease(spec.dtype.itemsize)
        block.buffer[:] = pack_number(value, label, session.x64)
        return block
    _check_readable(value, label)
    _check_memory(value, label)
    if DTYPES.get(value.dtype) is not spec.dtype:
        _check_range(value, spec, label)
    block = session.pool.lease(spec.nbytes)
    if block.nbytes:
        from_block(block, spec).copy_(value)
    return block


def _place_beside_gpu(
    program: AnyProgram, inputs: Values
) -> tuple[list[Placed], int, OnGpu]:
    """Place inputs as `place` does, if some of them are on a GPU."""
    session = program.session
    run = gpu.run_of(session, inputs)
    if run.pool is None:
        staged = [x.cpu() if gpu.is_on_gpu(x) else x for x in inputs]
        placed, copied, _ = place(program, staged)
        brought = filter(gpu.is_on_gpu, inputs)
        session.note_staged(sum(x.nbytes for x in brought))
        return placed, copied, run
    placed, copied = [], 0
    for value, spec, label in zip(inputs, program.inputs, program.labels, strict=True):
        if spec.weak or not value.is_cuda:
            block = _converted(value, spec, label, session)
        else:
            _check_readable(value, label)
            _check_memory(value, label)
            is_as_wanted = DTYPES.get(value.dtype) is spec.dtype
            address = (
                gpu.address_in(run.pool, value)
                if is_as_wanted and value.nbytes
                else None
            )
            if address is not None:
                placed.append(_InSlab(address, value.untyped_storage()))
                continue
            if not is_as_wanted:
                _check_range(value, spec, label)
            block = run.pool.lease(spec.nbytes, run.stream or 0)
            if block.nbytes:
                run.tensor_over(block, spec).copy_(value)
        placed.append(block)
        copied += 0 if spec.weak else block.nbytes
    return placed, copied, run


def from_blocks(
    blocks: Sequence[Block], described: Sequence[Spec], run: OnGpu | None = None
) -> list[Tensor]:
    """Return the tensors whose storages are the blocks, on the host or on the run's GPU."""
    if run is not None and run.pool is not None:
        return list(map(run.tensor_over, blocks, described))
    return list(map(from_block, blocks, described))


def from_block(block: Block, spec: Spec) -> Tensor:
    """Return the tensor whose storage is the block: the lease ends with the storage."""
    dtype = TORCH_DTYPES[spec.dtype.name]
    if block.nbytes == 0:
        return torch.empty(spec.shape, dtype=dtype, device="cpu")
    # Not a view of the flat tensor: autograd forbids in-place changes of views that a Function
    # returns.
    count = block.nbytes // spec.dtype.itemsize
    flat = torch.frombuffer(block.whole, dtype=dtype, count=count, offset=block.offset)
    return flat if len(spec.shape) == 1 else flat.resize_(spec.shape)


def copied_into(session: Session, tensor: Tensor) -> Tensor | None:
    """Return a copy of a tensor in the session's memory on its device; None if the session has
    none."""
    spec = Spec(DTYPES[tensor.dtype], tuple(tensor.shape))
    value = tensor.detach()
    if tensor.is_cpu:
        block = session.pool.lease(tensor.nbytes)
        return from_block(block, spec).copy_(value)
    pool = session.gpu_pool() if tensor.is_cuda else None
    if pool is None:
        return None
    ordinal = pool.device.gpu.ordinal
    if ordinal != gpu.index_of(tensor):
        return None
    block = pool.lease(tensor.nbytes, gpu.current_stream(ordinal))
    return gpu.tensor_over(pool, block, spec).copy_(value)


def is_sole_owner(tensor: Tensor) -> bool:
    """Whether nothing but this tensor uses its storage: no view, no exporter, no Python object that
    keeps the storage.

    False if this torch does not report the uses.
    """
    return _SOLE_OWNER is not None and _owners_of(tensor) == _SOLE_OWNER


def _owners_of(tensor: Tensor) -> tuple[int, int] | None:
    storage = tensor.untyped_storage()
    try:
        return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)
    except AttributeError:  # private: any release may lack it
        return None


_SOLE_OWNER = _owners_of(torch.empty(1, device="cpu"))


def spec_of(value: Any, path: str, x64: bool, shape: tuple[int, ...]) -> Spec:
    """Return the type of a value on the worker; `shape` is that of a tensor.

    Raises:
      DTypeError, SpecError, StructureError: the worker, or this session's memory, cannot hold it.
    """
    if not isinstance(value, Tensor):
        return NUMBERS[type(value)]
    _check_readable(value, path)
    dtype = DTYPES.get(value.dtype)
    if dtype is None:
        raise DTypeError(
            f"input `{path}` has dtype {value.dtype}, which has no counterpart in JAX; cast it"
        )
    if dtype.name in NEEDS_X64 and not x64:
        narrowed = NARROWED.get(dtype.name)
        if narrowed is None:
            raise DTypeError(
                f"input `{path}` has dtype {dtype.name}, but JAX runs without x64 there; cast it to"
                f" a 32-bit type or {TURN_ON_X64}"
            )
        dtype = narrowed
    return Spec(dtype, shape)


def _check_readable(value: Tensor, path: str) -> None:
    if value.layout is not torch.strided:
        raise StructureError(
            f"input `{path}` is {value.layout}; make it dense with .to_dense()"
        )
    if not (value.is_cpu or value.is_cuda):
        raise SpecError(
            f"input `{path}` is on {value.device}; expected the host or a CUDA device: move it with"
            " .cpu()"
        )


def _check_memory(value: Tensor, path: str) -> None:
    """Raise SpecError unless the storage holds each element: torch itself would read beyond its
    end, or crash."""
    if value.numel() == 0 or type(value) not in _WITH_MEMORY or value._is_zerotensor():
        return
    last = value.storage_offset()
    for size, stride in zip(value.shape, value.stride(), strict=True):
        last += (size - 1) * stride
    needed = (last + 1) * value.itemsize
    there = value.untyped_storage().nbytes()
    if there < needed:
        raise SpecError(
            f"input `{path}` has a storage of {there} bytes, and needs {needed}: the storage was"
            " resized, as sharding and offloading do between uses; bring its values back before"
            " the call"
        )


def _check_range(value: Tensor, spec: Spec, path: str) -> None:
    """Raise DTypeError unless each integer fits its narrower type on the worker."""
    if value.numel() == 0:
        return
    bounds = torch.iinfo(TORCH_DTYPES[spec.dtype.name])
    # Torch cannot order uint64.
    wide = value if value.dtype is torch.int64 else value.view(torch.int64)
    low, high = (int(extreme) for extreme in torch.aminmax(wide))
    floor = bounds.min if value.dtype is torch.int64 else 0
    if low < floor or high > bounds.max:
        raise DTypeError(
            f"input `{path}` has dtype {value.dtype} and values from {low} to {high}; JAX runs"
            f" without x64 there and holds {spec.dtype.name} only: {TURN_ON_X64}"
        )


def cast_floats(tree: Any, dtype: torch.dtype) -> Any:
    """Return a pytree with its float tensors in this dtype; float64 stays, as in autocast."""

    def cast(leaf: Any) -> Any:
        is_cast = (
            isinstance(leaf, Tensor)
            and leaf.is_floating_point()
            and leaf.dtype is not torch.float64
        )
        return leaf.to(dtype) if is_cast else leaf

    return mapped(cast, tree)


def as_tensor(leaf: Any, path: Callable[[], str]) -> Tensor:
    """Return an array of another library as a tensor; `path` names it in errors."""
    if hasattr(type(leaf), "__dlpack__") or hasattr(type(leaf), "__array__"):
        flags = getattr(leaf, "flags", None)
        if hasattr(type(leaf), "filled"):
            raise StructureError(
                f"`{path()}` is a masked array, whose mask would be lost; fill it with .filled(...)"
            )
        if flags is not None and (
            not flags.writeable or any(stride < 0 for stride in leaf.strides)
        ):
            leaf = leaf.copy()  # torch refuses these NumPy arrays, or warns
        try:
            return torch.as_tensor(leaf)
        except (TypeError, ValueError, RuntimeError) as error:
            raise StructureError(
                f"`{path()}` is a {type(leaf).__qualname__} that torch cannot read: {error}"
            ) from error
    raise StructureError(
        f"`{path()}` is a {type(leaf).__module__}.{type(leaf).__qualname__}; expected a tensor, a"
        " number, bool, str or None, or a dict, list, tuple, namedtuple or dataclass of these"
    )
