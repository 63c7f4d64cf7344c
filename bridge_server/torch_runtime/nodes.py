"""Containers and static values in a model's results, as torch's pytrees see them."""

import collections
import dataclasses
import enum
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from bridge_wire.classes import (
    Node,
    constant,
    expand_dataclass,
    is_plain_name,
    structured,
)
from bridge_wire.errors import StructureError
from bridge_wire.values import encode_value

_PLAIN = (dict, list, tuple)
_PLAIN_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict)
_CONSTANTS = (enum.Enum, torch.dtype, torch.device, torch.layout, torch.memory_format)
# Attributes that are part of an instance's structure, and no data.
_FIXED = (type, torch.Size)
# By these a class tells Python how to copy an instance; its attributes alone do not suffice.
_OWN_COPIES = (
    "__reduce__",
    "__reduce_ex__",
    "__getstate__",
    "__setstate__",
    "__getnewargs__",
    "__getnewargs_ex__",
)
_NO_DATA = {"__dict__", "__weakref__"}  # slots that hold no attribute
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made by a class statement


class _Plain:
    """A class whose instances have attributes only."""


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
    cls = type(value)
    is_known = cls in pytree.SUPPORTED_NODES or dataclasses.is_dataclass(value)
    return is_known or has_attributes(value)


def has_attributes(value: Any) -> bool:
    """Return whether a value consists of attributes only: it has no slots and no data in C.

    Modules are none of these: their parameters are not results.
    """
    cls = type(value)
    if cls.__basicsize__ != _Plain.__basicsize__ or isinstance(value, torch.nn.Module):
        return False
    if not all(map(_is_plain, cls.__mro__[:-1])):
        return False
    names: Iterable[str] = getattr(value, "__dict__", ())
    return bool(names) and all(map(is_plain_name, names))


def _is_plain(cls: type) -> bool:
    slots = vars(cls).get("__slots__", ())
    return bool(cls.__flags__ & _HEAP_TYPE) and set(slots) <= _NO_DATA


def is_registered(value: Any) -> bool:
    """Return whether a value's class is registered with torch's pytrees by somebody else."""
    return type(value) in pytree.SUPPORTED_NODES and not isinstance(value, list | tuple)


class Parts(NamedTuple):
    """The children of an instance, and the rest of it."""

    children: Sequence[Any]
    rest: "Rest"


class Rest:
    """The class and the context of an instance, comparable by value."""

    def __init__(self, cls: type, context: Any) -> None:
        self.cls, self.context = cls, context
        self._frozen = (cls, _frozen(context))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rest) and self._frozen == other._frozen

    def __hash__(self) -> int:
        return hash(self._frozen)


def parts_of(value: Any) -> Parts:
    """Take an instance of a registered class, or one that has attributes only, apart."""
    if not is_registered(value):
        attributes = vars(value)
        fixed = {
            name: each for name, each in attributes.items() if isinstance(each, _FIXED)
        }
        fields = tuple(name for name in attributes if name not in fixed)
        rest = Rest(type(value), _Attributes(fields, fixed))
        return Parts([attributes[name] for name in fields], rest)
    children, context = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
    return Parts(children, Rest(type(value), context))


def expand(value: Any) -> Node | None:
    """Return the parts of an instance or a constant; None: it is a plain container.

    Raises:
      StructureError: an instance's attributes lead back to it.
    """
    if isinstance(value, _CONSTANTS):
        return constant(value)
    if not is_registered(value) and not dataclasses.is_dataclass(value):
        return _by_attributes(value) if has_attributes(value) else None
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


class _Attributes(NamedTuple):
    """The attributes of an instance: the names of its data, and its fixed ones."""

    fields: tuple[str, ...]
    fixed: Mapping[str, Any]


def _by_attributes(value: Any) -> Node:
    cls = type(value)
    _refuse_cycles(value, ())
    children, rest = parts_of(value)
    fields = rest.context.fields
    if reason := _why_not_rebuilt(cls, children):
        return Node(cls, fields, children, reason, has_static=True)
    return structured(
        cls,
        fields,
        children,
        structure=rest,
        static=(rest,),
        unflatten=_with_attributes,
    )


def _with_attributes(rest: Rest, items: Sequence[Any]) -> Any:
    # As copy.copy does, which never calls __init__.
    instance: Any = object.__new__(rest.cls)
    fields, fixed = rest.context
    vars(instance).update(zip(fields, items, strict=True), **fixed)
    return instance


def _why_not_rebuilt(cls: type, children: Sequence[Any]) -> str:
    for name in _OWN_COPIES:
        if getattr(cls, name, None) is not getattr(object, name, None):
            return f"its class has a {name} of its own"
    if not all(map(_is_exact, children)):
        return "it has a list, tuple or dict of another class, which was sent as a plain one"
    return ""


def _is_exact(value: Any) -> bool:
    """Return whether a value arrives with its type."""
    if type(value) in _PLAIN or hasattr(value, "_fields"):
        items = value.values() if isinstance(value, dict) else value
        return all(map(_is_exact, items))
    return not isinstance(value, (*_PLAIN, *_PLAIN_MAPPINGS))


def _refuse_cycles(value: Any, above: tuple[Any, ...]) -> None:
    if any(value is each for each in above):
        raise StructureError(
            f"the attributes of a {type(value).__module__}.{type(value).__qualname__} in the result"
            " lead back to it; expected a tree: return its tensors in a dict or a dataclass"
        )
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, list | tuple):
        items = value
    elif not is_static(value) and has_attributes(value):
        items = vars(value).values()
    for item in items:
        _refuse_cycles(item, (*above, value))


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
