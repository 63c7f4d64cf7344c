"""Benchmark of calls between two processes on one GPU: `make bench GPU=1` or `python -m bench.gpu`.

The benchmark alternates between ways for forward and VJP of one function: a worker with inputs to
copy, a worker with inputs in a slab, this process by DLPack, and the worker staged through host
memory. This process has both frameworks. Exits with status 1 if a limit is missed, and with 0
without a GPU.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from bench import ROOT
from bench.gpu_probe import described
from bench.measure import KIB, MIB, Plan, interleave
from bridge_wire.memory.cuda import gpus

GIB = 1 << 30
_UNITS = {"GiB": GIB, "MiB": MIB, "KiB": KIB}
_PLAN = Plan(functions=("sine",), sizes=(KIB, 64 * MIB, GIB), rounds=15, turn_s=0.1)
_REHEARSAL = Plan(functions=("sine",), sizes=(KIB,), rounds=2, turn_s=0.0, min_calls=1)
_WORKER = ROOT / ".venv-jax/bin/python"
_COPIES = 20
_MOST_STAGED = 64 * MIB  # a call with 1 GiB through host memory takes seconds

Rounds = Mapping[str, Sequence[Sequence[float]]]


class Size(NamedTuple):
    """The measurements at one size.

    rounds: seconds of each call by way and round.
    copied: by way, the bridge's copied bytes in one step per byte of output and gradient.
    """

    rounds: Rounds
    copied: Mapping[str, float]

    def p50_s(self, way: str) -> float:
        return statistics.median(
            seconds for turn in self.rounds[way] for seconds in turn
        )

    def ratio(self, way: str, other: str) -> float:
        """Return the slowdown of a way: the median over the rounds of the quotient of medians."""
        pairs = zip(self.rounds[way], self.rounds[other], strict=True)
        return statistics.median(
            statistics.median(turn) / statistics.median(others)
            for turn, others in pairs
        )


class Limit(NamedTuple):
    """One line of the budget; a line without a limit is only reported."""

    work: str
    nbytes: int
    most: float | None
    value: Callable[[Size], float]


def _two_to_one(size: Size) -> float:
    return size.ratio("worker", "one process")


def _in_slab(size: Size) -> float:
    return size.ratio("slab", "one process")


# Inputs in a slab are not copied, so two processes need no more passes over the arrays than one
# process. With inputs to copy, the ratio is 14 passes to 10: about 1.4 by the bandwidth alone,
# which no limit can change.
LIMITS = (
    Limit(
        "forward + VJP, 64 MiB, two processes, inputs in a slab / one process by DLPack",
        64 * MIB,
        1.1,
        _in_slab,
    ),
    Limit("the same at 1 GiB", GIB, 1.1, _in_slab),
    Limit(
        "1 KiB, two processes, inputs copied in / one process by DLPack",
        KIB,
        None,
        _two_to_one,
    ),
    Limit("the same at 64 MiB", 64 * MIB, None, _two_to_one),
    Limit("the same at 1 GiB", GIB, None, _two_to_one),
    Limit(
        "64 MiB by the worker / staged through the host",
        64 * MIB,
        0.05,
        lambda size: size.ratio("worker", "staged"),
    ),
    Limit(
        "bytes copied at 64 MiB / bytes of the outputs and gradients",
        64 * MIB,
        2.0,
        lambda size: size.copied["worker"],
    ),
    Limit(
        "the same with inputs in a slab",
        64 * MIB,
        1.0,
        lambda size: size.copied["slab"],
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and judge."""
    options = _parser().parse_args(argv)
    if not gpus() and not options.rehearse:
        print("CUDA's driver shows no GPU here: nothing was measured")
        return 0
    python = options.worker_python or (
        _WORKER if _WORKER.exists() else Path(sys.executable)
    )
    plan, device = (
        (_REHEARSAL, "cpu") if options.rehearse else (_chosen(options), "cuda")
    )
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sizes = measured(plan, device, python)
    if not options.rehearse:
        print(
            f"{described()}\nA copy of 1 GiB on the device: {_copy_bandwidth() / 1e9:.0f} GB/s\n"
        )
    print("\n".join(tables(sizes)))
    missed = [line for line in judged(sizes) if line.endswith("MISSED |")]
    return 1 if missed and not options.rehearse else 0


def tables(sizes: Mapping[int, Size]) -> list[str]:
    """Return the measurements as Markdown tables."""
    ways = list(next(iter(sizes.values())).rounds)
    times = [
        f"| {_named(nbytes)} | {' | '.join(_shown(size, way) for way in ways)} |"
        for nbytes, size in sizes.items()
    ]
    return [
        f"| forward + VJP, p50 | {' | '.join(ways)} |",
        "|---" * (len(ways) + 1) + "|",
        *times,
        "",
        "| work | limit | found | |",
        "|---|---|---|---|",
        *judged(sizes),
    ]


def judged(sizes: Mapping[int, Size]) -> list[str]:
    """Return a row for each limit whose size was measured."""
    rows = []
    for work, nbytes, most, value in LIMITS:
        if nbytes in sizes:
            found = value(sizes[nbytes])
            if most is None:
                rows.append(f"| {work} | none | {found:.3f} | |")
            else:
                rows.append(
                    f"| {work} | {most:g} | {found:.3f} | {'met' if found <= most else 'MISSED'} |"
                )
    return rows


def _shown(size: Size, way: str) -> str:
    return f"{size.p50_s(way) * 1e3:.3f} ms" if way in size.rounds else "not measured"


def _chosen(options: argparse.Namespace) -> Plan:
    return dataclasses.replace(
        _PLAN, sizes=options.sizes or _PLAN.sizes, rounds=options.rounds or _PLAN.rounds
    )


def _sizes(text: str) -> tuple[int, ...]:
    """Return the sizes in an option's value, such as 1KiB,64MiB."""
    sizes = []
    for word in text.split(","):
        number, unit = word[:-3], word[-3:]
        if unit not in _UNITS or not number.isdecimal():
            raise argparse.ArgumentTypeError(
                f"{word!r} is not a size; expected such as 64MiB"
            )
        sizes.append(int(number) * _UNITS[unit])
    return tuple(sizes)


def measured(plan: Plan, device: str, python: Path) -> dict[int, Size]:
    """Return the measurements at each size."""
    from bridge_client import spawn

    found = {}
    worker: dict[str, Any] = {
        "python": python,
        "args": ["--device", device],
        "cwd": ROOT,
    }
    with spawn(jax_model={"sine": "bench.models:sine"}, **worker) as session:
        for nbytes in tqdm(plan.sizes, leave=False):
            found[nbytes] = _at(session, nbytes, plan, device)
        if device == "cuda" and (staged := session.stats()["bytes_through_host"]):
            raise RuntimeError(
                f"{staged} bytes of GPU tensors were copied through host memory: {session.memory}"
            )
    return found


def _at(session: Any, nbytes: int, plan: Plan, device: str) -> Size:
    import torch

    from bench import ways
    from bridge_client.torch.memory import copied_into

    x = torch.randn(nbytes // 4, device=device)
    cotangent = torch.randn_like(x)
    worker = ways.remote(session, "sine", x, cotangent)
    in_slab = [copied_into(session, tensor) for tensor in (x, cotangent)]
    assert in_slab[0] is not None and in_slab[1] is not None
    slab = ways.remote(session, "sine", in_slab[0], in_slab[1])
    steps: dict[str, Any] = {
        "native": ways.native("sine", x, cotangent),
        "one process": ways.inproc("sine", x, cotangent),
        "jax2torch": ways.jax2torch("sine", x, cotangent),
        "worker": worker,
        "slab": slab,
    }
    if nbytes <= _MOST_STAGED:
        steps["staged"] = ways.Step(
            lambda x: worker.call(x.cpu()).to(x.device), x, cotangent
        )
    ways.check_agreement(steps)
    copied = {
        way: steps[way].bytes_copied() / steps[way].bytes_made()
        for way in ("worker", "slab")
    }
    waiting = {way: _until_done(step, device) for way, step in steps.items()}
    return Size(interleave(waiting, plan), copied)


def _until_done(step: Callable[[], object], device: str) -> Callable[[], None]:
    import torch

    def run() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _copy_bandwidth() -> float:
    """Return the bandwidth of a copy on the device in bytes per second, counting each byte once."""
    import torch

    source, target = (
        torch.empty(GIB, dtype=torch.uint8, device="cuda") for _ in range(2)
    )
    seconds = []
    for _ in range(_COPIES):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return GIB / statistics.median(seconds)


def _named(nbytes: int) -> str:
    return next(
        f"{nbytes // unit} {name}" for name, unit in _UNITS.items() if nbytes >= unit
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bench.gpu", description="Measure calls between two processes on one GPU."
    )
    parser.add_argument(
        "--worker-python",
        type=Path,
        help="the worker's interpreter (default: the one of .venv-jax, else this one)",
    )
    parser.add_argument(
        "--sizes",
        type=_sizes,
        help="array sizes, such as 1KiB,64MiB (default: 1KiB,64MiB,1GiB)",
    )
    parser.add_argument(
        "--rounds", type=int, help=f"number of rounds (default: {_PLAN.rounds})"
    )
    parser.add_argument(
        "--rehearse",
        default=bool(os.environ.get("BRIDGE_TESTS_REHEARSE")),
        action="store_true",
        help="use small arrays in host memory to check the program; the figures mean nothing",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
