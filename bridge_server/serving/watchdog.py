"""The watchdog: notices runs that do not end, and says so. Imports no framework."""

import logging
import sys
import threading
import traceback
from collections.abc import Callable

from bridge_server.serving.sessions import Sessions

_log = logging.getLogger(__name__)

_LOOKS = 10  # within the limit
_LONGEST_PAUSE_S = 1.0


class Watchdog:
    """Watches the runs of a worker's sessions from a thread of its own."""

    def __init__(
        self,
        sessions: Sessions,
        limit_s: float,
        on_change: Callable[[bool], None],
    ) -> None:
        """Begin to watch.

        `on_change` is told whether a run is under way for longer than `limit_s` seconds, each time
        that this changes.
        """
        self._sessions = sessions
        self._limit_s = limit_s
        self._on_change = on_change
        self._is_stuck = False
        self._stop = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Stop watching. Idempotent."""
        self._stop.set()

    def _watch(self) -> None:
        pause_s = min(self._limit_s / _LOOKS, _LONGEST_PAUSE_S)
        # The number of looks that have met a run, by the run.
        seen: dict[object, int] = {}
        while not self._stop.wait(pause_s):
            seen = {run: seen.get(run, 0) + 1 for run in self._sessions.runs()}
            longest_s = max(seen.values(), default=0) * pause_s
            self._note(longest_s > self._limit_s)

    def _note(self, is_stuck: bool) -> None:
        if is_stuck == self._is_stuck:
            return
        self._is_stuck = is_stuck
        if is_stuck:
            _log.error(
                "a run is under way for more than %g s; the threads:\n%s",
                self._limit_s,
                _stacks(),
            )
        else:
            _log.warning("the run that seemed stuck has ended")
        self._on_change(is_stuck)


def _stacks() -> str:
    """Return the stacks of all threads that do not wait for a client."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(
        f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
        if ident != threading.get_ident()
    )
