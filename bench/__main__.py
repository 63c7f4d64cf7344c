"""The command `python -m bench`, for the interpreter of .venv-both after a clean `make setup`."""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from bench import ROOT, budget, machine, measure, report
from bench.measure import QUICK, Cell, Plan, Results
from bench.soak import soak

_JSON = ROOT / "docs/benchmarks.json"
_PLOT = ROOT / "docs/benchmarks.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, report and judge.

    Return the exit status: 1 if a line of the budget was missed, else 0.
    """
    options = _parser().parse_args(argv)
    plan = QUICK if options.quick else Plan()
    cells, tasks = _measure(plan)
    growth = None if options.no_soak else soak(plan.soak_calls)
    json = options.json or (None if options.quick else _JSON)
    plot = options.plot or (None if options.quick else _PLOT)
    return conclude(Results(plan, cells, tasks, growth, machine.describe()), json, plot)


def conclude(results: Results, json: Path | None, plot: Path | None) -> int:
    """Print the tables, write the requested files, and return the exit status.

    The page is written beside the JSON.
    """
    verdicts = budget.evaluate(results)
    print(report.tables(results, verdicts))
    if plot:
        report.draw(results, plot)
    if json:
        json.write_text(report.to_json(results, verdicts))
        json.with_suffix(".md").write_text(
            report.page(results, verdicts, plot.name if plot else _PLOT.name)
        )
    for verdict in verdicts:
        if verdict.outcome == "MISSED":
            print(
                f"missed: {verdict.line.work}: {verdict.value:.3f}, limit {verdict.line.limit:g}",
                file=sys.stderr,
            )
    return budget.exit_status(verdicts)


def _measure(
    plan: Plan,
) -> tuple[dict[tuple[str, int, str], Cell], dict[str, list[list[float]]]]:
    # Imported late, since torch and jax load slowly and option errors should come first.
    from bench import from_jax, tasks, ways

    cells = {}
    work = list(itertools.product(plan.functions, plan.sizes))
    with ways.Workbench() as workbench, tqdm(work, leave=False) as progress:
        for function, nbytes in progress:
            progress.set_description(
                f"{report.FUNCTIONS[function]}, {report.size_text(nbytes)}"
            )
            steps = workbench.steps(function, nbytes)
            ways.check_agreement(steps)
            native = steps["native"]
            assert isinstance(native, ways.Step)
            bytes_made = native.bytes_made()
            copied = {
                way: step.bytes_copied()
                for way, step in steps.items()
                if isinstance(step, ways.Step)
            }
            for way, rounds in measure.interleave(steps, plan).items():
                cells[function, nbytes, way] = Cell(rounds, bytes_made, copied.get(way))
        from_torch = measure.interleave(tasks.tasks(workbench.session), plan)
    with from_jax.worker() as session:
        return cells, from_torch | measure.interleave(from_jax.tasks(session), plan)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bench",
        description=(
            "Measure against the performance budget; exit with status 1 if a line is missed."
        ),
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="measure only the lines of the budget, in few rounds; write no files",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="default: docs/benchmarks.json; the page is written beside this file",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="default: docs/benchmarks.png"
    )
    parser.add_argument(
        "--no-soak", action="store_true", help="skip the memory growth over many calls"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
