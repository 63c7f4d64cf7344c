"""Tensors over the client's memory, copies into that memory, and tensors' types."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bridge_server.runtime import Turn
from bridge_wire.dtypes import BY_NAME, DType
from bridge_wire.memory.copying import copy
from bridge_wire.memory.dlpack import DeviceExporter, Exporter, keep_owners_by
from bridge_wire.specs import Spec


def _capsule_over(buffer: Any) -> Any:
    tensor = torch.frombuffer(buffer, dtype=torch.uint8)
    return torch.to_dlpack(tensor)  # type: ignore[attr-defined]


keep_owners_by(_capsule_over)

HOST = torch.device("cpu")
TORCH_DTYPES: Mapping[DType, torch.dtype] = {
    dtype: getattr(torch, name) for name, dtype in BY_NAME.items()
}
DTYPES: Mapping[torch.dtype, DType] = {
    theirs: ours for ours, theirs in TORCH_DTYPES.items()
}

# Of a storage: its only tensor, and the Python object that reads the count.
_OWN_USERS = 2


def spec_of(tensor: Tensor) -> Spec:
    """Return the type of a tensor whose dtype is one of ours."""
    return Spec(DTYPES[tensor.dtype], tuple(tensor.shape))


def bytes_of(tensor: Tensor) -> Any:
    """Return a tensor's elements, row-major, as bytes; its text if it has no dense memory."""
    with _disable_current_modes():
        try:
            dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            return ctypes.string_at(dense.data_ptr(), dense.nbytes)
        except Exception:  # sparse, quantized, of another library
            return repr(tensor)


def zeros(spec: Spec, device: torch.device = HOST) -> Any:
    """Return zeros of a type; for a Python number, a one of its kind, since models may divide."""
    if spec.weak:
        return {"int64": 1, "float64": 1.0, "complex128": 1 + 0j}[spec.dtype.name]
    return torch.zeros(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device=device)


def value_of(data: bytes, spec: Spec, device: torch.device) -> Any:
    """Return a tensor, or a Python number, with these elements, row-major."""
    buffer = ctypes.create_string_buffer(data, max(1, len(data)))
    if spec.weak:
        return number_at(ctypes.addressof(buffer), spec)
    made = zeros(spec)
    ctypes.memmove(made.data_ptr(), buffer, len(data))
    return made.to(device)


def number_at(pointer: int, spec: Spec) -> int | float | complex:
    """Return the Python number at an address."""
    if spec.dtype.name == "int64":
        return ctypes.c_int64.from_address(pointer).value
    real = ctypes.c_double.from_address(pointer).value
    if spec.dtype.name == "float64":
        return real
    return complex(real, ctypes.c_double.from_address(pointer + 8).value)


def tensor_at(pointer: int, spec: Spec, owner: Any) -> Tensor:
    """Return a tensor over memory that `owner` keeps alive."""
    if 0 in spec.shape:
        return _empty(spec)
    return torch.utils.dlpack.from_dlpack(Exporter(pointer, spec, owner))


def tensor_in_turn(pointer: int, spec: Spec, owner: Any, turn: Turn) -> Tensor:
    """Return a tensor over GPU memory that `owner` keeps alive.

    The turn's stream, which is torch's, waits for the memory.
    """
    if 0 in spec.shape:
        return _empty(spec)
    exporter = DeviceExporter(
        pointer, spec, owner, turn.device.dlpack_device, _in_order
    )
    return torch.utils.dlpack.from_dlpack(exporter)


def _empty(spec: Spec) -> Tensor:
    return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])


def _in_order(stream: int | None) -> None:
    """Wait for nothing: torch's stream has waited when the turn began."""


def brought_to(
    device: torch.device, inputs: Sequence[Any], kept: int | None
) -> list[Any]:
    """Move a program's inputs to a device, except for the position `kept`, which the host reads.

    On return, all host memory has been read.
    """
    moved = list(inputs)
    for i, x in enumerate(inputs):
        if i != kept and isinstance(x, Tensor) and x.device != device:
            moved[i] = x.to(device)
    return moved


def write(tensor: Tensor, pointer: int, nbytes: int) -> None:
    """Copy a tensor's elements, row-major, to host memory."""
    if _is_dense(tensor):
        copy(pointer, tensor.data_ptr(), nbytes, tensor)
    else:
        tensor_at(pointer, spec_of(tensor), None).copy_(tensor.detach())


def write_in_turn(tensor: Tensor, pointer: int, nbytes: int, turn: Turn) -> None:
    """Copy a tensor's elements, row-major, to GPU memory, in the order of the turn's stream."""
    if tensor.is_cuda and not _is_row_major(tensor):
        tensor_in_turn(pointer, spec_of(tensor), None, turn).copy_(tensor.detach())
        return
    source = tensor.detach().resolve_conj().resolve_neg().contiguous()
    turn.copy(pointer, source.data_ptr(), nbytes, source)


def exclusive_pointer(tensor: Tensor) -> int | None:
    """Return the address of a tensor that is dense in host memory of its own, else None."""
    if not _is_dense(tensor):
        return None
    storage = tensor.untyped_storage()
    users = torch._C._storage_Use_Count(storage._cdata)
    is_exclusive = users <= _OWN_USERS and storage.nbytes() == tensor.nbytes
    return tensor.data_ptr() if is_exclusive else None


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_cpu and _is_row_major(tensor)


def _is_row_major(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def replaced(
    xs: Sequence[Any], positions: Sequence[int], values: Sequence[Any]
) -> list[Any]:
    """Return a copy of a list with other values at some positions."""
    result = list(xs)
    for i, value in zip(positions, values, strict=True):
        result[i] = value
    return result
