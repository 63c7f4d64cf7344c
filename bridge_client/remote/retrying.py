"""Retrying: how long a call waits for a worker's successor, and how often a call is repeated.

No framework is imported here.
"""

import logging
import time
from dataclasses import dataclass

from bridge_client.remote.lanes import Stale
from bridge_wire.errors import (
    BridgeError,
    CallerError,
    CallTimeout,
    WorkerBusy,
    WorkerDied,
    WorkerUnavailable,
)

_log = logging.getLogger(__name__)

# After these errors the call did not run, or (WorkerDied) may have run.
RETRIED = (Stale, WorkerUnavailable, WorkerBusy)

_SHORTEST_S, _LONGEST_S = 0.05, 1.0  # pauses between two attempts
_MOST_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Policy:
    """A session's patience: see `connect`.

    `wait_s` applies to the first connection, `retry_s` and `retries` to later calls.
    """

    wait_s: float = 0.0
    retry_s: float = 30.0
    retries: int = 0

    def __post_init__(self) -> None:
        for name in ("wait_s", "retry_s"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= _MOST_S:
                raise CallerError(
                    f"{name}={value!r}; expected a number of seconds from 0 to {_MOST_S:g}"
                )
        if type(self.retries) is not int or self.retries < 0:
            raise CallerError(
                f"retries={self.retries!r}; expected a number of repeats, 0 or more"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Attempts:
    """The attempts of one call."""

    def __init__(
        self,
        within_s: float,
        repeats: int,
        *,
        is_limited: bool = False,
    ) -> None:
        """Begin after a first failed attempt.

        `within_s` is the time for calls that have not run, `repeats` the number of repeats of calls
        that may have run. `is_limited` tells whether the call has a time limit: a connection that
        nobody answers is then a CallTimeout.
        """
        self._is_limited = is_limited
        self._within_s = within_s
        self._deadline = time.monotonic() + within_s
        self._repeats = repeats
        self._pause_s = _SHORTEST_S
        self._stale = self._waits = 0

    def next(self, error: BaseException) -> None:
        """Wait for the next attempt after an error, or raise the error if there is none."""
        if isinstance(error, Stale):
            self._stale += 1
            if (
                self._stale == 1
            ):  # the link was dead for long, perhaps: no reason to wait
                return
            error = _unavailable(error)
        if isinstance(error, WorkerDied):
            if not self._repeats:
                raise error
            self._repeats -= 1
            # The call has reached a worker: the time until its successor is another wait.
            self._deadline = time.monotonic() + self._within_s
            self._pause_s = _SHORTEST_S
            # As text: a log handler may keep the error, and with its traceback the call's blocks.
            _log.warning("a call is repeated: %s", str(error))
            return
        assert isinstance(error, BridgeError)
        self._wait(error)

    def _wait(self, error: BridgeError) -> None:
        pause_s, level = self._pause_s, logging.WARNING
        if isinstance(error, WorkerBusy):
            pause_s, level = max(pause_s, error.retry_after_s), logging.DEBUG
        if time.monotonic() + pause_s > self._deadline:
            unanswered = error.__cause__
            if self._is_limited and isinstance(unanswered, CallTimeout):
                raise unanswered
            raise error
        self._waits += 1
        if self._waits == 1:
            _log.log(level, "waiting up to %g s: %s", self._within_s, str(error))
        time.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_S)


def _unavailable(stale: BaseException) -> WorkerUnavailable:
    error = WorkerUnavailable(
        "the worker disconnected again right after reconnecting; look at its log"
    )
    error.__cause__ = stale
    return error
