"""The benchmark on a GPU: its judgement, and that it runs at all."""

import subprocess
import sys

import pytest

from bench import gpu
from bench.measure import KIB, MIB
from tests.conftest import ROOT

_GOOD = {"native": 1.0, "one process": 1.0, "worker": 1.05, "staged": 30.0}


def _size(copied: float = 2.0, in_slab: float = 1.0, **seconds: float) -> gpu.Size:
    rounds = {way: [[s] * 3] * 2 for way, s in (_GOOD | seconds).items()}
    return gpu.Size(rounds, {"worker": copied, "slab": in_slab})


def _outcomes(size: gpu.Size) -> list[bool]:
    sizes = {KIB: size, 64 * MIB: size, gpu.GIB: size}
    return [row.endswith("| met |") for row in gpu.judged(sizes)]


def test_a_good_run_meets_every_limit() -> None:
    """There are six."""
    assert _outcomes(_size()) == [True] * 6


@pytest.mark.parametrize(
    ("size", "met"),
    [
        (_size(worker=1.2), [True, True, False, True, True, True]),
        (_size(worker=1.4), [True, False, False, True, True, True]),
        (_size(worker=2.6), [False, False, False, False, True, True]),
        (_size(staged=20.0), [True, True, True, False, True, True]),
        (_size(copied=2.01), [True, True, True, True, False, True]),
        (_size(in_slab=1.01), [True, True, True, True, True, False]),
    ],
)
def test_each_limit_can_be_missed(size: gpu.Size, met: list[bool]) -> None:
    """At its own value."""
    assert _outcomes(size) == met


def test_the_tables_show_every_way_and_limit() -> None:
    """By size."""
    table = gpu.tables({64 * MIB: _size()})
    assert table[0] == "| forward + VJP, p50 | native | one process | worker | staged |"
    assert table[2] == "| 64 MiB | 1000.000 ms | 1000.000 ms | 1050.000 ms | 30000.000 ms |"
    assert len(gpu.judged({64 * MIB: _size()})) == 4


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And that is no failure."""
    monkeypatch.setattr(gpu, "gpus", lambda: ())
    assert gpu.main([]) == 0
    assert "there is no GPU here" in capsys.readouterr().out


def test_it_runs_on_the_host_to_show_that_it_works() -> None:
    """All ways agree, and are timed."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--rehearse"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "\n| 1 KiB | " in done.stdout and "one process by DLPack" in done.stdout
