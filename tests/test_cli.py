"""The commands `bridge_server` and `bridge_client`: flags, variables, what they print, and how
they end."""

import ipaddress
import json
import os
import re
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bridge_client import connect, spawn
from bridge_client.remote.link import Tls
from bridge_server.process import endpoints
from bridge_wire import __version__
from bridge_wire.errors import CallerError, Unauthenticated, WorkerUnavailable
from tests.calls import floats, prepare, squares
from tests.conftest import ROOT, python_of
from tests.workers import Worker, environment, models, serving

_BIN = Path(python_of(".venv-jax")).parent
_TOKEN = "a token that nobody guesses"


def _run(
    *args: str, command: str = "bridge_server", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [_BIN / command, *args],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
    )


def _refusal(*args: str, **variables: str) -> str:
    """Return what a worker says that refuses to start with these arguments: misuse, status 2,
    nothing on stdout."""
    done = _run(*args, **variables)
    assert (done.returncode, done.stdout) == (2, ""), done
    return done.stderr


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker set up by flags and by variables, where a stale socket was."""
    directory = tmp_path_factory.mktemp("cli")
    path = directory / "worker.sock"
    for stale in (path, Path(f"{path}.lane")):
        with socket.socket(socket.AF_UNIX) as left_behind:
            left_behind.bind(str(stale))
    hosted = [
        *models("square"),
        "--jax-model",
        "another=tests.models:square",
        "--jax-model=cube=tests.models:outer",
    ]
    variables = {
        "BRIDGE_JAX_MODEL": "no.such.module:model",
        "BRIDGE_LISTEN": f"unix:{directory}/other.sock",
        "BRIDGE_LOG_LEVEL": "debug",
        "BRIDGE_RESIDUAL_BYTES": "1M",
        "BRIDGE_X64": "1",
    }
    with serving(
        directory, "--listen", f"unix:{path}", *hosted, env=variables
    ) as worker:
        yield worker


@pytest.fixture(scope="module")
def tokened_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker for any host, which asks for a token; its models come from a variable."""
    directory = tmp_path_factory.mktemp("token")
    (directory / "token").write_text(f"{_TOKEN}\n")
    variables = {"BRIDGE_JAX_MODEL": "tests.models:square total=tests.models:total"}
    with serving(
        directory,
        "--listen",
        "0.0.0.0:0",
        "--token-file",
        str(directory / "token"),
        env=variables,
    ) as worker:
        yield worker


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for this host, and its key."""
    directory = tmp_path_factory.mktemp("certificate")
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    subject = [
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost,IP:127.0.0.1",
    ]
    made = [
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        *subject,
    ]
    subprocess.run(
        ["openssl", "req", *made, "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    return certificate, key


# Refusals -----------------------------------------------------------------------------------------


def test_version() -> None:
    """--version prints the version and ends with status 0, for both commands, also as modules of
    an interpreter."""
    for command in ("bridge_server", "bridge_client"):
        for run in (
            _run("--version", command=command),
            _run("-m", command, "--version", command="python"),
        ):
            assert (run.returncode, run.stdout, run.stderr) == (
                0,
                f"{command} {__version__}\n",
                "",
            )


def test_help_names_every_flag() -> None:
    """--help shows every option of the command."""
    done = _run("--help")
    assert done.returncode == 0
    for flag in (
        "--jax-model",
        "--torch-model",
        "--factory",
        "--listen",
        "--x64",
        "--residual-bytes",
        "--warmup",
        "--log-level",
    ):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param([], "--jax-model or --torch-model", id="nothing to serve"),
        pytest.param(
            ["--torch-model=tests:x"], "exclude each other", id="two frameworks"
        ),
        pytest.param(
            ["tests.models:cube"], "stands beside --jax-model", id="a stray target"
        ),
        pytest.param(["docter"], "did you mean 'doctor'?", id="a misspelt command"),
        pytest.param(
            ["tests/models.py"], "neither a target such as", id="no attribute"
        ),
        pytest.param(["--no-such-flag"], "--no-such-flag", id="an unknown flag"),
        pytest.param(["--jax-m", "a:b"], "--jax-m", id="an abbreviated flag"),
        pytest.param(["--log-level", "loud"], "loud", id="an unknown level"),
        pytest.param(
            ["--residual-bytes", "many"], "'many' is not a size", id="no size"
        ),
        pytest.param(
            ["--listen", "nowhere"],
            "'nowhere' is neither unix:PATH nor HOST:PORT",
            id="no endpoint",
        ),
        pytest.param(
            ["--listen", "8000"], "did you mean '127.0.0.1:8000'?", id="only a port"
        ),
        pytest.param(
            ["--listen", "http://localhost:5000/"],
            "is a URL; did you mean 'localhost:5000'?",
            id="a URL",
        ),
        pytest.param(
            ["--port", "1", "--listen", "localhost:1"],
            "--port 1 means --listen 127.0.0.1:1",
            id="two addresses",
        ),
        pytest.param(["--port", "http"], "'http' is not a port", id="no port"),
        pytest.param(
            ["--device", "tpu"], "JAX takes a TPU without --device", id="a TPU"
        ),
        pytest.param(
            ["--jax-modl", "a:b"], "did you mean '--jax-model'?", id="a misspelt flag"
        ),
        pytest.param(
            ["--log-level", "inf"], "warning, error; did you mean 'info'", id="a level"
        ),
        pytest.param(["--listen", ":5000"], "':5000' is neither", id="no host"),
        pytest.param(["--listen", "localhost:http"], "neither", id="no port number"),
        pytest.param(
            ["--listen", "localhost:65536"],
            "a port above the limit 65535",
            id="too large a port",
        ),
        pytest.param(
            ["--listen", "unix:/no/such/directory/w.sock"],
            "/no/such/directory",
            id="no directory",
        ),
        pytest.param(
            ["--listen", f"unix:/{'x' * 120}"], "bytes: /xxx", id="too long a path"
        ),
        pytest.param(
            ["--listen", "unix:README.md"],
            "README.md exists and is not a socket",
            id="a regular file",
        ),
        pytest.param(
            ["--listen", "unix:tests"],
            "tests exists and is not a socket",
            id="a directory",
        ),
        pytest.param(["--listen", "0.0.0.0:0"], "--insecure", id="exposed"),
        pytest.param(["--listen", "[::]:0"], "--insecure", id="exposed by IPv6"),
        pytest.param(["--listen", "example.org:0"], "--insecure", id="exposed by name"),
        pytest.param(
            ["--tls-cert", "README.md"],
            "--tls-cert and --tls-key go together",
            id="half a certificate",
        ),
        pytest.param(
            ["--token-file", "/no/such/token"], "/no/such/token", id="no token file"
        ),
        pytest.param(
            ["--token-file", "/dev/null"],
            "the token file /dev/null is empty",
            id="no token",
        ),
    ],
)
def test_misuse_is_told_before_anything_starts(args: list[str], said: str) -> None:
    """What is wrong on the command line is named on stderr, and the status is 2."""
    served = [] if args == [] or args[0] == "--jax-m" else models("square")
    assert said in _refusal(*served, *args)


def test_a_variable_that_is_neither_on_nor_off_is_refused() -> None:
    """What switches something on or off says so in words that are known; nothing is off by a
    mistake."""
    assert "the variable BRIDGE_X64 is 'maybe'; expected 1 or 0" in _refusal(
        *models("square"), BRIDGE_X64="maybe"
    )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("BRIDGE_RESIDUAL_BYTES", "lots", "the variable BRIDGE_RESIDUAL_BYTES: 'lots'"),
        (
            "BRIDGE_LOG_LEVEL",
            "loud",
            "the variable BRIDGE_LOG_LEVEL: 'loud' is not one",
        ),
        ("BRIDGE_FACTORY", "depth", "'depth' is neither NAME=VALUE"),
    ],
)
def test_wrong_value_of_a_variable_names_the_variable(
    name: str, value: str, said: str
) -> None:
    """The user looks for the variable, not for a flag that was not given."""
    assert said in _refusal(*models("square"), **{name: value})


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("secret", 0o600, "the token in the token file .* has 6 characters"),
        (
            "a" * 40,
            0o644,
            "has mode 0644, so that every user can read it; run chmod 600",
        ),
        ("a" * 40, 0o640, None),
    ],
)
def test_weak_token_is_told(
    tmp_path: Path, text: str, mode: int, said: str | None
) -> None:
    """A worker warns of a token that others can read or guess, and starts."""
    (tmp_path / "token").write_text(f"{text}\n")
    (tmp_path / "token").chmod(mode)
    told = _refusal("no.such:model", "--token-file", str(tmp_path / "token"))
    warnings = [line for line in told.splitlines() if "WARNING" in line]
    assert bool(warnings) == bool(said)
    assert said is None or re.search(said, warnings[0])


def test_misspelt_variable_is_told() -> None:
    """Both commands name a variable that is ignored, and the one that was meant."""
    said = (
        "the variable BRIDGE_LISTN is unknown and ignored; did you mean 'BRIDGE_LISTEN'"
    )
    assert said in _refusal(BRIDGE_LISTN="unix:x")
    others = {"BRIDGE_SERVICE_HOST": "10.0.0.1", "BRIDGE_PORT": "tcp://10.0.0.1:50051"}
    done = _run("envs", command="bridge_client", BRIDGE_LISTN="unix:x", **others)
    assert done.stderr == f"bridge_client: {said}?\n"


def test_port_is_a_loopback_address(tmp_path: Path) -> None:
    """--port replaces the variable of --listen, and no variable of Kubernetes is read for it."""
    variables = {"BRIDGE_LISTEN": "0.0.0.0:0", "BRIDGE_PORT": "tcp://10.0.0.1:50051"}
    args = [*models("square"), "--port", "0"]
    with serving(tmp_path, *args, env=variables) as worker:
        assert worker.address.startswith("127.0.0.1:")


def test_help_is_grouped_and_short() -> None:
    """--help has titles, examples, and no defaults that nobody would write."""
    text = _run("--help").stdout
    for part in (
        "\nmodels:\n",
        "\nsecurity:\n",
        "\nexamples:\n",
        "bridge_server doctor",
    ):
        assert part in text
    for part in ("None", "[])", "{})", "False", "1099511627776", "(default: )", "inf)"):
        assert part not in text


def test_error_of_a_command_is_one_line() -> None:
    """A wrong flag prints one sentence, and no usage of many lines."""
    assert _refusal("--no-such-flag").count("\n") == 1


def test_a_token_that_no_header_can_carry_is_refused() -> None:
    """A token is printable ASCII: no client could present another one."""
    assert "printable ASCII" in _refusal(*models("square"), BRIDGE_TOKEN="sésame")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "raise OSError('no licence')",
            "importing 'untidy' failed: OSError: no licence",
        ),
        (
            "import no_such_package",
            "importing 'untidy' failed: No module named 'no_such_package'",
        ),
        ("raise SystemExit(0)", "importing 'untidy' called sys.exit(0)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_shown_where_it_fails(
    tmp_path: Path, line: str, said: str
) -> None:
    """The error tells what the module raised, and its file and line; a module's sys.exit() is an
    error too."""
    (tmp_path / "untidy.py").write_text(f"\n{line}\n")
    told = _refusal(
        "--jax-model",
        "untidy:model",
        PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    )
    assert said in told
    assert f'File "{tmp_path}/untidy.py", line 2' in told


MISSPELT = pytest.mark.parametrize(
    ("target", "said"),
    [
        ("json:JSONDecoder", "is a builtins.type; expected a function"),
        (
            "tests.models:sqare",
            "'tests.models' has no attribute 'sqare'; did you mean 'square'",
        ),
        ("tests.modles:square", "no module 'tests.modles'"),
        ("tests.modles:square", "'models'"),
        ("tets.models:square", "no module 'tets'"),
        ("tests.models:square.nothing", "has no attribute 'nothing'"),
        ("tests/modles.py:square", "did you mean 'models.py'?"),
        ("tests.models", "[NAME=]module:attribute"),
        ("=tests.models:square", "[NAME=]module:attribute"),
        ("tests.models:os", "'os' is a builtins.module; expected a function"),
    ],
)


def test_target_needs_no_flag(tmp_path: Path) -> None:
    """`bridge_server FILE.py:fn` serves models of the framework that is installed, in place of the
    variables' models; flags may stand on both sides."""
    variables = {"BRIDGE_TORCH_MODEL": "no.such.module:model"}
    for flags in (["--x64", "tests/models.py:square"], ["tests/models.py:square"]):
        args = [*flags, "total=tests/models.py:total", "--listen"]
        address = f"unix:{tmp_path}/worker.sock"
        with serving(tmp_path, *args, address, env=variables) as worker:
            assert worker.ready_line["models"] == "square,total"
            with connect(worker.address) as session:
                assert squares(session, 3.0) == [9.0]
            worker.terminate()
            assert worker.wait() == 0


@MISSPELT
def test_a_misspelt_target_is_named_with_near_matches(target: str, said: str) -> None:
    """A module or attribute that is not there is told, with names that look like it."""
    assert said in _refusal("--jax-model", target)


def test_a_framework_that_is_not_there_is_named() -> None:
    """A torch model in an environment without torch is refused, and the error names what is
    missing."""
    said = _refusal("--torch-model", "tests.server.torch_server.models:square")
    assert "--torch-model needs torch in the worker's environment" in said


def test_two_models_of_one_name_are_refused() -> None:
    """Targets that would get the same name must be named."""
    assert "two models are named 'square'" in _refusal(*models("square", "square"))


@pytest.mark.parametrize(
    ("warm_up", "said"),
    [
        ("float33[2]", "float33[2]"),
        ("f32[2]", "did you mean 'float32'?"),
        ("float32", "float32"),
        ("float32[2", "float32[2"),
        ("float32[-1]", "float32[-1]"),
        ("sqare=float32[2]", "sqare"),
    ],
)
def test_a_malformed_warm_up_is_refused(warm_up: str, said: str) -> None:
    """A --warmup that cannot be read, or names no model, is misuse."""
    assert said in _refusal(*models("square"), "--warmup", warm_up)


def test_a_warm_up_must_name_one_of_several_models() -> None:
    """With several models, --warmup needs NAME=."""
    assert "NAME=" in _refusal(*models("square", "total"), "--warmup", "float32[2]")


def test_a_factory_that_fails_is_a_failure() -> None:
    """A --factory that raises ends the worker with status 1: its exception and its line are shown,
    and none of the worker's own frames."""
    done = _run("--jax-model", "tests.models:failing_factory", "--factory")
    assert (done.returncode, done.stdout) == (1, "")
    said, where, line = done.stderr.splitlines()
    assert said == (
        "bridge_server: the factory 'tests.models:failing_factory' failed: RuntimeError: the"
        " checkpoint is missing"
    )
    assert f'File "{ROOT}/tests/models.py"' in where
    assert line.strip() == 'raise RuntimeError("the checkpoint is missing")'


def test_factory_takes_arguments() -> None:
    """Arguments come from flags, from spawn and from the variable, and are JSON."""
    python = python_of(".venv-jax")
    given = {"factor": 3, "of": {"more": [0.5]}}
    by_flags = ["--factory", "factor=3", '--factory=of={"more": [0.5]}']
    variable = {"BRIDGE_FACTORY": json.dumps(given)}
    for options in (
        {"factory": given},
        {"args": by_flags},
        {"env": variable},
    ):
        with spawn(
            "square=tests/models.py:multiple_factory",
            python=python,
            cwd=ROOT,
            **options,
        ) as session:
            assert squares(session, 2.0) == [7.0]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--factory=fctor=3"], "takes (factor, of=None), and --factory gives fctor"),
        (["--factory=fctor=3"], "did you mean 'factor'?"),
        (["--factory"], "missing a required argument: 'factor'"),
        (["--factory", "factor=1", "--factory", "factor=2"], "'factor' twice"),
        (["--factory=factor=[1"], "malformed value"),
        (["--factory=__import__('os')"], "neither NAME=VALUE nor a JSON object"),
    ],
)
def test_wrong_arguments_of_a_factory_are_refused(args: list[str], said: str) -> None:
    """Each mistake is misuse, and the factory's parameters are named."""
    assert said in _refusal("tests/models.py:multiple_factory", *args)


def test_target_after_factory_is_told() -> None:
    """A named target after --factory is its argument, so nothing is served: the error says so."""
    said = _refusal("--factory", "wave=tests/models.py:square_factory")
    assert "'wave=tests/models.py:square_factory' stands after --factory" in said
    assert "put the target before --factory" in said
    assert "stands after" not in _refusal("--factory", "depth=3")


# What a worker says -------------------------------------------------------------------------------


def test_stdout_has_the_ready_line_and_nothing_else(worker: Worker) -> None:
    """One line on stdout names the endpoint, the models, the lanes and the devices."""
    assert worker.stdout.count("\n") == 1
    line = worker.ready_line
    assert line["endpoint"].startswith("unix:/")
    assert line["models"] == "square,another,cube"
    assert line["lanes"] == "local,grpc"
    assert line["devices"].startswith("cpu:0")


def test_logs_are_json_where_nobody_watches(worker: Worker) -> None:
    """Each line on a stderr that is no terminal is a JSON object with time, level, logger and
    message."""
    lines = [json.loads(line) for line in worker.stderr.splitlines()]
    assert lines
    for line in lines:
        assert {"time", "level", "logger", "message"} <= set(line)


def test_the_log_names_the_allocator(worker: Worker) -> None:
    """At --log-level debug the worker says which allocator it runs with."""
    lines = [json.loads(line) for line in worker.stderr.splitlines()]
    (told,) = [line for line in lines if "allocator: " in line["message"]]
    assert told["level"] == "DEBUG"
    assert told["message"].partition(": ")[2]


def test_flags_come_before_variables(worker: Worker) -> None:
    """A flag wins over its variable, and a variable over the default."""
    assert worker.address.endswith("/worker.sock")
    assert "no.such.module" not in worker.stdout + worker.stderr
    with connect(worker.address) as session:
        assert session.x64
        assert set(session.models) == {"square", "another", "cube"}


def test_a_budget_may_come_from_a_variable(worker: Worker) -> None:
    """BRIDGE_RESIDUAL_BYTES=1M lets a residual of 1 MiB live, and none that is larger."""
    with connect(worker.address) as session:
        for count, kept in ((1 << 18, 1), (1 << 19, 0)):
            keeping = prepare(session, "square", floats(count)).keeping((0,))
            _, residual = session.run_keeping(keeping, [session.pool.lease(4 * count)])
            assert session.stats()["residuals"] == kept
            session.drop_residual(residual)


def test_a_stale_socket_is_replaced(worker: Worker) -> None:
    """A socket that a killed worker left behind is in nobody's way, and the new one is the
    user's alone."""
    with connect(worker.address, lane="local") as session:
        assert squares(session, 3.0) == [9.0]
    path = Path(worker.address.removeprefix("unix:"))
    for made in (path, Path(f"{path}.lane")):
        assert stat.S_ISSOCK(made.stat().st_mode)
        assert made.stat().st_mode & 0o077 == 0


def test_a_second_worker_at_the_same_path_refuses(worker: Worker) -> None:
    """A worker does not take another one's place, and the other serves on."""
    done = _run(*models("square"), "--listen", worker.address)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert "another worker" in done.stderr
    with connect(worker.address, lane="local") as session:
        assert squares(session, 3.0) == [9.0]


def test_describe_shows_the_models(worker: Worker) -> None:
    """`bridge_client describe` names the lane, the memory kind and every model with its
    arguments."""
    done = _run("describe", worker.address, command="bridge_client")
    assert (done.returncode, done.stderr) == (0, "")
    assert "lane=local memory=memfd" in done.stdout
    for shown in ("square(x)", "another(x)", "cube(x)"):
        assert shown in done.stdout


def test_describe_shows_all_that_the_worker_tells(tmp_path: Path) -> None:
    """Versions, devices, docstrings, defaults and types; --json has the same as values."""
    args = [*models("documented"), "--warmup", "float32[3]"]
    address = f"unix:{tmp_path}/worker.sock"
    with serving(tmp_path, *args, "--listen", address):
        text = _run("describe", address, command="bridge_client").stdout
        _, versions, call, doc, compiled = text.splitlines()
        assert re.fullmatch(
            rf"jax \S+, Python 3\.\S+, torch-jax-bridge {__version__}, devices cpu:0.*",
            versions,
        )
        assert call == "documented(x, scale=2.0, *, mode='a')"
        assert doc == "    Scale an array."
        assert compiled == "  compiled for (float32[3])"
        done = _run("describe", address, "--json", command="bridge_client")
        told = json.loads(done.stdout)
        (model,) = told["models"]
        assert (told["address"], told["framework"]) == (address, "jax")
        assert model["calls"] == {"documented": "(x, scale=2.0, *, mode='a')"}
        assert model["doc"].endswith("The rest is for --json.")
        assert model["compiled_for"] == [["float32[3]"]]
        done = _run("health", address, "--deep", "--json", command="bridge_client")
        status, call = map(json.loads, done.stdout.splitlines())
        assert status == {"status": "SERVING"}
        assert "documented" in call["call"]
        done = _run("check-gradients", address, "--json", command="bridge_client")
        told = json.loads(done.stdout)
        assert told["differ"] == 0
        assert told["checks"][0]["agrees"]


def test_describe_of_nobody_is_a_failure(tmp_path: Path) -> None:
    """`bridge_client describe` of an address without a worker says so, with status 1."""
    done = _run("describe", f"unix:{tmp_path}/none.sock", command="bridge_client")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("bridge_client: no worker answers")


# Where a worker listens ---------------------------------------------------------------------------


@pytest.fixture
def runtime_directory() -> Iterator[Path]:
    """A directory whose path is short: a socket's may have some 100 bytes."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def test_the_default_is_a_socket_in_a_private_directory(
    tmp_path: Path, runtime_directory: Path
) -> None:
    """Without --listen, a worker listens in a directory of mode 0700 under XDG_RUNTIME_DIR, and
    takes its sockets along when it ends.
    """
    with serving(
        tmp_path / "out",
        *models("square"),
        env={"XDG_RUNTIME_DIR": str(runtime_directory)},
    ) as worker:
        path = Path(worker.address.removeprefix("unix:"))
        assert path.parent.parent == runtime_directory
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with connect(worker.address, lane="local") as session:
            assert squares(session, 3.0) == [9.0]
        worker.terminate()
        assert worker.wait() == 0
        assert not list(path.parent.iterdir())


@pytest.mark.parametrize("listen", [None, "127.0.0.1:0"], ids=["unix", "tcp"])
@pytest.mark.parametrize("is_there", [False, True], ids=["missing", "long"])
def test_a_runtime_directory_that_no_socket_can_be_in_is_done_without(
    runtime_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    listen: str | None,
    is_there: bool,
) -> None:
    """Where XDG_RUNTIME_DIR names no directory, as after `su`, or one whose path is too long, a
    worker's sockets lie below the temporary directory.
    """
    named = runtime_directory / ("x" * 100)
    if is_there:
        named.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(named))
    monkeypatch.setattr(tempfile, "tempdir", str(runtime_directory))
    lane = Path(endpoints.parse(listen).lane_path)
    assert lane.parent == runtime_directory / f"torch-jax-bridge-{os.geteuid()}"


def test_a_lane_of_another_container_stays(
    runtime_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TCP worker removes the lanes of those that were killed, but none on which somebody listens:
    where containers share the directory, its process may be in another PID namespace.
    """
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_directory))
    directory = Path(endpoints.parse("127.0.0.1:0").lane_path).parent
    taken, left = directory / "99999998.lane", directory / "99999999.lane"
    with (
        socket.socket(socket.AF_UNIX) as listening,
        socket.socket(socket.AF_UNIX) as left_behind,
    ):
        listening.bind(str(taken))
        listening.listen(0)
        left_behind.bind(str(left))
        endpoints.parse("127.0.0.1:0")
        assert taken.exists() and not left.exists()


def test_a_runtime_directory_that_others_may_enter_is_refused(
    runtime_directory: Path,
) -> None:
    """A worker does not listen in a directory that somebody else may have prepared."""
    directory = runtime_directory / f"torch-jax-bridge-{os.geteuid()}"
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    assert "0700" in _refusal(*models("square"), XDG_RUNTIME_DIR=str(runtime_directory))


def test_a_worker_beyond_loopback_asks_for_its_token(tokened_worker: Worker) -> None:
    """With --token-file a worker may listen for other hosts, and serves only those who know the
    token."""
    port = tokened_worker.address.rpartition(":")[2]
    assert int(port) > 0
    assert tokened_worker.address == f"0.0.0.0:{port}"
    for token in (None, "", "another token", _TOKEN[:-1]):
        with pytest.raises(Unauthenticated, match="token="):
            connect(f"127.0.0.1:{port}", token=token)
    for lane in ("local", "grpc"):
        with connect(f"127.0.0.1:{port}", token=_TOKEN, lane=lane) as session:
            assert squares(session, 3.0) == [9.0]
            assert set(session.models) == {"square", "total"}


def test_describe_takes_a_token(tokened_worker: Worker) -> None:
    """`bridge_client describe --token` reaches a worker that asks for one; without it, it fails."""
    address = tokened_worker.address.replace("0.0.0.0", "127.0.0.1")
    assert (
        "square(x)"
        in _run("describe", address, "--token", _TOKEN, command="bridge_client").stdout
    )
    done = _run("describe", address, command="bridge_client")
    assert (done.returncode, done.stdout) == (1, "")


def test_a_token_may_have_the_end_of_its_line(
    tokened_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client presents a token as it stands in its file, says which cannot be one, and asks no
    proxy for its own host.
    """
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    address = f"127.0.0.1:{tokened_worker.address.rpartition(':')[2]}"
    with connect(address, token=f"{_TOKEN}\n") as session:
        assert squares(session, 3.0) == [9.0]
    with pytest.raises(CallerError, match="must be printable ASCII"):
        connect(address, token="sésame")


def test_health_needs_no_token(tokened_worker: Worker) -> None:
    """Probes ask for a worker's health without its token."""
    with grpc.insecure_channel(
        tokened_worker.address.replace("0.0.0.0", "127.0.0.1")
    ) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=10
        )
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_probes_and_doctor_of_a_worker_with_a_token(tokened_worker: Worker) -> None:
    """`bridge_client health` needs no token; `doctor` does, and says so."""
    address = tokened_worker.address.replace("0.0.0.0", "127.0.0.1")
    assert _run("health", address, command="bridge_client").stdout == "SERVING\n"
    done = _run("doctor", address, command="bridge_client")
    assert done.returncode == 1
    assert "BRIDGE_TOKEN" in done.stdout and "1 broken" in done.stdout
    done = _run("doctor", address, command="bridge_client", BRIDGE_TOKEN=_TOKEN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "memory memfd" in done.stdout


def test_the_token_is_nowhere_to_be_read(tokened_worker: Worker) -> None:
    """Neither the output nor the command line of a worker shows its token."""
    shown = (
        tokened_worker.stdout
        + tokened_worker.stderr
        + Path(f"/proc/{tokened_worker.pid}/cmdline").read_text()
    )
    assert _TOKEN not in shown


def test_tls_protects_a_worker(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    """With a certificate, --factory and --no-jit, a worker serves clients that trust the
    certificate, and no others."""
    cert, key = certificate
    flags = ["--tls-cert", str(cert), "--tls-key", str(key), "--factory", "--no-jit"]
    with serving(
        tmp_path,
        "--listen",
        "0.0.0.0:0",
        "--jax-model=square=tests.models:square_factory",
        *flags,
    ) as worker:
        port = worker.address.rpartition(":")[2]
        trusting = Tls(root_certificates=cert.read_bytes())
        for address in (f"localhost:{port}", f"127.0.0.1:{port}"):
            with connect(address, tls=trusting, lane="grpc") as session:
                assert squares(session, 3.0) == [9.0]
        with pytest.raises(WorkerUnavailable):
            connect(f"127.0.0.1:{port}")
        with pytest.raises(WorkerUnavailable):
            connect(f"127.0.0.1:{port}", tls=True)


def test_insecure_is_allowed_and_loud(tmp_path: Path) -> None:
    """--insecure lets a worker listen for every host without token or TLS, and it warns of that."""
    with serving(
        tmp_path,
        *models("square"),
        "--listen",
        "0.0.0.0:0",
        env={"BRIDGE_INSECURE": "1"},
    ) as worker:
        host, _, port = worker.address.rpartition(":")
        assert ipaddress.ip_address(host).is_unspecified
        with connect(f"127.0.0.1:{port}") as session:
            assert squares(session, 3.0) == [9.0]
        warnings = [json.loads(line) for line in worker.stderr.splitlines()]
        assert any(
            line["level"] == "WARNING" and "INSECURE" in line["message"]
            for line in warnings
        )


def test_a_port_that_is_taken_is_refused(tokened_worker: Worker) -> None:
    """A worker does not share another one's port."""
    port = tokened_worker.address.rpartition(":")[2]
    done = _run(*models("square"), "--listen", f"127.0.0.1:{port}")
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
