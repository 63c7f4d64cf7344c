"""Residuals: what the worker keeps between forwards and their VJPs, within one budget for all
sessions."""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

from bridge_server.runtime import Program
from bridge_wire.errors import ProtocolError, ResidualGone

_MOST = 1 << 20


class Kept(NamedTuple):
    """What one run has kept, for a pullback of its program."""

    program: Program
    value: Any
    nbytes: int


class Residuals:
    """What the worker keeps between forwards and their VJPs, for all sessions within one byte
    budget.

    Past the budget, or past a number of them, since they may have no bytes at all, the oldest is
    dropped: its session is then told ResidualGone, and recomputes.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: OrderedDict[tuple[object, int], Kept] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def keep(self, owner: object, id: int, kept: Kept) -> None:
        """Keep a residual under the owner's name for it, and evict the oldest ones as needed."""
        with self._lock:
            if (owner, id) in self._kept:
                raise ProtocolError(
                    f"the residual {id} exists already; a residual's id is never reused"
                )
            self._kept[owner, id] = kept
            self._total += kept.nbytes
            while self._total > self._budget or len(self._kept) > _MOST:
                _, oldest = self._kept.popitem(last=False)
                self._total -= oldest.nbytes

    def find(self, owner: object, id: int) -> Kept:
        """Return a residual, which stays kept."""
        kept = self._kept.get((owner, id))
        if kept is None:
            raise ResidualGone(
                "the residual is not here any more; run the vjp program on the inputs instead"
            )
        return kept

    def drop(self, owner: object, ids: Iterable[int]) -> None:
        """Forget residuals; unknown ones were evicted before."""
        known = [
            id for id in ids if (owner, id) in self._kept
        ]  # a client may name any number of others
        with self._lock:
            for id in known:
                kept = self._kept.pop((owner, id), None)
                if kept is not None:
                    self._total -= kept.nbytes

    def drop_all(self, owner: object) -> None:
        """Forget all residuals of an owner."""
        self.drop(owner, [id for each, id in list(self._kept) if each is owner])

    def usage(self, owner: object) -> tuple[int, int]:
        """Return the number of an owner's residuals and their bytes."""
        with self._lock:
            sizes = [kept.nbytes for (each, _), kept in self._kept.items() if each is owner]
        return len(sizes), sum(sizes)
