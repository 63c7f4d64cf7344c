"""Liveness that means progress: stuck runs, readiness, waiting for a worker, and canary calls."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bridge_client import connect
from bridge_client.cli import main
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import BridgeError
from tests.conftest import eventually
from tests.workers import Worker, serving

_MODEL = """
import pathlib
import time

import jax
import numpy as np

HERE = pathlib.Path(__file__).parent


def _blocked(x):
    while not (HERE / "go").exists():
        time.sleep(0.01)
    return 2 * np.asarray(x)


def blocked(x):
    return jax.pure_callback(_blocked, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def fast(x):
    return x + 1
"""


def _flags(directory: Path, *flags: str) -> list[str]:
    (directory / "stuck_models.py").write_text(_MODEL)
    models = [f"--jax-model=stuck_models:{name}" for name in ("fast", "blocked")]
    return [f"--listen=unix:{directory}/worker.sock", *models, *flags]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    flags = _flags(tmp_path, "--stuck-s=0.5", "--warmup=fast=float32[3]")
    with serving(tmp_path, *flags, env={"PYTHONPATH": str(tmp_path)}) as worker:
        yield worker
        (tmp_path / "go").touch()


def _status(worker: Worker, *args: str) -> int:
    return main(["health", worker.address, *args])


def test_a_run_that_does_not_end_is_told_by_liveness_alone(
    worker: Worker, tmp_path: Path, lane: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The worker still takes calls; the log shows where the run is, and liveness returns."""
    assert _status(worker, "--service", "liveness") == 0
    with connect(worker.address, lane=lane) as session:
        blocked = RemoteJaxFunction(session, name="blocked")
        thread = threading.Thread(target=lambda: blocked(torch.ones(3)))
        thread.start()
        assert eventually(lambda: _status(worker, "--service", "liveness") == 1, 20)
        assert _status(worker, "--deep") == 0
        assert "called model 'fast'(float32[3])" in capsys.readouterr().out
        assert eventually(lambda: "_blocked" in worker.stderr)
        (tmp_path / "go").touch()
        thread.join()
        assert eventually(lambda: _status(worker, "--service", "liveness") == 0, 20)
    assert "the run that seemed stuck has ended" in worker.stderr


def test_runs_that_end_are_not_stuck(tmp_path: Path, lane: str) -> None:
    """However many there are, one after another."""
    flags = _flags(tmp_path, "--stuck-s=2")
    with serving(tmp_path, *flags, env={"PYTHONPATH": str(tmp_path)}) as worker:
        with connect(worker.address, lane=lane) as session:
            fast = RemoteJaxFunction(session, name="fast")
            ended = threading.Event()
            threading.Timer(3, ended.set).start()
            while not ended.is_set():
                fast(torch.ones(3))
        assert "is under way for more than" not in worker.stderr


def test_a_stuck_worker_ends_where_it_is_told_to(tmp_path: Path) -> None:
    flags = _flags(tmp_path, "--stuck-s=0.5", "--exit-when-stuck")
    with serving(tmp_path, *flags, env={"PYTHONPATH": str(tmp_path)}) as worker:
        with connect(worker.address, retry_s=0) as session, pytest.raises(BridgeError):
            RemoteJaxFunction(session, name="blocked")(torch.ones(3))
        assert worker.wait() == 1
        (tmp_path / "go").touch()


def test_liveness_outlasts_readiness_in_a_drain(worker: Worker, tmp_path: Path) -> None:
    with connect(worker.address) as session:
        blocked = RemoteJaxFunction(session, name="blocked")
        under_way = blocked.submit(torch.ones(3))
        assert eventually(lambda: _status(worker, "--service", "liveness") == 1, 20)
        worker.terminate()
        assert eventually(lambda: _status(worker) == 1, 10)
        (tmp_path / "go").touch()
        assert under_way.result().tolist() == [2, 2, 2]
    assert worker.wait() == 0


def test_health_waits_for_a_worker(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/worker.sock"
    assert main(["health", address, "--wait", "0.3"]) == 1
    flags = _flags(tmp_path)
    with Worker(tmp_path, *flags, env={"PYTHONPATH": str(tmp_path)}):
        assert main(["health", address, "--wait", "60", "--deep"]) == 0


def test_doctor_makes_a_call(
    worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", worker.address]) == 0
    assert "called model 'fast'(float32[3])" in capsys.readouterr().out
