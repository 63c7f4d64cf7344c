"""Logs progress when a preparation takes longer than 2 s, so that it never looks like a hang."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

_log = logging.getLogger(__name__)
_SLOW_S = 2.0


@dataclass(slots=True)
class Progress:
    """Current phase of a preparation."""

    phase: str = "starting"

    def enter(self, phase: str) -> None:
        self.phase = phase


@contextlib.contextmanager
def logged_when_slow(what: str) -> Iterator[Progress]:
    """Log the phase of a preparation that takes longer than two seconds."""
    progress = Progress()
    timer = threading.Timer(
        _SLOW_S, lambda: _log.info("still %s %s", progress.phase, what)
    )
    timer.daemon = True
    timer.start()
    try:
        yield progress
    finally:
        timer.cancel()
