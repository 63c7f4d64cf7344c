"""Containers of one test: started, looked into and removed. Imports no framework."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import eventually
from tools.containers import Engine, tag_of

APP = Path(__file__).parent / "app"
SOCKET = "unix:/run/bridge/bridge.sock"
USER = 10001
# As in docker/compose.yaml, which tests/stories/test_deployment.py compares.
HARDENED = (
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--read-only",
    "--tmpfs=/tmp:mode=1777,size=64m",
    f"--user={USER}:{USER}",
    "--init",
)
APART = ("--network=none", *HARDENED)
_KILL_WORKER = """
import os, pathlib, signal
for process in pathlib.Path("/proc").glob("[0-9]*"):
    words = (process / "cmdline").read_bytes().split(b"\\0")
    if any(word.endswith(b"/bin/bridge_server") for word in words):
        os.kill(int(process.name), signal.SIGKILL)
"""
JAX, TORCH = tag_of("jax"), tag_of("torch")


@dataclass
class Containers:
    """Containers that share a volume of sockets; their names begin with `prefix`."""

    engine: Engine
    folder: Path  # mounted at /app
    prefix: str = "bridge-test"

    @property
    def volume(self) -> str:
        return f"{self.prefix}-sockets"

    def mounts(self) -> list[str]:
        return [
            f"--volume={self.volume}:/run/bridge",
            f"--volume={self.folder}:/app:ro",
            f"--env=BRIDGE_ADDRESS={SOCKET}",
        ]

    def run(
        self,
        image: str,
        *command: str,
        options: tuple[str, ...] = APART,
        timeout_s: float = 120.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a new container to its end."""
        return self.engine.run(
            "run",
            "--rm",
            *options,
            *self.mounts(),
            image,
            *command,
            is_checked=False,
            timeout_s=timeout_s,
        )

    def start(
        self,
        name: str,
        image: str,
        *command: str,
        options: tuple[str, ...] = APART,
    ) -> str:
        """Start a command in a new container; return the container's name."""
        full = f"{self.prefix}-{name}"
        self.engine.run(
            "run",
            "--detach",
            f"--name={full}",
            *options,
            *self.mounts(),
            image,
            *command,
        )
        return full

    def worker(self, *options: str) -> str:
        """Start a worker of both models, and wait until it is healthy."""
        name = self.start(
            "worker",
            JAX,
            "bridge_server",
            "--jax-model=models:damped",
            "--jax-model=models:slow",
            f"--listen={SOCKET}",
            options=options or APART,
        )
        self.wait_healthy(name, SOCKET)
        return name

    def wait_healthy(self, name: str, address: str, *options: str) -> None:
        command = ("bridge_client", "health", address, "--wait=60", *options)
        answer = self.inside(name, *command)
        assert answer == "SERVING", f"{answer}; the worker's log:\n{self.log(name)}"

    def inside(self, name: str, *command: str) -> str:
        """Run a command in a running container; return its output."""
        done = self.engine.run("exec", name, *command, is_checked=False)
        return (done.stdout + done.stderr).strip()

    def log(self, name: str) -> str:
        done = self.engine.run("logs", name)
        return done.stdout + done.stderr

    def shown(self, name: str, text: str, within_s: float = 90.0) -> bool:
        """Whether the text comes to stand in the container's log in time."""
        return eventually(lambda: text in self.log(name), within_s)

    def right(self, name: str) -> int:
        """Return how many answers of tests/containers/app/count.py were right so far."""
        lines = [line for line in self.log(name).splitlines() if line[:6] == "right "]
        return int(lines[-1].split()[1]) if lines else 0

    def goes_on(self, name: str, within_s: float = 90.0) -> bool:
        """Whether a client gets five more right answers in time, in the same process."""
        before = self.right(name)
        return eventually(lambda: self.right(name) >= before + 5, within_s)

    def state(self, name: str, key: str) -> str:
        done = self.engine.run("inspect", f"--format={{{{.State.{key}}}}}", name)
        return done.stdout.strip()

    def kill(self, name: str) -> None:
        """End a container by SIGKILL."""
        self.engine.run("kill", "--signal=KILL", name)

    def kill_inside(self, name: str) -> None:
        """End the worker of a container as its own death would: engines do not restart a container
        that they were told to kill."""
        self.inside(name, "python", "-c", _KILL_WORKER)

    def close(self) -> None:
        """Remove the containers and the volume, also those that an earlier run has left."""
        filtered = f"--filter=name={self.prefix}"
        # newest first: a container that lends its namespaces was started before its users
        for name in self.engine.run("ps", "--all", "--quiet", filtered).stdout.split():
            self.engine.run("kill", name, is_checked=False)
            self.engine.run("rm", "--force", name, is_checked=False)
        self.engine.run("volume", "rm", "--force", self.volume, is_checked=False)


def survives_kills(
    containers: Containers,
    worker: str,
    client: str,
    *,
    times: int,
    restarts: bool = True,
) -> None:
    """Kill the worker again and again: the client, the same process, gets right answers after each.

    Without `restarts`, the engine restarts the worker by itself.
    """
    begun = containers.state(client, "Pid")
    assert begun != "0"
    for number in range(times):
        started = containers.state(worker, "StartedAt")
        if restarts:
            containers.kill(worker)
            containers.engine.run("start", worker)
        else:
            containers.kill_inside(worker)
        assert containers.goes_on(client), (
            f"not after kill {number + 1}; the client's log:\n{containers.log(client)[-2000:]}"
            f"\nthe worker's:\n{containers.log(worker)[-2000:]}"
        )
        assert containers.state(worker, "StartedAt") != started
    assert containers.state(client, "Pid") == begun


def copied_app(folder: Path) -> Path:
    """Copy the programs, and the example's, to where any user can read them."""
    app = folder / "app"
    shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__"))
    app.chmod(0o755)
    for path in app.iterdir():
        path.chmod(0o644)
    return app


@contextmanager
def network(engine: Engine, name: str) -> Iterator[str]:
    """Yield the name of a network without a way out."""
    engine.run("network", "rm", "--force", name, is_checked=False)
    engine.run("network", "create", "--internal", name)
    try:
        yield name
    finally:
        engine.run("network", "rm", name, is_checked=False)


def secrets_in(folder: Path, host: str) -> Path:
    """Write a token, a certificate and its key, which uid 10001 alone can read."""
    folder.mkdir()
    names = f"subjectAltName=DNS:{host},DNS:localhost"
    key, certificate = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"),
            *("-keyout", str(key), "-out", str(certificate), "-days", "2"),
            *("-subj", f"/CN={host}", "-addext", names),
        ],
        check=True,
        capture_output=True,
    )
    (folder / "token").write_text(os.urandom(32).hex())
    for path in (*folder.iterdir(), folder):
        path.chmod(0o500 if path == folder else 0o400)
        os.chown(path, USER, USER)
    return folder
