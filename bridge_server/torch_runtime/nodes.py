"""Containers and static values in a model's results, as torch's pytrees see them."""

import collections
import dataclasses
import enum
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from bridge_wire.classes import Node, constant, expand_dataclass, structured
from bridge_wire.values import encode_value

_PLAIN = (dict, list, tuple)
_PLAIN_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict)
_CONSTANTS = (enum.Enum, torch.dtype, torch.device, torch.layout, torch.memory_format)


def is_leaf(value: Any) -> bool:
    """Return whether a value must be a tensor: it is neither a container nor static."""
    if isinstance(value, Tensor):
        return True
    is_container = isinstance(value, (*_PLAIN, Mapping)) or is_node(value)
    return not is_container and not is_static(value)


def is_static(value: Any) -> bool:
    """Return whether a value is part of the result's structure, such as None, numbers, texts,
    dtypes and enumerations."""
    return isinstance(value, _CONSTANTS) or encode_value(value) is not None


def is_node(value: Any) -> bool:
    """Return whether a value is an instance of a class that is taken apart."""
    return type(value) in pytree.SUPPORTED_NODES or dataclasses.is_dataclass(value)


def is_registered(value: Any) -> bool:
    """Return whether a value's class is registered with torch's pytrees by somebody else."""
    return type(value) in pytree.SUPPORTED_NODES and not isinstance(value, list | tuple)


class Parts(NamedTuple):
    """The children of a registered instance, and the rest of it."""

    children: Sequence[Any]
    rest: "Rest"


class Rest:
    """The class and the context of a registered instance, comparable by value."""

    def __init__(self, cls: type, context: Any) -> None:
        self.cls, self.context = cls, context
        self._frozen = (cls, _frozen(context))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rest) and self._frozen == other._frozen

    def __hash__(self) -> int:
        return hash(self._frozen)


def parts_of(value: Any) -> Parts:
    """Take an instance of a registered class apart."""
    children, context = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
    return Parts(children, Rest(type(value), context))


def expand(value: Any) -> Node | None:
    """Return the parts of an instance or a constant; None: it is a plain container."""
    if isinstance(value, _CONSTANTS):
        return constant(value)
    if not is_registered(value) or type(value) in _PLAIN_MAPPINGS:
        return expand_dataclass(value)
    children, rest = parts_of(value)
    fields: tuple[Any, ...] = tuple(f"item{i}" for i in range(len(children)))
    if isinstance(value, Mapping):
        fields = tuple(value)
        if [id(value[key]) for key in fields] != list(map(id, children)):
            return None
    elif dataclasses.is_dataclass(value):
        return expand_dataclass(value)
    return structured(
        type(value),
        fields,
        children,
        structure=rest,
        static=(rest,),
        unflatten=_unflatten,
    )


def _unflatten(rest: Rest, items: Sequence[Any]) -> Any:
    node = pytree.SUPPORTED_NODES[rest.cls]
    return node.unflatten_fn(list(items), rest.context)


def _frozen(context: Any) -> Hashable:
    """Return a context as a hashable value, if its containers are plain."""
    if isinstance(context, list | tuple):
        return type(context), tuple(map(_frozen, context))
    if isinstance(context, dict):
        return tuple((key, _frozen(value)) for key, value in context.items())
    frozen: Hashable = (type(context), context)
    return frozen
