"""A worker and a client in containers that share only a volume of sockets."""

import pytest

from tests.conftest import eventually
from tests.containers.running import (
    APART,
    JAX,
    SOCKET,
    TORCH,
    USER,
    Containers,
    survives_kills,
)

pytestmark = pytest.mark.containers

TRAINED = "amplitude 2.00, rate 0.30"


def test_a_worker_has_no_privilege(containers: Containers) -> None:
    """The worker has no capability and cannot gain one, its system calls are filtered, and its
    sockets are its user's alone."""
    worker = containers.worker()
    status = containers.inside(worker, "cat", "/proc/1/status")
    fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    seen = [fields[name] for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")]
    assert seen == ["0" * 16, "0" * 16, "1", "2"]
    paths = ("/run/bridge", "/run/bridge/bridge.sock", "/run/bridge/bridge.sock.lane")
    modes = containers.inside(worker, "stat", "--format=%a:%u", *paths)
    assert modes.split() == [f"700:{USER}", f"600:{USER}", f"600:{USER}"]
    assert "Read-only" in containers.inside(worker, "touch", "/opt/bridge/new")


def test_a_client_in_another_container_trains(containers: Containers) -> None:
    """With no namespace in common and a read-only root, tensors travel by memfd."""
    worker = containers.worker()
    client = containers.start("client", TORCH, "python", "count.py")
    assert containers.goes_on(client), containers.log(client)
    assert "connected local memfd" in containers.log(client)
    kinds = ("pid", "ipc", "mnt", "net", "uts")
    links = [
        containers.inside(name, "readlink", *(f"/proc/1/ns/{kind}" for kind in kinds))
        for name in (worker, client)
    ]
    ours, theirs = (set(text.split()) for text in links)
    assert len(ours) == len(theirs) == len(kinds) and not ours & theirs


def test_the_doctor_compares_two_containers(containers: Containers) -> None:
    """The doctor finds shared memory and namespaces that differ."""
    containers.worker()
    done = containers.run(TORCH, "bridge_client", "doctor", SOCKET)
    assert "path                lane local, memory memfd" in done.stdout, done.stdout
    assert done.stdout.rstrip().endswith(" 0 broken")


@pytest.mark.parametrize("user", [10002, 0])
def test_another_user_is_refused(containers: Containers, user: int) -> None:
    """Neither another user nor root without capabilities reaches the sockets."""
    containers.worker()
    options = (*APART, f"--user={user}:{user}")
    command = ("bridge_client", "describe", SOCKET)
    done = containers.run(TORCH, *command, options=options)
    assert done.returncode == 1
    assert "this user may not use the socket" in done.stderr


def test_a_directory_of_another_user_is_told(containers: Containers) -> None:
    """A worker that may not write to the sockets' directory exits with 2 and a sentence."""
    options = (*APART, "--user=10002:10002")
    command = ("bridge_server", "--jax-model=models:damped", f"--listen={SOCKET}")
    done = containers.run(JAX, *command, options=options)
    assert done.returncode == 2, done.stderr
    assert "not writable by the user 10002" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stopped_worker_drains(containers: Containers) -> None:
    """A call under way is answered, the worker exits with 0 and removes its sockets, and the client
    goes on with the next worker."""
    worker = containers.worker()
    client = containers.start("client", TORCH, "python", "count.py", "slow")
    assert containers.shown(client, "calling slow"), containers.log(client)
    running = ("bridge_client", "top", SOCKET, "--once")
    assert eventually(lambda: " 1 running" in containers.inside(worker, *running), 30)
    containers.engine.run("stop", "--time=35", worker)
    assert containers.state(worker, "ExitCode") == "0", containers.log(worker)
    assert containers.shown(client, "slow [1.0, 1.0]"), containers.log(client)
    left = containers.run(TORCH, "ls", "/run/bridge")
    assert left.stdout == ""
    containers.engine.run("start", worker)
    assert containers.goes_on(client), containers.log(client)


def test_a_client_survives_ten_kills_of_its_worker(containers: Containers) -> None:
    """Each killed worker is replaced at the same path, and the answers stay right."""
    worker = containers.worker()
    client = containers.start("client", TORCH, "python", "count.py")
    assert containers.goes_on(client), containers.log(client)
    survives_kills(containers, worker, client, times=10)


def test_shared_namespaces_survive_ten_kills(containers: Containers) -> None:
    """As in docker/compose.gpu.yaml, less the devices: a third container holds the PID and IPC
    namespaces, the engine restarts the worker, and the client stays."""
    holder = containers.start(
        "namespaces", JAX, "sleep", "infinity", options=(*APART, "--ipc=shareable")
    )
    shared = tuple(each for each in APART if each != "--init")
    shared += (f"--pid=container:{holder}", f"--ipc=container:{holder}")
    worker = containers.worker(*shared, "--restart=on-failure:20")
    client = containers.start("client", TORCH, "python", "count.py", options=shared)
    assert containers.goes_on(client), containers.log(client)
    survives_kills(containers, worker, client, times=10, restarts=False)
