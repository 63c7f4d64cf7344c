"""The command `python -m exact`: runs the databases' cases, sums up, writes docs/coverage.md."""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exact import ROOT, page, summary
from exact.cases import Entry, parse_entry, share
from exact.pool import Pool
from exact.results import Results

WAYS = ("inproc", "worker", "traced", "torch-client")
_OUT = ROOT / "out" / "exact"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return 1 if a fault is not listed in exact/known.toml."""
    options = _parser().parse_args(argv)
    results = Results(options.out)
    if not options.summary:
        for way in options.ways:
            for x64 in (False, True):
                _run(way, x64, options, results)
    return _report(results, options)


def _run(way: str, x64: bool, options: Any, results: Results) -> None:
    done = set() if options.again else results.done()
    listed = [
        e
        for e in listing(way, options)
        if e.is_wide == x64 and (way, str(e)) not in done
    ]
    chosen = [
        e
        for e in share(listed, options.share, options.seed)
        if re.search(options.only, str(e))
    ]
    chosen = chosen[: options.limit]
    if not chosen:
        return
    begun, count = time.monotonic(), 0

    def record(message: dict[str, Any]) -> None:
        nonlocal count
        results.add(way, message)
        if "done" in message:
            count += 1
            if count % 50 == 0:
                print(
                    f"{way}: {count} of {len(chosen)} entries, {time.monotonic() - begun:.0f} s",
                    flush=True,
                )

    arguments = [
        "--way",
        way,
        "--samples",
        str(options.samples),
        "--checks",
        options.checks,
    ]
    arguments += ["--x64"] if x64 else []
    pool = Pool(
        arguments,
        options.timeout_s,
        options.out.parent,
        record,
        begun + options.deadline_s,
        options.jobs,
    )
    pool.run(chosen)


def listing(way: str, options: Any) -> list[Entry]:
    """Return the entries of the way's databases, from a child process that imports frameworks."""
    text = subprocess.run(
        [sys.executable, "-m", "exact.listing", way, options.dtypes, options.kinds],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ).stdout
    return [parse_entry(line) for line in text.splitlines() if line.count("/") >= 3]


def _report(results: Results, options: Any) -> int:
    """Print the summary of a run; return 1 if there is a fault."""
    found = summary.summarise(results.read(), summary.Known())
    for way, checks in found["counts"].items():
        for check, counts in checks.items():
            text = ", ".join(
                f"{n} {status}"
                for status, n in sorted(counts.items(), key=lambda item: -item[1])
            )
            print(f"{way:12} {check:11} {summary.share_right(counts):6.2f} %: {text}")
    for row in found["listed"] if options.verbose else summary.faults(found):
        print(
            f"{row['way']} {row['entry']} {', '.join(row['checks'])}: {row['status']}:"
            f" {row['detail']}"
        )
    if options.write_docs:
        summary.write(found)
        page.PATH.write_text(page.page(found))
    return int(bool(summary.faults(found)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("exact", description=__doc__)
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS))
    parser.add_argument("--dtypes", default="float32,float64,complex64,complex128")
    parser.add_argument("--kinds", default="plain,strided,inplace,train,eval,harness")
    parser.add_argument("--checks", default="", help="checks to run (default: all)")
    parser.add_argument(
        "--samples", type=int, default=1, help="number of samples per operator"
    )
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="share of the entries, sampled with --seed",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="maximum number of entries per way")
    parser.add_argument(
        "--only",
        default="",
        metavar="REGEX",
        help="run matching entries, as op/sin/float32/plain",
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--timeout-s", type=float, default=120.0, help="limit for one check"
    )
    parser.add_argument(
        "--deadline-s",
        type=float,
        default=1e9,
        help="limit for a way; the next run continues",
    )
    parser.add_argument("--out", type=Path, default=_OUT / "results.jsonl")
    parser.add_argument(
        "--again", action="store_true", help="also run entries with a result"
    )
    parser.add_argument(
        "--summary", action="store_true", help="only summarise earlier results"
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="print every entry that is not right, not only faults",
    )
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="write exact/summary.json and docs/coverage.md",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
