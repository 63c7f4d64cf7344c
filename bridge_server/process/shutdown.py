"""A worker's shutdown: on signals, after its parent's end, and despite threads left by models.

Imports no framework.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

from bridge_server.process.endpoints import Endpoint

_log = logging.getLogger(__name__)

_FAILED = 1  # the exit status
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A stop signal came while the worker was starting: there is nothing to drain."""


class StopSignals:
    """SIGTERM and SIGINT request a drain; a second signal ends the process at once."""

    def __init__(self) -> None:
        self._is_requested = False
        self._is_at_once = False
        self.has_given_up = False
        # A pipe wakes the main thread from any thread. With a lock the main thread would continue
        # to wait if the signal reached another thread, or the main thread just before its wait.
        self._asked, self._ask = os.pipe()
        os.set_blocking(self._ask, False)
        signal.set_wakeup_fd(self._ask, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: self._note())

    def request(self) -> None:
        """Request a drain, from any thread."""
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        os.write(self._ask, b"\0")  # a model may have replaced the signal handler

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal interrupt the block, since imports and compilations may take minutes.

        Raises:
          Stopped: a signal came.
        """
        self._is_at_once = True
        try:
            self._stop_if_requested()
            yield
            self._stop_if_requested()  # a module may have caught Stopped
        finally:
            self._is_at_once = False

    def give_up(self) -> None:
        """Request an exit without a drain, since this process can compute nothing any more."""
        self.has_given_up = True
        os.write(self._ask, b"\0")

    def wait(self) -> None:
        while os.read(self._asked, 1)[0] not in (0, *_SIGNALS):
            pass  # a signal with a model's handler

    def _note(self) -> None:
        if self._is_requested:
            os._exit(_FAILED)
        self._is_requested = True
        if self._is_at_once:
            raise Stopped

    def _stop_if_requested(self) -> None:
        if self._is_requested:
            raise Stopped


def end_as_orphan(endpoint: Endpoint, stop: StopSignals) -> None:
    """Request a drain, and remove the sockets and their directory in the dead parent's place."""
    for path in (endpoint.address.removeprefix("unix:"), endpoint.lane_path):
        with contextlib.suppress(OSError):
            os.unlink(path)
    with contextlib.suppress(OSError):  # not empty, so not a directory of `spawn`
        os.rmdir(os.path.dirname(endpoint.lane_path))
    stop.request()


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
