"""A worker's shutdown: on signals, after its parent's end, and despite threads left by models.

Imports no framework.
"""

import atexit
import contextlib
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from bridge_server.process.endpoints import Endpoint

_log = logging.getLogger(__name__)

_FAILED = 1  # the exit status
_INTERRUPTED_S = 0.5
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A stop signal came while the worker was starting: there is nothing to drain."""


class StopSignals:
    """SIGTERM and SIGINT request a drain; a second signal ends the process at once.

    SIGHUP reloads files. On a terminal it is the terminal's end, and requests a drain.
    """

    def __init__(self) -> None:
        self._is_requested = False
        self._is_at_once = False
        self.has_given_up = False
        # A pipe wakes the main thread from any thread. With a lock the main thread would continue
        # to wait if the signal reached another thread, or the main thread just before its wait.
        self._asked, self._ask = os.pipe()
        os.set_blocking(self._ask, False)
        signal.set_wakeup_fd(self._ask, warn_on_full_buffer=False)
        signal.signal(signal.SIGHUP, lambda *_: None)
        sys.unraisablehook = _without_stopped(sys.unraisablehook)
        self._stops: tuple[int, ...] = _SIGNALS
        if sys.stderr is not None and sys.stderr.isatty():
            self._stops = (*_SIGNALS, signal.SIGHUP)
        for number in self._stops:
            signal.signal(number, lambda *_: self._note())

    def request(self) -> None:
        """Request a drain, from any thread."""
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        os.write(self._ask, b"\0")  # a model may have replaced the signal handler

    @contextlib.contextmanager
    def at_once(self, clean_up: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Let a signal interrupt the block, since imports and compilations may take minutes.

        Native code, such as a compiler, delays Python's signal handler: a block that goes on for
        _INTERRUPTED_S after a signal is ended with the process, after `clean_up`, with status 0.

        Raises:
          Stopped: a signal came.
        """
        self._is_at_once = True
        left, leave = os.pipe()
        watch = threading.Thread(
            target=self._watch, args=(left, clean_up), name="stop-watch", daemon=True
        )
        try:
            self._stop_if_requested()
            watch.start()
            yield
            self._stop_if_requested()  # a module may have caught Stopped
        finally:
            self._is_at_once = False
            os.write(leave, b"\0")  # a forked child may keep it open
            if watch.ident is not None:
                watch.join()
            os.close(left)
            os.close(leave)

    def _watch(self, left: int, clean_up: Callable[[], None]) -> None:
        """Wait until the block has ended, or end the process after a signal."""
        poll = select.poll()
        poll.register(left, select.POLLIN)
        poll.register(self._asked, select.POLLIN)
        taken = [1]
        while taken[-1] not in self._stops:
            if left in dict(poll.poll()):
                break
            taken.append(os.read(self._asked, 1)[0])
        if not {0, *self._stops}.isdisjoint(taken):
            os.write(self._ask, b"\0")  # `wait` must see the request too
        poll.unregister(self._asked)
        if not poll.poll(_INTERRUPTED_S * 1000):
            _log.info("stopping during a compilation or an import")
            clean_up()
            os._exit(0)

    def give_up(self) -> None:
        """Request an exit without a drain, since this process can compute nothing any more."""
        self.has_given_up = True
        os.write(self._ask, b"\0")

    def wait(self, reload: Callable[[], None]) -> None:
        """Wait for a request to stop; call `reload` at each SIGHUP."""
        while (number := os.read(self._asked, 1)[0]) not in (0, *self._stops):
            if number == signal.SIGHUP:  # others have a model's handler
                reload()

    def _note(self) -> None:
        if self._is_requested:
            os._exit(_FAILED)
        self._is_requested = True
        if self._is_at_once:
            raise Stopped

    def _stop_if_requested(self) -> None:
        if self._is_requested:
            raise Stopped


def _without_stopped(report: Callable[..., object]) -> Callable[..., object]:
    """Return a hook for exceptions that Python ignores, such as those in callbacks of its garbage
    collector; of Stopped it reports nothing, since `_watch` ends the block all the same."""

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, Stopped):
            report(unraisable)

    return hook


def end_as_orphan(endpoint: Endpoint, request: Callable[[], None]) -> None:
    """Request a drain, and remove the sockets and their directory in the dead parent's place."""
    for path in (endpoint.address.removeprefix("unix:"), endpoint.lane_path):
        with contextlib.suppress(OSError):
            os.unlink(path)
    with contextlib.suppress(OSError):  # not empty, so not a directory of `spawn`
        os.rmdir(os.path.dirname(endpoint.lane_path))
    request()


def end_without_finalization(status: int) -> NoReturn:
    """End this process as the interpreter does, after models' threads and exit handlers, but
    without finalizing the interpreter.

    Finalization ends daemon threads when they next take the interpreter's lock. Inside of a
    framework's C++ code, as where a lane's thread frees arrays, that aborts the process.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
    finally:
        os._exit(status)


def end_at_the_latest(limit_s: float, status: int) -> None:
    """End this process after the limit at the latest, since models' threads may run forever."""

    def end() -> None:
        others = [thread.name for thread in threading.enumerate() if not thread.daemon]
        _log.warning(
            "exiting without waiting for model threads: %s",
            others,
        )
        os._exit(status)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
