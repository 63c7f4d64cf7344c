"""When a worker ends: on signals, with the parent that has spawned it, and in spite of what
models leave running."""

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
    """The worker was told to end while it was starting: there is nothing to drain."""


class StopSignals:
    """SIGTERM and SIGINT ask for a drain; a second one ends the process at once."""

    def __init__(self) -> None:
        self._is_requested = False
        self._is_at_once = False
        self.has_given_up = False
        # A pipe, which is written to wherever the signal arrives. A lock would be waited for on, if
        # the signal came to another thread than the one that waits and runs handlers, or to that
        # one just before it waits.
        self._asked, self._ask = os.pipe()
        os.set_blocking(self._ask, False)
        signal.set_wakeup_fd(self._ask, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: self._note())

    def request(self) -> None:
        """Ask for a drain, from any thread."""
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        os.write(self._ask, b"\0")  # a model may have taken the signal for itself

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal breaks off: imports and compilations may take minutes.

        Raises:
          Stopped: a signal came.
        """
        self._is_at_once = True
        try:
            self._stop_if_requested()
            yield
            self._stop_if_requested()  # a module may have caught it
        finally:
            self._is_at_once = False

    def give_up(self) -> None:
        """Ask for an end without a drain: nothing can be computed here any more."""
        self.has_given_up = True
        os.write(self._ask, b"\0")

    def wait(self) -> None:
        while os.read(self._asked, 1)[0] not in (0, *_SIGNALS):
            pass  # a signal that a model handles

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
    """Ask for a drain, and remove what the parent has made for the sockets: nobody else does any
    more."""
    for path in (endpoint.address.removeprefix("unix:"), endpoint.lane_path):
        with contextlib.suppress(OSError):
            os.unlink(path)
    with contextlib.suppress(OSError):  # it holds other things: not a directory of `spawn`
        os.rmdir(os.path.dirname(endpoint.lane_path))
    stop.request()


def end_at_the_latest(limit_s: float, status: int) -> None:
    """End this process after that time, if it has not by then: threads that models have started
    may go on for ever."""

    def end() -> None:
        others = [thread.name for thread in threading.enumerate() if not thread.daemon]
        _log.warning(
            "ending without waiting any longer for what the models do at the end; threads: %s",
            others,
        )
        os._exit(status)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
