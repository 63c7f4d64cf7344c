"""Admission of clients: named tokens and their rights, certificates, the audit log, and the ways a
client presents them."""

import contextlib
import hashlib
import hmac
import json
import os
import random
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from bridge_client import Tls, connect
from bridge_client.cli import main
from bridge_client.remote.grpc_lane import GrpcLane, from_rpc
from bridge_server.process import tokens
from bridge_server.process.tokens import Grant, Tokens
from bridge_server.serving.local_lanes import LocalLanes
from bridge_server.serving.sessions import Sessions
from bridge_wire.errors import (
    CallerError,
    OutOfMemory,
    RemoteModelError,
    Unauthenticated,
    UnknownModel,
    WorkerUnavailable,
    decode,
)
from bridge_wire.lane.framed_socket import FramedSocket
from bridge_wire.memory.slabs import PAGE, create_slab
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.pb.bridge_pb2_grpc import BridgeStub
from tests.calls import floats, prepare, squares
from tests.conftest import eventually
from tests.workers import Worker, models, serving

ALICE, BOB, CAROL = "token-of-alice", "token-of-bob", "token-of-carol"


def line_of(name: str, token: str, *rights: str) -> str:
    return " ".join(
        [name, f"sha256:{hashlib.sha256(token.encode()).hexdigest()}", *rights]
    )


LINES = [
    "# comments and empty lines are allowed",
    "",
    line_of("alice", ALICE, "models=square,missing"),
    line_of("bob", BOB, "expires=2020-01-01"),
    line_of("carol", CAROL, "expires=2999-12-31T00:00Z"),
]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker of two models for three clients, of which one sees one model."""
    directory = tmp_path_factory.mktemp("admitting")
    (directory / "tokens").write_text("\n".join(LINES))
    with serving(
        directory,
        *models("square", "total"),
        f"--listen=unix:{directory}/w.sock",
        f"--token-file={directory}/tokens",
        "--log-level=debug",
        "--no-reflection",
    ) as worker:
        yield worker


def audited(worker: Worker) -> list[str]:
    """Return the lines of the audit log."""
    # gRPC's core writes lines about failed handshakes, which are no JSON.
    lines = [json.loads(x) for x in worker.stderr.splitlines() if x.startswith("{")]
    return [x["message"] for x in lines if x["logger"] == "bridge_server.audit"]


def authorized(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


# Tokens and their rights --------------------------------------------------------------------------


@pytest.mark.parametrize("lane", ["local", "grpc"])
def test_a_named_token_admits_its_client(worker: Worker, lane: str) -> None:
    """A client with a token of the file is served; the file has the token's hash only."""
    with connect(worker.address, token=CAROL, lane=lane) as session:
        assert set(session.models) == {"square", "total"}
        assert squares(session, 3.0) == [9.0]


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "carries no token"),
        ("", "carries no token"),
        ("mallory", "unknown to the worker"),
        (hashlib.sha256(CAROL.encode()).hexdigest(), "unknown to the worker"),
        (BOB, "'bob' has expired"),
    ],
    ids=["none", "empty", "wrong", "its hash", "expired"],
)
def test_a_token_that_does_not_admit_is_refused(
    worker: Worker, token: str | None, said: str
) -> None:
    """A missing, wrong or expired token is Unauthenticated, and so is a hash out of the file."""
    with pytest.raises(Unauthenticated, match=said):
        connect(worker.address, token=token)


def test_a_token_admits_to_its_models_only(worker: Worker) -> None:
    """For a token with models=, another model does not exist: it is neither listed nor named."""
    with connect(worker.address, token=ALICE) as session:
        assert set(session.models) == {"square"}
        assert squares(session, 3.0) == [9.0]
        for name in ("total", "missing", "nobody"):
            with pytest.raises(UnknownModel) as raised:
                prepare(session, name, floats(1))
            assert "['square'] for the token 'alice'" in str(raised.value)


@pytest.mark.parametrize("kind", ["call", "parameters", "shapes", "recipe"])
def test_no_kind_of_request_reaches_another_model(worker: Worker, kind: str) -> None:
    """The rights hold for every request that names a model, also within the recipe of a returned
    instance."""
    call = pb.Call(model="total")
    hidden = pb.Call(model="square", recipes=[pb.Recipe(call=call.SerializeToString())])
    request = {
        "call": pb.PrepareRequest(call=call),
        "parameters": pb.PrepareRequest(parameters=pb.Parameters(model="total")),
        "shapes": pb.PrepareRequest(shapes=pb.Shapes(call=call)),
        "recipe": pb.PrepareRequest(call=hidden),
    }[kind]
    with opened(worker, ALICE) as (stub, session):
        request.session = session
        (event,) = stub.Prepare(request, metadata=authorized(ALICE), timeout=20)
    error = decode(event.error)
    assert type(error) is UnknownModel and "'alice'" in str(error)


@contextlib.contextmanager
def opened(worker: Worker, token: str) -> Iterator[tuple[BridgeStub, bytes]]:
    """Yield a stub of the bare protocol, and a session that a token has opened."""
    with grpc.insecure_channel(worker.address) as channel:
        stub = BridgeStub(channel)
        request = pb.OpenRequest(oldest_protocol=1, newest_protocol=1)
        reply = stub.Open(request, metadata=authorized(token), timeout=20)
        yield stub, reply.session


class _WithToken:
    """A stub whose calls present a token."""

    def __init__(self, stub: BridgeStub, token: str) -> None:
        self._stub, self._token = stub, token

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._stub, name)
        return lambda request, timeout=20: method(
            request, timeout=timeout, metadata=authorized(self._token)
        )


def test_a_session_belongs_to_the_token_that_opened_it(worker: Worker) -> None:
    """A client that has another client's session token can neither prepare, attach nor close."""
    with opened(worker, CAROL) as (stub, session):
        alice, carol = _WithToken(stub, ALICE), _WithToken(stub, CAROL)
        request = pb.PrepareRequest(
            session=session, parameters=pb.Parameters(model="square")
        )
        (event,) = alice.Prepare(request)
        assert type(decode(event.error)) is Unauthenticated
        with pytest.raises(Unauthenticated):
            GrpcLane(alice, session)
        alice.Close(pb.CloseRequest(session=session))
        *_, event = carol.Prepare(request)
        assert event.HasField("prepared")
        lane = GrpcLane(carol, session)
        lane.close()


# Changes of the file ------------------------------------------------------------------------------


def test_the_token_file_is_watched(tmp_path: Path) -> None:
    """A token that is removed admits no more, a new one does; a malformed file changes nothing,
    and an empty one admits nobody."""
    file = tmp_path / "tokens"
    file.write_text(line_of("alice", ALICE))
    known = Tokens(file)
    assert known.admit(ALICE).name == "alice"
    file.write_text(f"{line_of('bob', BOB)}\n{line_of('carol', CAROL)}")
    with pytest.raises(Unauthenticated):
        known.admit(ALICE)
    assert known.admit(BOB).name == "bob"
    for broken in ("alice sha256:12", "\n".join([line_of("x", ALICE)] * 2)):
        file.write_text(broken)
        assert known.admit(CAROL).name == "carol"
    file.unlink()
    assert known.admit(CAROL).name == "carol"
    file.write_text("")
    with pytest.raises(Unauthenticated):
        known.admit(CAROL)
    file.write_text(f"{ALICE}\n")
    assert known.admit(ALICE) == Grant("token", hashlib.sha256(ALICE.encode()).digest())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("# nobody\n", "is empty"),
        ("alice sha256:12", "line 1 (the second word is not a SHA-256 hash"),
        ("alice sha256:zz", "line 1 (non-hexadecimal"),
        (f"{LINES[2]}\nbob\n", "line 2"),
        (f"{LINES[2]}\nplain token\n", "line 2"),
        (line_of("a/b", ALICE), "the name has other characters"),
        (line_of("a", ALICE, "model=x"), "'model' is neither models= nor expires="),
        (line_of("a", ALICE, "models=,"), "models= names no model"),
        (line_of("a", ALICE, "models"), "line 1"),
        (line_of("a", ALICE, "expires=soon"), "Invalid isoformat"),
        ("\n".join([line_of("a", ALICE), line_of("a", BOB)]), "names 'a' twice"),
        ("two\nlines", "printable ASCII"),
        ("alice sha25", "neither one token nor complete named ones"),
        ("alice sha-256:12 models=a", "neither one token nor complete"),
    ],
)
def test_a_malformed_token_file_is_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    """A line that could admit more than was meant is misuse, with its number."""
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(CallerError) as raised:
        Tokens(tmp_path / "tokens")
    assert said in str(raised.value)
    assert ALICE not in str(raised.value)


def test_every_token_is_compared_in_constant_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each hash of the file is compared by `compare_digest`, whichever token fits."""
    (tmp_path / "tokens").write_text("\n".join(LINES))
    known = Tokens(tmp_path / "tokens")
    compared: list[bytes] = []
    original = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return original(one, other)

    monkeypatch.setattr(tokens.hmac, "compare_digest", counting)
    for token in (ALICE, CAROL, "mallory"):
        compared.clear()
        with contextlib.suppress(Unauthenticated):
            known.admit(token)
        assert len(compared) == 3


def test_hangup_reloads_the_tokens(worker: Worker) -> None:
    """SIGHUP makes the worker read its files again, and does not end it."""
    logged = len(worker.stderr)
    worker.process.send_signal(signal.SIGHUP)
    assert eventually(lambda: "read 3 tokens" in worker.stderr[logged:])
    with connect(worker.address, token=CAROL) as session:
        assert squares(session, 3.0) == [9.0]


# The audit log ------------------------------------------------------------------------------------


def test_admissions_and_refusals_are_audited(worker: Worker) -> None:
    """The audit log names the peer and the token's name, or the reason, and never a token."""
    before = len(audited(worker))
    with connect(worker.address, token=CAROL):
        pass
    for token in (BOB, "mallory", None):
        with pytest.raises(Unauthenticated):
            connect(worker.address, token=token)
    lines = [line for line in audited(worker)[before:] if "refused" in line]
    assert len(lines) == 3 and all("peer=unix:" in line for line in lines)
    for line, reason in zip(lines, ["expired", "unknown", "no token"], strict=True):
        assert reason in line and "method='/bridge.v1.Bridge/Describe'" in line
    admitted = [line for line in audited(worker)[before:] if "/Open" in line]
    assert len(admitted) == 1
    assert admitted[0].startswith("admitted peer=unix:")
    assert " token=carol certificate=- method=/bridge.v1.Bridge/Open" in admitted[0]
    for token in (ALICE, BOB, CAROL, "mallory"):
        assert token not in worker.stderr


def test_refusals_cannot_fill_the_log(worker: Worker) -> None:
    """Of very many refusals in a second some are logged, and the others are counted."""
    before = len(audited(worker))
    with grpc.insecure_channel(worker.address) as channel:
        call: Any = channel.unary_unary("/bridge.v1.Bridge/Describe")
        for _ in range(300):
            with pytest.raises(grpc.RpcError):
                call(b"", timeout=20)
        assert eventually(
            lambda: (
                not call_is_admitted(call)
                and any("more calls" in line for line in audited(worker)[before:])
            )
        )
    assert len(audited(worker)) - before < 200


def call_is_admitted(call: Any) -> bool:
    try:
        call(b"", timeout=20)
    except grpc.RpcError:
        return False
    return True


# Other parts of the entrance ----------------------------------------------------------------------


def test_reflection_can_be_switched_off(worker: Worker) -> None:
    """With --no-reflection the worker does not list its services, to nobody."""
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    with (
        grpc.insecure_channel(worker.address) as channel,
        pytest.raises(grpc.RpcError) as raised,
    ):
        call: Any = channel.stream_stream(method)
        list(call(iter([b""]), metadata=authorized(CAROL), timeout=20))
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


_SECRET_MODEL = """
import jax, jax.numpy as jnp

def traced(x):
    secret = 1
    raise ValueError("no such shape")

def host(x):
    raise ValueError("not on the host")

def called_back(x):
    return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
"""


@pytest.mark.parametrize("is_off", [True, False], ids=["off", "on"])
def test_tracebacks_can_stay_in_the_worker(tmp_path: Path, is_off: bool) -> None:
    """With --no-tracebacks a client receives the type and the text of a model's error, and no
    source line or file name, also of a callback."""
    (tmp_path / "hidden.py").write_text(_SECRET_MODEL)
    flags = ["--no-tracebacks"] if is_off else []
    with (
        serving(
            tmp_path,
            "--jax-model=hidden:traced",
            "--jax-model=hidden:called_back",
            f"--listen=unix:{tmp_path}/w.sock",
            *flags,
            env={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        ) as worker,
        connect(worker.address) as session,
    ):
        with pytest.raises(RemoteModelError, match="no such shape") as raised:
            prepare(session, "traced", floats(1))
        assert raised.value.remote_type == "builtins.ValueError"
        with pytest.raises(RemoteModelError, match="not on the host") as called:
            program = prepare(session, "called_back", floats(1))
            session.run(program, [session.pool.lease(4)])
    for error in (raised.value, called.value):
        assert ("hidden.py" in str(error)) is not is_off
        assert ("raise ValueError" in str(error)) is not is_off


def test_full_and_no_tracebacks_exclude_each_other(
    tmp_path: Path,
) -> None:
    """A worker is not told to send all frames and none."""
    flags = ["--full-tracebacks", "--no-tracebacks"]
    with Worker(tmp_path, *models("square"), *flags) as worker:
        assert worker.wait() == 2
        assert "exclude each other" in worker.stderr


# The command that makes tokens --------------------------------------------------------------------


def test_a_new_token_admits_its_client(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bridge_server token` prints a token, and adds its name, hash and rights to a private
    file."""
    file = tmp_path / "tokens"
    assert (
        tokens.main(["alice", str(file), "--models=a,b", "--expires=2999-01-01"]) == 0
    )
    first = capsys.readouterr().out.strip()
    assert tokens.main(["bob", str(file)]) == 0
    second = capsys.readouterr().out.strip()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert hashlib.sha256(first.encode()).hexdigest() in file.read_text()
    assert first not in file.read_text() and len(first) > 40
    known = Tokens(file)
    alice, bob = known.admit(first), known.admit(second)
    assert (alice.name, alice.models) == ("alice", frozenset("ab"))
    assert alice.expires is not None and alice.expires.year == 2999
    assert (bob.name, bob.models, bob.expires) == ("bob", None, None)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["alice"], "names 'alice' already"),
        (["a/b"], "the name has other characters"),
        (["new", "--expires=never"], "Invalid isoformat"),
    ],
)
def test_a_token_that_no_worker_would_take_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str
) -> None:
    """The command checks a line as the worker does, and leaves the file as it is."""
    file = tmp_path / "tokens"
    file.write_text(line_of("alice", ALICE))
    name, *rest = args
    assert tokens.main([name, str(file), *rest]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and said in shown.err
    assert file.read_text() == line_of("alice", ALICE)


def test_a_file_with_a_plain_token_gets_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file has one plain token or lines of hashes: the command does not make a mixture."""
    (tmp_path / "token").write_text(ALICE)
    assert tokens.main(["bob", str(tmp_path / "token")]) == 2
    assert "one plain token" in capsys.readouterr().err
    assert tokens.main(["bob", str(tmp_path / "no" / "tokens")]) == 2
    assert "cannot write" in capsys.readouterr().err


# How a client presents its token ------------------------------------------------------------------


def test_a_client_reads_its_token_from_a_file(worker: Worker, tmp_path: Path) -> None:
    """`token_file=` is read at each connection, so that a new token needs no new session."""
    file = tmp_path / "token"
    file.write_text(f"{CAROL}\n")
    with connect(worker.address, token_file=file) as session:
        assert squares(session, 3.0) == [9.0]
        file.write_text("mallory")
        session._link.abort()
        with pytest.raises(Unauthenticated):
            squares(session, 1.0, 2.0)
        file.write_text(CAROL)
        assert squares(session, 1.0, 2.0) == [1.0, 4.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot read the token file"),
        ("", "is empty or has hashes"),
        (LINES[2], "is empty or has hashes"),
    ],
    ids=["missing", "empty", "hashes"],
)
def test_a_file_without_a_token_is_refused_by_the_client(
    tmp_path: Path, text: str | None, said: str
) -> None:
    """A token file that is missing or empty, or is the worker's own, is the caller's mistake."""
    if text is not None:
        (tmp_path / "token").write_text(text)
    with pytest.raises(CallerError, match=said):
        connect("unix:/nowhere", token_file=tmp_path / "token")
    with pytest.raises(CallerError, match="exclude each other"):
        connect("unix:/nowhere", token="a", token_file="b")


def test_commands_read_the_token_from_a_file(
    worker: Worker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--token-file and BRIDGE_TOKEN_FILE keep the token out of the list of processes; flags come
    before variables, and a file that cannot be read is misuse."""
    (tmp_path / "token").write_text(f"{CAROL}\n")
    file = str(tmp_path / "token")
    describe = ["describe", worker.address]
    assert main([*describe, "--token-file", file]) == 0
    monkeypatch.setenv("BRIDGE_TOKEN_FILE", file)
    assert main(describe) == 0
    assert "total(x)" in capsys.readouterr().out
    assert main([*describe, "--token", ALICE]) == 0
    assert "total(x)" not in capsys.readouterr().out
    monkeypatch.setenv("BRIDGE_TOKEN", "mallory")
    assert main(describe) == 1
    assert main([*describe, "--token-file", "/no/such/file"]) == 2
    assert main([*describe, "--tls-ca", "/no/such/file"]) == 2
    assert main([*describe, "--tls-cert", file]) == 2
    for flags in (["--token", "x", "--token-file", "y"], ["--token", "sésame"]):
        with pytest.raises(SystemExit) as ended:
            main([*describe, *flags])
        assert ended.value.code == 2


# Certificates -------------------------------------------------------------------------------------


class Authority:
    """An authority that signs certificates, in a directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self.certificate = directory / f"{name}.pem"
        self._key = directory / f"{name}.key"
        _openssl(
            *("req", "-x509", *_KEY, "-keyout", self._key, "-out", self.certificate),
            *("-subj", f"/CN={name}"),
        )

    def sign(self, name: str) -> tuple[Path, Path]:
        """Return the certificate and the key of a name, for 127.0.0.1."""
        made = [self._directory / f"{name}.{kind}" for kind in ("csr", "pem", "key")]
        request, certificate, key = made
        _openssl(
            *("req", "-new", *_KEY, "-keyout", key, "-out", request),
            *("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
        )
        _openssl(
            *("x509", "-req", "-in", request, "-out", certificate, "-days", "2"),
            *("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial"),
            *("-copy_extensions", "copyall"),
        )
        return certificate, key

    def tls(self, *pair: Path) -> Tls:
        """Return the terms of a client that trusts the authority, with its own certificate."""
        return Tls(
            self.certificate.read_bytes(),
            *(path.read_bytes() for path in pair),
        )


_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


def _openssl(*args: object) -> None:
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True)


def test_only_clients_with_a_certificate_come_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --tls-client-ca a client needs a certificate of that authority; a stranger's
    certificate, none, or no TLS do not admit, and the audit log has the certificate's name.
    """
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    cert, key = ours.sign("worker")
    with serving(
        tmp_path,
        *models("square"),
        "--listen=0.0.0.0:0",
        f"--tls-cert={cert}",
        f"--tls-key={key}",
        f"--tls-client-ca={ours.certificate}",
    ) as worker:
        address = f"127.0.0.1:{worker.address.rpartition(':')[2]}"
        alice = ours.sign("alice")
        with connect(address, tls=ours.tls(*alice), lane="grpc") as session:
            assert squares(session, 3.0) == [9.0]
        for tls in (ours.tls(*theirs.sign("mallory")), ours.tls(), None):
            with pytest.raises(WorkerUnavailable):
                connect(address, tls=tls)
        assert any("certificate='alice'" in line for line in audited(worker))
        assert "clear text" not in worker.stderr
        flags = ["--tls-cert", str(alice[0]), "--tls-key", str(alice[1])]
        monkeypatch.setenv("BRIDGE_TLS_CA", str(ours.certificate))
        assert main(["health", address, *flags]) == 0
        assert main(["health", address, "--timeout=2"]) == 1
        # gRPC's own lines on failed handshakes are not JSON.
        assert all(line.startswith("{") for line in worker.stderr.splitlines())


def test_a_new_certificate_is_taken_without_a_restart(tmp_path: Path) -> None:
    """New handshakes see the new certificate; while certificate and key do not belong together,
    they see the old one; sessions go on."""
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    cert, key = old.sign("worker")
    next_cert, next_key = new.sign("next")
    with (
        serving(
            tmp_path,
            *models("square"),
            "--listen=127.0.0.1:0",
            f"--tls-cert={cert}",
            f"--tls-key={key}",
        ) as worker,
        connect(worker.address, tls=old.tls(), lane="grpc") as session,
    ):
        cert.write_bytes(next_cert.read_bytes())
        with connect(worker.address, tls=old.tls(), lane="grpc") as another:
            assert squares(another, 3.0) == [9.0]
        assert "the previous certificate stays in force" in worker.stderr
        key.write_bytes(next_key.read_bytes())
        with connect(worker.address, tls=new.tls(), lane="grpc") as another:
            assert squares(another, 3.0) == [9.0]
        with pytest.raises(WorkerUnavailable):
            connect(worker.address, tls=old.tls())
        assert squares(session, 2.0) == [4.0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tls-client-ca=README.md"], "--tls-client-ca needs --tls-cert"),
        (["--tls-cert=README.md", "--tls-key=README.md"], "are not a certificate"),
        (["--tls-cert=ours.pem", "--tls-key=theirs.key"], "are not a certificate"),
        (["--tls-cert=ours.pem", "--tls-key=none.key"], "cannot read"),
        (
            ["--tls-cert=ours.pem", "--tls-key=ours.key", "--tls-client-ca=README.md"],
            "has no certificate in PEM form",
        ),
    ],
)
def test_certificates_that_cannot_serve_are_misuse(
    tmp_path: Path, flags: list[str], said: str
) -> None:
    """Files that gRPC would refuse at each handshake are told at the start, by their flags."""
    for name in ("ours", "theirs"):
        Authority(tmp_path, name)
    paths = [
        flag.replace("=", f"={tmp_path}/") if "README" not in flag else flag
        for flag in flags
    ]
    with Worker(tmp_path, *models("square"), *paths) as worker:
        assert worker.wait() == 2
        assert said in worker.stderr and "Traceback" not in worker.stderr


def test_a_token_in_clear_text_is_warned_of(tmp_path: Path) -> None:
    """Beyond loopback, a token without TLS can be read by others on the way."""
    with serving(
        tmp_path, *models("square"), "--listen=0.0.0.0:0", env={"BRIDGE_TOKEN": ALICE}
    ) as worker:
        assert "in clear text: set --tls-cert and --tls-key" in worker.stderr


# Random input -------------------------------------------------------------------------------------


def test_random_calls_are_not_admitted_and_do_no_harm(worker: Worker) -> None:
    """Whatever a client without a token writes into its headers, methods and requests, nothing
    answers it but the health service, and the worker serves on."""
    rng = random.Random(7)
    known = ["/bridge.v1.Bridge/", "/grpc.health.v1.Health/", "/grpc.reflection.v1/"]
    names = ["Describe", "Open", "Prepare", "Lane", "Close", "Check", "", "../Open"]
    with grpc.insecure_channel(worker.address) as channel:
        for _ in range(400):
            service = rng.choice([*known, "/", f"/{_text(rng)}/"])
            method = service + rng.choice([*names, _text(rng)])
            call: Any = channel.stream_stream(method)
            try:
                answers = call(
                    iter([rng.randbytes(rng.choice([0, 1, 7, 300]))]),
                    metadata=_metadata(rng),
                    timeout=20,
                )
                admitted = list(answers)
            except grpc.RpcError as error:
                assert from_rpc(error) is not None
                admitted = []
            assert not admitted or method == "/grpc.health.v1.Health/Check"
    with connect(worker.address, token=CAROL) as session:
        assert squares(session, 3.0) == [9.0]
    for line in worker.stderr.splitlines():
        assert "Traceback" not in json.loads(line)["message"]


def _text(rng: random.Random) -> str:
    """Return some characters that a header or a path may have."""
    alphabet = "aZ0/.:;=-_ %'\"\\{}~"
    return "".join(rng.choices(alphabet, k=rng.choice([1, 8, 200])))


def _metadata(rng: random.Random) -> list[tuple[str, str | bytes]]:
    """Return headers that resemble those of an admitted call."""
    tokens = [ALICE[:-1], f"{CAROL}x", CAROL.upper(), BOB, _text(rng), "", "Bearer"]
    schemes = ["Bearer ", "bearer ", "Bearer  ", "Basic ", "", _text(rng)]
    headers: list[tuple[str, str | bytes]] = [
        ("authorization", f"{rng.choice(schemes)}{rng.choice(tokens)}".strip())
        for _ in range(rng.choice([0, 1, 1, 3]))
    ]
    if rng.random() < 0.3:
        headers.append(("authorization-bin", rng.randbytes(20)))
    if rng.random() < 0.3:
        headers.append(("x-forwarded-user", CAROL))
    return headers


@pytest.mark.parametrize("seed", range(3))
def test_random_token_files_admit_nobody_else(tmp_path: Path, seed: int) -> None:
    """A mutated token file is refused, or admits the tokens of its own lines with no more rights;
    no other error comes out."""
    rng = random.Random(seed)
    good = "\n".join(LINES).encode()
    for _ in range(300):
        text = bytearray(good)
        for _ in range(rng.choice([1, 3, 20])):
            place = rng.randrange(len(text))
            text[place : place + rng.choice([0, 1])] = rng.randbytes(rng.choice([0, 1]))
        (tmp_path / "tokens").write_bytes(text)
        try:
            known = Tokens(tmp_path / "tokens")
        except CallerError:
            continue
        for token in ("mallory", "", ALICE[:-1], "sha256:"):
            with pytest.raises(Unauthenticated):
                known.admit(token)


# The local lane -----------------------------------------------------------------------------------


def test_a_local_lane_is_for_the_workers_own_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer with another user id is refused whatever it sends, also with a session's token."""
    sessions = Sessions(None, residual_bytes=0, slab_bytes=1 << 20)
    lanes = LocalLanes(f"{tmp_path}/w.sock.lane", sessions)
    lanes.start()
    with contextlib.closing(lanes), socket.socket(socket.AF_UNIX) as connection:
        own = os.geteuid()
        monkeypatch.setattr("os.geteuid", lambda: own + 1)
        connection.connect(lanes.path)
        lane = FramedSocket(connection)
        attach = pb.LaneRequest(attach=pb.Attach(session=sessions.open().token))
        with contextlib.suppress(OSError):
            lane.send(attach.SerializeToString())
        reply = pb.LaneReply.FromString(lane.receive(20) or b"")
        assert type(decode(reply.error)) is Unauthenticated
        assert "own user only" in reply.error.message
        assert stat.S_IMODE(Path(lanes.path).stat().st_mode) == 0o600
        lane.close()


def test_a_client_shares_no_more_than_its_limit() -> None:
    """The worker itself bounds the shared memory of a session: a client may ignore the limit that
    it was told."""
    sessions = Sessions(None, residual_bytes=0, slab_bytes=1 << 20)
    session = sessions.open()
    slab = create_slab(2 * PAGE, PAGE)
    share = pb.Share(base=PAGE, nbytes=2 * PAGE)
    try:
        with pytest.raises(OutOfMemory, match="may share at most"):
            session.add_slab([os.dup(slab.fd)], share, PAGE)
        session.add_slab([os.dup(slab.fd)], share, 2 * PAGE)
        share.base = 8 * PAGE
        with pytest.raises(OutOfMemory, match="may share at most"):
            session.add_slab([os.dup(slab.fd)], share, 3 * PAGE)
    finally:
        session.discard()
        slab.close()
