"""What a newcomer runs first: the examples."""

import re
import subprocess
from pathlib import Path

from tests.conftest import ROOT, python_of


def run(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a program in the torch environment, where its worker's environment is .venv-jax."""
    return subprocess.run([python_of(".venv-torch"), *arguments], cwd=cwd, capture_output=True, text=True, timeout=240)


def test_demo_learns_the_same_over_every_lane(tmp_path: Path) -> None:
    """The demo reaches 97 %; over gRPC its losses are the same to the last bit, and too few steps end it with 1."""
    shared, inline = tmp_path / "shared", tmp_path / "inline"
    demo = run("examples/digits.py", "--losses", shared)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "lane and memory:  local, memfd\n" in demo.stdout
    first_line = demo.stdout.splitlines()[0]
    assert re.fullmatch(r"this process \d+: torch yes, jax no \| worker \d+: torch no, jax yes", first_line)

    short = run("examples/digits.py", "--losses", inline, "--lane", "grpc", "--steps", "40")
    assert short.returncode == 1, short.stderr  # 40 steps are too few for 97 %
    assert re.search(r"^test accuracy: +\d\d\.\d% ", short.stdout, re.MULTILINE), short.stderr
    assert "lane and memory:  grpc, inline\n" in short.stdout, short.stderr
    losses = inline.read_text().splitlines()
    assert len(losses) == 40
    assert losses == shared.read_text().splitlines()[:40]


def test_lotka_volterra_fit_agrees_with_the_literature() -> None:
    """The rates fitted through the ODE solver are within 5 % of those of Carpenter's case study."""
    fit = run("examples/lotka_volterra.py")
    assert fit.returncode == 0, fit.stderr
    rows = re.findall(r"^(alpha|beta|gamma|delta) +(\S+) +(\S+)$", fit.stdout, re.MULTILINE)
    assert [name for name, *_ in rows] == ["alpha", "beta", "gamma", "delta"], fit.stdout
    for name, fitted, known in rows:
        assert abs(float(fitted) / float(known) - 1) < 0.05, name
