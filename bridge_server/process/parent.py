"""Parent watch: ends a spawned worker when its parent exits or is killed. Imports no framework."""

import os
import select
import threading
import time
from collections.abc import Callable

_POLL_S = 1.0


def watch_parent(pid: int, stop: Callable[[], None]) -> None:
    """Call `stop` once the parent process `pid` has ended.

    PR_SET_PDEATHSIG is unsuitable: the signal comes when the parent's spawning *thread* ends.
    """
    threading.Thread(
        target=_wait, args=(pid, stop), name="parent-watch", daemon=True
    ).start()


def _wait(pid: int, stop: Callable[[], None]) -> None:
    try:
        fd = os.pidfd_open(pid)
    except (
        AttributeError,
        OSError,
    ):
        # No pidfd on this system, or the parent has already ended.
        while os.getppid() == pid:
            time.sleep(_POLL_S)
    else:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        # If the parent ended before pidfd_open, the pid may belong to another process.
        if os.getppid() == pid:
            poll.poll()
        os.close(fd)
    stop()
