"""Instances of a peer's classes: read, compared and changed like dataclasses."""

import contextlib
import dataclasses
import enum
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from bridge_wire.errors import StructureError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.values import decode_value, encode_value

# Attribute of instances that a framework has unflattened: the fields that belong to the structure.
_MARK = "_bridge_static_fields"
_PLAIN = (type(None), bool, int, float, complex, str)


class PeerInstance:
    """Base of the dataclasses that stand for a peer's classes.

    The fields are data. Static parts that are plain values are attributes of the class.
    """

    _bridge_statics: Mapping[str, Any] = {}
    _bridge_fields: tuple[str, ...] = ()

    def __repr__(self) -> str:
        parts = {name: getattr(self, name) for name in fields_of(self)}
        parts |= self._bridge_statics
        shown = ", ".join(f"{name}={value!r}" for name, value in parts.items())
        return f"{type(self).__name__}({shown})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        names = fields_of(self)
        return all(_are_equal(getattr(self, x), getattr(other, x)) for x in names)

    __hash__ = None  # type: ignore[assignment]


class PeerMapping(dict[Any, Any]):
    """Base of the mappings that stand for a peer's classes.

    Items are attributes too, where their keys are texts that dict itself does not use.
    """

    _bridge_statics: Mapping[str, Any] = {}
    _bridge_fields: tuple[Any, ...] = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"{type(self).__name__!r} has no item {name!r}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self:
            self[name] = value
        elif name.startswith("_bridge"):
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(
                f"{type(self).__name__!r} has no item {name!r}; its items are {list(self)[:20]}"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({super().__repr__()})"

    def replace(self, **changes: Any) -> "PeerMapping":
        """Return a copy with other values of these items."""
        return type(self)({**self, **changes})


def parts_of(fields: tuple[Any, ...], cls: type) -> Callable[[Any], Sequence[Any]]:
    """Return the function from an instance of a peer's class to its items.

    It raises StructureError for a mapping whose keys have changed.
    """
    if issubclass(cls, PeerMapping):
        return lambda value: [value[key] for key in unchanged_keys(value)]
    if len(fields) > 1:
        return operator.attrgetter(*fields)
    return lambda value: [getattr(value, field) for field in fields]


def unchanged_keys(value: PeerMapping) -> Sequence[Any]:
    """Return the keys of a mapping in the order in which its items travel.

    Raises:
      StructureError: keys were added or removed.
    """
    keys = value._bridge_fields
    if len(value) != len(keys) or not all(key in value for key in keys):
        raise StructureError(
            f"a {type(value).__name__} of the worker has the keys {list(value)[:20]}, but had"
            f" {list(keys)[:20]}; keep its keys, or pass a dict"
        )
    return keys


def static_among(value: Any, named: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return the items of an instance that are part of its structure in a framework's pytrees.

    Of a result these are None, numbers and texts, since transforms refuse such leaves. An instance
    that the framework has unflattened may have them as leaves: it maps over dimensions.
    """
    marked = getattr(value, "__dict__", {}).get(_MARK)
    if marked is None:
        return {name: part for name, part in named if type(part) in _PLAIN}
    return {name: part for name, part in named if name in marked}


def with_mark(value: Any, parts: Sequence[Any], static: Collection[Any]) -> Any:
    """Return an unflattened instance with these parts, after noting the static ones."""
    if any(type(part) in _PLAIN for part in parts):
        object.__setattr__(value, _MARK, tuple(static))
    return value


def fields_of(instance: Any) -> tuple[str, ...]:
    """Return the names of the fields of an instance of a peer's class, or a mapping's keys."""
    fields: tuple[str, ...] = type(instance)._bridge_fields
    return fields


def complete(cls: type, fields: tuple[str, ...], statics: Mapping[str, Any]) -> None:
    """Give a class its static parts, and `replace` unless that is a field."""
    for name, value in statics.items():
        setattr(cls, name, value)
    cls._bridge_statics = statics  # type: ignore[attr-defined]
    cls._bridge_fields = fields  # type: ignore[attr-defined]
    if issubclass(cls, PeerInstance) and "replace" not in {*fields, *statics}:
        cls.replace = dataclasses.replace  # type: ignore[attr-defined]


def static_parts(instance: Any, fields: Collection[str]) -> Iterator[pb.Tree.Static]:
    """Yield an instance's plain values that are not among these fields of data."""
    if isinstance(instance, tuple):
        return
    for name, part in _named_parts(instance):
        try:
            value = None if name in fields else encode_value(part)
        except StructureError:  # such as an integer of more than 64 bits
            continue
        if value is not None:
            yield pb.Tree.Static(name=name, value=value)


def _named_parts(instance: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(instance, enum.Enum):
        yield from (("name", instance.name), ("value", instance.value))
    elif dataclasses.is_dataclass(instance):
        for field in dataclasses.fields(instance):
            yield field.name, getattr(instance, field.name, instance)
    elif type(instance).__module__ == "torch":  # a dtype, device or layout
        yield "name", str(instance)
    else:
        with contextlib.suppress(Exception):  # computed attributes may raise
            name = getattr(instance, "__name__", getattr(instance, "name", None))
            if isinstance(name, str):
                yield "name", name


def statics_of(record: pb.Tree.Record) -> dict[str, Any]:
    """Return the static parts that a record shows."""
    return {each.name: decode_value(each.value) for each in record.statics}


def _are_equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_are_equal(*pair) for pair in pairs)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(
            _are_equal(value, other[key]) for key, value in one.items()
        )
    if getattr(one, "shape", ()) != getattr(other, "shape", ()):
        return False
    same = one == other
    return bool(same.all() if hasattr(same, "all") else same)
