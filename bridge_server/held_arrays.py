"""Search for arrays inside callables that are served without parameters. Imports no framework."""

import contextlib
import functools
import logging
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_MOST_OBJECTS = 10000
_MOST_SHOWN = 3
_OPAQUE = (str, bytes, int, float, complex, type, types.ModuleType)


def arrays_held(target: Any, is_array: Callable[[Any], bool]) -> list[str]:
    """Return the paths of the arrays in a callable's closure, `self`, attributes and arguments.

    The search ignores globals that a function reads.
    """
    paths: list[str] = []
    pending = [("", target)]
    # References, since an id is valid only while its object lives.
    seen = {id(target): target}
    while pending and len(seen) < _MOST_OBJECTS:
        path, value = pending.pop(0)
        for step, part in _readable(_parts_of(value)):
            if isinstance(part, _OPAQUE) or id(part) in seen:
                continue
            seen[id(part)] = part
            if is_array(part):
                paths.append((path + step).lstrip("."))
            else:
                pending.append((path + step, part))
    return paths


def warn_of_held_arrays(
    log: logging.Logger,
    model: str,
    function: Any,
    is_array: Callable[[Any], bool],
    *,
    noun: str,
    remedy: str,
) -> None:
    """Log the arrays of a function that look like parameters and cannot be trained.

    `noun` is the framework's word for arrays.
    """
    paths = arrays_held(function, is_array)
    if paths:
        shown = ", ".join(paths[:_MOST_SHOWN]) + (
            ", ..." if len(paths) > _MOST_SHOWN else ""
        )
        log.warning(
            "model %r is served without parameters, but holds %d %s (%s): they are constants,"
            " which no client can train; to train them, %s",
            model,
            len(paths),
            noun,
            shown,
            remedy,
        )


def _parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, functools.partial):
        yield from (
            (".func", value.func),
            (".args", value.args),
            (".keywords", value.keywords),
        )
    elif isinstance(value, types.FunctionType):
        yield from _cells_of(value)
    else:
        yield from _attributes_of(value)


def _readable(parts: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield parts until one cannot be read: a model's own class may raise anything."""
    with contextlib.suppress(Exception):
        yield from parts


def _cells_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(
        function.__code__.co_freevars, function.__closure__ or (), strict=True
    ):
        try:
            yield f".{name}", cell.cell_contents
        except ValueError:  # not set yet
            continue
    if hasattr(function, "__wrapped__"):
        yield "", function.__wrapped__


def _attributes_of(value: Any) -> Iterator[tuple[str, Any]]:
    try:
        attributes = dict(vars(value))
    except TypeError:  # it has no attributes
        attributes = {}
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            # A native class, such as that of JAX's arrays, may list names that its objects lack.
            with contextlib.suppress(AttributeError, TypeError):
                attributes.setdefault(name, object.__getattribute__(value, name))
    yield from (
        (f".{name}", part) for name, part in attributes.items() if name != "__wrapped__"
    )
    # functools.wraps and jax.jit set it.
    if "__wrapped__" in attributes or hasattr(type(value), "__wrapped__"):
        yield "", getattr(value, "__wrapped__", None)
