"""Store of residuals between forwards and their VJPs, with one byte budget for all sessions.

Imports no framework.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

from bridge_server.runtime import Program
from bridge_wire.errors import ProtocolError, ResidualGone

_MOST = 1 << 20


class Kept(NamedTuple):
    """The residual of one run, for a pullback of its program."""

    program: Program
    value: Any
    nbytes: int


class Residuals:
    """The residuals of all sessions, within one byte budget.

    Past the byte budget the oldest residuals are evicted first. Since residuals may be empty, their
    number is limited too. A session that uses an evicted residual gets ResidualGone and recomputes.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: OrderedDict[tuple[object, int], Kept] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def keep(self, owner: object, id: int, kept: Kept) -> None:
        """Keep a residual under the owner's id and evict the oldest residuals as needed."""
        with self._lock:
            if (owner, id) in self._kept:
                raise ProtocolError(
                    f"the residual {id} exists already; use a fresh id for each residual"
                )
            self._kept[owner, id] = kept
            self._total += kept.nbytes
            while self._total > self._budget or len(self._kept) > _MOST:
                _, oldest = self._kept.popitem(last=False)
                self._total -= oldest.nbytes

    def find(self, owner: object, id: int) -> Kept:
        """Return a residual without removing it."""
        kept = self._kept.get((owner, id))
        if kept is None:
            raise ResidualGone(
                "the worker no longer has the residual; run the vjp program on the inputs instead"
            )
        return kept

    def drop(self, owner: object, ids: Iterable[int]) -> None:
        """Remove residuals; unknown ids are ignored, as those residuals were evicted before."""
        # Filtered without the lock, since a client may name any number of unknown ids.
        known = [id for id in ids if (owner, id) in self._kept]
        with self._lock:
            for id in known:
                kept = self._kept.pop((owner, id), None)
                if kept is not None:
                    self._total -= kept.nbytes

    def drop_all(self, owner: object) -> None:
        """Remove all residuals of an owner."""
        self.drop(owner, [id for each, id in list(self._kept) if each is owner])

    def usage(self, owner: object) -> tuple[int, int]:
        """Return the number of an owner's residuals and their bytes."""
        with self._lock:
            sizes = [
                kept.nbytes for (each, _), kept in self._kept.items() if each is owner
            ]
        return len(sizes), sum(sizes)
