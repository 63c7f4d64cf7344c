"""The benchmark on a GPU: its judgement, and that it runs at all."""

import argparse
import subprocess
import sys

import pytest

from bench import gpu
from bench.measure import KIB, MIB
from tests.conftest import ROOT

_GOOD = {"native": 1.0, "one process": 1.0, "worker": 1.4, "slab": 1.05, "staged": 30.0}


def _size(copied: float = 2.0, in_slab: float = 1.0, **seconds: float) -> gpu.Size:
    rounds = {way: [[s] * 3] * 2 for way, s in (_GOOD | seconds).items()}
    return gpu.Size(rounds, {"worker": copied, "slab": in_slab})


def _outcomes(size: gpu.Size) -> list[bool]:
    sizes = {KIB: size, 64 * MIB: size, gpu.GIB: size}
    return [
        row.endswith("| met |") for row in gpu.judged(sizes) if "| none |" not in row
    ]


def test_a_good_run_meets_every_limit() -> None:
    """There are five; how two processes do where inputs are copied in is reported at three
    sizes."""
    assert _outcomes(_size()) == [True] * 5
    size = _size(worker=9.0, staged=200.0)
    reported = [
        row
        for row in gpu.judged({KIB: size, 64 * MIB: size, gpu.GIB: size})
        if row.endswith("| none | 9.000 | |")
    ]
    assert len(reported) == 3


@pytest.mark.parametrize(
    ("size", "met"),
    [
        (_size(slab=1.11), [False, False, True, True, True]),
        (_size(staged=20.0), [True, True, False, True, True]),
        (_size(copied=2.01), [True, True, True, False, True]),
        (_size(in_slab=1.01), [True, True, True, True, False]),
    ],
)
def test_each_limit_can_be_missed(size: gpu.Size, met: list[bool]) -> None:
    """At its own value."""
    assert _outcomes(size) == met


def test_the_tables_show_every_way_and_limit() -> None:
    """By size."""
    table = gpu.tables({64 * MIB: _size()})
    assert (
        table[0]
        == "| forward + VJP, p50 | native | one process | worker | slab | staged |"
    )
    assert (
        table[2]
        == "| 64 MiB | 1000.000 ms | 1000.000 ms | 1400.000 ms | 1050.000 ms | 30000.000 ms |"
    )
    assert len(gpu.judged({64 * MIB: _size()})) == 5


def test_a_size_that_was_not_staged_through_the_host_says_so() -> None:
    """At 1 GiB that would take most of the time there is."""
    rounds = {
        way: seconds for way, seconds in _size().rounds.items() if way != "staged"
    }
    table = gpu.tables(
        {KIB: _size(), gpu.GIB: gpu.Size(rounds, {"worker": 2.0, "slab": 1.0})}
    )
    assert table[3].startswith("| 1 GiB | ") and table[3].endswith("| not measured |")


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("1KiB", (KIB,)), ("1KiB,64MiB,2GiB", (KIB, 64 * MIB, 2 * gpu.GIB))],
)
def test_a_user_names_the_sizes(text: str, sizes: tuple[int, ...]) -> None:
    """In binary units."""
    assert gpu._sizes(text) == sizes
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        gpu._sizes("64MB")


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And that is no failure."""
    monkeypatch.setattr(gpu, "gpus", lambda: ())
    assert gpu.main([]) == 0
    assert "shows no GPU here" in capsys.readouterr().out


def test_it_runs_on_the_host_to_show_that_it_works() -> None:
    """All ways agree, and are timed."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--rehearse"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "\n| 1 KiB | " in done.stdout and "one process by DLPack" in done.stdout
