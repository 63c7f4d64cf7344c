"""A thread that hears at once when connections end, also while all others wait for a GPU.

No framework.
"""

import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Watch:
    """Watches sockets of this process, until `close`.

    One that is closed here is forgotten by itself.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._actions: dict[int, Callable[[], None]] = {}
        self._epoll.register(self._stop, select.EPOLLIN)
        self._is_closed = False
        arguments = (self._epoll, self._stop, self._actions)
        threading.Thread(target=_watch, args=arguments, name="bridge-watch", daemon=True).start()

    def add(self, fd: int, action: Callable[[], None]) -> None:
        """Have a thread act when the peer of a socket has gone. The action holds nothing alive."""
        self._actions[fd] = action
        with contextlib.suppress(OSError, ValueError):  # the socket, or the watch, is being closed
            self._epoll.register(fd, select.EPOLLHUP)

    def close(self) -> None:
        """Stop. Idempotent; for finalizers, too."""
        if not self._is_closed:
            self._is_closed = True
            os.eventfd_write(self._stop, 1)


def _watch(epoll: select.epoll, stop: int, actions: dict[int, Callable[[], None]]) -> None:
    try:
        while True:
            for fd, _ in epoll.poll():
                if fd == stop:
                    return
                with contextlib.suppress(OSError):  # it was closed here meanwhile
                    epoll.unregister(fd)
                try:
                    actions.pop(fd)()
                except Exception:
                    _log.exception("the end of a worker could not be dealt with")
    finally:
        epoll.close()
        os.close(stop)
