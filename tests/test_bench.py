"""The benchmark's judgement and its reports, on made-up measurements; nothing is timed here."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import budget, report
from bench.__main__ import conclude
from bench.measure import KIB, MIB, Cell, Growth, Plan, Results, interleave, percentile

PLAN = Plan(functions=("sine",), sizes=(KIB, MIB, 64 * MIB))
# Seconds of each way at each of PLAN's sizes, and bytes copied per byte made.
SECONDS = {
    "native": (1e-5, 1e-3, 0.1),
    "jax2torch": (1e-3, 2e-3, 0.2),
    "local": (1e-4, 1e-3, 0.1),
    "slab": (1e-4, 1e-3, 0.1),
    "grpc": (1e-3, 1e-2, 0.3),
    "ping": (3e-4, 3e-4, 3e-4),
    "inproc": (8e-5, 1e-3, 0.1),
}
COPIED = {"local": 2.0, "slab": 1.0, "grpc": 3.0}
TASKS = {
    **{"vmap": 1e-3, "loop": 1e-1, "hvp": 1e-3, "native hvp": 1e-4},
    **{
        "eager with": 3e-4,
        "eager without": 1e-4,
        "compiled with": 2e-4,
        "compiled without": 1e-4,
    },
    **{"state": 3e-4, "state_tuple": 3e-4},
    **{"func.grad": 2e-4, "autograd": 1e-4},
    **{"torch worker": 2e-4, "pure_callback": 3e-4, "traced": 1e-3, "in jax": 1e-3},
}


def good_results() -> Results:
    """Results that meet every line of the budget."""
    cells = {
        ("sine", nbytes, way): Cell(
            [[seconds] * 3] * 2,
            2 * nbytes,
            COPIED[way] * 2 * nbytes if way in COPIED else None,
        )
        for way, times in SECONDS.items()
        for nbytes, seconds in zip(PLAN.sizes, times, strict=True)
    }
    growth = {
        "client": Growth(200 * MIB, 200 * MIB),
        "worker": Growth(300 * MIB, 301 * MIB),
    }
    tasks = {name: [[seconds] * 3] * 2 for name, seconds in TASKS.items()}
    return Results(PLAN, cells, tasks, growth, {"CPU": "two cores"})


def slower(nbytes: int, way: str, factor: float) -> Callable[[Results], Results]:
    """Return the change of results in which one way takes `factor` times as long at one size."""

    def change(results: Results) -> Results:
        cell = results.cells["sine", nbytes, way]
        rounds = [[seconds * factor for seconds in turn] for turn in cell.rounds]
        return with_cell(results, nbytes, way, dataclasses.replace(cell, rounds=rounds))

    return change


def slower_task(name: str, factor: float) -> Callable[[Results], Results]:
    """Return the change of results in which one task takes `factor` times as long."""
    turns = [[TASKS[name] * factor] * 3] * 2
    return lambda results: dataclasses.replace(
        results, tasks={**results.tasks, name: turns}
    )


def copies_one_byte_more(results: Results) -> Results:
    cell = results.cells["sine", MIB, "slab"]
    return with_cell(
        results,
        MIB,
        "slab",
        dataclasses.replace(cell, bytes_copied=cell.bytes_made + 1),
    )


def grows(process: str) -> Callable[[Results], Results]:
    """Return the change of results in which a process grows by exactly one percent."""
    return lambda results: dataclasses.replace(
        results, growth=results.growth | {process: Growth(100, 101)}
    )


def with_cell(results: Results, nbytes: int, way: str, cell: Cell) -> Results:
    return dataclasses.replace(
        results, cells=results.cells | {("sine", nbytes, way): cell}
    )


# A change that misses each line of the budget, and that one only.
MISSES = [
    (slower(KIB, "jax2torch", 0.4), 0),
    (slower(MIB, "local", 1.8), 1),
    (slower(64 * MIB, "local", 1.5), 2),
    (slower(64 * MIB, "grpc", 1.5), 3),
    (slower(KIB, "ping", 0.6), 4),
    (copies_one_byte_more, 5),
    (slower_task("loop", 0.09), 6),
    (slower_task("compiled with", 1.6), 7),
    (slower_task("eager with", 0.6), 7),
    (grows("client"), 8),
    (grows("worker"), 8),
    (slower(KIB, "inproc", 4.0), 9),
    (slower_task("torch worker", 1.6), 10),
    (slower_task("traced", 1.3), 11),
    (slower_task("state", 1.3), 12),
    (slower_task("func.grad", 1.3), 13),
]


def test_results_within_the_budget_exit_with_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that meets every line exits with status 0 and names no missed line."""
    assert conclude(good_results(), None, None) == 0
    printed = capsys.readouterr()
    assert printed.out.count(" met |") == len(budget.LINES)
    assert printed.err == ""


@pytest.mark.parametrize(("change", "line"), MISSES)
def test_a_missed_line_exits_with_1(
    change: Callable[[Results], Results], line: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that misses one line exits with status 1 and says which."""
    assert conclude(change(good_results()), None, None) == 1
    printed = capsys.readouterr()
    assert [
        text for text in printed.err.splitlines() if budget.LINES[line].work in text
    ] == printed.err.splitlines()
    assert printed.out.count("MISSED") == 1


def test_every_line_of_the_budget_can_be_missed() -> None:
    """Each line of the budget has a case above that misses it."""
    assert {line for _, line in MISSES} == set(range(len(budget.LINES)))


def test_a_soak_left_out_is_not_missed(capsys: pytest.CaptureFixture[str]) -> None:
    """A run without the soak says that growth was not measured, and exits with status 0."""
    assert conclude(dataclasses.replace(good_results(), growth=None), None, None) == 0
    assert capsys.readouterr().out.count("not measured") == 1


@pytest.mark.parametrize(
    ("nbytes", "way"), [(KIB, "jax2torch"), (64 * MIB, "grpc"), (KIB, "ping")]
)
def test_a_line_without_its_cells_raises(nbytes: int, way: str) -> None:
    """A budget line whose measurement is missing is an error, never met."""
    results = good_results()
    del results.cells["sine", nbytes, way]
    with pytest.raises(KeyError):
        budget.evaluate(results)


def test_ratio_compares_within_rounds() -> None:
    """A disturbance that slows both ways in some rounds leaves their ratio as it was."""
    disturbed = [1, 1, 10, 10, 10]
    results = good_results()
    results = with_cell(
        results, KIB, "local", Cell([[0.5 * s] * 3 for s in disturbed], 1)
    )
    results = with_cell(
        results, KIB, "jax2torch", Cell([[2.0 * s] * 3 for s in disturbed], 1)
    )
    assert results.ratio("sine", KIB, "local", "jax2torch") == 0.25


def test_percentile_is_a_measured_value() -> None:
    """A percentile is the smallest value that is at least as large as that share of all."""
    values = [float(i) for i in range(100, 0, -1)]
    assert (
        percentile(values, 50),
        percentile(values, 99),
        percentile(values, 100),
    ) == (
        50,
        99,
        100,
    )
    assert percentile([7.0], 50) == percentile([7.0], 99) == 7.0


def test_each_round_gives_each_way_its_turn() -> None:
    """Interleaving runs every way in every round, warmed up, and keeps the times by round."""
    order: list[str] = []
    steps = {way: lambda way=way: order.append(way) for way in ("a", "b")}
    plan = Plan(rounds=4, turn_s=0.0, min_calls=3, warm_calls=2)
    rounds = interleave(steps, plan)
    assert [len(turn) for turn in rounds["a"] + rounds["b"]] == [3] * 8
    turns = order[-4 * 2 * 5 :]
    assert all(len(set(turns[i : i + 5])) == 1 for i in range(0, 40, 5)), (
        "a turn belongs to one way"
    )
    assert all({turns[i], turns[i + 5]} == {"a", "b"} for i in range(0, 40, 10)), (
        "each round has a turn of each"
    )


@pytest.fixture(scope="module")
def fonts_are_open(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Once it has drawn, matplotlib keeps its fonts' files open: the descriptors are none that a
    test left behind."""
    report.draw(good_results(), tmp_path_factory.mktemp("fonts") / "plot.png")


@pytest.mark.usefixtures("fonts_are_open")
def test_files_hold_the_measurements(tmp_path: Path) -> None:
    """The JSON, the page beside it and the plot are written where they are asked for."""
    numbers, plot = tmp_path / "run.json", tmp_path / "run.png"
    assert conclude(good_results(), numbers, plot) == 0
    document = json.loads(numbers.read_text())
    assert len(document["cells"]) == len(good_results().cells)
    assert len(document["tasks"]) == len(TASKS)
    assert {line["outcome"] for line in document["budget"]} == {"met"}
    assert document["machine"] == {"CPU": "two cores"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "run.md").read_text()
    assert (
        "](run.png)" in page
        and "two cores" in page
        and "in-process" in page
        and "not yet" not in page
    )


def test_tables_are_aligned() -> None:
    """The tables read well as plain text: within one, all lines are of the same length."""
    results = good_results()
    for table in report.tables(results, budget.evaluate(results)).split("\n\n"):
        assert len({len(line) for line in table.splitlines()}) == 1
