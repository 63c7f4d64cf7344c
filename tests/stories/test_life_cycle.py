"""A worker under a supervisor: its end during a compilation, its time for draining, and its
messages to a service manager."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bridge_client import connect
from tests.calls import floats, prepare, squares
from tests.conftest import eventually
from tests.workers import Background, Gate, Worker, models, serving

_SLOW_MODELS = """
import hashlib, os
import jax, jax.numpy as jnp

def note():
    open(os.environ["BRIDGE_TEST_NOTE"], "w").close()

def compiled_slowly(x):
    note()
    for i in range(400):
        x = jnp.sin(x @ x) + jnp.linalg.svd(x + i)[0]
    return x

def native(x):
    note()
    hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 2_000_000_000)
    return x
"""


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts workers of slow models, which warm up when the call returns."""
    (tmp_path / "slow.py").write_text(_SLOW_MODELS)
    note = tmp_path / "note"
    with contextlib.ExitStack() as workers:

        def start(name: str) -> Worker:
            worker = workers.enter_context(
                Worker(
                    tmp_path,
                    f"--jax-model=slow:{name}",
                    "--warmup=float32[30,30]",
                    f"--listen=unix:{tmp_path}/w.sock",
                    env={
                        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
                        "BRIDGE_TEST_NOTE": str(note),
                    },
                )
            )
            assert eventually(note.exists, 60)
            return worker

        yield start


@pytest.mark.parametrize("name", ["compiled_slowly", "native"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_worker_that_compiles(
    starting: Callable[..., Worker], tmp_path: Path, name: str, number: int
) -> None:
    """A signal during a compilation, or during native code that Python cannot interrupt, ends the
    worker with status 0, without its sockets and without the compilation's end.
    """
    worker = starting(name)
    worker.process.send_signal(number)
    assert worker.wait() == 0
    assert not worker.is_ready
    assert "Traceback" not in worker.stderr
    assert not list(tmp_path.glob("*.sock*"))


def test_a_worker_that_loads_its_models_leaves_the_sockets_of_others(
    tmp_path: Path,
) -> None:
    """A signal during an import ends the worker, and takes no socket of the worker that listens at
    the same path."""
    (tmp_path / "slow.py").write_text(
        "import hashlib, os\n"
        "open(os.environ['BRIDGE_TEST_NOTE'], 'w').close()\n"
        "hashlib.pbkdf2_hmac('sha256', b'password', b'salt', 2_000_000_000)\n"
    )
    listen = f"--listen=unix:{tmp_path}/w.sock"
    with serving(tmp_path / "first", *models("square"), listen) as first:
        variables = {
            "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
            "BRIDGE_TEST_NOTE": str(tmp_path / "note"),
        }
        with Worker(tmp_path, "--jax-model=slow:x", listen, env=variables) as second:
            assert eventually((tmp_path / "note").exists, 60)
            second.terminate()
            assert second.wait() == 0
        with connect(first.address, lane="local") as session:
            assert squares(session, 3.0) == [9.0]


def test_the_time_for_draining_can_be_set(tmp_path: Path) -> None:
    """With --drain-s 0 running calls are given up at once, with status 1."""
    gate = Gate(tmp_path / "gate")
    with (
        serving(
            tmp_path,
            *models("gated"),
            f"--listen=unix:{tmp_path}/w.sock",
            env={"BRIDGE_DRAIN_S": "0"},
        ) as worker,
        connect(worker.address) as session,
    ):
        program = prepare(session, "gated", floats(1), str(gate))
        running = Background(lambda: session.run(program, [session.pool.lease(4)]))
        gate.wait_for_a_caller()
        worker.terminate()
        assert worker.wait() == 1
        assert "still running after 0 s" in worker.stderr
        with pytest.raises(ConnectionError):
            running.result()
