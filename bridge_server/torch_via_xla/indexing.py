"""Indices of traced torch code. Imports torch only."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridge_server.torch_via_xla.plain_torch import is_traced, tensors_in
from bridge_wire.errors import CallerError


def has_traced_position(index: Any) -> bool:
    """Return whether an index contains a traced number."""
    items = index if isinstance(index, tuple | list) else [index]
    return any(_is_traced_number(bound) for item in items for bound in _bounds(item))


def refuse_traced_slices(index: Any) -> None:
    """Raise CallerError for a slice whose size depends on traced values."""
    items = index if isinstance(index, tuple) else (index,)
    for item in items:
        if isinstance(item, slice) and has_traced_position((item.start, item.stop)):
            raise CallerError(
                "the torch code takes a slice whose bounds are traced, so that its size depends on"
                " values; index with torch.arange and a mask, or run the code by"
                " RemoteTorchFunction"
            )


def with_tensors_for_lists(index: Any) -> Any:
    """Replace each list in an index by a tensor.

    torch would make a tensor of the list on the traced tensor's device and lose its values.
    """
    if isinstance(index, tuple):
        return tuple(map(with_tensors_for_lists, index))
    is_list = isinstance(index, list | range | np.ndarray)
    if not is_list or not len(index) or tensors_in(index):
        return index
    return torch.as_tensor(np.asarray(index))


def _bounds(item: Any) -> Sequence[Any]:
    return [item.start, item.stop, item.step] if isinstance(item, slice) else [item]


def _is_traced_number(x: Any) -> bool:
    if not is_traced(x) or not isinstance(x, Tensor) or x.ndim:
        return False
    return not x.is_floating_point() and x.dtype is not torch.bool
