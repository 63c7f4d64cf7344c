"""Watch: a thread that reports ended connections at once, even if all other threads wait for a GPU.

Imports no framework.
"""

import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Watch:
    """Watches sockets of this process until `close`. A socket closed here leaves by itself."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._actions: dict[int, Callable[[], None]] = {}
        self._epoll.register(self._stop, select.EPOLLIN)
        self._is_closed = False
        arguments = (self._epoll, self._stop, self._actions)
        threading.Thread(
            target=_watch, args=arguments, name="bridge-watch", daemon=True
        ).start()

    def add(self, fd: int, action: Callable[[], None]) -> None:
        """Register an action for the end of a socket's peer.

        The action must hold no strong references.
        """
        self._actions[fd] = action
        # The socket or the watch is closing.
        with contextlib.suppress(OSError, ValueError):
            self._epoll.register(fd, select.EPOLLHUP)

    def close(self) -> None:
        """Stop the thread. Idempotent. For finalizers too."""
        if not self._is_closed:
            self._is_closed = True
            os.eventfd_write(self._stop, 1)


def _watch(
    epoll: select.epoll, stop: int, actions: dict[int, Callable[[], None]]
) -> None:
    try:
        while True:
            for fd, _ in epoll.poll():
                if fd == stop:
                    return
                # This process may have closed the socket.
                with contextlib.suppress(OSError):
                    epoll.unregister(fd)
                try:
                    actions.pop(fd)()
                except Exception:
                    _log.exception("the action for a worker's end failed")
    finally:
        epoll.close()
        os.close(stop)
