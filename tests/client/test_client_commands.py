"""The commands ps, call and bench of `bridge_client`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge_client import cli
from bridge_client.commands import ps
from tests.workers import Worker, models, serving


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker on TCP with a model that is warm."""
    args = [*models("square", "documented"), "--warmup", "square=float32[3]"]
    folder = tmp_path_factory.mktemp("worker")
    with serving(
        folder, *args, "--listen", "[::1]:0", "--metrics", "127.0.0.1:0"
    ) as worker:
        yield worker


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(words) == 0
    return capsys.readouterr().out


def test_call_prints_types_and_values(
    worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arguments are JSON, negative numbers and empty arrays too; --input gives other types."""
    square = (worker.address, "--model", "square")
    assert output(capsys, "call", *square, "[[1, 2], [3, -4.5]]") == (
        "float32[2,2] [[1.0, 4.0], [9.0, 20.25]]\n"
    )
    assert output(capsys, "call", *square, "-3") == "float32[] 9.0\n"
    assert output(capsys, "call", *square, "-5e-1") == "float32[] 0.25\n"
    assert output(capsys, "call", *square, "-2E0", "--json").startswith("{")
    assert output(capsys, "call", *square, "[]") == "float32[0] []\n"
    told = json.loads(
        output(capsys, "call", *square, "--json", "--input", "int32[2]", "[1, 2]")
    )
    assert told == {"outputs": [{"spec": "int32[2]", "value": [1, 4]}]}
    documented = (worker.address, "--model", "documented")
    assert output(capsys, "call", *documented, "[1]", "4") == "float32[1] [4.0]\n"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--model", "square", "[1, [2]]"], 1, "its rows have the shapes"),
        (["--model", "square", '"a"'], 1, "expected a number or nested lists"),
        (["--model", "sqare", "1"], 1, "did you mean 'square'?"),
        (["1"], 1, "pick one with --model"),
        (["--model", "square", "--input", "int32[2]", "1"], 1, "--input gives [[2]]"),
        (["--model", "square", "__import__"], 2, "is not JSON"),
    ],
)
def test_wrong_call_is_told(
    worker: Worker,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    status: int,
    said: str,
) -> None:
    """Each mistake is one sentence in the words of the command line."""
    try:
        assert cli.main(["call", worker.address, *words]) == status
    except SystemExit as ended:
        assert ended.code == status
    text = capsys.readouterr().err
    assert said in text
    assert text.count("\n") == 1


def test_bench_measures_a_warm_model(
    worker: Worker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --input, the types are those of --warmup; the figures agree with each other."""
    monkeypatch.setattr("bridge_client.commands.calls._WARM_S", 0.0)
    monkeypatch.setattr("bridge_client.commands.calls._MEASURED_S", 0.0)
    row = json.loads(output(capsys, "bench", worker.address, "--json"))
    assert (row["model"], row["types"], row["calls"]) == ("square", ["float32[3]"], 10)
    assert 0 < row["median_ms"] <= row["p99_ms"]
    assert output(capsys, "bench", worker.address).startswith(
        "square(float32[3]): median "
    )


def test_ps_finds_workers_by_their_sockets(
    worker: Worker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Workers on TCP and on Unix sockets are listed, without the ports of their metrics and the
    sockets of their lanes."""
    address = f"unix:{tmp_path}/worker.sock"
    monkeypatch.setattr(ps, "_PROBE_S", 10.0)
    with serving(tmp_path, *models("square"), "--listen", address) as other:
        rows = json.loads(output(capsys, "ps", "--json"))
        found = {row["pid"]: row for row in rows}
        assert found[worker.pid]["addresses"] == [worker.address]
        assert found[other.pid]["addresses"] == [address]
        assert found[other.pid]["status"] == "SERVING"
        assert 0 <= found[other.pid]["seconds"] <= 120
        assert found[other.pid]["arguments"][-2:] == ["--listen", address]
        assert f"{other.pid} SERVING" in output(capsys, "ps")


def test_no_worker_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a worker, ps says so."""
    monkeypatch.setattr(ps, "_PROC", tmp_path)
    assert output(capsys, "ps") == "no worker of this user runs here\n"
    assert output(capsys, "ps", "--json") == "[]\n"
