"""Messages to a service manager such as systemd, by the protocol of sd_notify(3).

Imports no framework.
"""

import logging
import os
import socket
import threading

_log = logging.getLogger(__name__)

_SOCKET, _WATCHDOG, _PID = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"


class ServiceManager:
    """The service manager that NOTIFY_SOCKET names; without the variable, no message is sent."""

    def __init__(self) -> None:
        """Take the variables out of the environment: they are not for child processes."""
        name = os.environ.pop(_SOCKET, "")
        # "@" stands for the first byte of an abstract socket's name.
        self._address = f"\0{name[1:]}" if name.startswith("@") else name
        period_us = os.environ.pop(_WATCHDOG, "")
        is_ours = os.environ.pop(_PID, str(os.getpid())) == str(os.getpid())
        is_watched = is_ours and period_us.isdecimal() and int(period_us) > 0
        self._period_s = int(period_us) / 2e6 if is_watched else None

    def note_ready(self, endpoint: str) -> None:
        """Report that the worker serves, and from now on that it lives, if the manager watches."""
        self._tell("READY=1", f"STATUS=serving at {endpoint}")
        if self._address and self._period_s is not None:
            threading.Thread(
                target=self._keep_alive,
                args=(self._period_s,),
                name="watchdog",
                daemon=True,
            ).start()

    def note_stopping(self) -> None:
        """Report that the worker takes no more work."""
        self._tell("STOPPING=1", "STATUS=waiting for the calls under way")

    def _keep_alive(self, period_s: float) -> None:
        # Ends with the process: an interpreter that hangs sends nothing.
        while True:
            self._tell("WATCHDOG=1")
            threading.Event().wait(period_s)

    def _tell(self, *lines: str) -> bool:
        """Send a message; return whether the manager can be reached."""
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                connection.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            _log.warning("cannot notify the service manager: %s", error.strerror)
            return False
        return True
