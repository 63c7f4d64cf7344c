"""The command `python -m exact.fuzz`: random programs, compared between bridge and framework.

Compares each program's value, gradient, jvp, batch and Hessian-vector product in float32, with
bridge and framework in the same child process.
"""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exact import ROOT, graphs
from exact.cases import Entry, parse_entry
from exact.compare import FAULTS
from exact.pool import Pool

# The framework of each way's programs.
FRAMEWORKS = {
    "inproc": "torch",
    "worker": "torch",
    "traced": "torch",
    "torch-client": "jax",
}


class Findings:
    """The findings of a run: counts, and a text for each fault."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def add(self, way: str, message: dict[str, Any]) -> None:
        if "case" not in message:
            return
        if "unusable" in message:
            self.counts["unusable"] += 1
            return
        for check, (status, detail) in message["checks"].items():
            self.counts[status] += 1
            if status in FAULTS:
                entry = parse_entry(message["case"].rsplit("/", 1)[0])
                seed, number = entry.name.split(".")
                options = f"--ways {way} --seed {seed} --first {number} --graphs 1"
                again = f"python -m exact.fuzz {options}"
                self.faults.append(
                    f"{check}: {status}: {detail}\n{again}\n{graphs.graph_of(entry).source}"
                )


def run(
    way: str,
    count: int,
    seed: int,
    *,
    first: int = 0,
    jobs: int = 1,
    timeout_s: float = 60.0,
    log: Path | None = None,
) -> Findings:
    """Run programs `first` to `first + count` of a seed."""
    findings = Findings()
    entries: list[Entry] = [
        graphs.entry(FRAMEWORKS[way], seed, first + n) for n in range(count)
    ]
    shown = itertools.count(1)

    def record(message: dict[str, Any]) -> None:
        known = len(findings.faults)
        findings.add(way, message)
        for fault in findings.faults[known:]:
            print(f"\n{way}: {fault}", flush=True)
        if "done" in message and (number := next(shown)) % 500 == 0:
            print(f"{way}: {number} of {count} programs", flush=True)

    Pool(
        ["--way", way], timeout_s, log or ROOT / "out" / "exact", record, jobs=jobs
    ).run(entries)
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("exact.fuzz", description=__doc__)
    parser.add_argument(
        "--ways", type=lambda text: text.split(","), default=list(FRAMEWORKS)
    )
    parser.add_argument(
        "--graphs", type=int, default=1000, help="number of programs per way"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first program"
    )
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(argv)
    failed = False
    for way in options.ways:
        findings = run(
            way, options.graphs, options.seed, first=options.first, jobs=options.jobs
        )
        failed |= bool(findings.faults)
        print(
            f"{way}:",
            ", ".join(f"{n} {status}" for status, n in findings.counts.most_common()),
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
