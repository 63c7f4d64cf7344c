"""Class instances in pytrees: their parts and origins, and the classes that stand for a peer's."""

import collections
import dataclasses
import functools
import keyword
import secrets
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, cast

from bridge_wire.errors import ProtocolError, StructureError
from bridge_wire.pb import bridge_pb2 as pb

_MAX_CLASSES = 1000
_MAX_FIELDS = 1000  # the time to make a class grows with their square
_MAX_NAME = 255  # characters
_MAX_ORIGIN = 1000  # characters
_NUMBERS = (bool, int, float, complex)


class Node(NamedTuple):
    """The parts of a class instance."""

    cls: type
    fields: tuple[str, ...]
    children: Sequence[Any]
    # Function from children to an instance with the same static parts: hashable, and equal for
    # equal static parts. Or a text: the reason why instances cannot be rebuilt.
    builder: Any
    # Whether an instance has parts besides its class and children.
    has_static: bool = False


# Returns the parts of a class instance; None: the value is no container.
Expand = Callable[[Any], Node | None]


class Instance(NamedTuple):
    """Builder of a namedtuple's or dataclass's instances, all of whose parts are in its fields."""

    cls: type
    fields: tuple[str, ...]

    def __call__(self, items: Sequence[Any]) -> Any:
        return instantiate(self.cls, self.fields, items)


class _Structured(NamedTuple):
    """Builder of instances whose class and static parts lie in a framework's structure."""

    structure: Any
    exact: Hashable  # distinguishes equal static numbers: 1, 1.0 and True
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
    return Node(
        cls, fields, children, builder, has_static=static is not None and parts != ()
    )


def expand_dataclass(value: Any) -> Node | None:
    """Return a dataclass instance's class and fields, or None for any other value."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return None
    names = tuple(field.name for field in dataclasses.fields(value))
    return node_of_fields(value, names, [getattr(value, name) for name in names])


def node_of_fields(
    value: Any, fields: tuple[str, ...], children: Sequence[Any]
) -> Node:
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
    """Return the names of attributes beyond an instance's fields, except cached properties."""
    attributes = getattr(value, "__dict__", None)
    if not attributes:
        return ()
    # The usual case.
    if len(attributes) <= len(fields) and not isinstance(value, tuple):
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

# Attribute of rebuilt instances: the names of attributes that they lack.
_WITHOUT = "_bridge_without"


class _Origins:
    """The origins of this process's classes: names known to peers, and the builders behind them.

    A peer returns an instance together with its origin, so no other class is ever used. The origin
    of a class without static parts is its module and name, equal in each process. A class with
    static parts gets an origin that cannot be guessed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: dict[Any, str] = {}
        self._nodes: dict[str, tuple[str, Node]] = {}

    def name_of(self, kind: str, node: Node) -> str:
        """Return the origin of a node's class and static parts; equal parts have equal origins."""
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
                self._names[key], self._nodes[name] = (
                    name,
                    (kind, node._replace(children=())),
                )
                # The oldest is forgotten, and refused when it comes back.
                if len(self._nodes) > _MAX_CLASSES:
                    del self._nodes[self._names.pop(next(iter(self._names)))]
        return name

    def builder_of(
        self, kind: str, record: pb.Tree.Record
    ) -> Callable[[Sequence[Any]], Any]:
        """Return the builder of a record that a peer returns.

        Raises:
          StructureError: its instance cannot be rebuilt.
          ProtocolError: it has other fields than were sent.
        """
        known_kind, node = self._nodes.get(record.returned, ("", None))
        if node is None:
            raise StructureError(
                f"the class {record.returned[:200]!r} is not known here: it was sent by another"
                " process, or before a restart, or too many classes ago; expected a"
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
        builder: Callable[[Sequence[Any]], Any] = node.builder
        return builder

    def refuse_without_origin(
        self, kind: str, name: str, fields: tuple[str, ...]
    ) -> None:
        """Raise StructureError for an older peer's record that may be a class sent from here."""
        for known_kind, node in list(self._nodes.values()):
            if (known_kind, node.cls.__name__, node.fields) == (kind, name, fields):
                raise StructureError(
                    f"an instance of {name[:80]!r} came without the origin of its class, which may"
                    " be one of this process; install the same version of torch-jax-bridge on both"
                    " sides"
                )


origins = _Origins()
# The classes made here for peers' classes, and these classes' origins.
made_here: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()


class Classes:
    """The namedtuple and dataclass types that stand here for a peer's classes.

    Each name, fields and origin get a class of their own. Nothing is ever imported on a peer's
    word. `adopt` is called once with each new dataclass, for a framework to register it as a pytree
    node.
    """

    def __init__(
        self, adopt: Callable[[type, tuple[str, ...]], None] = lambda cls, fields: None
    ) -> None:
        self._adopt = adopt
        self._known: dict[tuple[str, str, tuple[str, ...], str], type] = {}
        self._lock = threading.Lock()

    def learn(self, kind: str, cls: type, fields: tuple[str, ...], origin: str) -> None:
        """Use an existing class of this process for the peer's class of that origin."""
        with self._lock:
            self._keep((kind, cls.__name__, fields, origin), cls)

    def find(self, kind: str, name: str, fields: tuple[str, ...], origin: str) -> type:
        """Return the class that stands for a peer's class; make it at first."""
        with self._lock:
            found = self._known.get((kind, name, fields, origin))
            if found is None:
                found = self._make(kind, name, fields, origin)
                made_here[found] = origin
                self._keep((kind, name, fields, origin), found)
        return found

    def _keep(self, key: tuple[str, str, tuple[str, ...], str], cls: type) -> None:
        self._known[key] = cls
        # Forget the oldest: no client may take the room of all others.
        if len(self._known) > _MAX_CLASSES:
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
            # Would replace the class's own machinery.
            is_special = word.startswith("__") and word.endswith("__")
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


def instantiate(
    cls: type,
    fields: Sequence[str],
    items: Iterable[Any],
    without: tuple[str, ...] = (),
) -> Any:
    """Return an instance of a namedtuple's or dataclass's class with these values of its fields.

    `without` names attributes that the original has and the new instance lacks.
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
