"""Every command that docs/operations.md shows is run here, in the page's order.

Those of docker and kubectl are not: `make test-containers` runs the former.
"""

import contextlib
import os
import re
import shlex
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bridge_wire.memory.cuda import gpus
from tests.conftest import ROOT, eventually
from tests.pages import save_programs
from tests.workers import environment

PAGE = ROOT / "docs" / "operations.md"
# What these print depends on the host: its status says that they worked.
HOSTS_OWN = ("bridge_client doctor", "bridge_client ps")


@dataclass
class Shown:
    """A command, and the lines that the page shows as its output."""

    command: str
    lines: list[str] = field(default_factory=list)


def shown() -> list[Shown]:
    found: list[Shown] = []
    for block in re.findall(r"^```\w*\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        if block.startswith("$ "):
            for line in block.splitlines():
                if line.startswith("$ "):
                    found.append(Shown(line.removeprefix("$ ")))
                else:
                    found[-1].lines.append(line)
    return found


class Terminal:
    """A shell in a folder of the README's model; workers stay in the background."""

    def __init__(self, folder: Path, sockets: Path) -> None:
        save_programs(ROOT / "README.md", folder)
        for name in (".venv-jax", ".venv-torch"):
            (folder / name).symlink_to(ROOT / name)
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        self._replaced = {"/run/bridge": str(sockets), "50051": port}
        self._workers: list[subprocess.Popen[bytes]] = []
        self._status = 0

    def run(self, command: str) -> tuple[int, str]:
        """Run a command until it ends, or as a worker is ready; return status and output."""
        for before, after in {**self._replaced, "$?": str(self._status)}.items():
            command = command.replace(before, after)
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}" if _is_worker(command) else command],
                cwd=self._folder,
                env=environment(PATH=f".venv-jax/bin:{os.environ['PATH']}"),
                stdout=output,
                stderr=output,
            )

            if _is_worker(command):
                self._workers.append(process)

            def printed() -> str:
                return os.pread(output.fileno(), 1 << 20, 0).decode()

            assert eventually(
                lambda: process.poll() is not None or " ready endpoint=" in printed(),
                120,
            ), (command, printed())
            self._status = process.returncode or 0
            return self._status, self._as_shown(printed())

    def _as_shown(self, printed: str) -> str:
        for before, after in self._replaced.items():
            printed = printed.replace(after, before)
        return printed

    def close(self) -> None:
        alive = [worker for worker in self._workers if worker.poll() is None]
        for worker in alive:
            worker.terminate()
        assert [worker.wait(60) for worker in alive] == [0] * len(alive)


def _is_worker(command: str) -> bool:
    return "bridge_server --jax-model" in command


def _kind(line: str) -> str:
    """Return a line with its numbers, hashes and spaces made equal."""
    line = re.sub(r"\b[0-9a-f]{64}\b", "HASH", line)
    return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)*(e-?\d+)?", "N", line)).strip()


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    with tempfile.TemporaryDirectory(prefix="bridge-") as directory:
        made = Terminal(tmp_path, Path(directory) / "run")
        with contextlib.closing(made):
            yield made


def test_commands_print_what_the_page_shows(terminal: Terminal) -> None:
    """Each command's output has the lines that the page shows, up to numbers and hosts."""
    commands = shown()
    assert len(commands) >= 17
    for each in commands:
        if "--device cuda" in each.command and gpus():
            continue
        status, output = terminal.run(each.command)
        program = " ".join(shlex.split(each.command)[:2]).rpartition("/")[2]
        is_refused = any(line.startswith("bridge_server: ") for line in each.lines)
        assert status == (2 if is_refused else 0), (each.command, output)
        if not program.startswith(HOSTS_OWN):
            lines = {_kind(line) for line in output.splitlines()}
            assert {_kind(line) for line in each.lines} <= lines, (each, output)
