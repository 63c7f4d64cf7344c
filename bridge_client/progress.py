"""Progress of a preparation that takes longer than 2 s, so that it never looks like a hang.

On a terminal and in a notebook a line with the phase and the time is shown, if tqdm is installed;
the log has it everywhere.
"""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger(__name__)
_SLOW_S = 2.0
_REFRESH_S = 0.5


@dataclass(slots=True)
class Progress:
    """Current phase of a preparation."""

    phase: str = "starting"

    def enter(self, phase: str) -> None:
        self.phase = phase


@contextlib.contextmanager
def shown_when_slow(what: str) -> Iterator[Progress]:
    """Log and show the phase of a preparation that takes longer than two seconds."""
    progress, over = Progress(), threading.Event()

    def begin() -> None:
        # A timer waits in few resources; the loop below needs a thread.
        _log.info("still %s %s", progress.phase, what)
        bar = _bar()
        while bar is not None and not over.wait(_REFRESH_S):
            bar.set_description_str(f"bridge: {progress.phase} {what}")
        if bar is not None:
            bar.close()

    timer = threading.Timer(_SLOW_S, begin)
    timer.daemon = True
    timer.start()
    try:
        yield progress
    finally:
        over.set()
        timer.cancel()


def _bar() -> Any:
    """Return a line that shows the time, where somebody can see it."""
    is_notebook = "ipykernel" in sys.modules
    if not (is_notebook or sys.stderr.isatty()):
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(bar_format="{desc} {elapsed}", leave=False)
