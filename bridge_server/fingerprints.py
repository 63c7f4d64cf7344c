"""Digests of everything that determines a call's results, equal in each process with the model.

Each runtime adds its trace of a call, with the trace's constants. This module adds the code that a
trace of a forward does not show, such as the rules of custom derivatives and branches not taken.
Imports no framework.
"""

import contextlib
import dis
import functools
import hashlib
import itertools
import sys
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bridge_server.runtime import Model, is_users
from bridge_wire.pb import bridge_pb2 as pb

SIZE = 8
_MOST_OBJECTS = 100_000  # a model may hold any amount of data
_SIMPLE = (bool, int, float, complex, str, bytes, type(None))


class Fingerprint:
    """A digest of parts; each part counts with its length, so that no two lists collide."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=SIZE)

    def add(self, *parts: Any) -> None:
        """Add parts: bytes as they are, other values by their text."""
        for part in parts:
            data = (
                part
                if isinstance(part, bytes | bytearray | memoryview)
                else str(part).encode()
            )
            self._hash.update(memoryview(data).nbytes.to_bytes(8, "little"))
            self._hash.update(data)

    def digest(self) -> bytes:
        return self._hash.digest()


class Values:
    """Digests of the parameters that stay on the worker, each computed once, on first use."""

    def __init__(self, bytes_of: Callable[[Any], Any]) -> None:
        self._bytes_of = bytes_of
        self._digests: dict[Hashable, bytes] = {}

    def of(self, model: Model) -> bytes:
        if model not in self._digests:
            fingerprint = Fingerprint()
            for value in model.values:
                fingerprint.add(self._bytes_of(value))
            self._digests[model] = fingerprint.digest()
        return self._digests[model]


def add_call(
    fingerprint: Fingerprint, model: Model, call: pb.Call, values: Values
) -> None:
    """Add a model's code, a call, and the parameters: their types, or values if not passed."""
    fingerprint.add(code_of(model), call.SerializeToString(deterministic=True))
    fingerprint.add(
        *((parameter.path, parameter.spec) for parameter in model.parameters)
    )
    if not call.parameters:
        fingerprint.add(values.of(model))


@functools.lru_cache(maxsize=256)
def code_of(model: Model) -> bytes:
    """Return a digest of a model's code: the functions and classes reachable from it.

    Names, closures and attributes lead to them. Comments, docstrings, file names, line numbers and
    the code of installed packages are ignored; traces show the effect of installed packages.
    """
    walk = _Walk()
    walk.visit(model.source)
    fingerprint = Fingerprint()
    fingerprint.add(sys.version_info[:2], *sorted(walk.digests))
    return fingerprint.digest()


class _Walk:
    """Collects digests of code objects as a set, since the order of dicts differs by process."""

    def __init__(self) -> None:
        self.digests: set[bytes] = set()
        self._seen: dict[int, Any] = {}

    def visit(self, start: Any) -> None:
        pending = [start]
        while pending and len(self._seen) < _MOST_OBJECTS:
            each = pending.pop()
            if isinstance(each, _SIMPLE) or id(each) in self._seen:
                continue
            self._seen[id(each)] = (
                each  # a reference, so that no other object gets its id
            )
            with contextlib.suppress(Exception):  # computed attributes may raise
                pending += self._reached_from(each)

    def _reached_from(self, each: Any) -> Iterable[Any]:
        if isinstance(each, types.FunctionType):
            return (
                self._from_function(each)
                if is_users(each.__module__)
                else _wrapped(each)
            )
        if isinstance(each, types.MethodType):
            return each.__func__, each.__self__
        if isinstance(each, functools.partial):
            return each.func, *each.args, *each.keywords.values()
        if isinstance(each, property):
            return each.fget, each.fset
        if isinstance(each, staticmethod | classmethod):
            return (each.__func__,)
        if isinstance(each, type):
            return (
                (*each.__mro__[1:], *vars(each).values())
                if is_users(each.__module__)
                else ()
            )
        if isinstance(each, Mapping):
            return list(each.values())
        if isinstance(each, list | tuple | set | frozenset):
            return list(each)
        if isinstance(each, types.ModuleType):
            return ()  # code that uses its attributes names them
        return (type(each), *_wrapped(each), *getattr(each, "__dict__", {}).values())

    def _from_function(self, function: types.FunctionType) -> Iterable[Any]:
        reached: list[Any] = list(function.__defaults__ or ())
        reached += (function.__kwdefaults__ or {}).values()
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                reached.append(cell.cell_contents)
        constants: set[tuple[str, str]] = set()
        for code in _codes_of(function.__code__):
            self.digests.add(_digest_of(code))
            for name, value in _globals_read(code, function.__globals__):
                if isinstance(value, _SIMPLE):
                    constants.add((name, repr(value)))
                else:
                    reached.append(value)
        fingerprint = Fingerprint()
        fingerprint.add(function.__qualname__, *itertools.chain(*sorted(constants)))
        self.digests.add(fingerprint.digest())
        return [*reached, *_wrapped(function)]


def _globals_read(
    code: types.CodeType, variables: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield the globals, and the attributes of the user's modules, that code names."""
    scopes = [variables]
    for name in code.co_names:
        value = variables.get(name)
        if isinstance(value, types.ModuleType) and is_users(value.__name__):
            scopes.append(vars(value))
    # A global that the code assigns, such as a counter, is no constant.
    instructions = dis.get_instructions(code)
    assigned = {each.argval for each in instructions if each.opname == "STORE_GLOBAL"}
    for name in set(code.co_names) - assigned:
        for scope in scopes:
            if name in scope:
                yield name, scope[name]


def _wrapped(each: Any) -> Sequence[Any]:
    inner = getattr(each, "__wrapped__", None)
    return () if inner is None else (inner,)


def _codes_of(code: types.CodeType) -> Iterable[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes_of(constant)


def _digest_of(code: types.CodeType) -> bytes:
    """Return a digest of the instructions, which use no docstring."""
    fingerprint = Fingerprint()
    fingerprint.add(code.co_name, code.co_argcount, code.co_posonlyargcount)
    fingerprint.add(code.co_kwonlyargcount, code.co_flags)
    for each in dis.get_instructions(code):
        value = each.argval
        if isinstance(value, types.CodeType):
            value = value.co_name
        elif isinstance(value, frozenset):
            value = sorted(map(repr, value))
        fingerprint.add(each.opname, type(value).__name__, repr(value))
    return fingerprint.digest()
