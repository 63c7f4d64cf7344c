"""Search for arrays inside callables that are served without parameters. Imports no framework."""

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_MOST_OBJECTS = 10000
_OPAQUE = (str, bytes, int, float, complex, type, types.ModuleType)


def arrays_held(target: Any, is_array: Callable[[Any], bool]) -> list[str]:
    """Return the paths of the arrays that a callable holds: in its closure, its `self`, its
    attributes and arguments.

    What a function reads as a global of its module is not looked at.
    """
    found: list[str] = []
    pending, seen = [("", target)], {id(target)}
    alive = [target]  # an id names an object as long as it lives
    while pending and len(alive) < _MOST_OBJECTS:
        path, value = pending.pop(0)
        for step, part in _parts_of(value):
            if isinstance(part, _OPAQUE) or id(part) in seen:
                continue
            seen.add(id(part))
            alive.append(part)
            if is_array(part):
                found.append((path + step).lstrip("."))
            else:
                pending.append((path + step, part))
    return found


def _parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, types.FunctionType):
        yield from _cells_of(value)
    else:
        yield from _attributes_of(value)


def _cells_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f".{name}", cell.cell_contents
        except ValueError:  # not set yet
            continue
    if hasattr(function, "__wrapped__"):
        yield "", function.__wrapped__


def _attributes_of(value: Any) -> Iterator[tuple[str, Any]]:
    try:
        attributes = dict(vars(value))
    except TypeError:  # it has none
        attributes = {}
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            try:
                attributes.setdefault(name, object.__getattribute__(value, name))
            except AttributeError:
                continue
    yield from ((f".{name}", part) for name, part in attributes.items() if name != "__wrapped__")
    if "__wrapped__" in attributes or hasattr(
        type(value), "__wrapped__"
    ):  # of functools.wraps, jax.jit
        yield "", getattr(value, "__wrapped__", None)
