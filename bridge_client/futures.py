"""Futures of calls: waits for several, and makes completed ones. Imports no framework."""

from collections.abc import Callable
from concurrent.futures import ALL_COMPLETED, Future, wait
from typing import Any, TypeVar

from bridge_wire.errors import CallTimeout

_T = TypeVar("_T")


def gather(*futures: Future[Any], timeout_s: float | None = None) -> list[Any]:
    """Wait until every call has ended; return their results in order, or raise the first error
    among them.

    So after an error no call is still using things that the caller may now change or close.

    Raises:
      CallTimeout: some calls had not ended within `timeout_s` seconds; calls that had not begun are
        cancelled.
    """
    pending = wait(futures, timeout_s, ALL_COMPLETED).not_done
    if pending:
        for future in pending:
            future.cancel()
        raise CallTimeout(
            f"{len(pending)} of {len(futures)} calls had not ended within {timeout_s} s"
        )
    return [future.result() for future in futures]


def completed(action: Callable[[], _T]) -> Future[_T]:
    """Act at once, in this thread, and return the future of the outcome."""
    future: Future[_T] = Future()
    try:
        future.set_result(action())
    except Exception as error:
        future.set_exception(error)
    return future
