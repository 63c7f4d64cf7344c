"""Pytrees of arguments and results. This module touches no tensors."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch

from bridge_client.arguments import NUMBERS
from bridge_wire import trees
from bridge_wire.classes import attributes_beyond, instantiate
from bridge_wire.errors import StructureError

_NAMESPACE = "torch-jax-bridge"
_LEAVES = {bool, str, *NUMBERS, torch.Tensor, torch.nn.Parameter}  # the usual ones


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
        _register(
            cls,
            _parts_of_mapping,
            collections.OrderedDict
            if issubclass(cls, collections.OrderedDict)
            else dict,
        )
    elif issubclass(cls, list | tuple):
        _register(cls, _parts_of_sequence, list if issubclass(cls, list) else tuple)
    elif dataclasses.is_dataclass(cls):
        register_dataclass(cls, tuple(field.name for field in dataclasses.fields(cls)))
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
        return like(children if keys is None else zip(keys, children, strict=True))

    with contextlib.suppress(ValueError):  # another thread was faster
        optree.register_pytree_node(cls, parts_of, unflatten, namespace=_NAMESPACE)


def register_dataclass(cls: type, fields: tuple[str, ...]) -> None:
    """Make a dataclass a pytree node here; static fields are sent as values."""

    def parts_of(value: Any) -> Any:
        return (
            [getattr(value, field) for field in fields],
            attributes_beyond(value, fields),
            fields,
        )

    def unflatten(beyond: Any, children: Any) -> Any:
        return instantiate(cls, fields, children, without=beyond)

    with contextlib.suppress(ValueError):  # another thread was faster
        optree.register_pytree_node(cls, parts_of, unflatten, namespace=_NAMESPACE)


def marked(value: Any, mark: bool) -> Any:
    """Return the pytree with each leaf replaced by the mark."""
    return optree.tree_map(lambda _: mark, value, namespace=_NAMESPACE)


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to each leaf of a pytree, also in containers of new classes."""
    leaves, structure = flatten_fully(tree)
    return optree.tree_unflatten(structure, map(function, leaves))
