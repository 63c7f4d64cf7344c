"""The check at the border: a program's outputs against their declared types, before anybody reads
their memory.

torch hands out tensors that are not what their declared type says: tangents in float64 of float32
scalars (torch.func.jvp of `x.sum() * 0.5`), zero tensors without memory, sparse gradients, fake or
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
        self._types = [(TORCH_DTYPES[spec.dtype], torch.Size(spec.shape)) for spec in specs]

    def checked(self, outputs: Sequence[Any]) -> Sequence[Tensor]:
        """Return the outputs as strided tensors that have memory, and their declared dtypes and
        shapes.

        A tensor of another float dtype is cast to the declared one, a zero or sparse tensor is made
        dense.

        Raises:
          SpecError: an output is anything else.
        """
        for y, declared in zip(outputs, self._types, strict=True):
            if not _is_as_declared(y, *declared):
                return [self._made_dense(i, each) for i, each in enumerate(outputs)]
        return outputs

    def _made_dense(self, position: int, y: Any) -> Tensor:
        dtype, shape = self._types[position]
        if (
            not isinstance(y, Tensor)
            or _has_no_memory(y)
            or y.shape != shape
            or not _can_be_cast(y.dtype, dtype)
        ):
            raise SpecError(
                f"output {position} of {self._where} is {described(y)}, expected"
                f" {self._specs[position]}; a model must return dense tensors of the same types in"
                " every run and derivative, and keep none of an earlier run"
            )
        if y._is_zerotensor():
            return torch.zeros(shape, dtype=dtype, device=y.device)
        return dense(y).as_subclass(Tensor).to(dtype)


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor that may be sparse, such as a gradient of `nn.Embedding(sparse=True)`, as
    a strided one."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def described(value: Any) -> str:
    """Return what a value is, for an error text."""
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
        and not y.is_nested  # such a tensor has no shape to ask for
        and y.shape == shape
        and y.layout is torch.strided
        and not y.is_meta
        and not y._is_zerotensor()
        and not _is_wrapped(y)
    )


def _has_no_memory(y: Tensor) -> bool:
    """Whether a tensor stands for one, as fake, functorch's and distributed tensors do."""
    return (
        y.is_meta or y.is_nested or _is_wrapped(y) or type(y).__torch_dispatch__ is not _NO_DISPATCH
    )


def _can_be_cast(dtype: torch.dtype, declared: torch.dtype) -> bool:
    """Whether torch's own rule for tangents and gradients casts one dtype to the other."""
    if dtype is declared:
        return True
    is_declared_complex, is_complex = declared.is_complex, dtype.is_complex
    return (
        dtype in DTYPES
        and (is_complex or dtype.is_floating_point)
        and ((declared.is_floating_point and not is_complex) or is_declared_complex)
    )
