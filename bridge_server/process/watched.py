"""Files that are read again once they have changed. Imports no framework."""

import os
from collections.abc import Sequence
from pathlib import Path

# Of one file: inode, size, time of the last change in nanoseconds. None: it cannot be read.
_State = tuple[int, int, int] | None


class WatchedFiles:
    """Reports changes of files by their metadata; a look at one file takes microseconds."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._seen: list[_State] = []

    def have_changed(self) -> bool:
        """Return whether a file has changed since the last call; True for the first call."""
        now = [_state_of(path) for path in self._paths]
        has_changed = now != self._seen
        self._seen = now
        return has_changed

    def forget(self) -> None:
        """Let the next call of `have_changed` return True."""
        self._seen = []


def _state_of(path: Path) -> _State:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
