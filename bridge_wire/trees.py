"""Pytrees as messages.

Leaves are handed over beside the tree, in depth-first order; dict keys are in sorted order.
"""

import collections
import dataclasses
import functools
import keyword
import secrets
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from bridge_wire.errors import ProtocolError, StructureError
from bridge_wire.pb import bridge_pb2 as pb

# Protobuf parsers stop at 100 nested messages, and one level of a tree takes two.
MAX_DEPTH = 40
_MAX_CLASSES = 1000
_MAX_FIELDS = 1000  # the time to make a class grows with their square
_MAX_NAME = 255  # characters
_MAX_ORIGIN = 1000  # characters
_NUMBERS = (bool, int, float, complex)


class Node(NamedTuple):
    """A class instance taken apart."""

    cls: type
    fields: tuple[str, ...]
    children: Sequence[Any]
    # Function from children to an instance with the same static parts; hashable, and equal for
    # equal static parts. Or a text: why there is no such function.
    builder: Any
    has_static: bool = False  # whether an instance has parts besides its class and children


# Takes a class instance apart. None: not a container.
Expand = Callable[[Any], Node | None]


class Instance(NamedTuple):
    """Builder of a namedtuple's or dataclass's instances, all of whose parts are in its fields."""

    cls: type
    fields: tuple[str, ...]

    def __call__(self, items: Sequence[Any]) -> Any:
        return instantiate(self.cls, self.fields, items)


class _Structured(NamedTuple):
    """Builder of instances of which a framework knows the structure: the class and its static
    parts."""

    structure: Any
    exact: Hashable  # tells static numbers apart that are equal: 1, 1.0 and True
    unflatten: Callable[[Any, Sequence[Any]], Any]

    def __call__(self, items: Sequence[Any]) -> Any:
        return self.unflatten(self.structure, items)


def structured(
    cls: type,
    fields: tuple[str, ...],
    children: Sequence[Any],
    *,
    structure: Any,
    static: Any,
    unflatten: Callable[[Any, Sequence[Any]], Any],
) -> Node:
    """Return the node of an instance that `unflatten(structure, children)` makes.

    `static` are the parts that lie in the structure: None or () if there are none.
    """
    parts = static if isinstance(static, tuple) else (static,)
    builder: Any = _Structured(
        structure,
        tuple((type(p), repr(p) if type(p) in _NUMBERS else "") for p in parts),
        unflatten,
    )
    try:
        hash(builder)
    except Exception:
        builder = _INCOMPARABLE
    return Node(cls, fields, children, builder, has_static=static is not None and parts != ())


def expand_dataclass(value: Any) -> Node | None:
    """Return what a dataclass instance consists of, or None for anything else."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return None
    names = tuple(field.name for field in dataclasses.fields(value))
    return _node_of_fields(value, names, [getattr(value, name) for name in names])


def _node_of_fields(value: Any, fields: tuple[str, ...], children: Sequence[Any]) -> Node:
    cls = type(value)
    if others := attributes_beyond(value, fields):
        return Node(
            cls,
            fields,
            children,
            f"its attributes {list(others)} are no fields, and were not sent",
            True,
        )
    return Node(cls, fields, children, Instance(cls, fields))


def attributes_beyond(value: Any, fields: Sequence[str]) -> tuple[str, ...]:
    """Return the attributes of an instance that are not among its fields, save caches of
    properties."""
    attributes = getattr(value, "__dict__", None)
    if not attributes or (
        len(attributes) <= len(fields) and not isinstance(value, tuple)
    ):  # the usual case
        return ()
    if _WITHOUT in attributes:
        return cast("tuple[str, ...]", attributes[_WITHOUT])
    others = [name for name in attributes if name not in fields]
    return tuple(
        name
        for name in others
        if not isinstance(getattr(type(value), name, None), functools.cached_property)
    )


_INCOMPARABLE = "its static parts cannot be compared with those of others"

# An attribute of instances that were put together again without these attributes.
_WITHOUT = "_bridge_without"


class _Origins:
    """Names under which peers know this process's classes with their static parts, and the builders
    behind the names.

    A peer that returns an instance returns its name, so no other class is ever used. A class
    without static parts is named by its module, the same in each process; one with static parts
    gets a name that cannot be guessed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: dict[Any, str] = {}
        self._nodes: dict[str, tuple[str, Node]] = {}

    def name_of(self, kind: str, node: Node) -> str:
        """Return the name of a node's class and static parts, the same for equal ones."""
        key = (kind, node.cls, node.fields, node.builder)
        with self._lock:
            try:
                name = self._names.get(key)
            except Exception:  # of arrays, for example
                node = node._replace(builder=_INCOMPARABLE)
                key = (kind, node.cls, node.fields, node.builder)
                name = self._names.get(key)
            if name is None:
                name = f"{node.cls.__module__}.{node.cls.__qualname__}"[:_MAX_ORIGIN]
                if node.has_static or name in self._nodes:
                    name = f"{name[: _MAX_ORIGIN - 40]}#{secrets.token_hex(16)}"
                self._names[key], self._nodes[name] = name, (kind, node._replace(children=()))
                if (
                    len(self._nodes) > _MAX_CLASSES
                ):  # the oldest is forgotten, and refused when it comes back
                    del self._nodes[self._names.pop(next(iter(self._names)))]
        return name

    def builder_of(self, kind: str, record: pb.Tree.Record) -> Callable[[Sequence[Any]], Any]:
        """Return the builder of a record that a peer returns.

        Raises:
          StructureError: its instance cannot be rebuilt.
          ProtocolError: it has other fields than were sent.
        """
        known_kind, node = self._nodes.get(record.returned, ("", None))
        if node is None:
            raise StructureError(
                f"the class {record.returned[:200]!r} is not known here: another process has sent"
                " it, or this one before a restart, or too many classes ago; expected a"
                f" {record.name[:80]!r} from a recent result of this worker: call the function that"
                " returns it again, or pass a dict or a dataclass of your own"
            )
        if (known_kind, node.fields) != (kind, tuple(record.fields)):
            raise ProtocolError(
                f"{record.returned[:80]!r} is a {known_kind} with other fields than"
                f" {list(record.fields)}"
            )
        if isinstance(node.builder, str):
            raise StructureError(
                f"a {record.returned!r} cannot be rebuilt: {node.builder}; pass its parts as a dict"
                " or tuple"
            )
        return node.builder

    def refuse_without_origin(self, kind: str, name: str, fields: tuple[str, ...]) -> None:
        """Raise StructureError for an older peer's record, without origin, that looks like a
        class sent from here."""
        for known_kind, node in list(self._nodes.values()):
            if (known_kind, node.cls.__name__, node.fields) == (kind, name, fields):
                raise StructureError(
                    f"an instance of {name[:80]!r} came without the origin of its class, which may"
                    " be one of this process; install the same version of torch-jax-bridge on both"
                    " sides"
                )


_origins = _Origins()
# The classes made here for peers' classes, and these classes' origins.
_made: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()


class Classes:
    """The namedtuple and dataclass types that stand here for those of peers.

    One is made for each name, fields and origin. Nothing is ever imported on a peer's word. `adopt`
    is called once with each dataclass made here, so that a framework can register it as a pytree
    node.
    """

    def __init__(
        self, adopt: Callable[[type, tuple[str, ...]], None] = lambda cls, fields: None
    ) -> None:
        self._adopt = adopt
        self._known: dict[tuple[str, str, tuple[str, ...], str], type] = {}
        self._lock = threading.Lock()

    def learn(self, kind: str, cls: type, fields: tuple[str, ...], origin: str) -> None:
        """Use a class that was made elsewhere in this process for the peer's class of that
        origin."""
        with self._lock:
            self._keep((kind, cls.__name__, fields, origin), cls)

    def find(self, kind: str, name: str, fields: tuple[str, ...], origin: str) -> type:
        """Return the class that stands for the peer's, making it when it is new here."""
        with self._lock:
            found = self._known.get((kind, name, fields, origin))
            if found is None:
                found = self._make(kind, name, fields, origin)
                _made[found] = origin
                self._keep((kind, name, fields, origin), found)
        return found

    def _keep(self, key: tuple[str, str, tuple[str, ...], str], cls: type) -> None:
        self._known[key] = cls
        if (
            len(self._known) > _MAX_CLASSES
        ):  # forget the oldest: no client may take the room of all others
            del self._known[next(iter(self._known))]

    def _make(self, kind: str, name: str, fields: tuple[str, ...], origin: str) -> type:
        if len(origin) > _MAX_ORIGIN:
            raise ProtocolError(
                f"a tree names a class's origin by {len(origin)} characters; at most {_MAX_ORIGIN}"
                " are allowed"
            )
        if len(fields) > _MAX_FIELDS:
            raise ProtocolError(
                f"a tree names a class of {len(fields)} fields; at most {_MAX_FIELDS} are allowed"
            )
        for word in (name, *fields):
            is_special = word.startswith("__") and word.endswith(
                "__"
            )  # would replace the class's own machinery
            if (
                not word.isidentifier()
                or keyword.iskeyword(word)
                or is_special
                or len(word) > _MAX_NAME
            ):
                raise ProtocolError(
                    f"a tree names a class or field {word[:80]!r}, which is no plain identifier"
                )
        try:
            if kind == "namedtuple":
                return collections.namedtuple(name, fields)
            cls = dataclasses.make_dataclass(name, fields, frozen=True, eq=False)
        except (ValueError, TypeError, SyntaxError) as error:
            raise ProtocolError(
                f"a tree names the class {name!r} with unusable fields: {error}"
            ) from error
        self._adopt(cls, fields)
        return cls


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
      StructureError: something in it is neither a leaf, a container nor a static value (None, bool,
        number, str).
    """
    leaves: list[Any] = []

    def sequence(items: Iterable[Any], path: str, depth: int) -> pb.Tree.Sequence:
        return pb.Tree.Sequence(
            items=[walk(item, f"{path}[{i}]", depth) for i, item in enumerate(items)]
        )

    def record(kind: str, node: Node, path: str, depth: int) -> pb.Tree.Record:
        items = [
            walk(item, f"{path}.{field}", depth)
            for field, item in zip(node.fields, node.children, strict=True)
        ]
        made = pb.Tree.Record(name=node.cls.__name__, fields=node.fields, items=items)
        if (origin := _made.get(node.cls)) is not None:
            classes.learn(kind, node.cls, node.fields, origin)
            made.returned = origin
        else:
            made.origin = _origins.name_of(kind, node)
        return made

    def walk(value: Any, path: str, depth: int) -> pb.Tree:
        if is_leaf(value):
            leaves.append(value)
            return pb.Tree(leaf=pb.Tree.Leaf())
        if (static := _encode_value(value)) is not None:
            return pb.Tree(value=static)
        if depth == MAX_DEPTH:
            raise StructureError(
                f"{path} is nested more than {MAX_DEPTH} levels deep; flatten the structure"
            )
        depth += 1
        if isinstance(value, tuple):
            if (fields := getattr(value, "_fields", None)) is None:
                return pb.Tree(tuple=sequence(value, path, depth))
            return pb.Tree(
                namedtuple=record("namedtuple", _node_of_fields(value, fields, value), path, depth)
            )
        if isinstance(value, list):
            return pb.Tree(list=sequence(value, path, depth))
        if isinstance(value, Mapping):
            keys = ordered_keys(value)
            items = [walk(value[key], f"{path}[{key!r}]", depth) for key in keys]
            return pb.Tree(
                dict=pb.Tree.Mapping(keys=[_key(key, path) for key in keys], items=items)
            )
        if (node := expand(value)) is not None:
            return pb.Tree(dataclass=record("dataclass", node, path, depth))
        raise StructureError(
            f"{path or 'the value'} is a {type(value).__module__}.{type(value).__qualname__};"
            " expected a tensor, a number, bool, str or None, or a dict, list, tuple, namedtuple"
            " or dataclass of these"
        )

    tree = walk(value, root, 0)
    return tree, leaves


def build(tree: pb.Tree, leaves: Iterable[Any], classes: Classes) -> Any:
    """Return the value that a tree describes, with these array leaves.

    Raises:
      ProtocolError: the tree is malformed, or has more or fewer leaves than were given.
    """
    remaining = iter(leaves)
    try:
        value = _build(tree, remaining, classes)
    except StopIteration:
        raise ProtocolError("a tree has more leaves than arrays came with it") from None
    if next(remaining, remaining) is not remaining:
        raise ProtocolError("a tree has fewer leaves than arrays came with it")
    return value


def leaf_paths(tree: pb.Tree, root: str) -> list[str]:
    """Return the path of each array leaf, such as `args[0]['w']`, in the order of the leaves."""
    return [path for path, end in _ends(tree, root) if end.WhichOneof("kind") == "leaf"]


def _ends(tree: pb.Tree, root: str) -> Iterator[tuple[str, pb.Tree]]:
    """Yield the path of each array leaf and each static value, and what is there."""
    kind = tree.WhichOneof("kind")
    if kind is None or kind == "leaf" or kind == "value":
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
        (path, decode_value(end.value)) for path, end in ends if end.WhichOneof("kind") == "value"
    ]


def count_nodes(tree: pb.Tree, most: int) -> int:
    """Return the number of a tree's containers, values and leaves, but count no further than
    `most`."""
    pending, count = [tree], 0
    while pending and count < most:
        node = pending.pop()
        count += 1
        kind = node.WhichOneof("kind")
        if kind is not None and kind not in ("leaf", "value"):
            pending += getattr(node, kind).items[: most - count]
    return count


def without_origins(tree: pb.Tree) -> pb.Tree:
    """Return a copy of a tree without the origins of classes, which differ from one process to
    the next."""
    made = pb.Tree()
    made.CopyFrom(tree)
    pending = [made]
    while pending:
        kind = (each := pending.pop()).WhichOneof("kind")
        if kind is None or kind in ("leaf", "value"):
            continue
        node = getattr(each, kind)
        if kind in ("namedtuple", "dataclass"):
            node.ClearField("origin")
        pending += node.items
    return made


def flat(count: int) -> pb.Tree:
    """Return the tree of a tuple of `count` arrays."""
    return pb.Tree(tuple=pb.Tree.Sequence(items=[pb.Tree(leaf=pb.Tree.Leaf())] * count))


def _build(tree: pb.Tree, leaves: Iterator[Any], classes: Classes) -> Any:
    kind = tree.WhichOneof("kind")
    if kind == "leaf":
        return next(leaves)
    if kind == "value":
        return decode_value(tree.value)
    if kind is None:
        raise ProtocolError("a tree has a node of no kind")
    node = getattr(tree, kind)
    items = [_build(item, leaves, classes) for item in node.items]
    if kind == "list":
        return items
    if kind == "tuple":
        return tuple(items)
    if kind == "dict":
        keys = [decode_value(key) for key in node.keys]
        if len(keys) != len(items) or len(set(keys)) != len(keys):
            raise ProtocolError(
                f"a dict of a tree has {len(items)} items for {len(set(keys))} distinct keys"
            )
        return dict(zip(keys, items, strict=True))
    fields = tuple(node.fields)
    if len(fields) != len(items):
        raise ProtocolError(
            f"the class {node.name!r} of a tree has {len(items)} items for {len(fields)} fields"
        )
    if node.returned:
        return _origins.builder_of(kind, node)(items)
    if not node.origin:
        _origins.refuse_without_origin(kind, node.name, fields)
    return instantiate(classes.find(kind, node.name, fields, node.origin), fields, items)


def instantiate(
    cls: type, fields: Sequence[str], items: Iterable[Any], without: tuple[str, ...] = ()
) -> Any:
    """Return an instance of a namedtuple's or dataclass's class with these values of its fields.

    `without` names further attributes that the instance should have, and has not.
    """
    # Not through __new__ or __init__: a user's class may compute there, and a field may have
    # init=False.
    if issubclass(cls, tuple):
        return tuple.__new__(cls, items)
    instance = object.__new__(cls)
    for field, item in zip(fields, items, strict=True):
        object.__setattr__(instance, field, item)
    if without:
        object.__setattr__(instance, _WITHOUT, without)
    return instance


def ordered_keys(value: Mapping[Any, Any]) -> list[Any]:
    """Return the keys of a mapping in the order in which its items travel."""
    if isinstance(value, collections.OrderedDict):
        return list(value)
    try:
        return sorted(value)
    except TypeError:
        return list(value)


def _key(key: Any, path: str) -> pb.Value:
    encoded = _encode_value(key)
    if encoded is None:
        raise StructureError(f"{path} has the key {key!r}; expected a str, number, bool or None")
    return encoded


def _encode_value(value: Any) -> pb.Value | None:
    if value is None:
        return pb.Value(none=True)
    # Exact types: a subclass (an enum, a NumPy scalar) would come back as something else.
    kind = type(value)
    if kind is bool:
        return pb.Value(boolean=value)
    if kind is str:
        try:
            return pb.Value(text=value)
        except UnicodeEncodeError:
            raise StructureError(
                f"the text {value[:80]!r} has lone surrogates, which UTF-8 cannot carry"
            ) from None
    if kind is float:
        return pb.Value(real=value)
    if kind is complex:
        return pb.Value(complex=pb.Value.Complex(real=value.real, imag=value.imag))
    if kind is int:
        if not -(2**63) <= value < 2**63:
            raise StructureError(
                f"the static integer {value} does not fit in 64 bits; pass it as a string"
            )
        return pb.Value(integer=value)
    return None


def decode_value(value: pb.Value) -> Any:
    """Return the static value that a message carries."""
    kind = value.WhichOneof("kind")
    if kind is None:
        raise ProtocolError("a static value has no kind")
    if kind == "none":
        return None
    if kind == "complex":
        return complex(value.complex.real, value.complex.imag)
    return getattr(value, kind)
