"""Snapshots of a model's Python state: the objects that its code can change, and their contents.

A call of a served model is a function of its inputs. So the bridge undoes forward's changes of
attributes, lists and closures: cached values belong to the parameters and arguments of one call.
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
from torch.jit import ScriptModule

from bridge_server.torch_runtime.scripted import slots_of

# nn.Module's hooks, by far the most of its containers.
_MODULE_ATTRIBUTES = vars(nn.Module())
_HOOKS = frozenset(name for name in _MODULE_ATTRIBUTES if "_hooks" in name)
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
_LIBRARIES = frozenset(
    {"torch", "numpy", "jax", "jaxlib", "builtins", *sys.stdlib_module_names}
)
_MISSING = object()
_END = object()
_MOST_OBJECTS = 20_000  # visited in some 20 ms; a model's own code reaches far fewer
_LruCache = type(functools.lru_cache(lambda: None))


class PythonState:
    """Contents of all containers reachable from an object: attributes, dicts, lists, sets.

    With `follows_code`, functions lead further: to their closures, the globals that they name,
    classes, and lru_caches.
    """

    def __init__(self, root: Any, *, follows_code: bool = False) -> None:
        self._contents: list[_Contents] = []
        self.holds_tensors = False
        self._types: set[type] = set()
        seen: dict[int, Any] = {}  # by id; the reference keeps the id valid
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
        # All values in one list, and iterables of the present values: one pass detects changes.
        lives = [
            contents.live for contents in self._contents if contents.live is not None
        ]
        self._lives: list[Iterable[Any]] | None = None
        if len(lives) == len(self._contents):
            self._lives = [*lives, (_END,)]
        self._values = [
            value for contents in self._contents for value in contents.values
        ]
        self._values.append(_END)

    def may_reach(self, kinds: tuple[type, ...]) -> bool:
        """Return whether an instance of these classes is reachable, or the search was cut short."""
        return not self._is_whole or any(
            issubclass(each, kinds) for each in self._types
        )

    def restore(self) -> None:
        """Undo all changes since the snapshot."""
        if self._lives is not None:
            present = itertools.chain.from_iterable(self._lives)
            if all(map(operator.is_, present, self._values)):
                return
        for contents in self._contents:
            if not contents.is_unchanged():
                contents.restore()

    def restore_tensors(self) -> None:
        """Restore the containers that have gained tensors; other threads may change the others."""
        for contents in self._contents:
            if contents.has_got_tensors():
                contents.restore()

    def _visit(self, value: Any, follows_code: bool) -> Iterable[Any]:
        """Note a value's contents, and return the objects to visit next."""
        if isinstance(value, dict):
            return self._note(_Dict(value))
        if isinstance(value, list | deque | set):
            return self._note(_Collection(value))
        if isinstance(value, tuple | frozenset):
            return value
        if isinstance(value, type):
            return (
                self._visit_class(value)
                if follows_code and _is_users(value.__module__)
                else ()
            )
        if isinstance(
            value, types.FunctionType | types.MethodType | functools.partial | _LruCache
        ):
            return self._visit_code(value) if follows_code else ()
        attributes = getattr(value, "__dict__", None)
        is_followed = isinstance(value, nn.Module) or _is_users(type(value).__module__)
        if not is_followed or not isinstance(attributes, dict):
            return ()
        self._note(_Dict(attributes))
        if isinstance(value, ScriptModule):
            self._note(_Slots(value))
        reached = [each for name, each in attributes.items() if name not in _HOOKS]
        return [*reached, type(value)] if follows_code else reached

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
            yield from (
                each for each in gc.get_referents(value) if not _is_table_of_cache(each)
            )
        elif _is_users(value.__module__):
            yield from (value.__defaults__, value.__kwdefaults__, value.__dict__)
            yield from self._note(_Cells(value.__closure__ or ()))
            yield from self._visit_globals(
                value.__globals__, set(_names_in(value.__code__))
            )

    def _visit_globals(
        self, variables: dict[str, Any], names: set[str]
    ) -> Iterator[Any]:
        """Visit the global variables that code names, and those of the user's modules."""
        yield from self._note(_Globals(variables, sorted(names)))
        for name in names & variables.keys():
            module = variables[name]
            if isinstance(module, types.ModuleType) and _is_users(module.__name__):
                yield from self._note(_Globals(vars(module), sorted(names)))

    def _note(self, contents: "_Contents") -> Iterable[Any]:
        self._contents.append(contents)
        return contents.values


class _Contents(ABC):
    """One container, and its values at the time of the snapshot."""

    values: list[Any]
    # Iterates over the present values; None: use `now`.
    live: Iterable[Any] | None = None

    @abstractmethod
    def now(self) -> Iterable[Any]:
        """Return the container's present values."""

    @abstractmethod
    def restore(self) -> None: ...

    def is_unchanged(self) -> bool:
        now = list(self.now())
        return len(now) == len(self.values) and all(map(operator.is_, now, self.values))

    def has_got_tensors(self) -> bool:
        if self.is_unchanged():
            return False
        before = set(map(id, self.values))
        new = [value for value in self.now() if id(value) not in before]
        return any(PythonState(value).holds_tensors for value in new)


class _Dict(_Contents):
    def __init__(self, container: dict[Any, Any]) -> None:
        self._container = container
        self._keys = list(container)
        self.live = container.values()
        self.values = list(self.live)

    def now(self) -> Iterable[Any]:
        return self._container.values()

    def restore(self) -> None:
        # A subclass's own methods may refuse, or compute.
        kind = OrderedDict if isinstance(self._container, OrderedDict) else dict
        kind.clear(self._container)
        kind.update(self._container, zip(self._keys, self.values, strict=True))


class _Collection(_Contents):
    """A list, deque or set."""

    live: Iterable[Any]

    def __init__(self, container: Any) -> None:
        self._container = self.live = container
        self.values = list(container)

    def now(self) -> Iterable[Any]:
        return self.live

    def restore(self) -> None:
        self._container.clear()
        if isinstance(self._container, set):
            self._container.update(self.values)
        else:
            self._container.extend(self.values)


class _Class(_Contents):
    """A class's attributes, without Python's dunder names."""

    def __init__(self, cls: type) -> None:
        self._cls = cls
        self._names = self._own()
        self.values = [vars(cls)[name] for name in self._names]

    def _own(self) -> list[str]:
        return [name for name in vars(self._cls) if not _is_dunder(name)]

    def now(self) -> Iterable[Any]:
        return [vars(self._cls)[name] for name in self._own()]

    def restore(self) -> None:
        for name in set(self._own()) - set(self._names):
            type.__delattr__(self._cls, name)
        for name, value in zip(self._names, self.values, strict=True):
            type.__setattr__(self._cls, name, value)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


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
        return [
            cell.cell_contents if _is_filled(cell) else None for cell in self._cells
        ]

    def restore(self) -> None:
        for cell, value in zip(self._cells, self.values, strict=True):
            cell.cell_contents = value


class _Cache(_Contents):
    """An lru_cache. Its contents are hidden, so a restore clears it; calls compute them again."""

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


class _Slots(_Contents):
    """The attributes of a TorchScript module, but not its submodules."""

    def __init__(self, module: ScriptModule) -> None:
        self._slots = slots_of(module)
        self.values = list(self.now())

    def now(self) -> Iterable[Any]:
        return [slot.get() for slot in self._slots]

    def restore(self) -> None:
        for slot, value in zip(self._slots, self.values, strict=True):
            if slot.get() is not value:
                slot.set(value)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_table_of_cache(value: Any) -> bool:
    """Return whether a dict is an lru_cache's table, which other code must not change."""
    if not isinstance(value, dict):
        return False
    return any(type(each).__name__ == "_lru_list_elem" for each in value.values())


def _is_users(module: Any) -> bool:
    """Return whether code of this module may keep a model's tensors.

    The `__module__` of a class may be any object.
    """
    return isinstance(module, str) and module.partition(".")[0] not in _LIBRARIES


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
