#!/usr/bin/env python3
"""Creates the virtual environments .venv-jax, .venv-torch, .venv-wire, .venv-both, .venv-jax-next.

Standard library only, in syntax that an old Python can parse: the script runs before any
installation and must itself report an interpreter that is too old. An environment is created anew
if the package sections of `pyproject.toml`, this file, the checkout's path or the requested
interpreter have changed since its stamp. Otherwise a run takes milliseconds and prints nothing.

    tools/setup.py [--python PYTHON] [jax|torch|wire|both|jax-next ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
NEWER_MINORS = (13, 12)  # for .venv-jax-next, best first
# Prints an interpreter's version and path; in a virtual environment, the base interpreter's path.
PROBE = """
import json, sys
print(json.dumps([*sys.version_info[:3], getattr(sys, "_base_executable", sys.executable)]))
"""


@dataclasses.dataclass(frozen=True)
class Environment:
    """A virtual environment; pip installs packages and the editable project with extras there."""

    name: str
    extras: str
    packages: Sequence[str] = ()

    @property
    def folder(self) -> Path:
        return ROOT / f".venv-{self.name}"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.folder / "setup.stamp"

    @property
    def log(self) -> Path:
        return self.folder / "setup.log"

    def is_current(self, key: str) -> bool:
        return (
            self.python.exists()
            and self.stamp.is_file()
            and self.stamp.read_text() == key
        )


JAX_NEXT = Environment("jax-next", "", packages=("jax", "flax"))
ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment("jax", "[jax,models,metrics]"),
        Environment("torch", "[torch,examples,test]"),
        # Neither framework: for the tests of bridge_wire.
        Environment("wire", "[test]", packages=("ml_dtypes", "numpy")),
        Environment("both", "[jax,models,torch,trace,dev,examples,bench]"),
        JAX_NEXT,
    )
}


@dataclasses.dataclass(frozen=True)
class Interpreter:
    path: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        return "Python " + ".".join(map(str, self.version))


class SetupFailed(Exception):
    """A failure of the set-up, with a text that tells the user a remedy."""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def probe(path: str) -> Interpreter | None:
    """Return the interpreter at `path`; None if it fails (a pyenv shim of an inactive version)."""
    try:
        run = subprocess.run(
            [path, "-c", PROBE], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if run.returncode != 0:
        return None
    major, minor, micro, base = json.loads(run.stdout)
    return Interpreter(base, (major, minor, micro))


def pyenv_roots(shim: str | None) -> Iterator[Path]:
    """Yield pyenv's possible root folders.

    HOME may be empty, so a shim's location counts too.
    """
    if os.environ.get("PYENV_ROOT"):
        yield Path(os.environ["PYENV_ROOT"])
    if shim and Path(shim).parent.name == "shims":
        yield Path(shim).parent.parent
    if shutil.which("pyenv"):
        answer = subprocess.run(["pyenv", "root"], capture_output=True, text=True)
        if answer.returncode == 0:
            yield Path(answer.stdout.strip())


def pyenv_pythons(root: Path, minor: int) -> list[str]:
    """Return pyenv's Python 3.`minor`s, newest first, without free-threaded builds (3.13.0t)."""
    folders = [
        folder
        for folder in root.glob(f"versions/3.{minor}.*")
        if folder.name.split(".")[2].isdigit()
    ]
    folders.sort(key=lambda folder: int(folder.name.split(".")[2]), reverse=True)
    return [str(folder / "bin" / f"python3.{minor}") for folder in folders]


def find_python(minor: int) -> Interpreter | None:
    """Return a working Python 3.`minor`: from PATH, else pyenv's newest."""
    on_path = shutil.which(f"python3.{minor}")
    candidates = [on_path] if on_path else []
    for root in pyenv_roots(on_path):
        candidates += pyenv_pythons(root, minor)
    found = (probe(path) for path in candidates)
    return next(
        (python for python in found if python and python.version[:2] == (3, minor)),
        None,
    )


def choose_python(requested: str | None) -> Interpreter:
    """Return the environments' interpreter: the requested one, else a 3.11, else this one."""
    path = requested or sys.executable
    chosen = probe(path)
    if chosen is None:
        raise SetupFailed(
            f"{path} does not run; choose another interpreter: make setup PYTHON=python3.11"
        )
    if not requested and chosen.version[:2] != OLDEST:
        # Some package indexes have the pinned torch for 3.11 only.
        chosen = find_python(OLDEST[1]) or chosen
    if chosen.version < OLDEST:
        raise SetupFailed(
            f"Python 3.11 or newer is needed, but {path} is {chosen}; "
            "install a newer Python and pass it: make setup PYTHON=/path/to/python3.11"
        )
    return chosen


def find_newer_python(base: Interpreter) -> Interpreter | None:
    """Return an interpreter newer than `base`, for a worker with other versions than its client."""
    newer = (
        find_python(minor) for minor in NEWER_MINORS if (3, minor) > base.version[:2]
    )
    return next((python for python in newer if python), None)


def requirements_key(requested: str | None) -> str:
    """Return the hash of everything the environments depend on."""
    import tomllib  # new in 3.11, and an older Python must reach choose_python

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packaging = [project["build-system"], project["project"], project["tool"]["hatch"]]
    parts = [
        json.dumps(packaging, sort_keys=True),
        Path(__file__).read_text(),
        str(ROOT),
        str(requested),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def creation_steps(environment: Environment, base: Interpreter) -> list[list[str]]:
    """Return the commands that create an environment and install its packages."""
    folder, python = str(environment.folder), str(environment.python)
    pip = [python, "-m", "pip", "install", "--progress-bar", "off"]
    install = [*pip, *environment.packages, "--editable", f".{environment.extras}"]
    if (
        subprocess.run(
            [base.path, "-c", "import ensurepip"], capture_output=True
        ).returncode
        == 0
    ):
        return [[base.path, "-m", "venv", folder], install]
    # On Debian without python3-venv, the available pip installs pip into the environment.
    bring_pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--progress-bar",
        "off",
        "pip",
    ]
    return [[base.path, "-m", "venv", "--without-pip", folder], bring_pip, install]


def create(environment: Environment, base: Interpreter, key: str) -> None:
    """Create the environment from nothing and write its stamp.

    Raises:
      SetupFailed: a command failed; the folder stays, without a stamp and with the log.
    """
    begun = time.monotonic()
    if environment.folder.exists():
        shutil.rmtree(environment.folder)
    environment.folder.mkdir()
    # With PYTHONPATH, pip would consider packages of other folders as installed.
    settings = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    # With `user` in its configuration, pip refuses virtual environments.
    settings |= {
        "PIP_NO_INPUT": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_USER": "0",
    }
    with environment.log.open("w") as log:
        for command in creation_steps(environment, base):
            print("$", *command, file=log, flush=True)
            status = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=log, env=settings
            ).returncode
            if status != 0:
                raise SetupFailed(failure_text(environment, base, command, status))
    environment.stamp.write_text(key)
    say(f"{environment.folder.name} ready ({base}, {time.monotonic() - begun:.0f} s)")


def failure_text(
    environment: Environment, base: Interpreter, command: Sequence[str], status: int
) -> str:
    tail = environment.log.read_text(errors="replace").splitlines()[-15:]
    return "\n".join(
        [
            (
                f"{environment.folder.name} failed: `{' '.join(command)}` exited with {status}. The"
                " log's end:"
            ),
            *("    " + line for line in tail),
            (
                f"  The whole log is {environment.log.relative_to(ROOT)}. To retry, run the same"
                f" target again; if a package has no wheel for {base}, choose another interpreter:"
                " make setup PYTHON=python3.11"
            ),
        ]
    )


def set_up(names: Sequence[str], requested: str | None) -> list[str]:
    """Create the named environments that are not current, concurrently; return the failures."""
    key = requirements_key(requested)
    stale = [
        ENVIRONMENTS[name] for name in names if not ENVIRONMENTS[name].is_current(key)
    ]
    if not stale:
        return []
    base = choose_python(requested)
    plan = [(environment, base) for environment in stale if environment != JAX_NEXT]
    if JAX_NEXT in stale:
        newer = find_newer_python(base)
        if newer:
            plan.append((JAX_NEXT, newer))
        else:
            say(
                f"found no Python 3.12 or 3.13 newer than {base}: {JAX_NEXT.folder.name} is skipped"
            )
    if not plan:
        return []

    def attempt(step: tuple[Environment, Interpreter]) -> str | None:
        try:
            create(*step, key)
        except SetupFailed as failure:
            return str(failure)
        return None

    say(
        f"installing {', '.join(environment.folder.name for environment, _ in plan)}: this takes a"
        " minute or more"
    )
    with ThreadPoolExecutor(len(plan)) as pool:
        return [text for text in pool.map(attempt, plan) if text]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Create the project's virtual environments."
    )
    parser.add_argument(
        "--python",
        help="the environments' interpreter (default: a Python 3.11, else this one)",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="name",
        help=f"{', '.join(ENVIRONMENTS)} (default: all)",
    )
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"unknown environments: {', '.join(unknown)}")
    try:
        if sys.version_info < OLDEST:  # restart under the environments' interpreter
            path = choose_python(options.python).path
            os.execv(path, [path, *sys.argv])
        checkout = os.open(ROOT, os.O_RDONLY)
        fcntl.flock(checkout, fcntl.LOCK_EX)  # concurrent make targets run in turn
        failures = set_up(options.names or list(ENVIRONMENTS), options.python)
    except SetupFailed as failure:
        failures = [str(failure)]
    except KeyboardInterrupt:
        failures = ["interrupted; the next run creates the missing environments"]
    for text in failures:
        print(f"setup: {text}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
