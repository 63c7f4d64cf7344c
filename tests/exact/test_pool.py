"""The processes that run cases: one that crashes or hangs costs its own sample only."""

import sys
from pathlib import Path
from typing import Any

import pytest

from exact import pool
from exact.cases import Entry
from exact.pool import Pool

# Stands for exact.child: samples that crash, hang, or are right.
CHILD = """
import json, os, sys, time
def say(**message): print(json.dumps(message), flush=True)
say(ready=True)
for line in sys.stdin:
    text, skip = line.rsplit(" ", 1)
    for position in range(int(skip), 3):
        say(at=[position, "reference"], index=position)
        say(at=[position, "value"])
        if position == 1 and "crash" in text: os.abort()
        if position == 1 and "hang" in text: time.sleep(1000)
        say(case=f"{text}/{position}", checks={"value": ["right", ""]})
    say(done=text)
"""


@pytest.mark.parametrize(("what", "timeout_s"), [("crash", 60.0), ("hang", 2.0)])
def test_a_sample_that_ends_its_process_costs_no_other(
    what: str, timeout_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples before and after it, and the next entry, have their verdicts; its own says
    what happened."""
    monkeypatch.setattr(pool, "_COMMAND", [sys.executable, "-c", CHILD])
    records: list[dict[str, Any]] = []
    entries = [Entry("op", name, "float32", "plain") for name in (what, "sin")]
    Pool([], timeout_s, tmp_path, records.append).run(entries)
    verdicts = {
        record["case"]: record["checks"]["value"][0]
        for record in records
        if "case" in record
    }
    assert [verdicts[f"{entries[0]}/{i}"] for i in range(3)] == ["right", what, "right"]
    assert [verdicts[f"{entries[1]}/{i}"] for i in range(3)] == ["right"] * 3
    assert [record["done"] for record in records if "done" in record] == list(
        map(str, entries)
    )
