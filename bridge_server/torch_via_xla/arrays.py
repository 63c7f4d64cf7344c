"""Conversion of tensors to JAX arrays and back, in pytrees, without a copy where possible.

Runs no programs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch.utils.dlpack
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bridge_server.jax_runtime.types import has_x64
from bridge_wire.dtypes import BY_NAME, NARROWED, NEEDS_X64
from bridge_wire.errors import CopyNeeded, DTypeError, StructureError
from bridge_wire.memory.allocator import ALIGNMENT

_NAMES = {getattr(torch, name): name for name in BY_NAME}


def to_jax(tree: Any, *, copy: bool | None = None) -> Any:
    """Return a pytree with each of its tensors as a JAX array; other leaves stay unchanged.

    An array without a copy shares the tensor's memory, layout and lifetime: later writes to the
    tensor show in the array. A tensor needs a copy if it has gaps or broadcast axes, a conjugate or
    negative bit, memory that is not aligned to 64 bytes, or 64-bit integers while JAX runs without
    x64, which are narrowed if they fit.

    Args:
      copy: True always copies, False never, None if needed.
    Raises:
      CopyNeeded: copy=False, but the conversion needs a copy.
      DTypeError: JAX lacks the dtype, or needs x64 for it.
      StructureError: a tensor is sparse, has no memory here, or requires a gradient, which would be
        lost: detach it, or call within torch.no_grad().
    """
    return _map(lambda leaf: _as_array(leaf, copy), Tensor, tree)


def to_torch(tree: Any, *, copy: bool | None = None) -> Any:
    """Return a pytree with each of its JAX arrays as a tensor; other leaves stay unchanged.

    A tensor without a copy shares the array's memory. JAX assumes that arrays never change: write
    only to copies.

    Args:
      copy: True always copies, False never, None if needed: for an array that is sharded over
        several devices.
    Raises:
      CopyNeeded: copy=False, but the conversion needs a copy.
      DTypeError: torch lacks the dtype.
      StructureError: an array is traced, deleted, or on devices of another process.
    """
    return _map(lambda leaf: _as_tensor(leaf, copy), jax.Array, tree)


def _map(convert: Callable[[Any], Any], kind: type, tree: Any) -> Any:
    def convert_leaf(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, kind):
            return leaf
        try:
            return convert(leaf)
        except (CopyNeeded, DTypeError, StructureError) as error:
            where = jax.tree_util.keystr(path)
            raise type(error)(
                f"`{where}`: {error}" if where else str(error)
            ) from error.__cause__

    return jax.tree_util.tree_map_with_path(convert_leaf, tree)


def _as_array(tensor: Tensor, copy: bool | None) -> jax.Array:
    if tensor.layout is not torch.strided:
        raise StructureError(
            f"the tensor is {tensor.layout}; make it dense with .to_dense()"
        )
    if tensor.requires_grad:
        if torch.is_grad_enabled():
            raise StructureError(
                "the tensor requires a gradient, which would be lost; .detach() it, call within"
                " torch.no_grad(), or make the function that uses it a RemoteJaxFunction"
            )
        tensor = tensor.detach()
    # JAX would read an invalid address and crash the process.
    if isinstance(tensor, FakeTensor):
        raise StructureError(
            "the tensor has no values, since torch is tracing this code; call to_jax outside of the"
            " traced code"
        )
    try:
        importable = _importable(tensor)
        is_copy = importable.data_ptr() != tensor.data_ptr()
        if is_copy and copy is False:
            raise CopyNeeded(
                f"JAX cannot share a tensor of {_described(tensor)}; allow a copy with copy=None"
            )
        if copy and not is_copy:
            importable = importable.clone()
        array: jax.Array = jax.dlpack.from_dlpack(importable)
        return array
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, CopyNeeded | DTypeError):
            raise
        raise StructureError(
            f"the tensor has no memory that can be shared: {error}"
        ) from error


def _importable(tensor: Tensor) -> Tensor:
    """Return the tensor itself if JAX can import it, else a copy that JAX can import."""
    name = _NAMES.get(tensor.dtype)
    if name is None:
        raise DTypeError(
            f"the tensor has dtype {tensor.dtype}, which has no counterpart in JAX; cast it"
        )
    if name in NEEDS_X64 and not has_x64():
        tensor = _narrowed(tensor, name)
    tensor = tensor.resolve_conj().resolve_neg()
    if not _is_compact(tensor):
        tensor = tensor.contiguous()
    if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT and tensor.numel():
        tensor = tensor.clone()
    return tensor


def _narrowed(tensor: Tensor, name: str) -> Tensor:
    narrow = NARROWED.get(name)
    if narrow is None:
        raise DTypeError(
            f"the tensor has dtype {name}, but JAX runs without x64; cast it to a 32-bit type or"
            ' call jax.config.update("jax_enable_x64", True)'
        )
    dtype = getattr(torch, narrow.name)
    if tensor.numel():
        signed = tensor.view(torch.int64)  # torch cannot order uint64
        low, high = (int(extreme) for extreme in torch.aminmax(signed))
        floor = torch.iinfo(dtype).min if name == "int64" else 0
        if low < floor or high > torch.iinfo(dtype).max:
            raise DTypeError(
                f"the tensor has dtype {name} and values from {low} to {high}; JAX runs without x64"
                " and holds "
                f'{narrow.name} only: call jax.config.update("jax_enable_x64", True)'
            )
    return tensor.to(dtype)


def _is_compact(tensor: Tensor) -> bool:
    """Return whether the elements have no gaps and overlaps, in any order of the axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def _described(tensor: Tensor) -> str:
    bits = (", conj" if tensor.is_conj() else "") + (", neg" if tensor.is_neg() else "")
    offset = "" if tensor.data_ptr() % ALIGNMENT == 0 else ", not aligned to 64 bytes"
    return (
        f"dtype {tensor.dtype}, shape {list(tensor.shape)} and strides"
        f" {list(tensor.stride())}{bits}{offset}"
    )


def _as_tensor(array: jax.Array, copy: bool | None) -> Tensor:
    if isinstance(array, jax.core.Tracer):
        raise StructureError(
            "the array is traced and has no values; call to_torch outside of jit, grad and vmap, or"
            " make the torch function a RemoteTorchFunction or a trace_torch"
        )
    if array.is_deleted():
        raise StructureError("the array was deleted or donated; keep a copy of it")
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise DTypeError("the array holds PRNG keys; pass jax.random.key_data of it")
    if str(array.dtype) not in BY_NAME:
        raise DTypeError(
            f"the array has dtype {array.dtype}, which has no counterpart in torch; cast it"
        )
    if not array.is_fully_addressable:
        raise StructureError(
            "the array is also on devices of other processes; gather it first"
        )
    if len(array.sharding.device_set) > 1:
        return _gathered(array, copy)
    tensor = torch.utils.dlpack.from_dlpack(array.block_until_ready())
    return tensor.clone() if copy else tensor


def _gathered(array: jax.Array, copy: bool | None) -> Tensor:
    first = array.addressable_data(0)
    if array.is_fully_replicated:
        return _as_tensor(first, copy)
    if copy is False:
        raise CopyNeeded(
            "the array is sharded over several devices; allow a copy with copy=None"
        )
    return _as_tensor(jax.device_put(array, first.sharding), None)
