"""What is seen of a worker: numbers for Prometheus and `top`, against what the clients did."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bridge_client import connect
from bridge_client.cli import main
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import RemoteModelError
from tests.conftest import ROOT, eventually
from tests.workers import Worker, serving

_MODEL = """
import jax


def f(x):
    return jax.numpy.sin(x)


def raising(x):
    raise ValueError("no")
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    (tmp_path / "measured.py").write_text(_MODEL)
    flags = [f"--listen=unix:{tmp_path}/w.sock", "--metrics=127.0.0.1:0"]
    models = ["--jax-model=measured:f", "--jax-model=measured:raising"]
    env = {"PYTHONPATH": str(tmp_path)}
    with serving(tmp_path, *flags, *models, env=env) as worker:
        yield worker


def _scraped(worker: Worker) -> dict[str, float]:
    """The samples that Prometheus would read, by name and labels."""
    (url,) = re.findall(r"http://[0-9.]+:\d+/metrics", worker.stderr)
    with urllib.request.urlopen(url, timeout=10) as reply:  # noqa: S310
        lines = reply.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def test_numbers_are_those_of_the_clients(worker: Worker, lane: str) -> None:
    """Also once their lanes have ended."""
    with connect(worker.address, lane=lane) as session:
        f = RemoteJaxFunction(session, name="f")
        for _ in range(3):
            x = torch.ones(4, requires_grad=True)
            f(x).sum().backward()
        for _ in range(2):
            f(torch.ones(4))
        with pytest.raises(RemoteModelError):
            RemoteJaxFunction(session, name="raising")(torch.ones(4))
        calls = session.stats()["calls"]
        assert _scraped(worker)["bridge_sessions"] == 1
    # The worker ends a lane after the client has closed it.
    assert eventually(lambda: _scraped(worker)["bridge_lanes"] == 0)
    found = _scraped(worker)
    requests = {k: v for k, v in found.items() if k.startswith("bridge_requests")}
    assert sum(requests.values()) == calls
    forward = '{derivative="forward",model="f"}'
    pullback = '{derivative="vjp of forward",model="f"}'
    assert requests[f"bridge_requests_total{forward}"] == 5
    assert requests[f"bridge_requests_total{pullback}"] == 3
    assert found[f"bridge_output_bytes_total{forward}"] == 5 * 16
    assert found[f"bridge_compiles_total{forward}"] == 2  # one keeps a residual
    assert found[f"bridge_compute_seconds_total{forward}"] > 0
    assert found[f"bridge_queue_seconds_total{forward}"] >= 0
    assert found[f"bridge_run_seconds_count{forward}"] == 5
    edges = [v for k, v in found.items() if k.startswith("bridge_run_seconds_bucket")]
    assert len(edges) == 2 * 15 and max(edges) == 5
    assert found[f"bridge_compile_seconds_total{forward}"] > 0
    assert found['bridge_errors_total{kind="RemoteModelError"}'] == 1
    assert found["bridge_residuals"] == found["bridge_running"] == 0


def test_top_prints_the_same_numbers(
    worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    with connect(worker.address) as session:
        RemoteJaxFunction(session, name="f")(torch.ones(4))
    assert eventually(lambda: _scraped(worker)["bridge_lanes"] == 0)
    assert main(["top", worker.address, "--once"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"(?m)^f +forward +1 ", text)
    assert re.search(r"(?m)^f +forward +1 +\S+ +\S+ +[\d.]+ +\d+%", text)
    assert "1 sessions, 1 lanes, 0 running" in text
    assert main(["top", worker.address, "--once", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["runs"][0]["count"] == "1"


@pytest.mark.parametrize("listen", ["nowhere", "127.0.0.1:99999", "127.0.0.1:port"])
def test_an_address_of_metrics_that_is_none(tmp_path: Path, listen: str) -> None:
    (tmp_path / "measured.py").write_text(_MODEL)
    env = {"PYTHONPATH": str(tmp_path)}
    flags = ["--jax-model=measured:f", f"--metrics={listen}"]
    with Worker(tmp_path, *flags, f"--listen=unix:{tmp_path}/w.sock", env=env) as it:
        assert it.wait() == 2
        assert f"--metrics {listen!r}" in it.stderr
        assert "Traceback" not in it.stderr


def test_an_address_of_metrics_that_is_taken(worker: Worker, tmp_path: Path) -> None:
    (port,) = re.findall(r"http://[0-9.]+:(\d+)/metrics", worker.stderr)
    env = {"PYTHONPATH": str(tmp_path)}
    flags = ["--jax-model=measured:f", f"--metrics=127.0.0.1:{port}"]
    second = tmp_path / "second"
    with Worker(second, *flags, f"--listen=unix:{tmp_path}/v.sock", env=env) as it:
        assert it.wait() == 2
        assert "--metrics cannot listen" in it.stderr
        assert "Traceback" not in it.stderr


def test_the_dashboard_asks_for_metrics_that_exist(worker: Worker) -> None:
    """Each name in docker/observe/dashboard.json is one that a worker serves."""
    with connect(worker.address) as session:
        x = torch.ones(4, requires_grad=True)
        RemoteJaxFunction(session, name="f")(x).sum().backward()
        with pytest.raises(RemoteModelError):
            RemoteJaxFunction(session, name="raising")(torch.ones(4))
    asked = (ROOT / "docker/observe/dashboard.json").read_text()
    served = {name.partition("{")[0] for name in _scraped(worker)}
    assert set(re.findall(r"bridge_\w+", asked)) <= served
