"""Spans of calls: for OpenTelemetry, and for a file that Perfetto shows. Imports no framework.

A worker answers a timed run with the durations of its parts, so the spans of both sides are made
here, on one clock, and a worker needs no exporter. The parts of the worker lie in the middle of the
client's wait: what is left on both sides is the way there and back.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bridge_client.programs import Program
from bridge_wire.errors import CallerError
from bridge_wire.pb import bridge_pb2 as pb

PROFILE = "BRIDGE_PROFILE"
_SDK = "opentelemetry.sdk.trace"
_NS, _NS_PER_US = 1_000_000_000, 1000


class Part(NamedTuple):
    """A part of a span, in nanoseconds since the epoch."""

    name: str
    begin_ns: int
    end_ns: int


class Span(NamedTuple):
    """One run or preparation, and what the worker did for it."""

    name: str
    begin_ns: int
    end_ns: int
    address: str
    parts: Sequence[Part]


def are_wanted() -> bool:
    """Whether anybody takes spans: a profile, or a provider of OpenTelemetry's SDK."""
    return bool(_profiles) or _is_exported()


def _is_exported() -> bool:
    sdk = sys.modules.get(_SDK)
    if sdk is None:
        return False
    from opentelemetry import trace

    return isinstance(trace.get_tracer_provider(), sdk.TracerProvider)


def of_run(
    program: Program,
    address: str,
    begin_ns: int,
    times: pb.Times | None,
) -> None:
    """Note a run that has ended now."""
    end_ns = time.time_ns()
    parts: list[Part] = []
    if times is not None:
        named = ("queue", times.queue_s), ("compute", times.compute_s)
        seconds = [*named, ("copy", times.copy_s)]
        on_the_way_ns = end_ns - begin_ns - sum(int(s * _NS) for _, s in seconds)
        at_ns = begin_ns + max(0, on_the_way_ns // 2)
        for name, duration_s in seconds:
            parts.append(Part(name, at_ns, at_ns + int(duration_s * _NS)))
            at_ns = parts[-1].end_ns
    _note(Span(f"bridge {program.title}", begin_ns, end_ns, address, parts))


def of_preparation(
    what: str,
    address: str,
    begin_ns: int,
    phases: Sequence[tuple[str, int]],
) -> None:
    """Note a preparation that has ended now, and the times at which its phases began."""
    end_ns = time.time_ns()
    following = [at_ns for _, at_ns in phases[1:]] + [end_ns]
    parts = [
        Part(name, at_ns, until_ns)
        for (name, at_ns), until_ns in zip(phases, following, strict=False)
    ]
    _note(Span(f"bridge prepare {what}", begin_ns, end_ns, address, parts))


def _note(span: Span) -> None:
    for profile in list(_profiles):
        profile.add(span)
    if _is_exported():
        _export(span)


def _export(span: Span) -> None:
    """Make OpenTelemetry's spans, below the current one of this thread."""
    from opentelemetry import trace

    tracer = trace.get_tracer("torch-jax-bridge")
    whole = tracer.start_span(
        span.name,
        kind=trace.SpanKind.CLIENT,
        start_time=span.begin_ns,
        attributes={"bridge.address": span.address},
    )
    below = trace.set_span_in_context(whole)
    for part in span.parts:
        tracer.start_span(
            part.name,
            context=below,
            kind=trace.SpanKind.SERVER,
            start_time=part.begin_ns,
        ).end(part.end_ns)
    whole.end(span.end_ns)


class Profile:
    """Collects the spans of this process for one file in Chrome's trace format."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._workers: dict[str, int] = {}
        self._events: list[dict[str, Any]] = [self._named(self._pid, "client")]

    def add(self, span: Span) -> None:
        """Add a span of the client, and its parts as spans of the worker."""
        thread = threading.get_native_id()
        worker = self._workers.get(span.address)
        if worker is None:
            worker = self._workers[span.address] = self._pid + 1 + len(self._workers)
            self._events.append(self._named(worker, f"worker {span.address}"))
        whole = Part(span.name, span.begin_ns, span.end_ns)
        self._events.append(_event(whole, self._pid, thread))
        self._events += [_event(part, worker, thread) for part in span.parts]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, which ui.perfetto.dev and chrome://tracing open."""
        with open(path, "w") as file:
            json.dump({"traceEvents": list(self._events)}, file)

    def _named(self, pid: int, name: str) -> dict[str, Any]:
        return {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}


def _event(part: Part, pid: int, thread: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": part.name,
        "pid": pid,
        "tid": thread,
        "ts": part.begin_ns / _NS_PER_US,
        "dur": (part.end_ns - part.begin_ns) / _NS_PER_US,
    }


@contextlib.contextmanager
def profile(path: str | os.PathLike[str]) -> Iterator[None]:
    """Write the calls of this process during the block to a file that Perfetto opens.

    The file has two processes on one clock: the client, and the worker with its queue, computation
    and copies.

    Raises:
      CallerError: the file cannot be written.
    """
    try:
        with open(path, "w"):
            pass
    except OSError as error:
        raise CallerError(
            f"the profile {os.fspath(path)!r} cannot be written: {error.strerror}"
        ) from error
    recorded = Profile()
    _profiles.append(recorded)
    try:
        yield
    finally:
        _profiles.remove(recorded)
        recorded.write(path)


_profiles: list[Profile] = []


def _profile_this_process() -> None:
    """Write a profile when this process ends, as `bridge_client profile` asks for."""
    path = os.environ.pop(PROFILE, "")  # children would overwrite the file
    if path:
        context = profile(path)
        context.__enter__()
        atexit.register(context.__exit__, None, None, None)


_profile_this_process()
