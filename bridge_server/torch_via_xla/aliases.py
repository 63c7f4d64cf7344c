"""Tensors that share memory in torch, and not when they are traced. Imports torch only.

torchax writes through slices, and through no other view: what is written into `x.view(-1)` or `x.t()` would not
be seen in `x`. So each write is noted, and whoever reads the same memory by another name afterwards is refused.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bridge_wire.errors import CallerError

_ATTRIBUTE = "_bridge_name"
# Which torchax takes before they reach an operator whose schema says that it makes a view.
_VIEWS = frozenset({torch.Tensor.detach, torch.detach})


class Aliases:
    """The names of memory in one trace: tensors that are the same memory, or parts of it."""

    def __init__(self) -> None:
        self._memories: list[list[_Name]] = []

    def note_views(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], made: Any) -> None:
        """Note which tensors an operator has made as further names of its first argument's memory."""
        base, views = named_in(args[:1]), named_in(made)
        if not base or not views or not _makes_views(function) or views[0] is base[0]:
            return
        name = getattr(base[0], _ATTRIBUTE, None)
        if name is None:
            name = _Name(base[0], torch.empty(base[0].shape, dtype=base[0].dtype, device="meta"), [], {})
            self._memories.append(name.memory)
        try:
            laid_out = function(name.layout, *args[1:], **kwargs)
        except RuntimeError:  # there is no such view of this layout, so that torch has made a copy
            return
        call = object()
        for part, (view, layout) in enumerate(zip(views, pytree.tree_leaves(laid_out), strict=True)):
            _Name(view, layout, name.memory, {**name.parts, call: part})

    def clear(self) -> None:
        """Forget the tensors, so that none outlives the trace."""
        for memory in self._memories:
            memory.clear()


class _Name:
    """A tensor as a name of memory, in which it has a layout."""

    def __init__(self, tensor: Any, layout: Tensor, memory: "list[_Name]", parts: Mapping[object, int]) -> None:
        self.tensor = tensor
        self.layout = layout  # a tensor without elements, as it would lie in torch
        self.memory = memory  # all of its names
        self.parts = parts  # which result it stems from, of each operator on the way from the first name
        self._shown = tensor._elem  # when all names showed the same
        memory.append(self)
        setattr(tensor, _ATTRIBUTE, self)

    def is_written(self) -> bool:
        """Whether something was written by this name."""
        return self.tensor._elem is not self._shown

    def overlaps(self, other: "_Name") -> bool:
        """Whether both show the same elements: results of one operator, such as a chunk, do not."""
        return all(other.parts.get(call, part) == part for call, part in self.parts.items())


def named_in(tree: Any) -> list[Any]:
    """Return the traced tensors in a pytree; for a slice, the tensor that it is one of."""
    found = []
    for leaf in pytree.tree_leaves(tree):
        while isinstance(leaf, Tensor) and hasattr(leaf, "parent"):
            leaf = leaf.parent
        if isinstance(leaf, Tensor) and hasattr(leaf, "_elem"):
            found.append(leaf)
    return found


def refuse_stale(tensors: Iterable[Any]) -> None:
    """Raise CallerError for a tensor whose memory was written by another name."""
    for tensor in tensors:
        name = getattr(tensor, _ATTRIBUTE, None)
        if name is None:
            continue
        if any(other is not name and other.is_written() and other.overlaps(name) for other in name.memory):
            raise CallerError(
                "the torch code writes into a view, and then reads the same memory by another name, of shape "
                f"{list(tensor.shape)}: tracing follows writes into tensors and slices such as x[:, 1:], but not into "
                "other views of them, such as x.view(-1) or x.t(). Write into the tensor itself, as in x[0] = y, or "
                "run the code by RemoteTorchFunction"
            )


def is_permuted(tensor: Any) -> bool:
    """Whether torch would copy the tensor to make it contiguous."""
    name = getattr(tensor, _ATTRIBUTE, None)
    return name is not None and not name.layout.is_contiguous()


@functools.cache
def _makes_views(function: Any) -> bool:
    if function in _VIEWS:
        return True
    schema = getattr(function, "_schema", None)
    return schema is not None and any(
        each.alias_info is not None and not each.alias_info.is_write for each in schema.returns
    )
