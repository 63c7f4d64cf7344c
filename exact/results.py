"""The results file: one appended JSON line per way and sample, so that a run can resume."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Results:
    """A file of records `{"way", "case", "checks" | "unusable"}` and `{"way", "done"}`.

    The last record of a case is valid.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, way: str, message: dict[str, Any]) -> None:
        with self._lock, self.path.open("a") as file:
            print(json.dumps({"way": way, **message}), file=file)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the last record of each way and case."""
        last: dict[tuple[str, str], dict[str, Any]] = {}
        for message in self._messages():
            if "case" in message:
                last[message["way"], message["case"]] = message
        yield from last.values()

    def done(self) -> set[tuple[str, str]]:
        """Return the finished (way, entry) pairs."""
        return {
            (message["way"], message["done"])
            for message in self._messages()
            if "done" in message
        }

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            with self.path.open() as file:
                for line in file:
                    try:
                        yield json.loads(line)
                    except ValueError:
                        continue  # a partial line of an interrupted run
