"""Workers as processes that a test starts, signals and looks into: what the shared workers must
not be put through."""

import contextlib
import os
import shlex
import signal
import subprocess
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.conftest import ROOT, eventually, python_of

_READY = "bridge_server ready "


def environment(**variables: str) -> dict[str, str]:
    """Return this process's variables without any BRIDGE_*, and with the given ones."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("BRIDGE_")
    } | variables


class Worker:
    """`bridge_server` in an environment, whose output goes to files in `directory`.

    Also a context manager.
    """

    def __init__(
        self,
        directory: Path,
        *args: str,
        venv: str = ".venv-jax",
        env: Mapping[str, str] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._files = directory / "stdout", directory / "stderr"
        with self._files[0].open("w") as stdout, self._files[1].open("w") as stderr:
            self.process = subprocess.Popen(
                [python_of(venv), "-m", "bridge_server", *args],
                cwd=ROOT,
                env=environment(**(env or {})),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        return self._files[0].read_text()

    @property
    def stderr(self) -> str:
        return self._files[1].read_text()

    @property
    def is_ready(self) -> bool:
        return _READY in self.stdout

    @property
    def ready_line(self) -> dict[str, str]:
        """The fields of the ready line, by name."""
        line = next(
            line for line in self.stdout.splitlines() if line.startswith(_READY)
        )
        return dict(
            word.split("=", 1) for word in shlex.split(line.removeprefix(_READY))
        )

    @property
    def address(self) -> str:
        return self.ready_line["endpoint"]

    def wait_until_ready(self) -> "Worker":
        assert eventually(
            lambda: self.is_ready or self.process.poll() is not None, 60
        ), "the worker is not ready"
        assert self.process.poll() is None, (
            f"the worker ended with {self.process.returncode}:\n{self.stderr}"
        )
        return self

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it without a word."""
        self.process.kill()
        self.process.wait(10)

    def wait(self) -> int:
        """Return the exit status."""
        return self.process.wait(40)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextlib.contextmanager
def serving(
    directory: Path,
    *args: str,
    venv: str = ".venv-jax",
    env: Mapping[str, str] | None = None,
) -> Iterator[Worker]:
    """A worker that is ready for calls."""
    with Worker(directory, *args, venv=venv, env=env) as worker:
        yield worker.wait_until_ready()


def models(*names: str) -> list[str]:
    """Return the arguments that host models of tests/models.py."""
    return [f"--jax-model=tests.models:{name}" for name in names]


def is_running(pid: int) -> bool:
    """Whether a process computes still: a zombie does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def children() -> set[int]:
    """Return the ids of this process's children."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        # The thread has ended.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.update(map(int, (task / "children").read_text().split()))
    return found


def slabs_mapped(pid: int) -> int:
    """Return how many of the mappings of a process are slabs."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:bridge-slab")


def held_by(pid: int) -> dict[str, int]:
    """Return the counts of a process's resources."""
    return {
        "slabs": slabs_mapped(pid),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }


class Background(threading.Thread):
    """A call in another thread, whose outcome can be asked for."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._value: object = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error

    def result(self) -> object:
        """Return the call's result, or raise its exception."""
        self.join(30)
        assert not self.is_alive(), "the call has not come back"
        if self._error is None:
            return self._value
        # The traceback references the call's objects.
        error, self._error = self._error, None
        try:
            raise error
        finally:
            del error


class Gate:
    """The gate of the model `gated`; `str(gate)` is its argument."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    @property
    def has_a_caller(self) -> bool:
        return Path(f"{self._path}.waiting").exists()

    def wait_for_a_caller(self) -> None:
        assert eventually(lambda: self.has_a_caller, 30), "no call has reached the gate"

    def open(self) -> None:
        self._path.touch()

    def shut(self) -> None:
        """Shut it, with nobody waiting."""
        for path in (self._path, Path(f"{self._path}.waiting")):
            path.unlink(missing_ok=True)


def run_program(
    source: str, *args: str, venv: str = ".venv-both", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python program to its end, and return its output."""
    with start_program(source, *args, venv=venv, **variables) as program:
        stdout, stderr = program.communicate(timeout=60)
    return subprocess.CompletedProcess(program.args, program.returncode, stdout, stderr)


@contextlib.contextmanager
def start_program(
    source: str, *args: str, venv: str = ".venv-both", **variables: str
) -> Iterator[subprocess.Popen[str]]:
    """A Python program under way, which ends with the block at the latest."""
    program = subprocess.Popen(
        [python_of(venv), "-c", textwrap.dedent(source), *args],
        cwd=ROOT,
        env=environment(**variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with program:
        try:
            yield program
        finally:
            program.kill()
