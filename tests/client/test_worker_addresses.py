"""Addresses of workers as users give them, the default endpoint, and why no worker answers."""

import os
import socket
from pathlib import Path

import pytest

from bridge_client import cli, connect
from bridge_client.remote.worker_addresses import resolved, unavailable
from bridge_wire.errors import CallerError, WorkerUnavailable
from tests.workers import models, serving


@pytest.mark.parametrize(
    "address",
    [
        "unix:/run/b.sock",
        "unix:b.sock",
        "localhost:50051",
        "[::1]:50051",
        "dns:///host:50051",
        "ipv4:10.0.0.1:1,10.0.0.2:1",
        "unix-abstract:name",
    ],
)
def test_forms_of_grpc_are_kept(address: str) -> None:
    """An address that gRPC takes is passed on as it is."""
    assert resolved(address) == address


def test_path_is_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of a socket needs no "unix:", and is relative to the working directory or the home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert resolved("/run/b.sock") == "unix:/run/b.sock"
    assert resolved("./b") == f"unix:{tmp_path}/b"
    assert resolved("b.sock") == f"unix:{tmp_path}/b.sock"
    assert resolved("~/b.sock") == "unix:/home/me/b.sock"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://localhost:5000/", "is a URL; .* such as 'localhost:5000'"),
        ("localhost:notaport", "a port from 1 to 65535"),
        ("localhost:0", "a port from 1 to 65535"),
        ("localhost", "expected 'unix:PATH' or 'HOST:PORT'"),
        ("unix:", "expected 'unix:PATH' or 'HOST:PORT'"),
        (50051, "expected 'unix:PATH' or 'HOST:PORT'"),
    ],
)
def test_other_addresses_are_refused(address: object, said: str) -> None:
    """A wrong address is refused before gRPC sees it, by connect too."""
    for call in (resolved, connect):
        with pytest.raises(CallerError, match=said):
            call(address)


# The default endpoint -----------------------------------------------------------------------------


def test_default_endpoint_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """connect() and commands without an address reach a worker without --listen."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    variables = {"XDG_RUNTIME_DIR": str(tmp_path)}
    with serving(tmp_path / "logs", *models("square"), env=variables) as worker:
        with connect() as session:
            assert list(session.models) == ["square"]
        assert cli.main(["health"]) == 0
        assert cli.main(["describe"]) == 0
        assert "square(x)" in capsys.readouterr().out
        worker.terminate()
        worker.wait()


@pytest.mark.parametrize("mode", [None, 0o777])
def test_missing_or_foreign_default_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int | None
) -> None:
    """A directory in which others could make a socket is passed over like a missing one."""
    for name in ("XDG_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("bridge_wire.addresses.tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(
        "bridge_client.remote.worker_addresses.socket_directories",
        lambda: [tmp_path / "ours"],
    )
    if mode is not None:
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours").chmod(mode)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(tmp_path / "ours" / "bridge.sock"))
    with pytest.raises(
        WorkerUnavailable, match="no address was given, and the default"
    ):
        connect()


# No answer ----------------------------------------------------------------------------------------


def test_reason_comes_before_the_words_of_grpc(tmp_path: Path) -> None:
    """The error names the address and the reason; gRPC's words are a note, and no cause."""
    with pytest.raises(WorkerUnavailable) as caught:
        connect(f"unix:{tmp_path}/none.sock", wait_s=0)
    assert str(caught.value).startswith(
        f"no worker answers at unix:{tmp_path}/none.sock: there is no such socket"
    )
    assert any("gRPC: " in note for note in caught.value.__notes__)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("details", "said"),
    [
        ("connect: Connection refused (111)", "nothing listens there"),
        ("Socket closed", "it has TLS and this client has none"),
        ("recvmsg:Connection reset by peer", "it has TLS and this client has none"),
        ("SSL_ERROR_SSL: CERTIFICATE_VERIFY_FAILED", "not of the given authority"),
        ("Ssl handshake failed", "the worker may have no TLS"),
        ("DNS resolution failed for x", "the host's name is unknown"),
        ("something new", "something new"),
    ],
)
def test_reasons_are_in_plain_words(details: str, said: str) -> None:
    """Each known detail has a sentence with a remedy; an unknown one is shown as it is."""
    assert said in str(unavailable("localhost:1", details))


def test_proxy_in_between_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a worker beyond this host the error names a proxy, unless it is excluded."""
    for name in [*os.environ]:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    refused = "Connection refused"
    assert "set no_proxy=far.example" in str(unavailable("far.example:1", refused))
    assert "proxy" not in str(unavailable("127.0.0.1:1", refused))
    assert "proxy" not in str(unavailable("unix:/b.sock", refused))
    monkeypatch.setenv("no_proxy", "other, .example")
    assert "proxy" not in str(unavailable("far.example:1", refused))


def test_command_speaks_of_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors on the command line name flags, not arguments of Python."""
    (tmp_path / "token").write_text("a token of sufficient length\n")
    args = ["--token-file", str(tmp_path / "token"), "--listen"]
    with serving(
        tmp_path, *models("square"), *args, f"unix:{tmp_path}/w.sock"
    ) as worker:
        assert cli.main(["describe", worker.address]) == 1
        assert "give --token-file" in capsys.readouterr().err
        assert cli.main(["describe", worker.address, "--token", "no"]) == 1
        assert "give another --token-file" in capsys.readouterr().err
