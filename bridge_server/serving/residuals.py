"""Store of residuals between forwards and their VJPs, with one byte budget for all sessions.

Imports no framework.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bridge_server.runtime import Program
from bridge_wire.errors import ProtocolError, ResidualGone

_log = logging.getLogger(__name__)

_MOST = 1 << 20


class Kept(NamedTuple):
    """The residual of one run, for a pullback of its program."""

    program: Program
    value: Any
    nbytes: int


class Residuals:
    """The residuals of all sessions, within one byte budget.

    Over the budget, the session that keeps the most bytes loses its oldest residual: the forwards
    of one client do not evict the residuals of another that keeps less. Since residuals may be
    empty, their number is limited too. A session that uses an evicted residual gets ResidualGone
    and recomputes.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._owners: dict[object, _Owner] = {}
        self.nbytes = self.count = self.evictions = 0
        self._lock = threading.Lock()

    def keep(self, owner: object, id: int, kept: Kept) -> None:
        """Keep a residual under the owner's id, and evict residuals as needed."""
        with self._lock:
            owned = self._owners.setdefault(owner, _Owner())
            if id in owned.kept:
                raise ProtocolError(
                    f"the residual {id} exists already; use a fresh id for each residual"
                )
            owned.kept[id] = kept
            self._add(owned, kept.nbytes, 1)
            while self.nbytes > self._budget or self.count > _MOST:
                self._evict()

    def _evict(self) -> None:
        largest = max(self._owners.values(), key=lambda owned: owned.share)
        _, oldest = largest.kept.popitem(last=False)
        self._add(largest, -oldest.nbytes, -1)
        self.evictions += 1
        if (
            self.evictions & (self.evictions - 1) == 0
        ):  # the first, second, fourth, eighth ...
            _log.warning(
                "%d residuals were evicted so far, since all together exceed --residual-bytes (%d);"
                " their backwards run the forwards again",
                self.evictions,
                self._budget,
            )

    def _add(self, owned: "_Owner", nbytes: int, count: int) -> None:
        owned.nbytes += nbytes
        self.nbytes += nbytes
        self.count += count

    def find(self, owner: object, id: int) -> Kept:
        """Return a residual without removing it."""
        owned = self._owners.get(owner)
        kept = None if owned is None else owned.kept.get(id)
        if kept is None:
            raise ResidualGone(
                "the worker no longer has the residual; run the vjp program on the inputs instead"
            )
        return kept

    def drop(self, owner: object, ids: Iterable[int]) -> None:
        """Remove residuals; unknown ids are ignored, as those residuals were evicted before."""
        owned = self._owners.get(owner)
        if owned is None:
            return
        # Filtered without the lock, since a client may name any number of unknown ids.
        known = [id for id in ids if id in owned.kept]
        with self._lock:
            for id in known:
                kept = owned.kept.pop(id, None)
                if kept is not None:
                    self._add(owned, -kept.nbytes, -1)

    def drop_all(self, owner: object) -> None:
        """Remove all residuals of an owner."""
        owned = self._owners.get(owner)
        if owned is not None:
            self.drop(owner, list(owned.kept))
            self._owners.pop(owner, None)

    def usage(self, owner: object) -> tuple[int, int]:
        """Return the number of an owner's residuals and their bytes."""
        owned = self._owners.get(owner)
        return (0, 0) if owned is None else (len(owned.kept), owned.nbytes)


@dataclass(slots=True)
class _Owner:
    """One session's residuals, the oldest first."""

    kept: OrderedDict[int, Kept] = field(default_factory=OrderedDict)
    nbytes: int = 0

    @property
    def share(self) -> tuple[int, int]:
        return self.nbytes, len(self.kept)
