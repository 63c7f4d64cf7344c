"""Meters: what a worker has done, in plain numbers. Imports no framework.

Each lane adds to numbers of its own, without a lock; a reader sums them. An ended lane's numbers
are added to those of the ended lanes.
"""

import logging
import math
import threading
import time
from collections import Counter, defaultdict

from bridge_server.runtime import Program
from bridge_wire.pb import bridge_pb2 as pb

_log = logging.getLogger(__name__)


class _Runs:
    """The runs of one model and derivative over one lane."""

    __slots__ = (
        "compute_s",
        "copy_s",
        "count",
        "output_bytes",
        "queue_s",
        "times",
    )

    def __init__(self) -> None:
        self.count = self.output_bytes = 0
        self.queue_s = self.compute_s = self.copy_s = 0.0
        self.times: defaultdict[int, int] = defaultdict(int)  # see Statistics.Runs


class Meter:
    """The runs of one lane; used by the lane's thread alone."""

    def __init__(self, slow_s: float) -> None:
        """Begin without runs; a run of more than `slow_s` seconds is logged."""
        # By label: programs come and go.
        self.by_label: dict[tuple[str, str], _Runs] = {}
        self.waited_s = 0.0  # in the queue, before the run that is under way
        self.last = 0.0, 0.0  # compute_s and copy_s of the last run
        self._slow_s = slow_s

    def note(
        self,
        program: Program,
        compute_s: float,
        copy_s: float,
    ) -> None:
        """Count a run."""
        runs = self.by_label.get(program.label)
        if runs is None:
            runs = self.by_label[program.label] = _Runs()
        runs.count += 1
        runs.output_bytes += program.outputs_nbytes
        runs.queue_s += self.waited_s
        runs.times[int(1e6 * (compute_s + copy_s)).bit_length()] += 1
        runs.compute_s += compute_s
        runs.copy_s += copy_s
        self.last = compute_s, copy_s
        if compute_s > self._slow_s:
            model, derivative = program.label
            _log.warning("%s of model %r took %.3g s", derivative, model, compute_s)


class Meters:
    """All numbers of a worker. Thread-safe."""

    def __init__(self, slow_s: float = math.inf) -> None:
        """Begin at zero; a run of more than `slow_s` seconds is logged."""
        self._slow_s = slow_s
        self._lock = threading.Lock()
        self._open: set[Meter] = set()
        self._ended: dict[tuple[str, str], pb.Statistics.Runs] = {}
        self._compiles: dict[tuple[str, str], list[float]] = {}
        self._errors: Counter[str] = Counter()
        self._started = time.monotonic()

    def open(self) -> Meter:
        """Return a new lane's meter; `close` must follow."""
        meter = Meter(self._slow_s)
        with self._lock:
            self._open.add(meter)
        return meter

    def close(self, meter: Meter) -> None:
        """Keep the numbers of a lane that has ended."""
        with self._lock:
            self._open.discard(meter)
            _add(self._ended, meter)

    def note_error(self, kind: str) -> None:
        """Count an error that was sent to a client, by its class."""
        with self._lock:
            self._errors[kind] += 1

    def note_compile(
        self,
        label: tuple[str, str],
        seconds: float,
    ) -> None:
        """Count a preparation: tracing and compiling."""
        with self._lock:
            self._compiles.setdefault(label, []).append(seconds)

    def read(self) -> pb.Statistics:
        """Return the numbers since the worker's start."""
        with self._lock:
            found = {
                label: pb.Statistics.Runs.FromString(runs.SerializeToString())
                for label, runs in self._ended.items()
            }
            for meter in self._open:
                _add(found, meter)
            for label, seconds in self._compiles.items():
                runs = _of(found, label)
                runs.compiles = len(seconds)
                runs.compile_s = sum(seconds)
            return pb.Statistics(
                uptime_s=time.monotonic() - self._started,
                lanes=len(self._open),
                runs=[found[label] for label in sorted(found)],
                errors=[
                    pb.Statistics.Errors(kind=kind, count=count)
                    for kind, count in sorted(self._errors.items())
                ],
            )


def _add(found: dict[tuple[str, str], pb.Statistics.Runs], meter: Meter) -> None:
    for label, runs in list(meter.by_label.items()):
        total = _of(found, label)
        total.count += runs.count
        total.queue_s += runs.queue_s
        _add_times(total, runs.times)
        total.compute_s += runs.compute_s
        total.copy_s += runs.copy_s
        total.output_bytes += runs.output_bytes


def _add_times(
    total: pb.Statistics.Runs,
    times: dict[int, int],
) -> None:
    counts = list(times.items())
    longest = max((k for k, _ in counts), default=-1)
    total.times.extend([0] * (longest + 1 - len(total.times)))
    for k, count in counts:
        total.times[k] += count


def _of(
    found: dict[tuple[str, str], pb.Statistics.Runs],
    label: tuple[str, str],
) -> pb.Statistics.Runs:
    if label not in found:
        model, derivative = label
        found[label] = pb.Statistics.Runs(model=model, derivative=derivative)
    return found[label]


def label_of(call: pb.Call) -> tuple[str, str]:
    """Return the model and the derivative of a call, such as ("f", "vmap of vjp")."""
    kinds = [transform.WhichOneof("kind") or "" for transform in call.transforms]
    name = f"{call.model}.{call.method}" if call.method else call.model
    return name, " of ".join(reversed(kinds)) or "forward"
