"""Pytrees of arguments and results. This module touches no tensors."""

import collections
import contextlib
import copyreg
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from bridge_client.arguments import NUMBERS
from bridge_wire import trees
from bridge_wire.classes import attributes_beyond, instantiate, peers, restored
from bridge_wire.errors import StructureError
from bridge_wire.instances import (
    PeerInstance,
    PeerMapping,
    fields_of,
    parts_of,
    static_among,
    with_mark,
)
from bridge_wire.keys import Key

_NAMESPACE = "torch-jax-bridge"
# optree's own functions use it if no namespace is given; private (optree 0.20).
_EVERYWHERE = getattr(optree.registry, "__GLOBAL_NAMESPACE", _NAMESPACE)
_STATIC = {bool, str, *NUMBERS}
_LEAVES = {*_STATIC, torch.Tensor, torch.nn.Parameter}  # the usual ones


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Return a pytree's leaves and its structure, which is hashable.

    Raises:
      StructureError: it is nested too deeply, or contains itself.
    """
    try:
        return optree.tree_flatten(tree, namespace=_NAMESPACE)
    except RecursionError as error:
        raise StructureError(
            "the arguments are nested too deeply, or contain themselves; flatten them"
        ) from error


def flatten_fully(tree: Any) -> tuple[list[Any], Any]:
    """Return a pytree's leaves and its structure, after containers of new classes are made nodes.

    Raises:
      StructureError: as `flatten`.
    """
    leaves, structure = flatten(tree)
    new = [kind for kind in set(map(type, leaves)) if kind not in _LEAVES]
    if any([register_if_container(kind) for kind in new]):
        return flatten_fully(tree)  # these leaves are nodes now
    return leaves, structure


def path_of(arguments: tuple[tuple[Any, ...], dict[str, Any]], position: int) -> str:
    """Return the path of a leaf of a call's arguments, such as `args[0]['w']`."""
    tree: Any = arguments
    accessor = optree.tree_accessors(tree, namespace=_NAMESPACE)[position]
    return accessor[1:].codify("args" if accessor[0].entry == 0 else "kwargs")


def register_if_container(cls: type) -> bool:
    """Make a class that is new here a pytree node, if it is a container; return whether it is one.

    Subclasses of Python's dict, list and tuple, such as torch.Size, are sent as these; dataclasses
    are containers too.
    """
    if issubclass(cls, Mapping):
        is_ordered = issubclass(cls, collections.OrderedDict)
        like: Any = collections.OrderedDict if is_ordered else dict
        _register(cls, _parts_of_mapping, like)
    elif issubclass(cls, list):
        _register(cls, _parts_of_sequence, list)
    elif issubclass(cls, tuple):
        _register(cls, _parts_of_sequence, tuple)
    elif dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls)]
        register_dataclass(cls, tuple(names))
    else:
        return False
    return True


def _parts_of_mapping(value: Mapping[Any, Any]) -> Any:
    keys = tuple(trees.ordered_keys(value))
    return [value[key] for key in keys], keys, keys


def _parts_of_sequence(value: Sequence[Any]) -> Any:
    return list(value), None, tuple(range(len(value)))


def _register(
    cls: type, parts_of: Callable[[Any], Any], like: Callable[[Any], Any]
) -> None:
    """Make a container's class a pytree node; it is rebuilt as the plain class `like`."""

    def unflatten(keys: Any, children: Any) -> Any:
        if keys is None:
            return like(children)
        items = zip(keys, children, strict=True)
        return like(items)

    _add(cls, parts_of, unflatten)


def _add(
    cls: type, parts_of: Callable[[Any], Any], unflatten: Callable[[Any, Any], Any]
) -> None:
    with contextlib.suppress(ValueError):  # another thread was faster
        optree.register_pytree_node(cls, parts_of, unflatten, namespace=_NAMESPACE)


def register_dataclass(cls: type, fields: tuple[str, ...]) -> None:
    """Make a dataclass a pytree node here; static fields are sent as values."""

    def parts_of(value: Any) -> Any:
        children = [getattr(value, field) for field in fields]
        beyond = attributes_beyond(value, fields)
        return children, beyond, fields

    def unflatten(beyond: Any, children: Any) -> Any:
        return instantiate(cls, fields, children, without=beyond)

    _add(cls, parts_of, unflatten)


def register_peer(cls: type, fields: tuple[Any, ...]) -> None:
    """Make a class that stands for a worker's a pytree node of optree and of torch.

    So torch.func, torch.utils.data and the user's own tree functions see its items.
    """
    children_of = parts_of(fields, cls)

    def flatten(value: Any) -> tuple[Sequence[Any], None]:
        return children_of(value), None

    def unflatten(_: None, children: Any) -> Any:
        return instantiate(cls, fields, children)

    _register_everywhere(cls, fields, flatten, unflatten)


def _register_everywhere(
    cls: type,
    fields: tuple[Any, ...],
    flatten: Callable[[Any], tuple[Sequence[Any], Any]],
    unflatten: Callable[[Any, Any], Any],
) -> None:
    step = pytree.MappingKey if issubclass(cls, Mapping) else pytree.GetAttrKey

    def with_fields(value: Any) -> Any:
        children, context = flatten(value)
        return children, context, fields

    def with_keys(value: Any) -> Any:
        children, context = flatten(value)
        named = list(zip(fields, children, strict=True))
        static = static_among(value, named)
        pairs: Any = [(step(x), part) for x, part in named if x not in static]
        return pairs, (context, tuple(static.items()))

    def for_torch(value: Any) -> Any:
        pairs, context = with_keys(value)
        return [part for _, part in pairs], context

    def from_torch(children: Any, context: Any) -> Any:
        own, static = context
        known, others = dict(static), iter(children)
        parts = [known[name] if name in known else next(others) for name in fields]
        return with_mark(unflatten(own, parts), parts, known)

    optree.register_pytree_node(cls, with_fields, unflatten, namespace=_EVERYWHERE)
    pytree.register_pytree_node(
        cls,
        for_torch,
        from_torch,
        flatten_with_keys_fn=with_keys,
    )


def _collate(batch: Sequence[Any], *, collate_fn_map: Any = None) -> Any:
    """Collate instances of a worker's class, for torch's DataLoader: field by field."""
    cls, fields = type(batch[0]), fields_of(batch[0])
    if any(type(each) is not cls for each in batch):
        raise StructureError(
            f"a batch has instances of different classes or static parts: {batch[0]!r} and"
            " others; batch those of one kind together"
        )
    rows = map(parts_of(fields, cls), batch)
    collated = []
    for column in zip(*rows, strict=True):
        items = list(column)
        collated.append(collate(items, collate_fn_map=collate_fn_map))
    return instantiate(cls, fields, collated)


def _collate_keys(batch: Sequence[Key], *, collate_fn_map: Any = None) -> Key:
    (implementation,) = {key.implementation for key in batch}
    data = collate([key.data for key in batch], collate_fn_map=collate_fn_map)
    return Key(data, implementation)


def _parts_of_key(key: Key) -> tuple[Sequence[Any], str]:
    return [key.data], key.implementation


def _key_of(implementation: str, children: Any) -> Key:
    (data,) = children
    return Key(data, implementation)


def restored_key(words: Any, implementation: str) -> Key:
    """Return a pickled key."""
    is_signed = isinstance(words, torch.Tensor) and words.dtype == torch.int32
    return Key(words.view(torch.uint32) if is_signed else words, implementation)


def _reduced_key(key: Key) -> tuple[Any, ...]:
    # torch cannot unpickle uint32 (2.13).
    words = key.data
    if isinstance(words, torch.Tensor) and words.dtype == torch.uint32:
        words = words.view(torch.int32)
    return restored_key, (words, key.implementation)


copyreg.pickle(Key, _reduced_key)
peers.adopt_by(register_peer)
_register_everywhere(Key, ("data",), _parts_of_key, _key_of)
default_collate_fn_map |= {
    PeerInstance: _collate,
    PeerMapping: _collate,
    Key: _collate_keys,
}
torch.serialization.add_safe_globals([restored, restored_key])


def marked(value: Any, mark: bool) -> Any:
    """Return the pytree with each leaf replaced by the mark."""
    return optree.tree_map(lambda _: mark, value, namespace=_NAMESPACE)


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to each leaf of a pytree, also in containers of new classes."""
    leaves, structure = flatten_fully(tree)
    return optree.tree_unflatten(structure, map(function, leaves))
