"""Pytrees as messages.

Leaves travel beside the tree, in depth-first order; dict keys are in sorted order.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bridge_wire.classes import (
    Classes,
    Expand,
    Node,
    expand_dataclass,
    instantiate,
    made_here,
    node_of_fields,
    origins,
)
from bridge_wire.errors import ProtocolError, StructureError
from bridge_wire.instances import (
    PeerMapping,
    static_parts,
    statics_of,
    unchanged_keys,
)
from bridge_wire.keys import Key
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.recipes import ENDS, records
from bridge_wire.values import decode_value, encode_key, encode_value

# Takes the leaves of a part from the iterator, and returns the part.
_Taker = Callable[[Iterator[Any]], Any]

_LEAVES = ("leaf", "key")

# Protobuf parsers stop at 100 nested messages, and one level of a tree takes two.
MAX_DEPTH = 40


def encode(
    value: Any,
    is_leaf: Callable[[Any], bool],
    classes: Classes,
    *,
    expand: Expand = expand_dataclass,
    root: str = "",
) -> tuple[pb.Tree, list[Any]]:
    """Return the value's tree and its array leaves. `root` names the value in errors.

    Raises:
      StructureError: the value has a part that is neither a leaf, a container nor a static value
        (None, bool, number, str).
    """
    encoder = _Encoder(is_leaf, classes, expand)
    return encoder.tree_of(value, root, 0), encoder.leaves


class _Encoder:
    """Writes values as trees, and collects their leaves."""

    def __init__(
        self, is_leaf: Callable[[Any], bool], classes: Classes, expand: Expand
    ) -> None:
        self.leaves: list[Any] = []
        self._is_leaf = is_leaf
        self._classes = classes
        self._expand = expand

    def tree_of(self, value: Any, path: str, depth: int) -> pb.Tree:
        if self._is_leaf(value):
            self.leaves.append(value)
            return pb.Tree(leaf=pb.Tree.Leaf())
        if (static := encode_value(value)) is not None:
            return pb.Tree(value=static)
        if isinstance(value, Key):
            if not self._is_leaf(value.data) or type(value.implementation) is not str:
                raise StructureError(
                    f"{path} is a key of {type(value.data).__name__} and"
                    f" {value.implementation!r}; expected a uint32 array and a text"
                )
            self.leaves.append(value.data)
            return pb.Tree(key=pb.Tree.Key(implementation=value.implementation))
        if depth == MAX_DEPTH:
            raise StructureError(
                f"{path} is nested more than {MAX_DEPTH} levels deep; flatten the structure"
            )
        return self._container(value, path, depth + 1)

    def _container(self, value: Any, path: str, depth: int) -> pb.Tree:
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", None)
            if fields is None:
                return pb.Tree(tuple=self._sequence(value, path, depth))
            named = node_of_fields(value, fields, value)
            return pb.Tree(namedtuple=self._record(value, named, path, depth))
        if isinstance(value, list):
            return pb.Tree(list=self._sequence(value, path, depth))
        if type(value) is dict:
            return pb.Tree(dict=self._mapping(value, path, depth))
        part = self._expand(value)
        if isinstance(part, Key):
            return self.tree_of(part, path, depth)
        if isinstance(value, Mapping):
            mapping = self._mapping(value, path, depth, part)
            return pb.Tree(dict=mapping)
        if part is not None:
            return pb.Tree(dataclass=self._record(value, part, path, depth))
        raise StructureError(
            f"{path or 'the value'} is a {type(value).__module__}.{type(value).__qualname__};"
            " expected a tensor, a number, bool, str or None, or a dict, list, tuple, namedtuple"
            " or dataclass of these"
        )

    def _sequence(
        self, items: Iterable[Any], path: str, depth: int
    ) -> pb.Tree.Sequence:
        trees = [
            self.tree_of(item, f"{path}[{i}]", depth) for i, item in enumerate(items)
        ]
        return pb.Tree.Sequence(items=trees)

    def _mapping(
        self, value: Mapping[Any, Any], path: str, depth: int, node: Node | None = None
    ) -> pb.Tree.Mapping:
        keys = _keys_of(value, node)
        items = [self.tree_of(value[key], f"{path}[{key!r}]", depth) for key in keys]
        mapping = pb.Tree.Mapping(keys=[_key(key, path) for key in keys], items=items)
        if isinstance(value, PeerMapping):
            mapping.name, mapping.returned = (
                type(value).__name__,
                made_here[type(value)],
            )
        elif node is not None:
            mapping.name = node.cls.__name__
            mapping.origin = origins.name_of("dict", node)
        return mapping

    def _record(self, value: Any, node: Node, path: str, depth: int) -> pb.Tree.Record:
        kind = "namedtuple" if isinstance(value, tuple) else "dataclass"
        fields = zip(node.fields, node.children, strict=True)
        items = [self.tree_of(item, f"{path}.{field}", depth) for field, item in fields]
        record = pb.Tree.Record(name=node.cls.__name__, fields=node.fields, items=items)
        origin = made_here.get(node.cls)
        if origin is not None:
            self._classes.learn(kind, node.cls, node.fields, origin)
            record.returned = origin
        else:
            record.origin = origins.name_of(kind, node)
            record.statics.extend(static_parts(value, node.fields))
        return record


def build(tree: pb.Tree, leaves: Iterable[Any], classes: Classes) -> Any:
    """Return the value that a tree describes, with these array leaves.

    Raises:
      ProtocolError: the tree is malformed, or has more or fewer leaves than were given.
    """
    return builder(tree, classes)(leaves)


def builder(tree: pb.Tree, classes: Classes) -> Callable[[Iterable[Any]], Any]:
    """Return the function from array leaves to the value that a tree describes.

    Raises:
      ProtocolError: as `build`.
    """
    take = _taker(tree, classes)

    def build(leaves: Iterable[Any]) -> Any:
        remaining = iter(leaves)
        try:
            value = take(remaining)
        except StopIteration:
            raise ProtocolError(
                "a tree has more leaves than arrays came with it"
            ) from None
        if next(remaining, remaining) is not remaining:
            raise ProtocolError("a tree has fewer leaves than arrays came with it")
        return value

    return build


def leaf_paths(tree: pb.Tree, root: str) -> list[str]:
    """Return the path of each array leaf, such as `args[0]['w']`, in the order of the leaves."""
    return [
        path for path, end in _ends(tree, root) if end.WhichOneof("kind") in _LEAVES
    ]


def _ends(tree: pb.Tree, root: str) -> Iterator[tuple[str, pb.Tree]]:
    """Yield each array leaf and each static value with its path."""
    kind = tree.WhichOneof("kind")
    if kind is None or kind in ENDS:
        yield root, tree
        return
    node = getattr(tree, kind)
    if kind == "dict":
        steps = [f"[{decode_value(key)!r}]" for key in node.keys]
    elif kind in ("namedtuple", "dataclass"):
        steps = [f".{field}" for field in node.fields]
    else:
        steps = [f"[{i}]" for i in range(len(node.items))]
    for step, item in zip(steps, node.items, strict=False):
        yield from _ends(item, root + step)


def arguments(args: pb.Tree, kwargs: pb.Tree) -> pb.Tree:
    """Return the tree of a call's arguments."""
    return pb.Tree(tuple=pb.Tree.Sequence(items=[args, kwargs]))


def positional(count: int) -> pb.Tree:
    """Return the tree of a call's arguments: `count` arrays by position."""
    return arguments(flat(count), pb.Tree(dict=pb.Tree.Mapping()))


def argument_paths(tree: pb.Tree) -> list[str]:
    """Return the paths of the leaves of a call's arguments, such as `args[0]` and
    `kwargs['scale']`.

    Raises:
      ProtocolError: the tree is not a pair of a tuple and a dict.
    """
    items = tree.tuple.items
    if (
        len(items) != 2
        or items[0].WhichOneof("kind") != "tuple"
        or items[1].WhichOneof("kind") != "dict"
    ):
        raise ProtocolError("a call's arguments must be a tuple of a tuple and a dict")
    return leaf_paths(items[0], "args") + leaf_paths(items[1], "kwargs")


def argument_values(tree: pb.Tree) -> list[tuple[str, Any]]:
    """Return the path and the value of each static argument of a call."""
    args, kwargs = tree.tuple.items
    ends = (*_ends(args, "args"), *_ends(kwargs, "kwargs"))
    return [
        (path, decode_value(end.value))
        for path, end in ends
        if end.WhichOneof("kind") == "value"
    ]


def count_nodes(tree: pb.Tree, most: int) -> int:
    """Return the number of a tree's containers, values and leaves, but count no further than
    `most`."""
    pending, count = [tree], 0
    while pending and count < most:
        node = pending.pop()
        count += 1
        kind = node.WhichOneof("kind")
        if kind is not None and kind not in ENDS:
            pending += getattr(node, kind).items[: most - count]
    return count


def without_origins(tree: pb.Tree) -> pb.Tree:
    """Return a copy of a tree without the origins of classes, which differ from one process to
    the next."""
    made = pb.Tree()
    made.CopyFrom(tree)
    for record in records(made):
        record.ClearField("origin")
        if isinstance(record, pb.Tree.Record):
            record.ClearField("statics")
    return made


def flat(count: int) -> pb.Tree:
    """Return the tree of a tuple of `count` arrays."""
    return pb.Tree(tuple=pb.Tree.Sequence(items=[pb.Tree(leaf=pb.Tree.Leaf())] * count))


def _taker(tree: pb.Tree, classes: Classes) -> _Taker:
    kind = tree.WhichOneof("kind")
    if kind == "leaf":
        return next
    if kind == "value":
        value = decode_value(tree.value)
        return lambda leaves: value
    if kind is None:
        raise ProtocolError("a tree has a node of no kind")
    node = getattr(tree, kind)
    if kind == "key":
        return lambda leaves: classes.key(next(leaves), node.implementation)
    takers = [_taker(item, classes) for item in node.items]
    if kind == "list":
        return lambda leaves: [take(leaves) for take in takers]
    if kind == "tuple":
        return lambda leaves: tuple([take(leaves) for take in takers])
    if kind == "dict" and not (node.origin or node.returned):
        keys = _distinct_keys(node)
        return lambda leaves: {
            key: take(leaves) for key, take in zip(keys, takers, strict=True)
        }
    make = _maker_of(kind, node, classes)
    return lambda leaves: make([take(leaves) for take in takers])


def _distinct_keys(node: Any) -> list[Any]:
    keys = [decode_value(key) for key in node.keys]
    if len(keys) != len(node.items) or len(set(keys)) != len(keys):
        raise ProtocolError(
            f"a dict of a tree has {len(node.items)} items for {len(set(keys))} distinct keys"
        )
    return keys


def _maker_of(kind: str, node: Any, classes: Classes) -> Callable[[list[Any]], Any]:
    fields = tuple(_distinct_keys(node) if kind == "dict" else node.fields)
    if len(fields) != len(node.items):
        raise ProtocolError(
            f"the class {node.name!r} of a tree has {len(node.items)} items for"
            f" {len(fields)} fields"
        )
    if node.returned:
        return origins.builder_of(kind, node, fields)
    if not node.origin:
        origins.refuse_without_origin(kind, node.name, fields)
    statics = {} if kind == "dict" else statics_of(node)
    cls = classes.find(kind, node.name, fields, node.origin, statics)
    return lambda items: instantiate(cls, fields, items)


def ordered_keys(value: Mapping[Any, Any]) -> list[Any]:
    """Return the keys of a mapping in the order in which its items travel."""
    if isinstance(value, collections.OrderedDict):
        return list(value)
    try:
        return sorted(value)
    except TypeError:
        return list(value)


def _keys_of(value: Mapping[Any, Any], node: Node | None) -> Sequence[Any]:
    if isinstance(value, PeerMapping):
        return unchanged_keys(value)
    return ordered_keys(value) if node is None else node.fields


def _key(key: Any, path: str) -> pb.Value:
    encoded = encode_key(key)
    if encoded is None:
        raise StructureError(
            f"{path} has the key {key!r}; expected a str, number, bool, None or a tuple of these"
        )
    return encoded
