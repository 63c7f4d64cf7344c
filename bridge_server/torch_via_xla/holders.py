"""Search for an object's holder, for errors about caches that the bridge cannot empty.

Imports no framework.
"""

import gc
import types
from typing import Any


def holder_of(value: Any, depth: int = 3) -> str:
    """Describe the holder of an object, as far as Python knows it."""
    for referrer in gc.get_referrers(value):
        if isinstance(referrer, types.FrameType):
            continue
        if isinstance(referrer, types.CellType):
            return "a variable of an enclosing function"
        if isinstance(referrer, dict):
            # A comprehension here would be a referrer.
            keys = dict(zip(map(id, referrer.values()), referrer, strict=True))
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
