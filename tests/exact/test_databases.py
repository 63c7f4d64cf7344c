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
# How many entries of a way's databases, drawn at random: together a tenth of torch's, most of them
# in process, which takes least time; of JAX's thousands, for each of which XLA compiles a dozen
# programs, a few.
ENTRIES = {"inproc": 60, "worker": 20, "traced": 15, "torch-client": 6}


@pytest.mark.parametrize("way", ENTRIES)
def test_operators_are_right_or_refused_by_name(way: str, tmp_path: Path) -> None:
    """Values and derivatives are the framework's, or a typed error; nothing crashes, and no fake
    tensor is left."""
    options = argparse.Namespace(
        dtypes="float32", kinds="plain,strided,inplace,eval,train,harness"
    )
    entries = [entry for entry in command.listing(way, options) if not entry.is_wide]
    taken = share(entries, 1.0, SEED + list(ENTRIES).index(way))[: ENTRIES[way]]
    results = Results(tmp_path / "results.jsonl")
    Pool(["--way", way], 100, tmp_path, lambda message: results.add(way, message)).run(
        taken
    )
    found = summarise(results.read(), Known())
    assert found["counts"][way]["value"]["right"] > len(taken) / 2
    assert faults(found) == []
