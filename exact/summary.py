"""Summary of a run: counts by way and check, and the entries that are not right.

Imports no framework.
"""

import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from exact import ROOT
from exact.compare import FAULTS

PATH = ROOT / "exact" / "summary.json"
_KNOWN = ROOT / "exact" / "known.toml"
# Verdicts without information about the bridge: the framework has no value either, or the other
# framework lacks the type.
NEUTRAL = ("as torch", "as jax", "beyond", "no type")


class Known:
    """The table of verdicts that have a reason outside the bridge."""

    def __init__(self, path: Path = _KNOWN) -> None:
        self.rows: list[dict[str, Any]] = tomllib.loads(path.read_text())["known"]

    def reason(self, way: str, check: str, case: str, status: str) -> str | None:
        entry = case.rsplit("/", 1)[0]
        for row in self.rows:
            if (
                row["status"] == status
                and way in row.get("ways", [way])
                and check in row.get("checks", [check])
                and re.fullmatch(row["entry"], entry)
            ):
                return str(row["reason"])
        return None


def summarise(records: Iterable[dict[str, Any]], known: Known) -> dict[str, Any]:
    """Return counts and lists as JSON values."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    listed: dict[str, dict[str, Any]] = {}
    unusable: dict[str, set[str]] = {}
    for record in records:
        way, case = record["way"], record["case"]
        if "unusable" in record:
            unusable.setdefault(_general(record["unusable"]), set()).add(
                case.rsplit("/", 1)[0]
            )
            continue
        for check, (status, detail) in record["checks"].items():
            reason = known.reason(way, check, case, status)
            counted = "listed" if reason else status
            by_check = counts.setdefault(way, {}).setdefault(check, {})
            by_check[counted] = by_check.get(counted, 0) + 1
            if counted in ("listed", "refused", "inherited", *FAULTS):
                key = f"{way} {case.rsplit('/', 1)[0]} {counted}"
                row = listed.setdefault(
                    key,
                    {"way": way, "entry": case.rsplit("/", 1)[0], "status": counted},
                )
                row.setdefault("checks", [])
                if check not in row["checks"]:
                    row["checks"].append(check)
                row.setdefault("detail", reason or detail[:160])
    return {
        "counts": counts,
        "listed": sorted(
            listed.values(), key=lambda row: (row["way"], row["status"], row["entry"])
        ),
        "unusable": {
            reason: sorted(entries) for reason, entries in sorted(unusable.items())
        },
    }


def share_right(counts: dict[str, int]) -> float:
    """Return the percentage of right checks among the checks that the framework itself passes."""
    considered = sum(
        n for status, n in counts.items() if status not in (*NEUTRAL, "listed")
    )
    return 100 * counts.get("right", 0) / considered if considered else 100.0


def faults(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in summary["listed"] if row["status"] in FAULTS]


def write(summary: dict[str, Any], path: Path = PATH) -> None:
    path.write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")


def read(path: Path = PATH) -> dict[str, Any]:
    return json.loads(path.read_text())


def _general(reason: str) -> str:
    """Return a reason with its numbers replaced, so that entries with one reason form a group."""
    return re.sub(r"\d+(\.\d+)?", "N", reason)[:120]
