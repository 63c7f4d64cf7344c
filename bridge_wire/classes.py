"""Class instances in pytrees: their parts and origins, and the classes that stand for a peer's."""

import collections
import dataclasses
import functools
import keyword
import secrets
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from bridge_wire.errors import ProtocolError, StructureError
from bridge_wire.instances import (
    PeerInstance,
    PeerMapping,
    complete,
    fields_of,
    parts_of,
)
from bridge_wire.keys import Key
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.recipes import Recipes

_MAX_CLASSES = 1000
_MAX_FIELDS = 1000  # the time to make a class grows with their square
_MAX_NAME = 255  # characters
_MAX_ORIGIN = 1000  # characters
_PLAIN = (bool, int, float, complex, str)
_OTHER = object()  # stands for a value that is compared by its own equality
_NOTHING: Mapping[str, Any] = {}


class Node(NamedTuple):
    """The parts of a class instance."""

    cls: type
    fields: tuple[Any, ...]  # names, or a mapping's keys
    children: Sequence[Any]
    # Function from children to an instance with the same static parts: hashable, and equal for
    # equal static parts. Or a text: the reason why instances cannot be rebuilt.
    builder: Any
    # Whether an instance has parts besides its class and children.
    has_static: bool = False


# Returns the parts of a class instance or the data of keys; None: the value is no container.
Expand = Callable[[Any], Node | Key | None]


class Instance(NamedTuple):
    """Builder of a namedtuple's or dataclass's instances, all of whose parts are in its fields."""

    cls: type
    fields: tuple[str, ...]

    def __call__(self, items: Sequence[Any]) -> Any:
        return instantiate(self.cls, self.fields, items)


@dataclasses.dataclass(frozen=True, eq=False)
class _Structured:
    """Builder of instances whose class and static parts lie in a framework's structure."""

    structure: Any
    exact: Hashable  # types and plain values, since 1, 1.0 and True are equal
    unflatten: Callable[[Any, Sequence[Any]], Any]

    def __call__(self, items: Sequence[Any]) -> Any:
        return self.unflatten(self.structure, items)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Structured) or self.unflatten != other.unflatten:
            return False
        if self.exact != other.exact:
            return False
        # Structures that hold arrays cannot be compared, and need not be.
        return _is_complete(self.exact) or bool(self.structure == other.structure)

    def __hash__(self) -> int:
        return hash((self.structure, self.exact, self.unflatten))


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
    try:
        builder: Any = _Structured(structure, tuple(map(_exact, parts)), unflatten)
        hash(builder)
    except Exception:
        builder = _INCOMPARABLE
    return Node(
        cls, fields, children, builder, has_static=static is not None and parts != ()
    )


class _Constant(NamedTuple):
    """Builder of one object without parts."""

    value: Any

    def __call__(self, items: Sequence[Any]) -> Any:
        return self.value


def constant(value: Hashable) -> Node:
    """Return the node of an object that a peer only hands back."""
    return Node(type(value), (), (), _Constant(value), has_static=True)


def _exact(part: Any) -> Hashable:
    """Return types and plain values of a static part, which tell apart parts that are equal: 1, 1.0
    and True, or arrays of one element.

    Raises:
      Exception: the part cannot be described.
    """
    kind = type(part)
    if kind in _PLAIN or getattr(part, "shape", None) == ():
        return kind, repr(part)
    if isinstance(part, tuple | list):
        return kind, tuple(map(_exact, part))
    if isinstance(part, Mapping):
        return kind, tuple((_exact(key), _exact(part[key])) for key in part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        names = [field.name for field in dataclasses.fields(part)]
        return kind, tuple(_exact(getattr(part, name, None)) for name in names)
    if isinstance(part, set | frozenset):
        return kind, frozenset(map(_exact, part))
    if hasattr(part, "__array__"):
        return kind, str(part.dtype), part.shape, part.tobytes()
    return kind, _OTHER


def _is_complete(exact: Hashable) -> bool:
    """Return whether a description tells all of a static part."""
    if isinstance(exact, tuple | frozenset):
        return all(map(_is_complete, exact))
    return exact is not _OTHER


def expand_dataclass(value: Any) -> Node | None:
    """Return a dataclass instance's class and fields, or None for any other value."""
    is_instance = dataclasses.is_dataclass(value) and not isinstance(value, type)
    if not is_instance or isinstance(value, Mapping):
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


def name_of_class(cls: type) -> str:
    """Return a class's module and name, as origins begin with it."""
    return f"{cls.__module__}.{cls.__qualname__}"[: _MAX_ORIGIN - 40]


def _key_of(kind: str, node: Node) -> Any:
    return kind, node.cls, node.fields, node.builder


def _are_alike(one: tuple[str, Node], other: tuple[str, Node]) -> bool:
    """Return whether instances differ in parts only that have no plain values, if at all."""
    (kind, node), (other_kind, known) = one, other
    same_class = (kind, node.cls, node.fields) == (other_kind, known.cls, known.fields)
    exact = getattr(node.builder, "exact", node.builder)
    return same_class and exact == getattr(known.builder, "exact", known.builder)


def _forget_oldest(known: dict[Any, Any]) -> None:
    if len(known) > _MAX_CLASSES:
        del known[next(iter(known))]


_INCOMPARABLE = "its static parts cannot be compared with those of others"

# Attribute of rebuilt instances: the names of attributes that they lack.
_WITHOUT = "_bridge_without"


class _Origins:
    """The origins of this process's classes: names known to peers, and the builders behind them.

    A peer returns an instance together with its origin, so no other class is ever used. An origin
    has the class's module and name; those of classes with static parts cannot be guessed. A worker
    renames its origins by recipes, which are the same in each process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: dict[Any, str] = {}
        self._nodes: dict[str, tuple[str, Node]] = {}
        self._used: set[str] = set()  # names of classes, each an origin of its own once
        # Lasting names, by the names that they replace: of trees made before.
        self._renamed: dict[str, str] = {}

    def name_of(self, kind: str, node: Node) -> str:
        """Return the origin of a node's class and static parts; equal parts have equal origins."""
        with self._lock:
            try:
                name = self._names.get(_key_of(kind, node))
            except Exception:  # of arrays, for example
                node = node._replace(builder=_INCOMPARABLE)
                name = self._names.get(_key_of(kind, node))
            if name is None:
                name = name_of_class(node.cls)
                if node.has_static or name in self._used:
                    name = f"{name}#{secrets.token_hex(16)}"
                self._used.add(name_of_class(node.cls))
                self._names[_key_of(kind, node)] = name
                self._add(name, kind, node._replace(children=()))
        return name

    def rename(self, origin: str, lasting: str) -> str:
        """Let peers know an origin by a lasting name, unless it has one; return that name."""
        with self._lock:
            kind, node = self._nodes.get(origin, ("", None))
            if node is None or self._is_lasting(origin):
                return self._renamed.get(origin, origin)
            # Each trace of a call may make functions and objects of its own.
            known = self._nodes.get(lasting)
            if known is not None and not _are_alike((kind, node), known):
                return origin
            del self._nodes[origin]
            self._names[_key_of(kind, node)] = self._renamed[origin] = lasting
            if known is None:
                self._add(lasting, kind, node)
            _forget_oldest(self._renamed)
        return lasting

    def alias(self, origin: str, other: str) -> None:
        """Let peers return instances of an origin by another name too."""
        with self._lock:
            if origin in self._nodes:
                self._add(other, *self._nodes[origin])

    def are_same(self, origin: str, other: str) -> bool:
        """Return whether two names are of one class and its static parts."""
        _, node = self._nodes.get(origin, ("", None))
        return node is not None and node is self._nodes.get(other, ("", None))[1]

    def class_of(self, origin: str) -> type | None:
        """Return the class of an origin; None if the origin is not known here."""
        _, node = self._nodes.get(self._renamed.get(origin, origin), ("", None))
        return None if node is None else node.cls

    def _add(self, name: str, kind: str, node: Node) -> None:
        self._nodes[name] = (kind, node)
        # The oldest is forgotten, and refused when it comes back.
        if len(self._nodes) > _MAX_CLASSES:
            oldest = next(iter(self._nodes))
            key = _key_of(*self._nodes.pop(oldest))
            if self._names.get(key) == oldest:
                del self._names[key]

    def _is_lasting(self, origin: str) -> bool:
        return origin in self._renamed.values()

    def builder_of(
        self, kind: str, record: Any, fields: tuple[Any, ...]
    ) -> Callable[[Sequence[Any]], Any]:
        """Return the builder of a record or mapping with these fields that a peer returns.

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
        if (known_kind, node.fields) != (kind, fields):
            raise ProtocolError(
                f"{record.returned[:80]!r} is a {known_kind} with other fields than"
                f" {list(fields)}"
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

Adopt = Callable[[type, tuple[str, ...]], None]
# Kind, name, fields, origin and static parts.
_Key = tuple[str, str, tuple[str, ...], str, str]


class Classes:
    """The namedtuple and dataclass types that stand here for a peer's classes.

    Each name, fields and origin get a class of their own. Nothing is ever imported on a peer's
    word. Frameworks adopt each dataclass that is made: they register it as a pytree node.
    """

    def __init__(self, *adopt: Adopt, key: Callable[[Any, str], Any] = Key) -> None:
        """`key` makes an array of random keys of their data and implementation."""
        self.key = key
        self._adopters = list(adopt)
        self._known: dict[_Key, type] = {}
        self._lock = threading.Lock()

    def adopt_by(self, adopt: Adopt) -> None:
        """Have a framework adopt the dataclasses made so far and from now on."""
        with self._lock:
            self._adopters.append(adopt)
            for (kind, _, fields, *_), cls in self._known.items():
                if kind != "namedtuple" and cls in made_here:
                    adopt(cls, fields)

    def learn(self, kind: str, cls: type, fields: tuple[str, ...], origin: str) -> None:
        """Use an existing class of this process for the peer's class of that origin."""
        with self._lock:
            self._keep((kind, cls.__name__, fields, origin, repr([])), cls)

    def find(
        self,
        kind: str,
        name: str,
        fields: tuple[str, ...],
        origin: str,
        statics: Mapping[str, Any] = _NOTHING,
    ) -> type:
        """Return the class that stands for a peer's class; make it at first."""
        with self._lock:
            # Static parts too: a pickle may tell others than the worker.
            key = (kind, name, fields, origin, repr(sorted(statics.items())))
            found = self._known.get(key)
            if found is None:
                named = () if kind == "dict" else fields
                _check_names(name, named, origin, statics)
                found = _made(kind, name, fields)
                complete(found, fields, statics)
                found.__reduce__ = _reduced  # type: ignore[assignment]
                made_here[found] = origin
                for adopt in self._adopters if kind != "namedtuple" else ():
                    adopt(found, fields)
                self._keep(key, found)
        return found

    def _keep(self, key: "_Key", cls: type) -> None:
        self._known[key] = cls
        # Forget the oldest: no client may take the room of all others.
        _forget_oldest(self._known)


# The classes that stand for those of workers, and the recipes of their origins. Of a client: all
# of its functions share them.
peers = Classes()
recipes = Recipes()


def restored(
    identity: tuple[str, str, tuple[str, ...], str],
    statics: Mapping[str, Any],
    known: Iterable[str],
    items: Sequence[Any],
) -> Any:
    """Return a pickled instance of a worker's class.

    `identity` are the arguments of `Classes.find`, `known` the needed recipes as text.
    """
    recipes.learn(pb.Recipe.FromString(each.encode("latin1")) for each in known)
    _, _, fields, _ = identity
    return instantiate(peers.find(*identity, statics), fields, items)


def _reduced(instance: Any) -> tuple[Any, ...]:
    """Pickle an instance without code: its identity, recipes and items."""
    cls, fields = type(instance), fields_of(instance)
    kind = _kind_of(cls)
    identity = (kind, cls.__name__, fields, made_here[cls])
    needed = recipes.of([made_here[cls]])
    known = [each.SerializeToString().decode("latin1") for each in needed]
    items = tuple(parts_of(fields, cls)(instance))
    return restored, (identity, dict(cls._bridge_statics), known, items)


def _kind_of(cls: type) -> str:
    if issubclass(cls, tuple):
        return "namedtuple"
    return "dict" if issubclass(cls, PeerMapping) else "dataclass"


def _check_names(
    name: str, fields: Sequence[str], origin: str, statics: Iterable[str]
) -> None:
    if len(origin) > _MAX_ORIGIN:
        raise ProtocolError(
            f"a tree names a class's origin by {len(origin)} characters; at most {_MAX_ORIGIN}"
            " are allowed"
        )
    names = (name, *fields, *statics)
    if len(names) > _MAX_FIELDS:
        raise ProtocolError(
            f"a tree names a class of {len(names)} fields; at most {_MAX_FIELDS} are allowed"
        )
    for word in names:
        if not is_plain_name(word):
            raise ProtocolError(
                f"a tree names a class or field {word[:80]!r}, which is no plain identifier"
            )


def is_plain_name(word: str) -> bool:
    """Return whether a class or field may have a name: it is no name of Python's own."""
    # Would replace the class's own machinery.
    is_special = word.startswith("__") and word.endswith("__")
    is_own = keyword.iskeyword(word) or is_special
    return word.isidentifier() and not is_own and len(word) <= _MAX_NAME


def _made(kind: str, name: str, fields: tuple[str, ...]) -> type:
    try:
        if kind == "namedtuple":
            return collections.namedtuple(name, fields)
        if kind == "dict":
            return type(name, (PeerMapping,), {})
        return dataclasses.make_dataclass(
            name, fields, bases=(PeerInstance,), frozen=True, eq=False, repr=False
        )
    except (ValueError, TypeError, SyntaxError) as error:
        raise ProtocolError(
            f"a tree names the class {name!r} with unusable fields: {error}"
        ) from error


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
    if issubclass(cls, PeerMapping):
        return cls(zip(fields, items, strict=True))
    instance = object.__new__(cls)
    for field, item in zip(fields, items, strict=True):
        object.__setattr__(instance, field, item)
    if without:
        object.__setattr__(instance, _WITHOUT, without)
    return instance
