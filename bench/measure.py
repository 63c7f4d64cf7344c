"""Timing of calls, and the results of a run. Imports no framework."""

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """The extent of a run.

    A way's turn lasts about `turn_s` and has at least `min_calls` timed calls.
    """

    functions: tuple[str, ...] = ("affine", "sine", "mlp")
    sizes: tuple[int, ...] = (KIB, MIB, 16 * MIB, 64 * MIB)
    rounds: int = 15
    turn_s: float = 0.05
    min_calls: int = 2
    warm_calls: int = 2
    soak_calls: int = 100_000


# The smallest plan with every line of the budget.
QUICK = Plan(
    functions=("sine",),
    sizes=(KIB, MIB, 64 * MIB),
    rounds=5,
    turn_s=0.02,
    min_calls=1,
    soak_calls=10_000,
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to call one function at one size: seconds per call by round, and bytes per call."""

    rounds: Sequence[Sequence[float]]
    bytes_made: int  # bytes of the output and the gradients
    bytes_copied: float | None = None  # None if not counted

    @property
    def p50_s(self) -> float:
        return percentile(self._seconds(), 50)

    @property
    def p99_s(self) -> float:
        return percentile(self._seconds(), 99)

    @property
    def calls(self) -> int:
        return len(self._seconds())

    def _seconds(self) -> list[float]:
        return [seconds for turn in self.rounds for seconds in turn]


@dataclass(frozen=True, slots=True)
class Growth:
    """Resident bytes of one process before and after many calls."""

    before: int
    after: int

    @property
    def share(self) -> float:
        return self.after / self.before - 1


@dataclass(frozen=True, slots=True)
class Results:
    """The results of a run.

    cells: by (function, size in bytes, way). tasks: seconds of each call, by round.
    growth: by process, if measured.
    """

    plan: Plan
    cells: Mapping[tuple[str, int, str], Cell]
    tasks: Mapping[str, Sequence[Sequence[float]]]
    growth: Mapping[str, Growth] | None
    machine: Mapping[str, str]

    def ratio(self, function: str, nbytes: int, way: str, other: str) -> float:
        """Return the slowdown of `way` against `other`.

        The ratio is the median over the rounds of the quotient of both p50s, since within a round
        both ways run under the same conditions.
        """
        rounds = zip(
            self.cells[function, nbytes, way].rounds,
            self.cells[function, nbytes, other].rounds,
            strict=True,
        )
        return statistics.median(
            statistics.median(turn) / statistics.median(others)
            for turn, others in rounds
        )

    def task_p50s(self, *names: str) -> list[tuple[float, ...]]:
        """Return each round's p50s of these tasks."""
        rounds = zip(*(self.tasks[name] for name in names), strict=True)
        return [tuple(map(statistics.median, turns)) for turns in rounds]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that is at least as large as `percent` % of the values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def interleave(
    steps: Mapping[str, Callable[[], object]], plan: Plan
) -> dict[str, list[list[float]]]:
    """Return the seconds of each call of each step, by round.

    In each round every step has one turn, in random order, so that the machine's other load affects
    all steps alike.
    """
    calls = {way: _calls_per_turn(step, plan) for way, step in steps.items()}
    rounds: dict[str, list[list[float]]] = {way: [] for way in steps}
    with _without_gc():
        for _ in range(plan.rounds):
            for way in random.sample(list(steps), len(steps)):
                rounds[way].append(_turn(steps[way], plan.warm_calls, calls[way]))
    return rounds


def _turn(step: Callable[[], object], warm_calls: int, calls: int) -> list[float]:
    for _ in range(warm_calls):
        step()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def _calls_per_turn(step: Callable[[], object], plan: Plan) -> int:
    # The first calls compile and touch fresh memory.
    fastest = min(_turn(step, plan.warm_calls, 3))
    return max(plan.min_calls, round(plan.turn_s / fastest))


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
