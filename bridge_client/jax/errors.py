"""Exceptions that pass through compiled code and keep their types.

XLA knows texts only: an exception in a callback becomes a JaxRuntimeError whose message quotes it.
So the callback stores the exception here, under a number that the message contains. When jax makes
a JaxRuntimeError with this message, it gets an instance that is of the exception's type too:
`except RemoteModelError` and `except JaxRuntimeError` both catch it. Ctrl-C during a call in
compiled code passes in the same way.
"""

import contextlib
import functools
import itertools
import re
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, cast

from jax.errors import JaxRuntimeError

from bridge_wire.errors import BridgeError, unexpected

_MOST_PENDING = 64
_MARK = re.compile(r"torch-jax-bridge error #(\d+)#")

_numbers = itertools.count(1)
_pending: OrderedDict[int, BridgeError | KeyboardInterrupt] = OrderedDict()
_lock = threading.Lock()


class Crossing(Exception):
    """A reference to a stored exception, in a form that XLA quotes."""


def named(error: BaseException) -> Crossing:
    """Store an exception; return the exception that a callback must raise in its place."""
    stored = (
        error
        if isinstance(error, BridgeError | KeyboardInterrupt)
        else unexpected(error)
    )
    number = next(_numbers)
    # Without its frames and those of its causes, which hold the call's memory.
    stored.__cause__ = stored.__context__ = None
    with _lock:
        _pending[number] = stored.with_traceback(None)
        while len(_pending) > _MOST_PENDING:
            _pending.popitem(last=False)
    return Crossing(
        f"{type(stored).__name__}: {stored} (torch-jax-bridge error #{number}#)"
    )


def _new(cls: type[JaxRuntimeError], *args: Any, **kwargs: Any) -> JaxRuntimeError:
    if cls is JaxRuntimeError and args and isinstance(args[0], str):
        marks = _MARK.findall(args[0])
        error = _pending.get(int(marks[-1])) if marks else None
        if error is not None:
            return _surfaced(error)
    return _plain_new(cls, *args, **kwargs)


def _surfaced(error: BridgeError | KeyboardInterrupt) -> JaxRuntimeError:
    kind = _kind(cast(Hashable, type(error)))
    surfaced = cast(Any, type(error).__new__(kind, *error.args))
    surfaced.args = error.args
    surfaced.__dict__.update(error.__dict__)
    return surfaced


@functools.cache
def _kind(cls: Any) -> Any:
    """Return the type of errors of this class that come out of compiled code."""

    def init(self: Any, *args: Any) -> None:
        # jax calls this with XLA's message; the error already has its own arguments.
        JaxRuntimeError.__init__(self, str(self.args[0]) if self.args else "")

    return type(
        cls.__name__,
        (cls, JaxRuntimeError),
        {"__init__": init, "__module__": cls.__module__, "__doc__": cls.__doc__},
    )


_plain_new = JaxRuntimeError.__new__
# If jax forbids the assignment, the message still has the text of the exception, with the remote
# traceback.
with contextlib.suppress(TypeError, AttributeError):
    JaxRuntimeError.__new__ = _new
