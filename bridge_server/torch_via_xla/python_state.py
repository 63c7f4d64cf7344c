"""Python state that traced code leaves behind: a module's attributes are put back, other holders are named.

Imports torch only.
"""

import contextlib
import gc
import types
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def put_back(root: nn.Module) -> Iterator[None]:
    """Put back the attributes of all modules, and the lists, dicts and sets in them, as they were at the start."""
    modules = list(root.modules())
    containers: dict[int, tuple[Any, Any]] = {}
    for module in modules:
        _note(module.__dict__, containers)
    try:
        yield
    finally:
        for container, before in containers.values():
            _restore(container, before)


def _note(value: Any, containers: dict[int, tuple[Any, Any]]) -> None:
    """Copy a container and those within it, each with the container itself."""
    if not isinstance(value, dict | list | set) or id(value) in containers:
        return
    containers[id(value)] = value, (dict(value) if isinstance(value, dict) else value.copy())
    for each in value.values() if isinstance(value, dict) else value:
        _note(each, containers)


def _restore(container: Any, before: Any) -> None:
    if isinstance(container, list):
        container[:] = before
    elif isinstance(container, dict):
        for key in container.keys() - before.keys():
            del container[key]
        container.update(before)
    else:
        container.clear()
        container.update(before)


def holder_of(value: Any, depth: int = 3) -> str:
    """Return where an object is kept, as far as Python tells."""
    for referrer in gc.get_referrers(value):
        if isinstance(referrer, types.FrameType):
            continue
        if isinstance(referrer, types.CellType):
            return "a variable of an enclosing function"
        if isinstance(referrer, dict):
            keys = dict(zip(map(id, referrer.values()), referrer, strict=True))  # a closure here would be a referrer
            if owner := _owner_of(referrer):
                return f"{owner}, as {keys[id(value)]!r}"
        if type(referrer).__name__ == "_lru_cache_wrapper":
            return f"the cache of {getattr(referrer, '__qualname__', 'a function')}"
    for referrer in gc.get_referrers(value) if depth else []:
        if isinstance(referrer, dict | list | tuple | set):
            return f"a {type(referrer).__name__} in {holder_of(referrer, depth - 1)}"
    return "an object outside of the module"


def _owner_of(namespace: dict[Any, Any]) -> str | None:
    if "__name__" in namespace and "__spec__" in namespace:
        return f"the globals of {namespace['__name__']}"
    for owner in gc.get_referrers(namespace):
        if isinstance(owner, type):
            return f"the class {owner.__qualname__}"
        if getattr(owner, "__dict__", None) is namespace:
            return f"an object of class {type(owner).__qualname__}"
    return None
