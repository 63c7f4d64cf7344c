#!/usr/bin/env python3
"""Test of the built wheel in a user's setting: outside of the checkout, one framework at a time.

Builds the wheel and installs it into three new environments in an empty folder. There the test runs
both commands and the programs of README.md and docs/jax-client.md, and type-checks a program
against the installed packages.

The new environments read the frameworks from the environments of `make setup` through a .pth file,
which takes seconds; with --fresh pip installs the frameworks too. In both cases pip verifies the
wheel's requirements, and the bridge's packages come from the wheel.

    python -m tools.test_wheel [--fresh]
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.pages import save_programs, shown_after

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
JAX_CLIENT = ROOT / "docs" / "jax-client.md"
PACKAGES = ("bridge_wire", "bridge_client", "bridge_server")
# The frameworks of each environment, as extras of the wheel.
EXTRAS = {"jax": "[jax,models]", "torch": "[torch]", "both": "[jax,torch,trace]"}
RIGHT_USE = """
from bridge_client import Session, Tls, connect
from bridge_wire.errors import BridgeError

try:
    session: Session = connect("host:50051", token="t", tls=Tls(), require="memfd")
except BridgeError as error:
    print(error)
"""
# Each wrong line with the error code that mypy must report.
WRONG_USES = {
    'connect("host:50051", requires="memfd")': "call-arg",
    "connect(50051)": "arg-type",
    'number: int = connect("host:50051")': "assignment",
}


class Failed(Exception):
    """A step of the test failed; the text names the step and quotes its output."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A named virtual environment in the test's folder."""

    name: str
    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / f".venv-{self.name}"

    def command(self, name: str) -> str:
        return str(self.root / "bin" / name)

    def run(self, *arguments: str) -> str:
        """Run the environment's interpreter in the test's folder."""
        return run(self.command("python"), *arguments, cwd=self.folder)


def run(*command: str, cwd: Path, expected: int = 0) -> str:
    """Return the output of a command.

    Raises:
      Failed: the exit status is not the expected one.
    """
    done = subprocess.run(
        command, cwd=cwd, env=_settings(), capture_output=True, text=True, timeout=600
    )
    if done.returncode != expected:
        output = done.stdout + done.stderr
        raise Failed(f"`{' '.join(command)}` exited with {done.returncode}:\n{output}")
    return done.stdout


def build(folder: Path) -> Path:
    """Build the wheel into the folder."""
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, environment: Environment, is_fresh: bool) -> None:
    """Create the environment and install the wheel with its extras."""
    run(sys.executable, "-m", "venv", "--without-pip", str(environment.root), cwd=ROOT)
    python = environment.command("python")
    requirement = f"{wheel}{EXTRAS[environment.name]}"
    if is_fresh:
        _pip("--python", python, "install", requirement, cwd=environment.folder)
        return
    _pip("--python", python, "install", "--no-deps", str(wheel), cwd=environment.folder)
    _lend_frameworks(environment)
    # Installs nothing, but fails if a requirement of the wheel is not met.
    _pip(
        "--python", python, "install", "--no-index", requirement, cwd=environment.folder
    )


def check_origin(environment: Environment) -> None:
    """Check that the environment imports the bridge from the wheel, not from the checkout."""
    program = "import importlib, sys\nfor name in sys.argv[1:]:\n    "
    program += "print(importlib.import_module(name).__file__)"
    for line in environment.run("-c", program, *PACKAGES).splitlines():
        if not Path(line).is_relative_to(environment.root):
            raise Failed(
                f"{environment.name} imports {line}; expected a file of the wheel"
            )


def check_commands(environment: Environment) -> None:
    """Run both commands."""
    for arguments in (
        "bridge_server --help",
        "bridge_client --help",
        "bridge_client doctor",
    ):
        name, *rest = arguments.split()
        run(environment.command(name), *rest, cwd=environment.folder)


def check_programs(folder: Path) -> None:
    """Run the pages' programs and compare their outputs with the pages."""
    for page, program, name in (
        (README, "train.py", "torch"),
        (README, "both.py", "both"),
        (JAX_CLIENT, "fit.py", "jax"),
    ):
        save_programs(page, folder)
        output = Environment(name, folder).run(program)
        # The loss of train.py depends on the processor's last bits.
        seen, expected = (
            text.split(", loss")[0] for text in (output, shown_after(page, program))
        )
        if seen != expected:
            raise Failed(
                f"{program} printed {output!r}, but {page.name} shows {expected!r}"
            )


def check_types(environment: Environment) -> None:
    """Type-check right and wrong uses against the installed packages."""
    program = environment.folder / "typed.py"
    program.write_text(RIGHT_USE)
    _mypy(environment, program, expected=0)
    program.write_text(RIGHT_USE + "\n".join(WRONG_USES) + "\n")
    report = _mypy(environment, program, expected=1)
    first = len(RIGHT_USE.splitlines()) + 1
    for line, code in enumerate(WRONG_USES.values(), first):
        found = [
            text for text in report.splitlines() if text.startswith(f"typed.py:{line}:")
        ]
        if not any(f"[{code}]" in text for text in found):
            raise Failed(
                f"mypy reports no {code} in line {line} of typed.py:\n{report}"
            )


def _mypy(environment: Environment, program: Path, expected: int) -> str:
    python = environment.command("python")
    options = ("--strict", "--python-executable", python, "--cache-dir", "mypy")
    command = (sys.executable, "-m", "mypy", *options, program.name)
    return run(*command, cwd=environment.folder, expected=expected)


def _lend_frameworks(environment: Environment) -> None:
    """Let the environment import the packages of the checkout's environment of the same name.

    The wheel's packages come first on the path. Python ignores .pth files within the lent folder,
    such as the editable project's.
    """
    checkout = ROOT / f".venv-{environment.name}"
    scheme = {"base": str(checkout), "platbase": str(checkout)}
    lent = sysconfig.get_path("purelib", "venv", scheme)
    own = sysconfig.get_path("purelib", "venv", {"base": str(environment.root)})
    Path(own, "lent.pth").write_text(f"{lent}\n")


def _pip(*arguments: str, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", *arguments, cwd=cwd)


def _settings() -> dict[str, str]:
    """Return this process's environment without a path into the checkout."""
    settings = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }
    return settings | {
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PIP_USER": "0",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Test the built wheel outside of the checkout."
    )
    parser.add_argument(
        "--fresh", action="store_true", help="install the frameworks too"
    )
    options = parser.parse_args(arguments)
    begun = time.monotonic()

    def report(text: str) -> None:
        print(f"test-wheel: {text} ({time.monotonic() - begun:.0f} s)", flush=True)

    with tempfile.TemporaryDirectory(prefix="bridge-wheel-") as name:
        folder = Path(name)
        environments = [Environment(extras, folder) for extras in EXTRAS]
        try:
            wheel = build(folder)
            report(f"built {wheel.name}")
            for environment in environments:
                install(wheel, environment, options.fresh)
                check_origin(environment)
                check_commands(environment)
                report(f"installed {EXTRAS[environment.name]}, both commands run")
            check_types(Environment("torch", folder))
            report("right uses pass the type checker, wrong ones fail")
            check_programs(folder)
            report("the programs of the pages print their outputs")
        except Failed as failure:
            print(f"test-wheel: {failure}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
