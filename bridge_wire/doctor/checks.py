"""Results of the doctors: checks with a verdict and a remedy, as a table or JSON.

Never imports torch or jax.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

OK, SLOW, BROKEN = "ok", "slow", "broken"
_BY_GRAVITY = (OK, SLOW, BROKEN)


@dataclass(frozen=True, slots=True)
class Check:
    """One check's result. The verdict SLOW means: works, but by a slower path than possible."""

    name: str
    verdict: str
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Check:
    return Check(name, OK, found)


def slow(name: str, found: str, remedy: str) -> Check:
    return Check(name, SLOW, found, remedy)


def broken(name: str, found: str, remedy: str) -> Check:
    return Check(name, BROKEN, found, remedy)


def worst(checks: Sequence[Check]) -> str:
    """Return the worst verdict of the checks."""
    return max((check.verdict for check in checks), key=_BY_GRAVITY.index, default=OK)


def as_table(checks: Sequence[Check]) -> str:
    """Return the checks as text: one line per check, its remedy below, and a summary at the end."""
    width = max(map(len, (check.name for check in checks)), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.verdict:6}  {check.name:{width}}  {check.found}".rstrip())
        if check.remedy:
            lines.append(f"{'':6}  {'':{width}}  -> {check.remedy}")
    counts = {
        verdict: sum(check.verdict == verdict for check in checks)
        for verdict in _BY_GRAVITY
    }
    lines += ["", ", ".join(f"{count} {verdict}" for verdict, count in counts.items())]
    return "\n".join(lines)


def as_json(checks: Sequence[Check]) -> str:
    """Return the checks and their worst verdict as a JSON object."""
    return json.dumps(
        {
            "verdict": worst(checks),
            "checks": [dataclasses.asdict(check) for check in checks],
        },
        indent=2,
    )
