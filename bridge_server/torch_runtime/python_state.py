"""Snapshots of a model's Python state: the objects that its code can change, and their contents.

A call of a served model is a function of its inputs, so whatever forward caches in an attribute, a
list or a closure is put back afterwards: it belongs to the parameters and arguments of that one
call.
"""

import functools
import gc
import itertools
import operator
import sys
import types
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

# What nn.Module keeps besides its parts, parameters and buffers: hooks, by far the most of its
# containers.
_HOOKS = frozenset(
    name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name
)
_ATOMS = (
    Tensor,
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    types.ModuleType,
    types.BuiltinFunctionType,
)
_LIBRARIES = frozenset({"torch", "numpy", "jax", "jaxlib", "builtins", *sys.stdlib_module_names})
_MISSING = object()
_END = object()
_MOST_OBJECTS = 20_000  # visited in some 20 ms, and far from what a model's own code reaches
_LruCache = type(functools.lru_cache(lambda: None))


class PythonState:
    """The contents of all containers that can be reached from an object: instances' attributes,
    dicts, lists, sets.

    With `follows_code`, also of those that functions reach: closures, globals that they name,
    classes, lru_caches.
    """

    def __init__(self, root: Any, *, follows_code: bool = False) -> None:
        self._contents: list[_Contents] = []
        self.holds_tensors = False
        self._types: set[type] = set()
        seen: dict[
            int, Any
        ] = {}  # by identity, and kept: an id is only an object's as long as it lives
        pending = deque([root])  # the nearest first
        while pending and len(seen) < _MOST_OBJECTS:
            value = pending.popleft()
            self.holds_tensors |= isinstance(value, Tensor)
            if isinstance(value, _ATOMS) or id(value) in seen:
                continue
            seen[id(value)] = value
            self._types.add(type(value))
            pending.extend(self._visit(value, follows_code))
        self._is_whole = not pending
        # All values in one row, and iterables of all that are there now: one pass finds that
        # nothing has changed.
        lives = [contents.live for contents in self._contents if contents.live is not None]
        self._lives: list[Iterable[Any]] | None = (
            [*lives, (_END,)] if len(lives) == len(self._contents) else None
        )
        self._values = [
            *itertools.chain.from_iterable(contents.values for contents in self._contents),
            _END,
        ]

    def may_reach(self, kinds: tuple[type, ...]) -> bool:
        """Whether an instance of these classes can be reached, or that was not found out."""
        return not self._is_whole or any(issubclass(each, kinds) for each in self._types)

    def restore(self) -> None:
        """Put everything back that has changed since."""
        if self._lives is not None and all(
            map(operator.is_, itertools.chain.from_iterable(self._lives), self._values)
        ):
            return
        for contents in self._contents:
            if not contents.is_unchanged():
                contents.restore()

    def restore_tensors(self) -> None:
        """Put back the containers that have got tensors since, and leave those alone that others
        may have changed."""
        for contents in self._contents:
            if contents.has_got_tensors():
                contents.restore()

    def _visit(self, value: Any, follows_code: bool) -> Iterable[Any]:
        """Note what a value holds, and return the objects to visit next."""
        if isinstance(value, dict):
            return self._note(_Dict(value))
        if isinstance(value, list | deque | set):
            return self._note(_Collection(value))
        if isinstance(value, tuple | frozenset):
            return value
        if isinstance(value, type):
            return self._visit_class(value) if follows_code and _is_users(value.__module__) else ()
        if isinstance(value, types.FunctionType | types.MethodType | functools.partial | _LruCache):
            return self._visit_code(value) if follows_code else ()
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict) or not (
            isinstance(value, nn.Module) or _is_users(type(value).__module__)
        ):
            return ()
        self._note(_Dict(attributes))
        found = [each for name, each in attributes.items() if name not in _HOOKS]
        return [*found, type(value)] if follows_code else found

    def _visit_class(self, cls: type) -> Iterator[Any]:
        self._note(_Class(cls))
        yield from vars(cls).values()
        yield from cls.__bases__

    def _visit_code(self, value: Any) -> Iterator[Any]:
        if isinstance(value, types.MethodType):
            yield from (value.__self__, value.__func__)
        elif isinstance(value, functools.partial):
            yield from (value.func, value.args, value.keywords)
        elif isinstance(value, _LruCache):
            self._contents.append(_Cache(value))
            yield from (each for each in gc.get_referents(value) if not _is_table_of_cache(each))
        elif _is_users(value.__module__):
            yield from (value.__defaults__, value.__kwdefaults__, value.__dict__)
            yield from self._note(_Cells(value.__closure__ or ()))
            yield from self._visit_globals(value.__globals__, set(_names_in(value.__code__)))

    def _visit_globals(self, variables: dict[str, Any], names: set[str]) -> Iterator[Any]:
        """Visit the global variables that code names, and the variables of modules that it
        imports."""
        yield from self._note(_Globals(variables, sorted(names)))
        for name in names & variables.keys():
            module = variables[name]
            if isinstance(module, types.ModuleType) and _is_users(module.__name__):
                yield from self._note(_Globals(vars(module), sorted(names)))

    def _note(self, contents: "_Contents") -> Iterable[Any]:
        self._contents.append(contents)
        return contents.values


class _Contents(ABC):
    """One container, and its values at one moment."""

    values: list[Any]
    live: Iterable[Any] | None = None  # gives the values at present each time; None: only `now` can

    @abstractmethod
    def now(self) -> Iterable[Any]:
        """Return the container's values at present."""

    @abstractmethod
    def restore(self) -> None: ...

    def is_unchanged(self) -> bool:
        now = list(self.now())
        return len(now) == len(self.values) and all(map(operator.is_, now, self.values))

    def has_got_tensors(self) -> bool:
        if self.is_unchanged():
            return False
        before = set(map(id, self.values))
        return any(
            PythonState(value).holds_tensors for value in self.now() if id(value) not in before
        )


class _Dict(_Contents):
    def __init__(self, container: dict[Any, Any]) -> None:
        self._container = container
        self._keys = list(container)
        self.live = container.values()
        self.values = list(self.live)

    def now(self) -> Iterable[Any]:
        return self._container.values()

    def restore(self) -> None:
        kind = (
            OrderedDict if isinstance(self._container, OrderedDict) else dict
        )  # a subclass may refuse, or compute
        kind.clear(self._container)
        kind.update(self._container, zip(self._keys, self.values, strict=True))


class _Collection(_Contents):
    """A list, deque or set."""

    def __init__(self, container: Any) -> None:
        self._container = self.live = container
        self.values = list(container)

    def now(self) -> Iterable[Any]:
        return self._container

    def restore(self) -> None:
        fill = (
            self._container.update if isinstance(self._container, set) else self._container.extend
        )
        self._container.clear()
        fill(self.values)


class _Class(_Contents):
    """A class's attributes, save the machinery that Python keeps there."""

    def __init__(self, cls: type) -> None:
        self._cls = cls
        self._names = self._own()
        self.values = [vars(cls)[name] for name in self._names]

    def _own(self) -> list[str]:
        return [
            name for name in vars(self._cls) if not (name.startswith("__") and name.endswith("__"))
        ]

    def now(self) -> Iterable[Any]:
        return [vars(self._cls)[name] for name in self._own()]

    def restore(self) -> None:
        for name in set(self._own()) - set(self._names):
            type.__delattr__(self._cls, name)
        for name, value in zip(self._names, self.values, strict=True):
            type.__setattr__(self._cls, name, value)


class _Globals(_Contents):
    """Some of a module's variables."""

    def __init__(self, variables: dict[str, Any], names: list[str]) -> None:
        self._variables = variables
        self._names = names
        self.values = list(self.now())

    def now(self) -> Iterable[Any]:
        return [self._variables.get(name, _MISSING) for name in self._names]

    def restore(self) -> None:
        for name, value in zip(self._names, self.values, strict=True):
            if value is _MISSING:
                self._variables.pop(name, None)
            else:
                self._variables[name] = value


class _Cells(_Contents):
    """The variables that a function closes over."""

    def __init__(self, cells: Iterable[Any]) -> None:
        self._cells = [cell for cell in cells if _is_filled(cell)]
        self.values = [cell.cell_contents for cell in self._cells]

    def now(self) -> Iterable[Any]:
        return [cell.cell_contents if _is_filled(cell) else None for cell in self._cells]

    def restore(self) -> None:
        for cell, value in zip(self._cells, self.values, strict=True):
            cell.cell_contents = value


class _Cache(_Contents):
    """An lru_cache. Its contents cannot be told, so it is emptied: it computes them again."""

    values: list[Any] = []  # noqa: RUF012

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._size = cache.cache_info().currsize

    def now(self) -> Iterable[Any]:
        return [None] * (self._cache.cache_info().currsize - self._size)

    def has_got_tensors(self) -> bool:
        return not self.is_unchanged()

    def restore(self) -> None:
        self._cache.cache_clear()


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_table_of_cache(value: Any) -> bool:
    """Whether a dict is an lru_cache's own, which nobody else may change."""
    return isinstance(value, dict) and any(
        type(each).__name__ == "_lru_list_elem" for each in value.values()
    )


def _is_users(module: Any) -> bool:
    """Whether code of this module may keep a model's tensors.

    A class may have anything for its `__module__`.
    """
    return isinstance(module, str) and module.partition(".")[0] not in _LIBRARIES


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
