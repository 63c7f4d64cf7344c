"""Fingerprints: digests of what decides a call's results, equal in each process that serves the
same model.

Each runtime adds what it traces of a call, with its constants. This module adds the code that no
trace of a forward shows, such as the rules of custom derivatives and branches that were not taken.
No framework is imported here.
"""

import contextlib
import dis
import functools
import hashlib
import itertools
import site
import sys
import sysconfig
import types
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from bridge_server.runtime import Model

SIZE = 8
_MOST_OBJECTS = 100_000  # of a model, which may hold any data
_SIMPLE = (bool, int, float, complex, str, bytes, type(None))


class Fingerprint:
    """A digest of parts, each of which is told from the next."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=SIZE)

    def add(self, *parts: Any) -> None:
        """Add parts: bytes as such, all else by its text."""
        for part in parts:
            data = part if isinstance(part, bytes | bytearray | memoryview) else str(part).encode()
            self._hash.update(memoryview(data).nbytes.to_bytes(8, "little"))
            self._hash.update(data)

    def digest(self) -> bytes:
        return self._hash.digest()


class Values:
    """Digests of the parameters that stay on the worker, each made once, when it is first asked
    for."""

    def __init__(self, bytes_of: Callable[[Any], Any]) -> None:
        self._bytes_of = bytes_of
        self._known: dict[Hashable, bytes] = {}

    def of(self, model: Model) -> bytes:
        known = self._known.get(model)
        if known is None:
            made = Fingerprint()
            for value in model.values:
                made.add(self._bytes_of(value))
            known = self._known[model] = made.digest()
        return known


@functools.lru_cache(maxsize=256)
def code_of(model: Model) -> bytes:
    """Return a digest of the code that can be reached from a model: of functions and classes
    outside of installed packages, found by names, closures and attributes.

    Without comments, docstrings, names of files and line numbers. Installed packages count by what
    they do in a trace.
    """
    walk = _Walk()
    walk.visit(model.source)
    made = Fingerprint()
    made.add(sys.version_info[:2], *sorted(walk.found))
    return made.digest()


class _Walk:
    """Collects digests of code objects, in no order: that of dicts and sets differs between
    processes."""

    def __init__(self) -> None:
        self.found: set[bytes] = set()
        self._seen: dict[int, Any] = {}

    def visit(self, start: Any) -> None:
        waiting = [start]
        while waiting and len(self._seen) < _MOST_OBJECTS:
            each = waiting.pop()
            if isinstance(each, _SIMPLE) or id(each) in self._seen:
                continue
            self._seen[id(each)] = each  # held, so that no other object gets its id
            with contextlib.suppress(Exception):  # of an object whose attributes are computed
                waiting += self._reached_from(each)

    def _reached_from(self, each: Any) -> Iterable[Any]:
        if isinstance(each, types.FunctionType):
            return self._from_function(each) if _is_own(each.__module__) else _wrapped(each)
        if isinstance(each, types.MethodType):
            return each.__func__, each.__self__
        if isinstance(each, functools.partial):
            return each.func, *each.args, *each.keywords.values()
        if isinstance(each, property):
            return each.fget, each.fset
        if isinstance(each, staticmethod | classmethod):
            return (each.__func__,)
        if isinstance(each, type):
            return (*each.__mro__[1:], *vars(each).values()) if _is_own(each.__module__) else ()
        if isinstance(each, Mapping):
            return list(each.values())
        if isinstance(each, list | tuple | set | frozenset):
            return list(each)
        if isinstance(each, types.ModuleType):
            return ()  # its attributes are reached by their names, from the code that uses them
        return (type(each), *_wrapped(each), *getattr(each, "__dict__", {}).values())

    def _from_function(self, function: types.FunctionType) -> Iterable[Any]:
        reached: list[Any] = [
            *(function.__defaults__ or ()),
            *(function.__kwdefaults__ or {}).values(),
        ]
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                reached.append(cell.cell_contents)
        constants: set[tuple[str, str]] = set()
        for code in _codes_of(function.__code__):
            self.found.add(_digest_of(code))
            counted = {
                each.argval for each in dis.get_instructions(code) if each.opname == "STORE_GLOBAL"
            }
            scopes = [function.__globals__]
            for name in code.co_names:
                value = function.__globals__.get(name)
                if isinstance(value, types.ModuleType) and _is_own(value.__name__):
                    scopes.append(vars(value))
            for name in set(code.co_names) - counted:
                for value in (scope[name] for scope in scopes if name in scope):
                    if isinstance(value, _SIMPLE):
                        constants.add((name, repr(value)))
                    else:
                        reached.append(value)
        made = Fingerprint()
        made.add(function.__qualname__, *itertools.chain(*sorted(constants)))
        self.found.add(made.digest())
        return [*reached, *_wrapped(function)]


def _wrapped(each: Any) -> Sequence[Any]:
    inner = getattr(each, "__wrapped__", None)
    return () if inner is None else (inner,)


def _codes_of(code: types.CodeType) -> Iterable[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes_of(constant)


def _digest_of(code: types.CodeType) -> bytes:
    """Return a digest of the instructions: a docstring is a constant that none of them uses."""
    made = Fingerprint()
    made.add(
        code.co_name,
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_flags,
    )
    for each in dis.get_instructions(code):
        value = each.argval
        if isinstance(value, types.CodeType):
            value = value.co_name
        elif isinstance(value, frozenset):
            value = sorted(map(repr, value))
        made.add(each.opname, type(value).__name__, repr(value))
    return made.digest()


_INSTALLED = tuple(
    {
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
    }
)


@functools.lru_cache(maxsize=4096)
def _is_own(module: str | None) -> bool:
    """Whether a module is the user's: no built-in, none of Python's and none of an installed
    package."""
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is not None and not file.startswith(_INSTALLED)
