"""A seeded share of the frameworks' operator databases, in processes that may crash."""

import argparse
from pathlib import Path

import pytest

from exact import __main__ as command
from exact.cases import share
from exact.pool import Pool
from exact.results import Results
from exact.summary import Known, faults, summarise

SEED = 10
# Of the entries of a database in float32, with all checks: a tenth of torch's, shared out among the ways to them, and a
# hundredth of JAX's thousands.
SHARES = {"inproc": 0.05, "worker": 0.025, "traced": 0.025, "torch-client": 0.01}


@pytest.mark.parametrize("way", SHARES)
def test_operators_are_right_or_refused_by_name(way: str, tmp_path: Path) -> None:
    """Values and derivatives are the framework's, or a typed error; nothing crashes, and no fake tensor is left."""
    options = argparse.Namespace(dtypes="float32", kinds="plain,strided,inplace,eval,train,harness")
    entries = [entry for entry in command.listing(way, options) if entry.dtype == "float32" or way == "torch-client"]
    entries = [entry for entry in entries if not entry.is_wide]
    taken = share(entries, SHARES[way] if way == "torch-client" else SHARES[way] / 2, SEED + list(SHARES).index(way))
    results = Results(tmp_path / "results.jsonl")
    Pool(["--way", way], 100, tmp_path, lambda message: results.add(way, message)).run(taken)
    found = summarise(results.read(), Known())
    assert found["counts"][way]["value"]["right"] > len(taken) / 2
    assert faults(found) == []
