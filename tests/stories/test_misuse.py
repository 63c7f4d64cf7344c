"""Misuse of the commands, and requests that a worker cannot serve: one sentence, the right status,
and no traceback."""

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from bridge_client import connect
from bridge_client.cli import main
from bridge_server.process import options
from tests.calls import squares
from tests.workers import Worker, models, run_program, serving

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become another user"
)
# The imports come first: another user may be unable to read the environment.
_AS_NOBODY = """
    import os, sys
    from bridge_server import cli
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    sys.exit(cli.main(sys.argv[1:]))
"""


def _refused_as_nobody(listen: Path) -> str:
    """Return the error of a worker of the user 65534 that is to listen there."""
    done = run_program(
        _AS_NOBODY, *models("square"), f"--listen=unix:{listen}", venv=".venv-jax"
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    return done.stderr


# Where a worker may listen ------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory that every user can reach, with a dead worker's sockets."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.geteuid() and len(parent.parts) > 2:
            parent.chmod(parent.stat().st_mode | 0o055)
    place = tmp_path / "place"
    place.mkdir(mode=0o755)
    for name in ("w.sock", "w.sock.lane"):
        with socket.socket(socket.AF_UNIX) as left_behind:
            left_behind.bind(str(place / name))
    yield place


@needs_root
@pytest.mark.parametrize("name", ["w.sock", "new.sock"])
def test_a_directory_of_another_user_is_refused(directory: Path, name: str) -> None:
    """A worker that cannot write to the socket's directory says so, whether sockets are there or
    not."""
    said = _refused_as_nobody(directory / name)
    assert f"{directory} is not writable by the user 65534" in said


@needs_root
def test_a_directory_that_is_closed_to_this_user_is_refused(directory: Path) -> None:
    """A directory that the worker's user cannot look into is told from a missing one."""
    directory.chmod(0o700)
    assert "not writable by the user" in _refused_as_nobody(directory / "w.sock")
    (directory / "below").mkdir()
    assert "cannot enter" in _refused_as_nobody(directory / "below" / "w.sock")


@needs_root
def test_a_read_only_volume_is_refused(directory: Path) -> None:
    """On a read-only volume the sockets of a dead worker can be neither removed nor replaced."""
    mounted = subprocess.run(
        ["mount", "--bind", "-o", "ro", directory, directory], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this system lets nobody mount")
    try:
        said = _refused_as_nobody(directory / "w.sock")
    finally:
        subprocess.run(["umount", directory], check=True)
    assert "is on a read-only file system" in said


def test_a_file_in_place_of_the_runtime_directory_is_refused() -> None:
    """A file, or a link to nowhere, that has the name of the directory for sockets is named."""
    # In a directory with a short path: a longer one has no room for sockets.
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    name = directory / f"torch-jax-bridge-{os.geteuid()}"
    for make in (name.touch, lambda: name.symlink_to("nowhere")):
        make()
        done = run_program(
            "import sys; from bridge_server import cli; sys.exit(cli.main(sys.argv[1:]))",
            *models("square"),
            venv=".venv-jax",
            XDG_RUNTIME_DIR=str(directory),
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"bridge_server: {name} is not a directory")
        name.unlink()
    directory.rmdir()


# What is compiled first ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warm_up", "said"),
    [
        ("float32[2,3],float32[2,3]", "fails: TypeError: dot_general"),
        ("float32[2,3]", "--warmup 'float32[2,3]' fails: "),
        ("float32[99999999999999999999]", "a size beyond the address space"),
        ("sqare=float32[2]", "no model is named 'sqare'"),
    ],
)
def test_a_warm_up_that_the_model_does_not_take_is_misuse(
    tmp_path: Path, warm_up: str, said: str
) -> None:
    """Arguments that the model refuses are told in one line, with status 2: no traceback, and
    none that is called remote."""
    done = subprocess_of_worker(tmp_path, *models("matmul"), "--warmup", warm_up)
    assert done.wait() == 2
    (last,) = [x for x in done.stderr.splitlines() if x.startswith("bridge_server: ")]
    assert said in last
    assert "raceback" not in done.stderr
    assert not done.is_ready


def subprocess_of_worker(directory: Path, *args: str) -> Worker:
    return Worker(directory, *args, f"--listen=unix:{directory}/w.sock")


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["-1", "0", "nan", "inf", "-inf", "1e9", "x", ""])
def test_a_time_limit_is_a_positive_number(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bridge_client health --timeout` takes seconds that a clock can count."""
    with pytest.raises(SystemExit) as ended:
        main(["health", "unix:/nowhere", f"--timeout={number}"])
    assert ended.value.code == 2
    assert "is not a time" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["nan", "inf", "1e999", "x"])
def test_a_range_has_finite_ends(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bridge_client check-gradients --range` takes numbers that arguments can be drawn from."""
    with pytest.raises(SystemExit) as ended:
        main(["check-gradients", "unix:/nowhere", "--range", "0", number])
    assert ended.value.code == 2
    assert "is not a finite number" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--residual-bytes", "--session-slab-bytes"])
def test_a_size_fits_in_the_address_space(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A size that no reply could carry is refused at the start."""
    with pytest.raises(SystemExit) as ended:
        options.parse([flag, "9999999T"])
    assert ended.value.code == 2
    assert "exceeds the address space" in capsys.readouterr().err


@pytest.mark.parametrize(
    "address", [":0", "unix:", "localhost:99999", "a:b", "h:0", "unix:/\udce9", "x"]
)
def test_an_address_that_nobody_can_have_is_misuse(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bridge_client` refuses an address by its form before it calls anybody."""
    with pytest.raises(SystemExit) as ended:
        main(["describe", address])
    assert ended.value.code == 2
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--token-file", "--tls-cert", "--tls-client-ca"])
def test_a_guard_without_a_file_is_refused(tmp_path: Path, flag: str) -> None:
    """An empty name, as of an unset variable of a shell, does not leave the worker open."""
    with subprocess_of_worker(tmp_path, *models("square"), flag, "") as worker:
        assert worker.wait() == 2
        assert f"{flag} or its variable is empty" in worker.stderr


# Requests that no method serves -------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    directory = tmp_path_factory.mktemp("misused")
    with serving(
        directory, *models("square"), f"--listen=unix:{directory}/w.sock"
    ) as worker:
        yield worker


_SERVICES = {
    "health": ["Check", "Watch", "List", "Nothing"],
    "bridge": ["Describe", "Open", "Prepare", "Lane", "Close", "Nothing"],
    "reflection": ["ServerReflectionInfo", "Nothing"],
}
_NAMES = {
    "health": "grpc.health.v1.Health",
    "bridge": "bridge.v1.Bridge",
    "reflection": "grpc.reflection.v1alpha.ServerReflection",
}


@pytest.mark.parametrize("service", _SERVICES)
@pytest.mark.parametrize("data", [b"", b"\xff\xff", b"\x0a\x05ab"])
def test_no_request_writes_a_traceback_to_the_log(
    worker: Worker, service: str, data: bytes
) -> None:
    """A request that cannot be decoded, or that no method serves, has an answer, and the log of
    the worker no traceback of it."""
    with grpc.insecure_channel(worker.address) as channel:
        for method in [*_SERVICES[service], ""]:
            call: Any = channel.stream_stream(f"/{_NAMES[service]}/{method}")
            replies = call(iter([data]), timeout=1 if method == "Watch" else 20)
            try:
                for _ in replies:
                    pass
            except grpc.RpcError as error:
                assert error.code() is not grpc.StatusCode.UNKNOWN
    with connect(worker.address) as session:
        assert squares(session, 3.0) == [9.0]
    for line in worker.stderr.splitlines():
        assert "Traceback" not in json.loads(line)["message"]


def test_a_method_that_is_only_declared_is_unimplemented(worker: Worker) -> None:
    """`grpc.health.v1.Health/List` has a status of its own, and does not raise in the worker."""
    with grpc.insecure_channel(worker.address) as channel:
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary("/grpc.health.v1.Health/List")(b"", timeout=20)
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "NotImplementedError" not in worker.stderr
