"""`bridge_client doctor`, `bridge_server doctor` and `bridge_client health`: what they find and
cannot miss."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from bridge_client import Session
from bridge_client.cli import main
from bridge_client.commands import doctor
from bridge_client.remote.link import Terms
from bridge_server.cli import main as bridge_server
from bridge_wire.doctor import exchange, host, namespaces
from bridge_wire.doctor.checks import (
    BROKEN,
    OK,
    SLOW,
    Check,
    as_json,
    as_table,
    broken,
    ok,
    slow,
    worst,
)
from bridge_wire.errors import WorldError
from tests.conftest import ROOT, python_of
from tests.workers import environment

# A child that sends back what it was sent.
_ECHO = (
    "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.sendall(s.recv(99));"
    " s.recv(1)"
)


def _found(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, Check]]:
    """Return the exit status of a doctor's run, and its checks by name."""
    status = main(["doctor", "--json", *argv])
    told = json.loads(capsys.readouterr().out)
    checks = [Check(**check) for check in told["checks"]]
    assert told["verdict"] == worst(checks)
    return status, {check.name: check for check in checks}


def _program(path: Path, lines: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return path


# A healthy host and worker ------------------------------------------------------------------------


def test_doctor_finds_a_worker_well(
    jax_worker: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a worker at hand it tells health, versions, models, and that its memory is the
    client's."""
    status, checks = _found([jax_worker.address], capsys)
    assert status == 0
    assert not [check for check in checks.values() if check.verdict == BROKEN]
    assert checks["health"].found == "SERVING"
    assert ", jax " in checks["worker"].found and "Python 3." in checks["worker"].found
    assert set(jax_worker.models) == set(checks["its models"].found.split(", "))
    assert checks["its devices"].found.startswith("cpu:0; 64-bit types are off")
    assert checks["its allocator"].verdict == OK
    assert (
        checks["its namespaces"].found == "on this system, in common: pid ipc mnt net"
    )
    assert checks["path"].found == "lane local, memory memfd"
    assert checks["shared memory"] == ok(
        "shared memory", "the worker sees 256 random bytes as they were written"
    )
    assert checks["local lane"].found.endswith(" ms") and checks[
        "gRPC ping"
    ].found.endswith(" ms")


def test_doctor_tells_why_a_worker_at_hand_is_slow(
    jax_worker: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the worker's lane cannot be reached on one system, the path is slow, with the reason
    and the remedy."""
    (tmp_path / "bridge.sock").symlink_to(jax_worker.address.removeprefix("unix:"))
    status, checks = _found([f"unix:{tmp_path}/bridge.sock"], capsys)
    assert status == 0
    path = checks["path"]
    assert path.verdict == SLOW
    assert path.found.startswith(
        "lane grpc, memory inline: its local lane is unreachable"
    )
    assert "unix:PATH" in path.remedy
    assert "shared memory" not in checks and "grpc lane" in checks


def test_doctor_of_a_client_needs_no_worker(capsys: pytest.CaptureFixture[str]) -> None:
    """Without an address it looks at this host and environment, by live exchanges."""
    status, checks = _found([], capsys)
    assert status == 0
    assert (
        checks["memfd and seals"].verdict == checks["descriptor passing"].verdict == OK
    )
    assert (
        "grpcio 1." in checks["packages"].found
        and "protobuf " in checks["packages"].found
    )
    assert (
        "jax 0." in checks["frameworks"].found
        and "torch 2." in checks["frameworks"].found
    )
    assert "worker" not in checks


@pytest.mark.parametrize(
    ("venv", "framework"), [(".venv-jax", "jax 0."), (".venv-torch", "torch 2.")]
)
def test_doctor_of_a_worker_tells_what_one_would_run_with(
    venv: str, framework: str
) -> None:
    """`bridge_server doctor` ends with 0 in an environment that can serve models, and loads no
    framework for it."""
    done = subprocess.run(
        [python_of(venv), "-X", "importtime", "-m", "bridge_server", "doctor"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = {line[8:].split("  ")[0]: line for line in done.stdout.splitlines()}
    assert framework in lines["frameworks"]
    assert lines["models"].startswith("ok ") and lines["endpoint"].startswith("ok ")
    assert (
        lines["allocator"].endswith("glibc with huge pages")
        or "glibc" not in lines["system"]
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "bridge_wire.doctor.host" in loaded and not loaded & {
        "jax",
        "jaxlib",
        "torch",
        "cupy",
    }


def test_doctor_of_a_worker_with_an_unknown_option_is_misuse(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What `bridge_server doctor` does not know ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        bridge_server(["doctor", "--listen", "unix:/x"])
    assert ended.value.code == 2
    assert "--listen" in capsys.readouterr().err


# What is amiss ------------------------------------------------------------------------------------


def test_doctor_tells_that_no_worker_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An address where nobody listens is broken, with what to do, and the status is 1."""
    status, checks = _found([f"unix:{tmp_path}/none.sock"], capsys)
    assert status == 1
    assert checks["worker"].verdict == BROKEN
    assert checks["worker"].found.startswith("no worker answers")
    assert "bridge_server ready" in checks["worker"].remedy


def test_doctor_without_a_framework_finds_a_worker_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An environment with neither jax nor torch can serve nothing, and the system's allocator is
    slow."""
    monkeypatch.setenv("BRIDGE_ALLOCATOR", "system")
    monkeypatch.setattr(host, "installed", lambda package: None)
    assert bridge_server(["doctor", "--json"]) == 1
    checks = {
        check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]
    }
    assert (
        checks["models"]["verdict"] == BROKEN and "[jax]" in checks["models"]["remedy"]
    )
    assert checks["allocator"]["verdict"] == SLOW
    assert checks["frameworks"]["found"] == "none"


def test_a_kernel_that_breaks_seals_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a sealed memfd can be shrunk, the check is broken."""
    monkeypatch.setattr(os, "ftruncate", lambda fd, size: None)
    assert host.memfd().verdict == BROKEN


def test_a_system_without_memfd_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no memfd, or it is forbidden, tensors travel by value, and the check says
    so."""

    def forbidden(name: str, flags: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    assert "Operation not permitted" in host.memfd().found
    monkeypatch.delattr(os, "memfd_create")
    assert host.memfd().verdict == SLOW and "by value" in host.memfd().found


@pytest.mark.parametrize(
    ("child", "said"),
    [
        ("exit 3", "did not receive"),
        (f'exec {sys.executable} -c "{_ECHO}" $3', "see different bytes"),
    ],
    ids=["a child that dies", "a child that only answers"],
)
def test_an_exchange_that_fails_is_found(
    child: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A child that gets no memory, or sees other memory, is a WorldError that says which, and
    the check is slow."""
    monkeypatch.setattr("sys.executable", str(_program(tmp_path / "python", child)))
    with pytest.raises(WorldError, match=said):
        exchange.with_child()
    assert host.descriptor_passing().verdict == SLOW


def test_memory_that_differs_is_broken() -> None:
    """A worker that sees other bytes than were written is broken, whatever else works."""
    assert doctor._seen_alike(b"ab", b"ab").verdict == OK
    assert doctor._seen_alike(b"ab", b"ba").verdict == BROKEN


def test_huge_pages_that_are_off_are_slow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With transparent huge pages off the remedy names the setting; a system without them tells
    nothing."""
    monkeypatch.setattr(host, "_HUGE_PAGES", tmp_path)
    assert host.huge_pages() == ok("huge pages", "unknown; for shared memory unknown")
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert (
        host.huge_pages().verdict == SLOW and "echo madvise" in host.huge_pages().remedy
    )
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert host.huge_pages().verdict == OK


@pytest.mark.parametrize(
    ("usable", "quota", "verdict"),
    [(2, None, OK), (1, None, SLOW), (8, 2.0, OK), (8, 0.5, SLOW), (8, 1.0, SLOW)],
)
def test_one_core_is_slow(usable: int, quota: float | None, verdict: str) -> None:
    """A process that may use one core only, by affinity or by quota, is told that calls cost
    wake-ups."""
    assert host.cores("cores", usable, quota).verdict == verdict


# Namespaces ---------------------------------------------------------------------------------------


def test_namespaces_tell_only_whether_they_are_shared() -> None:
    """A digest is neither a namespace's name nor a function of it alone, and every process of a
    namespace has it."""
    ours = namespaces.digests()
    assert set(ours) == {"host", "pid", "ipc", "mnt", "net"}
    assert len(set(ours.values())) == 5 and {
        len(digest) for digest in ours.values()
    } == {32}
    program = (
        "from bridge_wire.doctor import namespaces; print({k: d.hex() for k, d in"
        " namespaces.digests().items()})"
    )
    told = subprocess.run(
        [python_of(".venv-both"), "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told.stdout.strip() == str(
        {kind: digest.hex() for kind, digest in ours.items()}
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda theirs: None, "on this system, in common: pid ipc mnt net"),
        (
            lambda theirs: theirs.update(pid=b"", ipc=b""),
            "on this system, in common: mnt net; its own: pid ipc",
        ),
        (lambda theirs: theirs.update(host=b""), "on another system"),
        (lambda theirs: theirs.clear(), "unknown"),
    ],
    ids=["all", "some", "another system", "an older worker"],
)
def test_namespaces_are_compared(
    change: Callable[[dict[str, bytes]], None], said: str
) -> None:
    """Which namespaces a worker has in common with the client is told, as far as both tell."""
    theirs = namespaces.digests()
    change(theirs)
    assert doctor._compared(namespaces.digests(), theirs) == said


# What is printed ----------------------------------------------------------------------------------


def test_table_shows_verdicts_and_remedies() -> None:
    """A line for each check, its remedy below, and the sums."""
    checks = [
        ok("a", "well"),
        slow("bcd", "so so", "hurry"),
        broken("e", "out", "mend it"),
    ]
    assert as_table(checks).splitlines() == [
        "ok      a    well",
        "slow    bcd  so so",
        "             -> hurry",
        "broken  e    out",
        "             -> mend it",
        "",
        "1 ok, 1 slow, 1 broken",
    ]


def test_gravest_verdict_counts() -> None:
    """A run is as bad as its worst check; of no checks all is well."""
    checks = [slow("a", "", ""), broken("b", "", ""), ok("c", "")]
    assert [worst(checks[:0]), worst(checks[2:]), worst(checks[:1]), worst(checks)] == [
        OK,
        OK,
        SLOW,
        BROKEN,
    ]
    assert json.loads(as_json(checks))["verdict"] == BROKEN


def test_doctor_s_table_is_the_default(
    jax_worker: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --json the checks come as a table."""
    assert main(["doctor", jax_worker.address]) == 0
    assert "\nok      shared memory " in capsys.readouterr().out


def test_grpc_lane_can_be_examined(jax_worker: Session) -> None:
    """A lane that was asked for is no fall-back."""
    checks = {
        check.name: check
        for check in doctor.examine(jax_worker.address, Terms(lane="grpc"))
    }
    assert checks["path"] == ok("path", "lane grpc, memory inline")


# Health -------------------------------------------------------------------------------------------


def test_health_of_a_worker_that_serves(
    jax_worker: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bridge_client health` prints SERVING and ends with 0."""
    assert main(["health", jax_worker.address]) == 0
    assert capsys.readouterr().out == "SERVING\n"


def test_health_of_nobody_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bridge_client health` of an address without a worker ends with 1; of what is no address,
    with 2."""
    assert main(["health", f"unix:{tmp_path}/none.sock"]) == 1
    assert capsys.readouterr().err.startswith("bridge_client: no worker answers")
    with pytest.raises(SystemExit) as ended:
        main(["health", "nowhere"])
    assert ended.value.code == 2


def test_worker_that_drains_is_not_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NOT_SERVING ends `health` with 1, and is broken for `doctor`, which says that it warms up
    or drains."""
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    address = f"unix:{tmp_path}/drains.sock"
    server.add_insecure_port(address)
    server.start()
    try:
        assert main(["health", address]) == 1
        assert capsys.readouterr().out == "NOT_SERVING\n"
        status, checks = _found([address], capsys)
        assert status == 1
        assert checks["health"].verdict == BROKEN and "warm" in checks["health"].remedy
    finally:
        server.stop(None).wait()
