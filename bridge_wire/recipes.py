"""Recipes: how instances of a worker's classes are made again, after a restart or elsewhere."""

import hashlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from google.protobuf.message import DecodeError

from bridge_wire.pb import bridge_pb2 as pb

ENDS = ("leaf", "value", "key")  # kinds of a tree's parts without items
_MAX_RECIPES = 4096
_MAX_STEPS = 1024  # recipes that one origin may need
_MAX_BYTES = 1 << 20  # of a call in a recipe


def origin_of(name: str, fingerprint: bytes, call: bytes, record: int) -> str:
    """Return the origin of a class of that name, first made by this record of a call's result."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (fingerprint, call, record.to_bytes(8, "little")):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return f"{name}#{digest.hexdigest()}"


def records(tree: pb.Tree) -> Iterator[Any]:
    """Yield the class instances of a tree, depth-first, parents first."""
    pending = [tree]
    while pending:
        kind = (each := pending.pop()).WhichOneof("kind")
        if kind is None or kind in ENDS:
            continue
        node = getattr(each, kind)
        if kind in ("namedtuple", "dataclass") or (kind == "dict" and node.name):
            yield node
        pending += reversed(node.items)


def returned_in(arguments: pb.Tree) -> list[str]:
    """Return the origins that a call's arguments return to the worker."""
    return [record.returned for record in records(arguments) if record.returned]


class Recipes:
    """The recipes that this process knows, by origin. The oldest are forgotten."""

    def __init__(self) -> None:
        self._known: dict[str, pb.Recipe] = {}
        self._lock = threading.Lock()

    def learn(self, recipes: Iterable[pb.Recipe]) -> None:
        """Add recipes, except those that are too long or hold no call."""
        with self._lock:
            for recipe in recipes:
                if len(recipe.call) <= _MAX_BYTES and _holds_call(recipe):
                    self._known[recipe.origin] = recipe
            while len(self._known) > _MAX_RECIPES:
                del self._known[next(iter(self._known))]

    def of(self, origins: Iterable[str]) -> list[pb.Recipe]:
        """Return the recipes of these origins, and of the origins that their calls return.

        An origin with an unknown or too long recipe is left out.
        """
        found: dict[str, pb.Recipe] = {}
        for origin in origins:
            found |= self._steps_to(origin)
        return list(found.values())

    def _steps_to(self, origin: str) -> dict[str, pb.Recipe]:
        found: dict[str, pb.Recipe] = {}
        pending = [origin]
        while pending:
            recipe = self._known.get(name := pending.pop())
            if recipe is None or len(found) == _MAX_STEPS:
                return {}
            if name not in found:
                found[name] = recipe
                call = pb.Call.FromString(recipe.call)
                pending += returned_in(call.arguments)
        return found


def _holds_call(recipe: pb.Recipe) -> bool:
    try:
        pb.Call.FromString(recipe.call)
    except DecodeError:
        return False
    return True
