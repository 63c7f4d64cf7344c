"""A worker under a supervisor: its end during a compilation, its time for draining, and its
messages to a service manager."""

import configparser
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bridge_client import connect
from bridge_client.torch import RemoteJaxFunction
from bridge_server import cli
from bridge_server.process import options
from bridge_server.process.service_manager import ServiceManager
from tests.calls import floats, prepare, squares
from tests.conftest import ROOT, eventually
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


_MANY_ARRAYS = """
import atexit, pathlib
import jax

atexit.register((pathlib.Path(__file__).parent / "left").touch)

def scaled(tree):
    return jax.tree.map(lambda x: 2 * x, tree)
"""


def test_a_worker_ends_while_it_frees_the_arrays_of_a_session(tmp_path: Path) -> None:
    """With status 0 and after its models' exit handlers: the interpreter's end must not meet a
    thread inside the framework."""
    (tmp_path / "many_arrays.py").write_text(_MANY_ARRAYS)
    flags = ["--jax-model=many_arrays:scaled", f"--listen=unix:{tmp_path}/w.sock"]
    with serving(tmp_path, *flags, env={"PYTHONPATH": str(tmp_path)}) as worker:
        session = connect(worker.address)
        f = RemoteJaxFunction(session)
        tree = [torch.ones(16, requires_grad=True) for _ in range(500)]
        kept = [f(tree) for _ in range(20)]
        session.close()
        worker.terminate()
        assert worker.wait() == 0, worker.stderr
        assert kept and (tmp_path / "left").exists()


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


# A service manager --------------------------------------------------------------------------------


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    """The socket of a service manager, which waits for messages."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        is_path = request.param == "path"
        listening.bind(f"{tmp_path}/notify" if is_path else f"\0bridge-{os.getpid()}")
        listening.settimeout(60)
        yield listening


def variable_for(manager: socket.socket) -> str:
    """Return NOTIFY_SOCKET as systemd sets it."""
    name = manager.getsockname()
    return f"@{name[1:].decode()}" if isinstance(name, bytes) else str(name)


def test_a_service_manager_hears_of_the_worker(
    manager: socket.socket, tmp_path: Path
) -> None:
    """The worker reports that it is ready once it is warm, that it lives as often as the watchdog
    expects, and that it stops; programs that a model starts report nothing.
    """
    (tmp_path / "noting.py").write_text(
        "import os\nNAMES = {'NOTIFY_SOCKET', 'WATCHDOG_USEC'} & set(os.environ)\n"
        "assert not NAMES, NAMES\n"
        "def model(x):\n    return x\n"
    )
    with Worker(
        tmp_path / "out",
        "--jax-model=noting:model",
        f"--listen=unix:{tmp_path}/w.sock",
        "--warmup=float32[2]",
        env={
            "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
            "NOTIFY_SOCKET": variable_for(manager),
            "WATCHDOG_USEC": "200000",
        },
    ) as worker:
        ready = manager.recv(4096).decode()
        assert ready == f"READY=1\nSTATUS=serving at unix:{tmp_path}/w.sock"
        assert worker.is_ready
        assert [manager.recv(4096) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        worker.terminate()
        messages = iter(lambda: manager.recv(4096), None)
        assert any(message.startswith(b"STOPPING=1") for message in messages)
        assert worker.wait() == 0


@pytest.mark.parametrize(
    "variables",
    [
        {"WATCHDOG_USEC": "200000", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "0"},
        {},
    ],
    ids=["of another process", "malformed", "zero", "none"],
)
def test_no_watchdog_expects_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """Without a period for this process, no thread reports that it lives."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"{tmp_path}/notify")
        monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        service = ServiceManager()
        service.note_ready("unix:/w.sock")
        assert listening.recv(4096).startswith(b"READY=1")
        service.note_stopping()
        assert listening.recv(4096).startswith(b"STOPPING=1")


def test_a_service_manager_that_is_gone_does_no_harm(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A socket at which no manager listens is a warning."""
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/none")
    ServiceManager().note_ready("unix:/w.sock")
    assert "cannot notify the service manager" in caplog.text


# The unit -----------------------------------------------------------------------------------------

UNIT = ROOT / "deploy" / "bridge-server.service"


@pytest.fixture
def service() -> configparser.SectionProxy:
    """The section [Service] of the unit."""
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(UNIT)
    return unit["Service"]


def test_the_unit_runs_a_command_with_options_that_exist(
    service: configparser.SectionProxy,
) -> None:
    """The worker of the unit listens in the service's own directory, which others cannot enter."""
    program, *args = service["ExecStart"].split()
    assert Path(program).name == "bridge_server"
    parsed = options.parse(args)
    assert parsed.listen == f"unix:/run/{service['RuntimeDirectory']}/bridge.sock"
    assert service["RuntimeDirectoryMode"] == "0700"
    assert service["User"] not in ("", "root")


def test_the_unit_agrees_with_the_worker(service: configparser.SectionProxy) -> None:
    """The manager waits longer than the worker drains, does not restart after misuse, and knows
    the messages that the worker sends."""
    drain_s = options.parse([]).drain_s
    assert int(service["TimeoutStopSec"]) >= drain_s + cli._LAST_S
    assert service["RestartPreventExitStatus"] == str(cli.USAGE)
    assert (service["Type"], service["Restart"]) == ("notify", "on-failure")
    assert "-HUP" in service["ExecReload"]
    assert int(service["WatchdogSec"]) > 0


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` finds no fault in the unit, with a program that exists."""
    text = re.sub(
        r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.M
    )
    (tmp_path / UNIT.name).write_text(text)
    verified = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / UNIT.name],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (verified.returncode, verified.stderr) == (0, "")
