"""The performance budget of docs/design.md as a table, and the verdicts on a run.

Imports no framework.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.measure import KIB, MIB, Results


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its value in a run must be at most `limit`, or with `below` less than `limit`.

    The value is None if it was not measured.
    """

    work: str
    limit: float
    value: Callable[[Results], float | None]
    below: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """A line and its value in one run."""

    line: Line
    value: float | None

    @property
    def outcome(self) -> str:
        """Return "met", "MISSED" or "not measured"."""
        if self.value is None:
            return "not measured"
        is_met = (
            self.value < self.line.limit
            if self.line.below
            else self.value <= self.line.limit
        )
        return "met" if is_met else "MISSED"


def evaluate(results: Results) -> list[Verdict]:
    """Return the verdict on each line.

    Raises:
      KeyError: a cell that a line needs was not measured.
    """
    return [Verdict(line, line.value(results)) for line in LINES]


def exit_status(verdicts: Sequence[Verdict]) -> int:
    """Return 1 if any line was missed, else 0."""
    return int(any(verdict.outcome == "MISSED" for verdict in verdicts))


def _ratio(nbytes: int, way: str, other: str) -> Callable[[Results], float]:
    return lambda results: results.ratio("sine", nbytes, way, other)


def _copied(results: Results) -> float:
    """Return the highest share of all functions and sizes."""
    cells = [cell for (_, _, way), cell in results.cells.items() if way == "slab"]
    return max((cell.bytes_copied or 0) / cell.bytes_made for cell in cells)


def _growth(results: Results) -> float | None:
    """Return the larger growth of client and worker."""
    return (
        None
        if results.growth is None
        else max(growth.share for growth in results.growth.values())
    )


def _tasks(task: str, other: str) -> Callable[[Results], float]:
    return lambda results: statistics.median(
        one / two for one, two in results.task_p50s(task, other)
    )


LINES = (
    Line(
        "forward + VJP, 1 KiB, two processes / jax2torch-style in one process",
        0.20,
        _ratio(KIB, "local", "jax2torch"),
    ),
    Line("the same at 1 MiB", 0.85, _ratio(MIB, "local", "jax2torch")),
    Line("the same at 64 MiB", 0.70, _ratio(64 * MIB, "local", "jax2torch")),
    Line(
        "the same over gRPC inline, 64 MiB / local lane",
        4.0,
        _ratio(64 * MIB, "grpc", "local"),
    ),
    Line(
        "forward + VJP, 1 KiB / one bare gRPC unary ping",
        0.5,
        _ratio(KIB, "local", "ping"),
    ),
    Line(
        "bytes copied, inputs already in a slab / bytes of the outputs and gradients",
        1.0,
        _copied,
    ),
    Line("vmap over 1,000 rows / a Python loop over them", 0.1, _tasks("vmap", "loop")),
    Line(
        "a step with a call among torch's operations, by torch.compile / as it is",
        1.0,
        _tasks("compiled with", "eager with"),
    ),
    Line(
        "resident growth of client and worker over 100,000 calls",
        0.01,
        _growth,
        below=True,
    ),
    Line(
        "forward + VJP, 1 KiB, in one process / jax2torch-style",
        0.25,
        _ratio(KIB, "inproc", "jax2torch"),
    ),
    Line(
        "a torch worker from jitted JAX, 1 KiB / jax.pure_callback",
        1.0,
        _tasks("torch worker", "pure_callback"),
    ),
    Line(
        "an MLP through trace_torch / written in JAX", 1.2, _tasks("traced", "in jax")
    ),
    Line(
        "reset and step of a state of 20 arrays / of the same as a tuple",
        1.2,
        _tasks("state", "state_tuple"),
    ),
    Line(
        "torch.func.grad of a call, 1 KiB / torch.autograd.grad",
        2.2,
        _tasks("func.grad", "autograd"),
    ),
)
