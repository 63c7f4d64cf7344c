"""`bridge_client top`: what a worker does, live. Imports no framework."""

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.json_format import MessageToJson

from bridge_client.remote.session import RemoteSession
from bridge_wire.errors import CallerError
from bridge_wire.pb import bridge_pb2 as pb

_PERIOD_S = 1.0
_TITLES = (
    "model",
    "derivative",
    "calls",
    "calls/s",
    "ms/call",
    "99 % under",
    "of it copying",
    "compiles",
)
_MIB = 1 << 20


def show(
    session: RemoteSession,
    *,
    is_once: bool,
    is_json: bool,
) -> None:
    """Print a worker's numbers, once or every second.

    Raises:
      CallerError: the live table needs rich, which is not installed.
    """
    measured = _measured(session, is_once)
    if is_json:
        for _, now in measured:
            print(MessageToJson(now, indent=None), flush=True)
    elif is_once or not sys.stdout.isatty():
        for before, now in measured:
            print(_as_text(before, now), flush=True)
    else:
        _show_live(measured)


def _measured(
    session: RemoteSession, is_once: bool
) -> Iterator[tuple[pb.Statistics, pb.Statistics]]:
    """Yield the numbers of the last look, and now; the first look compares with the start."""
    before = pb.Statistics()
    while True:
        now = session.measure()
        yield before, now
        if is_once:
            return
        before = now
        time.sleep(_PERIOD_S)


def _show_live(measured: Iterator[tuple[pb.Statistics, pb.Statistics]]) -> None:
    try:
        from rich.live import Live
    except ImportError as error:
        raise CallerError(
            "the live table needs rich; run `pip install 'torch-jax-bridge[cli]'`, or use --once"
        ) from error
    with Live(screen=True, auto_refresh=False) as live:
        for before, now in measured:
            live.update(table_of(before, now), refresh=True)


def table_of(before: pb.Statistics, now: pb.Statistics) -> Any:
    """Return the live table of two looks, as rich's Table."""
    from rich.table import Table

    table = Table(title=_summary(now))
    for i, title in enumerate(_TITLES):
        table.add_column(title, justify="left" if i < 2 else "right")
    for row in _rows(before, now):
        table.add_row(*row)
    return table


def _as_text(before: pb.Statistics, now: pb.Statistics) -> str:
    rows = [_TITLES, *_rows(before, now)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([_summary(now), *lines])


def _summary(now: pb.Statistics) -> str:
    errors = sum(error.count for error in now.errors)
    return (
        f"up {now.uptime_s:.0f} s, {now.sessions} sessions, {now.lanes} lanes,"
        f" {now.running} running, {now.waiting} waiting, {errors} errors,"
        f" {now.slab_bytes / _MIB:.0f} MiB shared, {now.residual_bytes / _MIB:.0f} MiB of"
        f" residuals, {now.evictions} evicted"
    )


def _rows(before: pb.Statistics, now: pb.Statistics) -> Iterator[Sequence[str]]:
    seconds = now.uptime_s - before.uptime_s
    earlier = {(runs.model, runs.derivative): runs for runs in before.runs}
    for runs in now.runs:
        old: Any = earlier.get((runs.model, runs.derivative), pb.Statistics.Runs())
        calls = runs.count - old.count
        copying_s = runs.copy_s - old.copy_s
        busy_s = runs.compute_s - old.compute_s + copying_s
        yield (
            runs.model,
            runs.derivative,
            str(runs.count),
            f"{calls / seconds:.1f}" if seconds > 0 else "",
            f"{1e3 * busy_s / calls:.3f}" if calls else "",
            _most_take(0.99, runs, old),
            f"{copying_s / busy_s:.0%}" if busy_s > 0 else "",
            str(runs.compiles),
        )


def _most_take(
    share: float,
    now: pb.Statistics.Runs,
    before: pb.Statistics.Runs,
) -> str:
    """Return the milliseconds below which a share of the runs lies, to a power of two of
    microseconds."""
    old = itertools.chain(before.times, itertools.repeat(0))
    counts = [new - earlier for new, earlier in zip(now.times, old, strict=False)]
    below = itertools.accumulate(counts)
    wanted = share * sum(counts)
    for k, count in enumerate(below):
        if count >= wanted > 0:
            return f"{2**k / 1e3:g}"
    return ""
