"""What a worker says: models' prints, slow preparations, the log's forms and its warnings."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bridge_client import connect, spawn
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import RemoteModelError
from tests.conftest import ROOT, eventually, python_of
from tests.workers import environment, serving

_MODEL = """
import sys
import time
import warnings

import jax


def f(x):
    print("traced with", x.shape)
    warnings.warn("a warning of the model")
    jax.debug.print("computed {y}", y=x[0])
    return 2 * x


def raising(x):
    raise ValueError("no such thing")


def _sleep(x):
    time.sleep(0.3)
    return x


def slow(x):
    return jax.pure_callback(_sleep, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
"""
_PROGRAM = """
import sys, torch
from bridge_client import spawn
from bridge_client.torch import RemoteJaxFunction
with spawn(jax_model="said:f", python=sys.argv[1]) as session:
    RemoteJaxFunction(session)(torch.ones(3))
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "said.py").write_text(_MODEL)
    return tmp_path


def _path(models: Path) -> str:
    return f"{models}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"


def test_a_models_prints_reach_the_users_stderr(models: Path) -> None:
    """Marked as the worker's; the worker's own log is not among them."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, python_of(".venv-jax")],
        env=environment(PYTHONPATH=_path(models)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert "[worker] traced with (3,)" in lines
    assert lines.count("[worker] computed 1.0") == 1
    assert any("a warning of the model" in line for line in lines)
    assert "prepared" not in done.stderr
    assert done.stdout == ""


def test_a_function_gets_the_prints_instead(
    models: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that raises harms nothing."""
    lines: list[str] = []

    def take(line: str) -> None:
        lines.append(line)
        raise ValueError(line)

    env = {"PYTHONPATH": _path(models)}
    python = python_of(".venv-jax")
    with spawn(jax_model="said:f", python=python, env=env, worker_output=take) as it:
        assert RemoteJaxFunction(it)(torch.ones(2)).tolist() == [2, 2]
        assert eventually(lambda: "computed 1.0" in lines)
    assert "[worker]" not in capfd.readouterr().err


def test_a_logger_that_shows_the_prints_is_enough(
    models: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "bridge_client.worker")
    env = {"PYTHONPATH": _path(models)}
    with spawn(jax_model="said:f", python=python_of(".venv-jax"), env=env) as it:
        RemoteJaxFunction(it)(torch.ones(2))
        assert eventually(lambda: "computed 1.0" in caplog.text)
    assert "[worker]" not in capfd.readouterr().err


@pytest.mark.parametrize("form", ["json", "text"])
def test_the_log_has_one_form(models: Path, form: str, lane: str) -> None:
    """It names sessions, preparations, slow calls, errors, and arrays that change their shape."""
    listen = f"--listen=unix:{models}/w.sock"
    named = [f"--jax-model=said:{name}" for name in ("f", "raising", "slow")]
    flags = [listen, *named, f"--log-format={form}", "--slow-call-s=0.1"]
    with serving(models, *flags, env={"PYTHONPATH": _path(models)}) as worker:
        with connect(worker.address, lane=lane) as session:
            f = RemoteJaxFunction(session, name="f")
            for size in range(1, 20):
                f(torch.ones(size))
            with pytest.raises(RemoteModelError) as caught:
                RemoteJaxFunction(session, name="raising")(torch.ones(1))
            RemoteJaxFunction(session, name="slow")(torch.ones(1))
        assert eventually(lambda: "session 1 has ended" in worker.stderr)
        lines = worker.stderr.splitlines()
    of_the_log = [line for line in lines if "bridge_server" in line]
    assert of_the_log
    assert all((line[0] == "{") == (form == "json") for line in of_the_log)
    if form == "json":
        assert all("message" in json.loads(line) for line in of_the_log)
    text = "\n".join(of_the_log)
    assert "session 1: 'torch-jax-bridge" in text
    assert "prepared forward of model 'f' in" in text
    assert "forward of model 'slow' took " in text
    assert "was compiled for 16 shapes so far" in text
    assert "input 0 (now float32[17])" in text
    error = caught.value
    assert f"{error.request}: a model raised" in text
    assert f"({error.request} in the worker's log)" in str(error)
