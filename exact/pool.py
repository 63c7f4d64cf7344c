"""Pool of child processes that run one entry at a time; a crash or hang affects one entry only."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exact import ROOT
from exact.cases import Entry

# A regular fresh process bounds the memory of compiled programs and caches.
_ENTRIES_PER_PROCESS = 300
_COMMAND = [sys.executable, "-m", "exact.child"]


@dataclass
class _Child:
    process: subprocess.Popen[str]
    lines: "queue.Queue[str | None]" = field(default_factory=queue.Queue)
    entries: int = 0

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def end(self) -> int:
        """End the process and its workers; return its exit status."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            return self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


@dataclass
class Pool:
    """Runs entries on one way.

    Args:
      arguments: of `python -m exact.child`.
      timeout_s: limit for one check.
      log: folder for the children's stderr.
      record: called with a dict for each sample, and with {"done": entry} after an entry; from
        several threads, one call at a time.
      deadline: a time.monotonic() after which no entry begins.
    """

    arguments: Sequence[str]
    timeout_s: float
    log: Path
    record: Callable[[dict[str, Any]], None]
    deadline: float = float("inf")
    jobs: int = 1

    def run(self, entries: Sequence[Entry]) -> None:
        self._left = deque(entries)
        self._lock = threading.Lock()
        threads = [
            threading.Thread(target=self._serve, args=(n,))
            for n in range(min(self.jobs, len(entries)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _serve(self, number: int) -> None:
        child: _Child | None = None
        try:
            while time.monotonic() < self.deadline:
                try:
                    entry = self._left.popleft()
                except IndexError:
                    break
                skip: int | None = 0
                while skip is not None:
                    if child is not None and child.entries >= _ENTRIES_PER_PROCESS:
                        child.end()
                        child = None
                    if child is None:
                        child = self._start(number)
                    skip = self._hand(child, entry, skip)
                    if skip is not None:
                        child = None
        finally:
            if child is not None:
                child.end()

    def _start(self, number: int) -> _Child:
        self.log.mkdir(parents=True, exist_ok=True)
        with (
            self.log / f"child-{'-'.join(self.arguments[:3]).strip('-')}-{number}.log"
        ).open("a") as log:
            child = _Child(
                subprocess.Popen(
                    [*_COMMAND, *self.arguments],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            )
        try:
            line = child.lines.get(timeout=300)
        except queue.Empty:
            line = None
        if line is None:
            status = child.end()
            raise RuntimeError(
                f"exact.child did not start (status {status}); see {self.log}"
            )
        return child

    def _hand(self, child: _Child, entry: Entry, skip: int) -> int | None:
        """Run an entry in a child from a sample on; after a crash return the next sample."""
        child.entries += 1
        at: dict[str, Any] = {"at": [skip, "samples"]}
        try:
            assert child.process.stdin is not None
            child.process.stdin.write(f"{entry} {skip}\n")
            child.process.stdin.flush()
        except OSError:
            pass
        while True:
            try:
                line = child.lines.get(timeout=self.timeout_s)
                what = "crash"
            except queue.Empty:
                line, what = None, "hang"
                os.killpg(child.process.pid, signal.SIGKILL)
            if line is None:
                status = child.end()
                self._note_end(entry, at, what, status)
                return int(at["at"][0]) + 1 if at["at"][1] != "samples" else None
            message = json.loads(line)
            if "at" in message:
                at = message | {"index": message.get("index", at.get("index", 0))}
                continue
            with self._lock:
                self.record(message)
            if "done" in message:
                return None

    def _note_end(
        self, entry: Entry, at: dict[str, Any], what: str, status: int
    ) -> None:
        check = at["at"][1]
        case = f"{entry}/{at.get('index', 0)}"
        detail = (
            f"no answer within {self.timeout_s:g} s"
            if what == "hang"
            else f"the process ended with {status}"
        )
        with self._lock:
            if check in ("samples", "reference"):
                self.record(
                    {
                        "case": case,
                        "unusable": f"torch itself, or a sample of it: {what}, {detail}",
                    }
                )
            else:
                self.record(
                    {
                        "case": case,
                        "checks": {**at.get("so far", {}), check: [what, detail]},
                    }
                )
            if check == "samples":
                self.record({"done": str(entry)})
