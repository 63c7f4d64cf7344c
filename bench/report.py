"""Report of a run: tables, page, JSON and plot. Imports no framework."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.budget import Verdict
from bench.measure import KIB, MIB, Growth, Plan, Results, percentile

WAYS = {
    "native": "native torch, one process",
    "jax2torch": "jax2torch-style, one process",
    "inproc": "this project, in-process",
    "local": "this project, local lane",
    "slab": "this project, local lane, inputs in a slab",
    "grpc": "this project, gRPC inline",
    "ping": "a bare gRPC unary ping",
}
TASKS = {
    "vmap": "vmap of sin(x)*2 over 1,000 rows of 64: one call",
    "loop": "the same as a Python loop: 1,000 calls",
    "hvp": "Hessian-vector product of the sum of sin(x)*2, 1 KiB",
    "native hvp": "the same in native torch",
    "func.grad": "torch.func.grad of the sum of sin(x)*2, 1 KiB",
    "autograd": "the same by torch.autograd.grad",
    "eager with": "a training step with sin(x)*2 among torch's operations, 1 KiB",
    "eager without": "the same without the call",
    "compiled with": "with the call, by torch.compile(fullgraph=True)",
    "compiled without": "without the call, by torch.compile(fullgraph=True)",
    "state": "reset and step of a state of 20 arrays with a static part, 1 KiB each",
    "state_tuple": "the same arrays as a tuple",
    "torch worker": "sin(x)*2 in a torch worker, called from jitted JAX, forward and VJP, 1 KiB",
    "pure_callback": "the same torch code through jax.pure_callback in one process",
    "traced": "a 3-layer MLP of torch through trace_torch, jitted forward and VJP of 1,024 rows",
    "in jax": "the same written in JAX",
}
FUNCTIONS = {"affine": "2x+1", "sine": "sin(x)*2", "mlp": "3-layer MLP"}

_COLOURS = {
    "native": "#7f7f7f",
    "jax2torch": "#d95f02",
    "inproc": "#1b9e77",
    "local": "#08519c",
    "slab": "#6baed6",
    "grpc": "#7b3294",
    "ping": "#969696",
}
_LINES: dict[str, dict[str, Any]] = {
    "native": {"marker": "o", "linestyle": "--"},
    "local": {"marker": "o", "linewidth": 2.5},
    "ping": {"linestyle": ":"},
}


def tables(results: Results, verdicts: Sequence[Verdict]) -> str:
    """Return the measurements and the verdicts as aligned Markdown tables."""
    parts = [
        _aligned(_cell_rows(results, function)) for function in results.plan.functions
    ]
    return "\n\n".join(
        [*parts, _aligned(_task_rows(results)), _aligned(_verdict_rows(verdicts))]
    )


def page(results: Results, verdicts: Sequence[Verdict], plot: str) -> str:
    """Return the page about a run; `plot` is the plot's file name."""
    plan = results.plan
    machine = "\n".join(f"- {key}: {value}" for key, value in results.machine.items())
    growth = _growth_text(results.growth, results.plan) if results.growth else ""
    return f"""# Benchmarks

Forward + VJP, called from torch on float32, in milliseconds: p50 (p99). `make bench` writes this
page.

![time of one forward + VJP against the size of the input]({plot})

{tables(results, verdicts)}
{growth}
## The machine
{machine}

## Compared
- *native torch*: the same function in torch.
- *jax2torch-style*: an `autograd.Function` whose forward calls `jax.vjp` of a jitted function each
  time, with DLPack both ways; torch and JAX in one process and one environment. The baseline of the
  budget.
- *local lane*: a worker in another process and environment; tensors and signals in shared memory.
  With *inputs in a slab* the input and the cotangent are in shared memory already, like the outputs
  of another remote call.
- *gRPC inline*: the same worker, over the same host's Unix socket, the bytes sent in gRPC messages.
- *ping*: an empty gRPC unary call to another process, without protobuf.
- *copied*: bytes that either side copies in one step, divided by the bytes of the output and the
  gradients, at the largest size. Native torch and the baseline are not counted.
- The MLP's layers are 64 wide, with ReLU between them; the number of rows sets the size. Its
  parameters belong to the client and get gradients too.
- The compiled step has some twenty pointwise operations of torch, before and after the call. The
  cost of a call in it is the difference of the rows with and without the call.

## Method
Each round measures every way of one function at one size, in random order; there are
{plan.rounds} rounds. A measurement makes {plan.warm_calls} calls to warm up; then {plan.min_calls}
calls are timed, or as many as fit in {plan.turn_s * 1e3:g} ms. Python's garbage collector is off. A
ratio in the budget is the median, over the rounds, of the quotient of both p50s, so that a
disturbance of the machine affects both. Slow calls are few, and their p99 is the slowest one.
Before the measurement, all ways must agree on the output and on every gradient. Resident growth is
measured in a separate run, with the client in an environment without JAX.

## How to reproduce it
`make bench` on an otherwise idle machine; it exits with status 1 when a line of the budget is
missed.
`.venv-both/bin/python -m bench --quick` takes a minute and writes nothing.
"""


def to_json(results: Results, verdicts: Sequence[Verdict]) -> str:
    """Return the results as JSON, without the single calls."""
    cells = [
        {
            "function": FUNCTIONS[function],
            "nbytes": nbytes,
            "way": WAYS[way],
            "p50_ms": round(cell.p50_s * 1e3, 4),
            "p99_ms": round(cell.p99_s * 1e3, 4),
            "calls": cell.calls,
            "bytes_made": cell.bytes_made,
            "bytes_copied": cell.bytes_copied,
        }
        for (function, nbytes, way), cell in results.cells.items()
    ]
    growth = results.growth or {}
    tasks = [
        {
            "task": TASKS[task],
            "p50_ms": round(
                statistics.median(second for turn in turns for second in turn) * 1e3, 4
            ),
        }
        for task, turns in results.tasks.items()
    ]
    document = {
        "machine": dict(results.machine),
        "rounds": results.plan.rounds,
        "cells": cells,
        "tasks": tasks,
        "resident_bytes": {
            process: {"before": g.before, "after": g.after}
            for process, g in growth.items()
        },
        "soak_calls": results.plan.soak_calls if growth else 0,
        "budget": [
            {
                "work": v.line.work,
                "value": v.value,
                "limit": v.line.limit,
                "outcome": v.outcome,
            }
            for v in verdicts
        ],
    }
    return json.dumps(document, indent=2) + "\n"


def draw(results: Results, path: Path) -> None:
    """Write the plot: p50 against size, a whisker up to p99, one panel per function."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plan = results.plan
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.markersize": 4,
    }
    with pyplot.rc_context(style):  # type: ignore[arg-type]
        figure, panels = pyplot.subplots(
            1,
            len(plan.functions),
            figsize=(max(9, 4 * len(plan.functions)), 5),
            sharey=True,
            squeeze=False,
        )
        for function, axes in zip(plan.functions, panels[0], strict=True):
            for way, label in WAYS.items():
                _draw_way(axes, results, function, way, label)
            axes.set(
                xscale="log",
                yscale="log",
                xlabel="size of the input",
                title=FUNCTIONS[function],
            )
            axes.set_xticks(
                plan.sizes,
                [size_text(nbytes) for nbytes in plan.sizes],
                rotation=30,
                ha="right",
            )
            axes.minorticks_off()
            axes.grid(alpha=0.3, linewidth=0.6)
        panels[0][0].set_ylabel("one forward + VJP, ms")
        panels[0][0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        figure.legend(
            *panels[0][0].get_legend_handles_labels(),
            loc="lower center",
            ncols=3,
            frameon=False,
        )
        figure.suptitle("JAX functions called from torch: p50, whiskers up to p99")
        figure.tight_layout(rect=(0, 0.12, 1, 1))
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def size_text(nbytes: int) -> str:
    """Return a size in KiB or MiB."""
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def _draw_way(axes: Any, results: Results, function: str, way: str, label: str) -> None:
    sizes = [
        nbytes
        for nbytes in results.plan.sizes
        if (function, nbytes, way) in results.cells
    ]
    if not sizes:
        return
    cells = [results.cells[function, nbytes, way] for nbytes in sizes]
    p50 = [cell.p50_s * 1e3 for cell in cells]
    line = axes.plot(
        sizes, p50, label=label, color=_COLOURS[way], **_LINES.get(way, {"marker": "o"})
    )[0]
    axes.vlines(
        sizes,
        p50,
        [cell.p99_s * 1e3 for cell in cells],
        color=line.get_color(),
        alpha=0.4,
        linewidth=1,
    )


def _cell_rows(results: Results, function: str) -> list[list[str]]:
    sizes = results.plan.sizes
    rows = [[FUNCTIONS[function], *map(size_text, sizes), "copied"]]
    for way, label in WAYS.items():
        cells = [results.cells.get((function, nbytes, way)) for nbytes in sizes]
        texts = [
            "not yet" if cell is None else f"{_ms(cell.p50_s)} ({_ms(cell.p99_s)})"
            for cell in cells
        ]
        last = cells[-1]
        copied = ""
        if last is not None and last.bytes_copied is not None:
            copied = f"{last.bytes_copied / last.bytes_made:.2f}"
        rows.append([label, *texts, copied])
    return rows


def _task_rows(results: Results) -> list[list[str]]:
    rows = [["other uses", "ms"]]
    for task, label in TASKS.items():
        seconds = [second for turn in results.tasks[task] for second in turn]
        rows.append(
            [label, f"{_ms(percentile(seconds, 50))} ({_ms(percentile(seconds, 99))})"]
        )
    return rows


def _verdict_rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    rows = [["budget", "measured", "at most", ""]]
    for verdict in verdicts:
        measured = "" if verdict.value is None else f"{verdict.value:.3f}"
        limit = f"{'< ' if verdict.line.below else ''}{verdict.line.limit:g}"
        rows.append([verdict.line.work, measured, limit, verdict.outcome])
    return rows


def _growth_text(growths: Mapping[str, Growth], plan: Plan) -> str:
    sentences = (
        f"the {process} from {growth.before / MIB:.1f} to {growth.after / MIB:.1f} MiB"
        for process, growth in growths.items()
    )
    calls = f"{plan.soak_calls:,} forward + VJP of 1 KiB"
    return f"\nOver {calls} {' and '.join(sentences)} resident.\n"


def _ms(seconds: float) -> str:
    """Return milliseconds with three significant digits, but at most three decimals."""
    ms = seconds * 1e3
    return f"{ms:.3f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(texts: Sequence[str]) -> str:
        first, *others = zip(texts, widths, strict=True)
        padded = [
            first[0].ljust(first[1]),
            *(text.rjust(width) for text, width in others),
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        f"{'-' * (width - 1)}{'-' if i == 0 else ':'}" for i, width in enumerate(widths)
    ]
    return "\n".join(
        [
            line(rows[0]),
            f"|{'|'.join(f' {text} ' for text in rule)}|",
            *map(line, rows[1:]),
        ]
    )
