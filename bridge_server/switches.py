"""What is set for the whole process as long as anybody needs it so. Imports no framework."""

import threading
from collections.abc import Callable


class Switch:
    """A context manager that may be nested, and used in several threads: the first sets, and the
    last sets back."""

    def __init__(self, turn: Callable[[], Callable[[], object]]) -> None:
        """`turn` sets what there is to set, and returns what sets it back."""
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
