"""Pytrees of arrays as messages, and other pytrees of the same structure. Touches no memory."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bridge_client.arguments import NUMBERS, Args, Kwargs
from bridge_client.numpy.memory import as_array
from bridge_wire import trees
from bridge_wire.classes import peers
from bridge_wire.errors import StructureError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.recipes import records
from bridge_wire.values import decode_value, plain

_LEAF = pb.Tree(leaf=pb.Tree.Leaf())


class Encoded(NamedTuple):
    """A call's arguments: the tree of each positional one, the whole, and the leaves of each."""

    items: Sequence[pb.Tree]
    tree: pb.Tree
    leaves: Sequence[Sequence[Any]]  # arrays and Python numbers; keyword arguments last


def encoded(
    args: Args, kwargs: Kwargs, names: Iterable[str], static: Collection[str]
) -> Encoded:
    """Return a call's arguments; `names` are those of the positional ones.

    Raises:
      StructureError: an argument has a part that can neither be sent nor be static.
    """
    items: list[pb.Tree] = []
    leaves: list[list[Any]] = []
    padded = itertools.chain(names, itertools.repeat(""))
    for i, (value, name) in enumerate(zip(args, padded, strict=False)):
        tree, own = _encoded(value, f"args[{i}]", name in static)
        items.append(tree)
        leaves.append(own)
    mapping = pb.Tree.Mapping()
    of_kwargs: list[Any] = []
    for key in sorted(kwargs):
        tree, own = _encoded(kwargs[key], f"kwargs[{key!r}]", key in static)
        mapping.keys.append(pb.Value(text=key))
        mapping.items.append(tree)
        of_kwargs += own
    positional = pb.Tree(tuple=pb.Tree.Sequence(items=items))
    tree = trees.arguments(positional, pb.Tree(dict=mapping))
    return Encoded(items, tree, [*leaves, of_kwargs])


def _encoded(value: Any, path: str, is_static: bool) -> tuple[pb.Tree, list[Any]]:
    if not _is_array(value):
        value = plain(value)
    is_leaf = _is_array if is_static else _is_data
    tree, leaves = trees.encode(value, is_leaf, peers, root=path)
    if is_static and leaves:
        raise StructureError(
            f"`{path}` is static, and has an array; pass Python values, or leave the argument out"
            " of static_argnames"
        )
    paths = trees.leaf_paths(tree, path)
    arrays = [
        leaf if type(leaf) in NUMBERS else as_array(leaf, each)
        for leaf, each in zip(leaves, paths, strict=True)
    ]
    return tree, arrays


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) or hasattr(
        type(value), "__array__"
    )


def _is_data(value: Any) -> bool:
    return type(value) in NUMBERS or _is_array(value)


def dict_of(names: Sequence[str]) -> pb.Tree:
    """Return the tree of a dict of arrays by name."""
    keys = [pb.Value(text=name) for name in names]
    items = [_LEAF] * len(names)
    return pb.Tree(dict=pb.Tree.Mapping(keys=keys, items=items))


def leaf_of(count: int) -> list[pb.Tree]:
    """Return the trees of `count` arrays."""
    return [_LEAF] * count


def rebuilder(tree: pb.Tree) -> Callable[[Iterable[Any]], Any]:
    """Return the function from leaves to an argument of this tree, in the classes of this
    process."""
    mirrored = pb.Tree()
    mirrored.CopyFrom(tree)
    for record in records(mirrored):
        # As a worker names the classes of the arguments that it returns.
        record.origin, record.returned = record.returned, record.origin
    return trees.builder(mirrored, peers)


def along(tree: pb.Tree, value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the path and the part of a value at each leaf of a tree; None stands for parts that
    are left out.

    Raises:
      StructureError: the value has another structure.
    """
    kind = tree.WhichOneof("kind")
    if kind in ("leaf", "key"):
        yield path, value
        return
    if kind in ("value", None):
        return
    node = getattr(tree, kind)
    steps, parts = _parts(kind, node, value, path)
    for step, item, part in zip(steps, node.items, parts, strict=True):
        yield from along(item, part, path + step)


def _parts(
    kind: str, node: Any, value: Any, path: str
) -> tuple[Sequence[str], Sequence[Any]]:
    """Return the steps from a container to its parts, and these parts of a value."""
    keys: Sequence[Any] = range(len(node.items))
    if kind == "dict":
        keys = [decode_value(key) for key in node.keys]
    if kind in ("namedtuple", "dataclass"):
        steps = [f".{field}" for field in node.fields]
        if value is not None and all(hasattr(value, name) for name in node.fields):
            return steps, [getattr(value, name) for name in node.fields]
    else:
        steps = [f"[{key!r}]" for key in keys]
        like = Mapping if kind == "dict" else list | tuple
        is_same = isinstance(value, like) and len(value) == len(keys)
        if is_same and (kind != "dict" or all(key in value for key in keys)):
            return steps, [value[key] for key in keys]
    if value is None:
        return steps, [None] * len(steps)
    raise StructureError(
        f"`{path}` is a {type(value).__qualname__}; expected a {kind} with"
        f" {', '.join(steps) or 'no parts'}, or None"
    )
