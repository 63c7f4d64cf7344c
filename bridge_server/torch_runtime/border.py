"""Border check: compares a program's outputs with their declared types before any read.

torch may return tensors of other types than declared: float64 tangents of float32 scalars
(torch.func.jvp of `x.sum() * 0.5`), zero tensors without memory, sparse gradients, and fake or
functorch tensors that a model kept. Reading their memory would return garbage or crash.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bridge_server.torch_runtime.types import DTYPES, TORCH_DTYPES
from bridge_wire.errors import SpecError
from bridge_wire.specs import Spec

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_NO_DISPATCH = Tensor.__torch_dispatch__


class Border:
    """The declared types of one program's outputs."""

    def __init__(self, specs: Sequence[Spec], where: str) -> None:
        self._where = where
        self._specs = specs
        self._types = [
            (TORCH_DTYPES[spec.dtype], torch.Size(spec.shape)) for spec in specs
        ]

    def checked(self, outputs: Sequence[Any]) -> Sequence[Tensor]:
        """Return the outputs as strided tensors with memory, of declared dtypes and shapes.

        The check casts other float dtypes to the declared one, and makes zero and sparse tensors
        dense.

        Raises:
          SpecError: an output differs in another way.
        """
        for y, declared in zip(outputs, self._types, strict=True):
            if not _is_as_declared(y, *declared):
                return [self._made_dense(i, each) for i, each in enumerate(outputs)]
        return outputs

    def _made_dense(self, position: int, y: Any) -> Tensor:
        dtype, shape = self._types[position]
        is_readable = isinstance(y, Tensor) and not _has_no_memory(y)
        if not is_readable or y.shape != shape or not _can_be_cast(y.dtype, dtype):
            raise SpecError(
                f"output {position} of {self._where} is {described(y)}, expected"
                f" {self._specs[position]}; a model must return dense tensors of the same types in"
                " every run and derivative, and keep none of an earlier run"
            )
        if y._is_zerotensor():
            return torch.zeros(shape, dtype=dtype, device=y.device)
        return dense(y).as_subclass(Tensor).to(dtype)


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor as a strided one; a gradient of `nn.Embedding(sparse=True)` is sparse."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def described(value: Any) -> str:
    """Describe a value for an error text."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__module__}.{type(value).__qualname__}"
    kind = "" if type(value) is Tensor else f"a {type(value).__name__} of "
    layout = "" if value.layout is torch.strided else f" of layout {value.layout}"
    wrapped = " of a torch.func transform that has ended" if _is_wrapped(value) else ""
    device = " on meta" if value.device.type == "meta" else ""
    shape = " of several shapes" if value.is_nested else list(value.shape)
    return f"{kind}{str(value.dtype).removeprefix('torch.')}{shape}{layout}{wrapped}{device}"


def _is_as_declared(y: Any, dtype: torch.dtype, shape: torch.Size) -> bool:
    return (
        type(y) is Tensor
        and y.dtype is dtype
        and not y.is_nested  # nested tensors have no shape
        and y.shape == shape
        and y.layout is torch.strided
        and not y.is_meta
        and not y._is_zerotensor()
        and not _is_wrapped(y)
    )


def _has_no_memory(y: Tensor) -> bool:
    """Return whether a tensor has no memory of its own: fake, functorch or distributed."""
    is_subclass = type(y).__torch_dispatch__ is not _NO_DISPATCH
    return y.is_meta or y.is_nested or is_subclass or _is_wrapped(y)


def _can_be_cast(dtype: torch.dtype, declared: torch.dtype) -> bool:
    """Return whether torch's rule for tangents and gradients casts one dtype to the other."""
    if dtype is declared:
        return True
    if dtype not in DTYPES or not (dtype.is_complex or dtype.is_floating_point):
        return False
    return declared.is_complex or (declared.is_floating_point and not dtype.is_complex)
