"""Records of unfinished work: residuals, ids to release, abandoned calls, uncounted bytes.

No framework is imported here.
"""

import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from bridge_client.remote.lanes import Call, Lane
from bridge_client.remote.link import Link
from bridge_client.session import Placed

_MOST_UNCOUNTED = 1000
_MOST_RELEASED = 100_000  # ids per message, which must fit in a frame


class Forward(NamedTuple):
    """A run that kept a residual. Keeps the inputs alive, since the residual may alias them."""

    link: Link
    inputs: Sequence[Placed]
    stream: int | None  # CUDA stream of the inputs' blocks


class _Abandoned(NamedTuple):
    """An abandoned call; the worker may still use its blocks."""

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
        """Return the run that kept a residual, or None if the residual was dropped."""
        return self._forwards.get(residual)

    def drop(self, residual: int) -> None:
        """Queue a residual for release with the next message. For finalizers."""
        if self._forwards.pop(residual, None) is not None:
            self._released.append(residual)

    def to_release(self) -> list[int]:
        """Take the ids of dropped residuals, up to the limit of one message."""
        taken: list[int] = []
        while self._released and len(taken) < _MOST_RELEASED:
            taken.append(self._released.popleft())
        return taken

    def release_later(self, residuals: Sequence[int]) -> None:
        """Put back ids whose message did not reach the worker."""
        self._released.extend(residuals)

    def abandon(self, lane: Lane, call: Call) -> None:
        """Keep an abandoned call's blocks until the worker has ended its lane."""
        with self._lock:
            self._abandoned.append(_Abandoned(lane, call))

    def count(self, bytes_copied: int) -> None:
        """Count a call, and the bytes copied for it by either side."""
        self._uncounted.append(bytes_copied)
        if self._abandoned or len(self._uncounted) > _MOST_UNCOUNTED:
            self.sweep()

    def totals(self) -> tuple[int, int]:
        """Return the number of calls and the bytes copied for them."""
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
