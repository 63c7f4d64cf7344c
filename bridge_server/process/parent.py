"""A spawned worker ends with its parent, however the parent ends."""

import os
import select
import threading
import time
from collections.abc import Callable

_POLL_S = 1.0


def watch_parent(pid: int, stop: Callable[[], None]) -> None:
    """Call `stop` once the process `pid`, this one's parent, has ended.

    Not by PR_SET_PDEATHSIG, which fires when the parent's *thread* that spawned this process ends.
    """
    threading.Thread(target=_wait, args=(pid, stop), name="parent-watch", daemon=True).start()


def _wait(pid: int, stop: Callable[[], None]) -> None:
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError):  # not on this system, or the parent has gone already
        while os.getppid() == pid:
            time.sleep(_POLL_S)
    else:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if (
            os.getppid() == pid
        ):  # else it ended before the descriptor was opened, and the pid may be another's
            poll.poll()
        os.close(fd)
    stop()
