"""Pytrees of arguments and results. This module touches no arrays."""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from bridge_wire.classes import (
    Node,
    attributes_beyond,
    expand_dataclass,
    instantiate,
    peers,
    structured,
)
from bridge_wire.errors import StructureError
from bridge_wire.instances import PeerMapping, parts_of, static_among, with_mark


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Return a pytree's leaves and its structure.

    Raises:
      StructureError: jax cannot flatten it: its keys cannot be sorted, or it contains itself.
    """
    try:
        return jax.tree.flatten(tree)
    except (
        ValueError,
        TypeError,
        RecursionError,
        SystemError,
    ) as error:  # SystemError is how jax passes on another error
        raise StructureError(
            f"jax cannot take the arguments apart: {error.__cause__ or error}"
        ) from error


def path_of(arguments: tuple[tuple[Any, ...], dict[str, Any]], position: int) -> str:
    """Return the path of a leaf of a call's arguments, such as `args[0]['w']`."""
    path, _ = jax.tree_util.tree_flatten_with_path(arguments)[0][position]
    return ("args" if path[0].idx == 0 else "kwargs") + jax.tree_util.keystr(path[1:])


def register_if_dataclass(cls: type) -> bool:
    """Make a dataclass that is new here, and so a leaf, a pytree node; return whether it is a
    dataclass."""
    if not dataclasses.is_dataclass(cls):
        return False
    register_dataclass(cls, tuple(field.name for field in dataclasses.fields(cls)))
    return True


def register_dataclass(cls: type, fields: tuple[str, ...]) -> None:
    """Make a dataclass a pytree node; static fields are sent as values."""

    def flatten(value: Any) -> tuple[list[Any], tuple[str, ...]]:
        return [getattr(value, field) for field in fields], attributes_beyond(
            value, fields
        )

    def flatten_with_keys(value: Any) -> tuple[list[Any], tuple[str, ...]]:
        children, beyond = flatten(value)
        return [
            (jax.tree_util.GetAttrKey(field), child)
            for field, child in zip(fields, children, strict=True)
        ], beyond

    def unflatten(beyond: tuple[str, ...], children: Iterable[Any]) -> Any:
        return instantiate(cls, fields, children, without=beyond)

    with contextlib.suppress(ValueError):  # another thread was faster
        jax.tree_util.register_pytree_with_keys(
            cls, flatten_with_keys, unflatten, flatten
        )


def register_peer(cls: type, fields: tuple[Any, ...]) -> None:
    """Make a class that stands for a worker's a pytree node."""
    parts = parts_of(fields, cls)
    step: Any = jax.tree_util.GetAttrKey
    if issubclass(cls, PeerMapping):
        step = jax.tree_util.DictKey

    # Transforms refuse leaves without arrays: these are part of the structure, by type and repr.
    def flatten_with_keys(value: Any) -> tuple[Any, Any]:
        named = list(zip(fields, parts(value), strict=True))
        static = static_among(value, named)
        pairs = [(step(name), part) for name, part in named if name not in static]
        exact = [(name, type(x), repr(x), x) for name, x in static.items()]
        return pairs, tuple(exact)

    def flatten(value: Any) -> tuple[Any, Any]:
        pairs, static = flatten_with_keys(value)
        return [part for _, part in pairs], static

    def unflatten(static: Any, children: Iterable[Any]) -> Any:
        known, others = {name: part for name, *_, part in static}, iter(children)
        items = [known[name] if name in known else next(others) for name in fields]
        return with_mark(instantiate(cls, fields, items), items, known)

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


peers.adopt_by(register_peer)


def expand(value: Any) -> Node | None:
    """Return the parts of a dataclass, or of any other pytree node that jax knows."""
    if (node := expand_dataclass(value)) is not None or isinstance(value, Mapping):
        return node
    structure: Any
    children, structure = jax.tree.flatten(value, is_leaf=lambda x: x is not value)
    if len(children) == 1 and children[0] is value:
        return None
    return structured(
        type(value),
        tuple(f"item{i}" for i in range(len(children))),
        children,
        structure=structure,
        static=structure.node_data()[1],
        unflatten=jax.tree_util.tree_unflatten,
    )


def marked(value: Any, mark: bool) -> Any:
    """Return the pytree with each leaf replaced by the mark."""
    return jax.tree.map(lambda _: mark, value)
