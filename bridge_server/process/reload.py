"""--reload: a supervisor that replaces its worker when the models' files change.

A successor loads and warms up its models beside the worker, and then takes its place. If a model
cannot be loaded, the previous one keeps serving. Imports no framework.
"""

import argparse
import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bridge_server.process import endpoints
from bridge_server.process.parent import watch_parent
from bridge_server.process.shutdown import StopSignals, end_as_orphan
from bridge_server.process.watched import WatchedFiles
from bridge_server.runtime import is_users

_log = logging.getLogger(__name__)

_OK, _FAILED = 0, 1  # exit statuses
_POLL_S = 0.25
_LOADED, _SERVING = "loaded", "serving"


class Handover:
    """A worker's connection to its supervisor; without a descriptor, each method does nothing."""

    def __init__(self, descriptor: int | None, stop: StopSignals) -> None:
        """Take the connection. The supervisor's end requests a drain."""
        self._has_turn = threading.Event()
        self._connection: socket.socket | None = None
        if descriptor is not None:
            self._connection = socket.socket(fileno=descriptor)
            self._connection.set_inheritable(False)  # not for programs of the models
            threading.Thread(
                target=self._watch, args=(self._connection, stop), daemon=True
            ).start()

    def wait_for_turn(self) -> None:
        """Report that the models are loaded, and wait until the previous worker has ended."""
        if self._connection is not None:
            modules = list(sys.modules.items())
            files = [module.__file__ for name, module in modules if is_users(name)]
            self._tell({_LOADED: files})
            self._has_turn.wait()

    def note_serving(self, address: str) -> None:
        """Report that the worker serves."""
        if self._connection is not None:
            self._tell({_SERVING: address})

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._connection is not None
        with contextlib.suppress(OSError):  # its end is noticed by `_watch`
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _watch(self, connection: socket.socket, stop: StopSignals) -> None:
        with contextlib.suppress(OSError):
            while connection.recv(1):
                self._has_turn.set()
        stop.request()


class _Process:
    """A worker as its supervisor sees it."""

    def __init__(self, command: Sequence[str]) -> None:
        self.begun = time.time()
        self.files: list[Path] | None = None  # once its models are loaded
        self.address = ""  # once it serves
        self._is_told = False
        self._received = b""
        self.connection, theirs = socket.socketpair()
        with theirs:
            # A process group of its own: Ctrl-C reaches the supervisor alone.
            self._process = subprocess.Popen(
                [*command, f"--reload-fd={theirs.fileno()}"],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
        self.connection.setblocking(False)

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def read(self) -> None:
        """Take the messages that it has sent."""
        with contextlib.suppress(OSError):
            while chunk := self.connection.recv(1 << 16):
                self._received += chunk
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if _LOADED in message:
                self.files = [Path(file) for file in message[_LOADED]]
            self.address = message.get(_SERVING, self.address)

    def give_turn(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(b"\n")

    def stop(self, again: bool = False) -> None:
        """Ask it to drain, once unless `again`."""
        if again or not self._is_told:
            self._is_told = True
            self._process.terminate()

    def hang_up(self) -> None:
        self._process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """End it before its turn: it has no clients."""
        self._process.kill()
        self.wait()

    def wait(self) -> int:
        status = self._process.wait()
        self.connection.close()
        return status


class Supervisor:
    """Runs a worker, and replaces it when its files change."""

    def __init__(self, argv: Sequence[str], options: argparse.Namespace) -> None:
        """`argv` are the worker's arguments, of which `options` are made."""
        # -B: a compiled file counts as up to date if its source has changed within its second.
        self._command = [sys.executable, "-B", "-m", "bridge_server", *argv]
        self._command.append("--parent-pid=0")  # its parent is this process
        self._options = options
        self._worker: _Process | None = None
        self._successor: _Process | None = None
        self._files = WatchedFiles([])
        self._is_changing = False
        self._is_stopping = False

    def run(self) -> int:
        """Run until a signal, or until the worker ends. Returns its exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.request())
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        on_hangup = self.request if is_terminal else self._hang_up
        signal.signal(signal.SIGHUP, lambda *_: on_hangup())
        parent = self._options.parent_pid
        if parent:
            endpoint = endpoints.parse(self._options.listen)
            watch_parent(parent, lambda: end_as_orphan(endpoint, self._end_as_orphan))
        self._successor = _Process(self._command)
        status = None
        while status is None:
            status = self._step()
        for each in self._processes():
            each.kill()
        return _FAILED if status < 0 else status

    def request(self) -> None:
        """Drain the worker; a second request ends it at once."""
        for each in self._processes():
            each.stop(again=self._is_stopping)
        self._is_stopping = True

    def _end_as_orphan(self) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _hang_up(self) -> None:
        if self._worker is not None:
            self._worker.hang_up()

    def _processes(self) -> Iterator[_Process]:
        yield from filter(None, (self._worker, self._successor))

    def _step(self) -> int | None:
        """Wait for an event, and act on it; return the status if all has ended."""
        # The worker's end makes its connection readable until it is noticed below.
        waited = [] if self._successor is None else [self._successor.connection]
        select.select(waited, [], [], _POLL_S)
        for each in self._processes():
            each.read()
        if self._is_stopping:
            return self._stopped()
        if self._successor is not None:
            status = self._advance(self._successor)
            if status is not None:
                return status
        if self._worker is None:
            return None
        if self._worker.status is not None:
            return self._worker.status
        if self._worker.address and self._are_files_new():
            self._start_successor()
        return None

    def _stopped(self) -> int:
        statuses = []
        for each in self._processes():
            each.stop()
            statuses.append(each.wait())
        self._worker = self._successor = None
        # SIGTERM itself ends a process that has not begun to load.
        return _OK if statuses[0] == -signal.SIGTERM else statuses[0]

    def _advance(self, successor: _Process) -> int | None:
        """Let a successor with loaded models take its turn; return the status of a first worker
        that failed."""
        if successor.files is not None:
            self._replace(successor, successor.files)
        elif successor.status is not None:
            if self._worker is None:
                return successor.status
            successor.kill()
            self._successor = None
            _log.error("the reload failed; the previous models keep serving")
            self._watch(_beside(self._worker.files or []))
        return None

    def _replace(self, successor: _Process, files: list[Path]) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker.wait()
        # A signal that came meanwhile has stopped the successor too.
        successor.give_turn()
        if self._worker is not None:
            _log.info("the models were reloaded")
        self._worker, self._successor = successor, None
        self._watch(files)
        if any(_is_within(file, successor.begun) for file in files):
            self._files.forget()

    def _watch(self, files: list[Path]) -> None:
        self._files = WatchedFiles(files)
        self._files.have_changed()

    def _are_files_new(self) -> bool:
        """Return whether files have changed, and are not being written any more."""
        was_changing = self._is_changing
        self._is_changing = self._files.have_changed()
        return was_changing and not self._is_changing

    def _start_successor(self) -> None:
        assert self._worker is not None
        if self._successor is not None:
            self._successor.kill()
        _log.info("a file has changed: loading the models again")
        address = self._worker.address
        port = address.rpartition(":")[2]
        has_port = self._options.port is not None
        where = f"--port={port}" if has_port else f"--listen={address}"
        self._successor = _Process([*self._command, where])


def _beside(files: list[Path]) -> list[Path]:
    """Return the modules beside some files, which a model that failed may import."""
    folders = {file.parent for file in files}
    found = {*files}
    for folder in folders:
        found.update(folder.glob("*.py"), folder.glob("*/*.py"))
    return sorted(found)


def _is_within(file: Path, begun: float) -> bool:
    """Whether a file was written since a time; clocks of file systems may be ahead."""
    try:
        written = os.stat(file).st_mtime
    except OSError:
        return False
    return begun <= written <= time.time()
