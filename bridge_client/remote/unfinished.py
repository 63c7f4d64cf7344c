"""Records of what calls leave behind: residuals, ids to release, calls given up, bytes to count."""

import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from bridge_client.remote.lanes import Call, Lane
from bridge_client.remote.link import Link
from bridge_client.session import Placed

_MOST_UNCOUNTED = 1000
_MOST_RELEASED = 100_000  # by one message, which has to fit in a frame


class Forward(NamedTuple):
    """A run that kept a residual. It keeps the blocks alive that the residual may alias."""

    link: Link
    inputs: Sequence[Placed]
    stream: int | None  # on which the inputs' blocks are used


class _Abandoned(NamedTuple):
    """A call that was given up: the worker may still use its blocks."""

    lane: Lane
    call: Call


class Unfinished:
    """The records of one session. Thread-safe; `drop` and `count` take no lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forwards: dict[int, Forward] = {}
        self._released: deque[int] = deque()
        self._abandoned: list[_Abandoned] = []
        self._uncounted: deque[int] = deque()
        self._calls = self._bytes_copied = 0

    def keep(self, residual: int, forward: Forward) -> None:
        """Record a run that keeps a residual."""
        self._forwards[residual] = forward

    def forward(self, residual: int) -> Forward | None:
        """Return the run that kept a residual, or None if that was dropped."""
        return self._forwards.get(residual)

    def drop(self, residual: int) -> None:
        """Have a residual released with the next message. For finalizers."""
        if self._forwards.pop(residual, None) is not None:
            self._released.append(residual)

    def to_release(self) -> list[int]:
        """Take ids of dropped residuals, as many as one message may hold."""
        taken: list[int] = []
        while self._released and len(taken) < _MOST_RELEASED:
            taken.append(self._released.popleft())
        return taken

    def release_later(self, residuals: Sequence[int]) -> None:
        """Put back ids whose message did not reach the worker."""
        self._released.extend(residuals)

    def abandon(self, lane: Lane, call: Call) -> None:
        """Keep the blocks of a call that was given up until the worker has ended its lane."""
        with self._lock:
            self._abandoned.append(_Abandoned(lane, call))

    def count(self, bytes_copied: int) -> None:
        """Count a call, and the bytes that either side copied for it."""
        self._uncounted.append(bytes_copied)
        if self._abandoned or len(self._uncounted) > _MOST_UNCOUNTED:
            self.sweep()

    def totals(self) -> tuple[int, int]:
        """Return how many calls were counted, and the bytes copied by them."""
        with self._lock:
            self._add_up()
            return self._calls, self._bytes_copied

    def sweep(self) -> None:
        """Free the blocks of abandoned calls whose lanes the worker has ended."""
        with self._lock:
            ended = [call for call in self._abandoned if call.lane.has_ended()]
            self._abandoned = [call for call in self._abandoned if call not in ended]
            for lane, call in ended:
                lane.close()
                if call.run.program.keeps_residual:
                    self._released.append(call.run.residual)
            self._add_up()

    def close(self) -> None:
        """Close the lanes of abandoned calls, and forget all residuals."""
        while self._abandoned:
            self._abandoned.pop().lane.close()
        self._forwards.clear()

    def _add_up(self) -> None:
        while self._uncounted:
            self._bytes_copied += self._uncounted.popleft()
            self._calls += 1
