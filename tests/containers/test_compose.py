"""The Compose files of docker/, as they stand: podman-compose with podman, Compose with Docker."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.containers.running import (
    JAX,
    SOCKET,
    TORCH,
    USER,
    Containers,
    secrets_in,
    survives_kills,
)
from tools.containers import Engine, compose_command

pytestmark = pytest.mark.containers

DOCKER = ROOT / "docker"
# Laid over a file: the counting client in place of the example's, with a worker's log of its own.
_COUNTING = """
services:
  worker:
    command: !override {worker}
    volumes: ["{app}:/checks:ro"]
    working_dir: /checks
  client:
    command: !override [python, /checks/count.py]
    volumes: ["{app}:/checks:ro"]
"""
_CERTIFICATES = "--tls-ca=/run/secrets/certificate"


class Project:
    """Services of Compose files under one name of project."""

    def __init__(self, engine: Engine, name: str, *files: Path, **variables: str):
        self.engine = engine
        self.name = name
        named = (f"--file={path}" for path in files)
        self._command = [*compose_command(engine), f"--project-name={name}", *named]
        images = {"BRIDGE_JAX_IMAGE": JAX, "BRIDGE_TORCH_IMAGE": TORCH}
        self._environment = {**engine.environment, **images, **variables}

    def run(self, *arguments: str, timeout_s: float = 180.0) -> tuple[int, str]:
        """Run a Compose command; return its exit status and its output."""
        done = subprocess.run(
            [*self._command, *arguments],
            env=self._environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        return done.returncode, done.stdout

    def container(self, service: str) -> str:
        """Return the name of a service's only container."""
        done = self.engine.run("ps", "--all", "--format={{.Names}}")
        (name,) = (
            name
            for name in done.stdout.split()
            if name.replace("_", "-") == f"{self.name}-{service}-1"
        )
        return name

    def close(self) -> None:
        self.run("down", "--volumes", "--timeout=5")


@pytest.fixture
def projects(engine: Engine) -> Iterator[list[Project]]:
    """Projects that are taken down after the test."""
    projects: list[Project] = []
    yield projects
    for project in projects:
        project.close()


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    return secrets_in(tmp_path / "secrets", "worker")


def _up(projects: list[Project], project: Project, *arguments: str) -> tuple[int, str]:
    projects.append(project)
    project.close()  # of a run that was killed
    return project.run("up", "--no-build", *arguments)


def test_the_example_trains(engine: Engine, projects: list[Project]) -> None:
    """`up --exit-code-from client` ends with the client's status, after a training by memfd."""
    project = Project(engine, "bridge-test-cpu", DOCKER / "compose.yaml")
    status, output = _up(projects, project, "--exit-code-from=client")
    assert "lane local, memory memfd: amplitude 2.00, rate 0.30" in output
    assert status == 0, output


def test_a_failed_client_is_the_exit_code(
    engine: Engine, projects: list[Project], tmp_path: Path
) -> None:
    """A client that ends with 3 makes Compose end with 3."""
    over = tmp_path / "over.yaml"
    failing = '[python, -c, "raise SystemExit(3)"]'
    over.write_text(f"services: {{client: {{command: !override {failing}}}}}\n")
    project = Project(engine, "bridge-test-cpu", DOCKER / "compose.yaml", over)
    status, output = _up(projects, project, "--exit-code-from=client")
    assert status == 3, output


def test_the_example_trains_over_tcp(
    engine: Engine, projects: list[Project], secrets: Path
) -> None:
    """On an internal network with TLS and a token, both read from secrets."""
    project = _tcp(engine, secrets)
    status, output = _up(projects, project, "--exit-code-from=client")
    assert "lane grpc, memory inline: amplitude 2.00, rate 0.30" in output
    assert status == 0, output


def test_the_worker_on_tcp_refuses(
    engine: Engine,
    projects: list[Project],
    secrets: Path,
    tmp_path: Path,
    app: Path,
) -> None:
    """Without the token, with a wrong one and without TLS no client is served, and there is no way
    out of the network."""
    _up(projects, _tcp(engine, secrets, _counting(tmp_path, app, "tcp")), "--detach")
    client = projects[0].container("client")
    worker = projects[0].container("worker")
    containers = Containers(engine, app)
    containers.wait_healthy(worker, "localhost:50051", _CERTIFICATES)
    describe = ("bridge_client", "describe", "worker:50051")
    token = "--token-file=/run/secrets/token"
    good = containers.inside(client, *describe, _CERTIFICATES, token)
    assert "lane=grpc memory=inline" in good
    for arguments, told in (
        ((_CERTIFICATES,), "carries no token"),
        ((_CERTIFICATES, f"--token={'0' * 64}"), "unknown to the worker"),
        ((token,), "no worker answers"),
    ):
        clean = ("env", "--unset=BRIDGE_TLS_CA", "--unset=BRIDGE_TOKEN_FILE")
        answer = containers.inside(client, *clean, *describe, *arguments)
        assert told in answer
    modes = containers.inside(worker, "stat", "-L", "-c%a:%u", "/run/secrets/key")
    assert modes == f"400:{USER}"
    program = "import socket; socket.create_connection(('1.1.1.1', 53), 5)"
    answer = containers.inside(client, "python", "-c", program)
    assert "unreachable" in answer or "timed out" in answer


@pytest.mark.parametrize("kind", ["cpu", "tcp"])
def test_a_client_survives_ten_kills_of_its_worker(
    engine: Engine,
    projects: list[Project],
    secrets: Path,
    tmp_path: Path,
    app: Path,
    kind: str,
) -> None:
    """Each killed worker is started again, and the client's answers stay right."""
    over = _counting(tmp_path, app, kind)
    if kind == "tcp":
        project = _tcp(engine, secrets, over)
    else:
        project = Project(engine, "bridge-test-cpu", DOCKER / "compose.yaml", over)
    status, output = _up(projects, project, "--detach")
    assert status == 0, output
    worker, client = (project.container(name) for name in ("worker", "client"))
    containers = Containers(engine, app)
    assert containers.goes_on(client), containers.log(client)
    survives_kills(containers, worker, client, times=10)


def _tcp(engine: Engine, secrets: Path, *over: Path) -> Project:
    files = (DOCKER / "compose.tcp.yaml", *over)
    return Project(engine, "bridge-test-tcp", *files, BRIDGE_SECRETS=str(secrets))


def _counting(folder: Path, app: Path, kind: str) -> Path:
    """Write the overlay with the counting client."""
    worker = ["bridge_server", "--jax-model=models:damped", "--jax-model=models:slow"]
    worker += (
        [f"--listen={SOCKET}"]
        if kind == "cpu"
        else [
            "--listen=0.0.0.0:50051",
            "--token-file=/run/secrets/token",
            "--tls-cert=/run/secrets/certificate",
            "--tls-key=/run/secrets/key",
        ]
    )
    path = folder / "counting.yaml"
    path.write_text(_COUNTING.format(worker=worker, app=app))
    return path
