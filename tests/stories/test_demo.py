"""What a newcomer runs first: the examples."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, python_of


def run(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a program in the torch environment, where its worker's environment is .venv-jax."""
    return subprocess.run(
        [python_of(".venv-torch"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_demo_learns_the_same_over_every_lane(tmp_path: Path) -> None:
    """The demo reaches 97 %; over gRPC its losses are the same to the last bit, and too few
    steps end it with 1."""
    shared, inline = tmp_path / "shared", tmp_path / "inline"
    demo = run("examples/digits.py", "--losses", shared)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "lane and memory:  local, memfd\n" in demo.stdout
    first_line = demo.stdout.splitlines()[0]
    assert re.fullmatch(
        r"this process \d+: torch yes, jax no \| worker \d+: torch no, jax yes",
        first_line,
    )

    short = run(
        "examples/digits.py", "--losses", inline, "--lane", "grpc", "--steps", "40"
    )
    assert short.returncode == 1, short.stderr  # 40 steps are too few for 97 %
    assert re.search(r"^test accuracy: +\d\d\.\d% ", short.stdout, re.MULTILINE), (
        short.stderr
    )
    assert "lane and memory:  grpc, inline\n" in short.stdout, short.stderr
    losses = inline.read_text().splitlines()
    assert len(losses) == 40
    assert losses == shared.read_text().splitlines()[:40]


def test_lotka_volterra_fit_agrees_with_the_literature() -> None:
    """The rates fitted through the ODE solver are within 5 % of those of Carpenter's case study."""
    fit = run("examples/lotka_volterra.py")
    assert fit.returncode == 0, fit.stderr
    rows = re.findall(
        r"^(alpha|beta|gamma|delta) +(\S+) +(\S+)$", fit.stdout, re.MULTILINE
    )
    assert [name for name, *_ in rows] == ["alpha", "beta", "gamma", "delta"], (
        fit.stdout
    )
    for name, fitted, known in rows:
        assert abs(float(fitted) / float(known) - 1) < 0.05, name


@pytest.mark.parametrize("options", [[], ["--precision", "bf16-mixed"]], ids=str)
def test_lightning_trains_the_digits(
    request: pytest.FixtureRequest, options: list[str]
) -> None:
    """Lightning's Trainer reaches 97 %, in float32 and in mixed precision, and its checkpoint is
    that model."""
    train_elsewhere(request, "examples/lightning_digits.py", *options)


@pytest.mark.parametrize("options", [[], ["--bf16"]], ids=str)
def test_transformers_trains_the_digits(
    request: pytest.FixtureRequest, options: list[str]
) -> None:
    """transformers' Trainer reaches 97 %, in float32 and in bfloat16, and what it saves is that
    model."""
    train_elsewhere(request, "examples/trainer_digits.py", *options)


def train_elsewhere(request: pytest.FixtureRequest, *arguments: str) -> None:
    """Run an example with the interpreter that was declared to have what it needs."""
    python = request.config.getoption("--examples-extra")
    if python is None:
        pytest.skip("needs --examples-extra=PYTHON")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, *arguments, "--epochs", "12"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^test accuracy: 9\d\.\d% ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", ["cartpole", "pendulum"])
def test_a_policy_is_trained_in_a_simulator(
    request: pytest.FixtureRequest, name: str
) -> None:
    """States of gymnax and brax, of their own classes, go from step to step: batched by vmap, and
    with gradients through all of them. The policy reaches the example's goal."""
    python = request.config.getoption("--simulators")
    if python is None:
        pytest.skip("needs --simulators=PYTHON")
    done = run(f"examples/{name}.py", "--worker-python", python)
    assert done.returncode == 0, done.stdout + done.stderr
