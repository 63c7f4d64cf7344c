"""`bridge_server --reload`: models that are loaded again when their files change."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bridge_client import Session, connect, spawn
from bridge_client.commands import ps
from bridge_client.numpy import RemoteFunction
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import ModelChanged
from tests.conftest import eventually, python_of
from tests.workers import Worker, is_running

_X = np.ones(2, np.float32)


class Reloading:
    """A worker with --reload, whose model multiplies by the factor in an imported file."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.folder = folder
        self._written_ns = int(time.time()) * 10**9
        self.write(2)
        (folder / "scaling.py").write_text(
            "import factor_of_scaling\n\n\n"
            "def scaled(x):\n    return x * x * factor_of_scaling.FACTOR\n"
        )
        where = args or ("--listen", f"unix:{folder}/w.sock")
        target = f"{folder}/scaling.py:scaled"
        compiled = {"PYTHONDONTWRITEBYTECODE": ""}  # as for a user
        self.worker = Worker(folder, target, "--reload", *where, env=compiled)

    def write(self, factor: object) -> None:
        """Write the imported file, each time within the same second."""
        path = self.folder / "factor_of_scaling.py"
        path.write_text(f"FACTOR = {factor}\n")
        self._written_ns += 1
        os.utime(path, ns=(self._written_ns, self._written_ns))

    def says(self, text: str, count: int = 1) -> bool:
        return eventually(lambda: self.worker.stderr.count(text) >= count, 60)

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.worker.pid}/task/{self.worker.pid}/children")
        return [int(word) for word in path.read_text().split()]


@pytest.fixture
def reloading(tmp_path: Path) -> Iterator[Reloading]:
    made = Reloading(tmp_path)
    with made.worker:
        made.worker.wait_until_ready()
        yield made
        made.worker.terminate()
        assert made.worker.wait() == 0


def value(session: Session) -> float:
    (first, _) = RemoteFunction(session)(_X)
    return float(first)


@pytest.mark.parametrize("lane", ["local", "grpc"])
def test_changed_file_is_served_without_an_error(
    reloading: Reloading, lane: str
) -> None:
    """Calls go on during the reload, with one model's values or the other's; a backward whose
    forward was the old model's is refused.

    `retries`, since gRPC may take a call before it notices that its connection has ended.
    """
    with connect(reloading.worker.address, lane=lane, retries=1) as session:
        assert value(session) == 2
        x = torch.ones(2, requires_grad=True)
        y = RemoteJaxFunction(session)(x).sum()
        seen = [2.0]
        reloading.write(3)
        assert eventually(lambda: seen.append(value(session)) or seen[-1] == 3, 60)
        assert set(seen) == {2, 3} and sorted(seen) == seen
        with pytest.raises(ModelChanged):
            y.backward()
    assert len(reloading.children()) == 1
    assert reloading.says("the models were reloaded")


def test_file_with_an_error_leaves_the_old_model(reloading: Reloading) -> None:
    """The log has the error, the calls have the old values, and a mended file is served."""
    with connect(reloading.worker.address) as session:
        reloading.write("(")
        assert reloading.says("the previous models keep serving")
        assert "SyntaxError" in reloading.worker.stderr
        assert value(session) == 2
        reloading.write("1 / 0")
        assert reloading.says("the previous models keep serving", 2)
        assert value(session) == 2
        reloading.write(5)
        assert eventually(lambda: value(session) == 5, 60)


def test_spawned_worker_reloads_too(tmp_path: Path) -> None:
    """The session of `spawn` goes on with the new model, and its end is the supervisor's."""
    (tmp_path / "model.py").write_text("def f(x):\n    return x * 2\n")
    how = {"python": python_of(".venv-jax"), "cwd": tmp_path, "args": ["--reload"]}
    with spawn("model.py:f", **how) as session:
        folder = Path(session.address.removeprefix("unix:")).parent
        assert value(session) == 2
        (tmp_path / "model.py").write_text("def f(x):\n    return x * 3\n")
        assert eventually(lambda: value(session) == 3, 60)
        assert session.stats()["restarts"] == 0
    assert not folder.exists()


def test_port_is_kept(tmp_path: Path) -> None:
    """A successor listens on the port that the first worker was given, beside --port too."""
    for flag in ("--listen=127.0.0.1:0", "--port=0"):
        (tmp_path / flag).mkdir()
        made = Reloading(tmp_path / flag, flag)
        with made.worker:
            made.worker.wait_until_ready()
            with connect(made.worker.address, retries=1) as session:
                made.write(4)
                assert eventually(lambda: value(session) == 4, 60)
            made.worker.terminate()
            assert made.worker.wait() == 0


def test_nothing_is_left_of_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    """Its worker drains, and removes the sockets."""
    made = Reloading(tmp_path)
    with made.worker:
        made.worker.wait_until_ready()
        (child,) = made.children()
        made.worker.kill()
        assert eventually(lambda: not is_running(child), 60)
    assert not [*tmp_path.glob("w.sock*")]


def test_supervisor_ends_with_its_worker(tmp_path: Path) -> None:
    """A worker that was killed is not replaced: its end is an error of the command."""
    made = Reloading(tmp_path)
    with made.worker:
        made.worker.wait_until_ready()
        (child,) = made.children()
        os.kill(child, signal.SIGKILL)
        assert made.worker.wait() == 1


def test_first_start_that_fails_ends_the_command(tmp_path: Path) -> None:
    """As without --reload, a model that cannot be loaded is misuse."""
    with Worker(tmp_path, "tests/models.py:nothing", "--reload") as worker:
        assert worker.wait() == 2
        assert "has no attribute 'nothing'" in worker.stderr


def test_worker_that_is_stopped_while_it_loads_ends(tmp_path: Path) -> None:
    """SIGTERM ends the supervisor and a worker that is still importing."""
    (tmp_path / "slow.py").write_text(
        f"import time\nopen({str(tmp_path / 'mark')!r}, 'w')\ntime.sleep(600)\n"
    )
    with Worker(tmp_path, f"{tmp_path}/slow.py:f", "--reload") as worker:
        assert eventually((tmp_path / "mark").exists, 60)
        worker.terminate()
        assert worker.wait() == 0


def test_supervisor_is_no_worker_of_ps(reloading: Reloading) -> None:
    """`bridge_client ps` lists the worker, and not the process that replaces it."""
    pids = {each.pid for each in ps.workers()}
    assert pids & {reloading.worker.pid, *reloading.children()} == {
        *reloading.children()
    }
