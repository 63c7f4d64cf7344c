"""Audit log: each session that is opened, and each call that is refused, but never a token.

The logger is `bridge_server.audit`. Imports no framework.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import grpc

from bridge_server.process.tokens import Grant

_log = logging.getLogger("bridge_server.audit")

_MOST = 20  # refusals logged in a second: a client must not be able to fill the disk
_LONGEST = 100  # characters of a name that a client chooses


class Audit:
    """Logs admissions, and a bounded number of refusals. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._second = 0
        self._refusals = 0

    def admit(self, context: grpc.ServicerContext, method: str, grant: Grant) -> None:
        """Log a call that is admitted: at level INFO if it opens a session, else at DEBUG."""
        opens = method.endswith("/Open")
        _log.log(
            logging.INFO if opens else logging.DEBUG,
            "admitted peer=%s token=%s certificate=%s method=%s",
            context.peer(),
            grant.name,
            _certificate_of(context),
            method[:_LONGEST],
        )

    def refuse(self, context: grpc.ServicerContext, method: str, reason: str) -> None:
        """Log a call that is refused."""
        if not self._has_room():
            return
        _log.info(
            "refused peer=%s certificate=%s method=%r reason=%r",
            context.peer(),
            _certificate_of(context),
            method[:_LONGEST],
            reason,
        )

    def _has_room(self) -> bool:
        """Count a refusal; return whether to log it."""
        now = int(time.monotonic())
        with self._lock:
            unlogged = self._refusals - _MOST
            if now != self._second:
                self._second, self._refusals = now, 0
                if unlogged > 0:
                    _log.info("refused %d more calls", unlogged)
            self._refusals += 1
            return self._refusals <= _MOST


def _certificate_of(context: grpc.ServicerContext) -> str:
    """Return the common name in the client's certificate, or "-"."""
    properties: Mapping[str, Any] = context.auth_context()
    names = list(properties.get("x509_common_name", ()))
    return repr(b" ".join(names).decode(errors="replace"))[:_LONGEST] if names else "-"
