"""Process-wide settings, held while at least one user needs them. Imports no framework."""

import threading
from collections.abc import Callable


class Switch:
    """A nestable context manager for all threads: the first entry sets, the last exit restores."""

    def __init__(self, turn: Callable[[], Callable[[], object]]) -> None:
        """`turn` applies the setting, and returns the function that restores it."""
        self._turn = turn
        self._turn_back: Callable[[], object] = lambda: None
        self._users = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._turn_back = self._turn()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._turn_back()
