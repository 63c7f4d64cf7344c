"""The files in docker/, as far as no engine is needed: what they name exists, and what they run
works.

An image was never built here and a container never started: docs/operations.md says so.
"""

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from bridge_client import connect
from tests.conftest import ROOT, eventually, python_of
from tests.workers import environment

DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTRUCTIONS = {"ARG", "FROM", "COPY", "RUN", "ENV", "WORKDIR", "CMD", "USER"}
SOCKET = "unix:/run/bridge/bridge.sock"
# Those of the Compose Specification that these files use.
_SERVICE_KEYS = {
    *(
        "build",
        "cap_drop",
        "command",
        "depends_on",
        "deploy",
        "environment",
        "healthcheck",
        "init",
        "ipc",
    ),
    *(
        "image",
        "network_mode",
        "pid",
        "pull_policy",
        "read_only",
        "restart",
        "security_opt",
        "stop_grace_period",
        "user",
        "volumes",
    ),
    "working_dir",
}
VENV = {"jax": ".venv-jax", "torch": ".venv-torch"}


class Instruction(NamedTuple):
    """One instruction of a Dockerfile: its word, and what follows."""

    word: str
    text: str


class Stage(NamedTuple):
    """A stage of a Dockerfile: its name, what it builds on, and its instructions."""

    name: str
    base: str
    instructions: list[Instruction]

    def texts(self, word: str) -> list[str]:
        return [
            instruction.text
            for instruction in self.instructions
            if instruction.word == word
        ]


def instructions_of(text: str) -> Iterator[Instruction]:
    """Yield the instructions of a Dockerfile, lines that are continued put together."""
    lines = [
        line
        for line in text.splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        assert word in INSTRUCTIONS and rest, f"no instruction: {line}"
        yield Instruction(word, rest.strip())


def stages_of(text: str) -> tuple[list[str], dict[str, Stage]]:
    """Return the arguments before the first stage, and the stages by name."""
    globals_: list[str] = []
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for word, rest in instructions_of(text):
        if word == "FROM":
            base, named, name = re.fullmatch(r"(\S+) (AS) (\S+)", rest).groups()
            assert named and name not in stages
            stage = stages[name] = Stage(name, base, [])
        elif stage is None:
            assert word == "ARG", f"{word} before the first stage"
            globals_.append(rest)
        else:
            stage.instructions.append(Instruction(word, rest))
    return globals_, stages


def is_sent_to_the_builder(path: str) -> bool:
    """Whether .dockerignore, whose lines are plain names here, lets a path of the repository
    through."""
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[0] == "*" and all(line.startswith(("!", "**/")) for line in lines[1:])
    return f"!{path.partition('/')[0]}" in lines


def compose(*names: str) -> dict[str, Any]:
    """Return compose files laid over each other: mappings merge, anything else is replaced."""
    merged: dict[str, Any] = {}
    for name in names:
        merged = _over(merged, yaml.safe_load((DOCKER / name).read_text()))
    return merged


def _over(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {
            key: _over(below.get(key), value) for key, value in above.items()
        }
    return above


@pytest.fixture(scope="module")
def dockerfile() -> dict[str, Stage]:
    return stages_of((DOCKER / "Dockerfile").read_text())[1]


# Dockerfile ---------------------------------------------------------------------------------------


def test_images_are_based_on_a_python_that_is_supported() -> None:
    """The interpreter of the images is one of those that pyproject.toml lists, and a slim
    official image."""
    globals_, stages = stages_of((DOCKER / "Dockerfile").read_text())
    (python,) = globals_
    assert (
        f"Programming Language :: Python :: {python.removeprefix('PYTHON=')}"
        in PROJECT["classifiers"]
    )
    bases = {stage.base for stage in stages.values()}
    assert bases - set(stages) == {"python:${PYTHON}-slim"}


def test_everything_that_is_copied_is_there(dockerfile: dict[str, Stage]) -> None:
    """The sources of COPY exist and pass .dockerignore; they are all that the wheel is made of."""
    copied: set[str] = set()
    for stage in dockerfile.values():
        for text in stage.texts("COPY"):
            *sources, target = text.split()
            assert target.startswith("/src/")
            copied |= set(sources)
    assert all(
        (ROOT / path).exists() and is_sent_to_the_builder(path) for path in copied
    )
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    packages = tool["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert copied == {
        "pyproject.toml",
        PROJECT["readme"],
        *PROJECT["license-files"],
        *packages,
    }


def test_stages_that_are_named_are_there(dockerfile: dict[str, Stage]) -> None:
    """What a stage mounts from another one, that one has."""
    mounted = {
        name
        for stage in dockerfile.values()
        for text in stage.texts("RUN")
        for name in re.findall(r"from=(\w+)", text)
    }
    assert mounted == {"wheel"} <= set(dockerfile)


def test_versions_are_those_of_the_project(dockerfile: dict[str, Stage]) -> None:
    """No image names a version: what is installed are extras of pyproject.toml, of one framework
    each."""
    for name in ("jax", "torch"):
        stage = dockerfile[name]
        assert not re.search(r"[=<>~]=?\s*\d+\.\d", " ".join(stage.texts("RUN")))
        (extras,) = (
            text.removeprefix("EXTRAS=")
            for text in stage.texts("ARG")
            if text.startswith("EXTRAS=")
        )
        assert extras == name and extras in PROJECT["optional-dependencies"]
    assert not any(
        "torch" in text
        for text in dockerfile["jax"].texts("RUN") + dockerfile["jax"].texts("ARG")
    )
    assert not any(
        "jax" in text.lower()
        for text in dockerfile["torch"].texts("RUN") + dockerfile["torch"].texts("ARG")
    )


def test_images_run_as_no_root(dockerfile: dict[str, Stage]) -> None:
    """Every image ends as the user that owns the directory of the sockets, which is closed to
    others."""
    for name in ("jax", "torch"):
        assert dockerfile[name].base == "base"
        assert dockerfile[name].instructions[-1] == Instruction("USER", "bridge")
    (made,) = dockerfile["base"].texts("RUN")
    assert "useradd --uid 10001 --gid bridge" in made
    assert (
        "install --directory --owner=bridge --group=bridge --mode=0700 /run/bridge"
        in made
    )


def test_commands_in_the_images_are_the_project_s(dockerfile: dict[str, Stage]) -> None:
    """What a container runs by itself is a console script of the project."""
    (command,) = dockerfile["base"].texts("CMD")
    assert yaml.safe_load(command)[0] in PROJECT["scripts"]


@pytest.mark.parametrize(
    "text",
    ["FORM python AS a", "COPY", "RUN", "FROM python", "COPY a b\nFROM c AS d"],
    ids=lambda text: text[:9],
)
def test_dockerfile_that_is_malformed_is_noticed(text: str) -> None:
    """An unknown word, an instruction without arguments, a stage without a name: the reader
    above sees them."""
    with pytest.raises((AssertionError, AttributeError)):
        stages_of(text)


# Compose ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")],
    ids=["cpu", "gpu"],
)
def test_services_are_built_from_targets_that_exist(
    files: tuple[str, ...], dockerfile: dict[str, Stage]
) -> None:
    """Each service has a target of the Dockerfile, one framework each, and arguments that this
    target declares."""
    services = compose(*files)["services"]
    targets = {}
    for name, service in services.items():
        if "build" not in service:
            assert service["image"] == services["worker"]["image"], (
                "an image that no service builds"
            )
            continue
        build = service["build"]
        assert (DOCKER / build["context"]).resolve() == ROOT and (
            ROOT / build["dockerfile"]
        ).is_file()
        stage = dockerfile[build["target"]]
        declared = {text.partition("=")[0] for text in stage.texts("ARG")}
        arguments = build.get("args", {})
        assert set(arguments) <= declared
        extras = arguments.get("EXTRAS", build["target"]).split(",")
        assert set(extras) <= set(PROJECT["optional-dependencies"]) and set(extras) - {
            "cuda"
        } == {build["target"]}
        targets[name] = build["target"]
    assert targets == {"worker": "jax", "client": "torch"}


def test_containers_share_nothing_but_the_sockets() -> None:
    """On CPU the services have no network and no namespace in common, one user, and one volume
    beside the example."""
    file = compose("compose.yaml")
    for service in file["services"].values():
        assert service["user"] == "10001:10001" and service["init"] is True
        assert service["network_mode"] == "none" and service["cap_drop"] == ["ALL"]
        assert not {"pid", "ipc", "privileged", "cap_add"} & set(service)
        assert service["volumes"] == ["sockets:/run/bridge", "./example:/app:ro"]
    assert list(file["volumes"]) == ["sockets"] and (DOCKER / "example").is_dir()


def test_client_waits_until_the_worker_is_healthy() -> None:
    """The worker's health is asked for by a command of its image, and the client starts after a
    good answer."""
    services = compose("compose.yaml")["services"]
    assert services["client"]["depends_on"] == {
        "worker": {"condition": "service_healthy"}
    }
    test = services["worker"]["healthcheck"]["test"]
    assert test == ["CMD", "bridge_client", "health", SOCKET]
    assert f"--listen={SOCKET}" in services["worker"]["command"]
    assert services["client"]["environment"]["BRIDGE_ADDRESS"] == SOCKET


def test_gpu_services_share_the_device_and_namespaces() -> None:
    """With a GPU both reserve the same device, and are in namespaces of a third container, which
    outlives them."""
    services = compose("compose.yaml", "compose.gpu.yaml")["services"]
    namespaces = services.pop("namespaces")
    devices = [
        service["deploy"]["resources"]["reservations"]["devices"]
        for service in services.values()
    ]
    assert devices[0] == devices[1]
    assert devices[0] == [
        {
            "driver": "nvidia",
            "device_ids": ["${BRIDGE_GPU:-0}"],
            "capabilities": ["gpu", "compute", "utility"],
        }
    ]
    assert (
        namespaces["ipc"] == "shareable"
        and namespaces["restart"] == "always"
        and "deploy" not in namespaces
    )
    assert namespaces["user"] == services["worker"]["user"] and namespaces[
        "cap_drop"
    ] == ["ALL"]
    for service in services.values():
        assert service["pid"] == service["ipc"] == "service:namespaces"
        # Several inits in one PID namespace: only the first can reap.
        assert service["init"] is False
    assert namespaces["init"] is True
    settings = services["worker"]["environment"]
    assert (
        settings["BRIDGE_DEVICE"] == "cuda:0"
        and 0 < float(settings["BRIDGE_GPU_MEMORY_FRACTION"]) < 1
    )
    # A worker that CUDA has failed ends and comes back, but not forever; the client stays, and is
    # not restarted.
    assert (
        services["worker"]["restart"] == "on-failure:5"
        and "restart" not in services["client"]
    )
    assert services["worker"]["healthcheck"] and services["client"]["depends_on"]
    assert services["client"]["environment"]["BRIDGE_ADDRESS"] == SOCKET


def test_gpu_images_have_one_frameworks_cuda_wheels() -> None:
    """The worker's are JAX's, the client's torch's, and each has CuPy for the same CUDA."""
    services = compose("compose.yaml", "compose.gpu.yaml")["services"]
    (cupy,) = PROJECT["optional-dependencies"]["cuda"]
    (cuda,) = re.findall(r"cupy-cuda(\d+)x", cupy)
    worker, client = (services[name]["build"]["args"] for name in ("worker", "client"))
    assert (worker["EXTRAS"], worker["JAX"]) == ("jax,cuda", f"jax[cuda{cuda}]")
    assert client == {"EXTRAS": "torch,cuda", "TORCH_INDEX": "https://pypi.org/simple"}


@pytest.mark.parametrize(
    "files",
    [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")],
    ids=["cpu", "gpu"],
)
def test_settings_of_the_services_are_options_of_the_commands(
    files: tuple[str, ...],
) -> None:
    """Every BRIDGE_* variable is one that a command of the project reads, and other keys are
    Compose's."""
    for name, service in compose(*files)["services"].items():
        assert not set(service) - _SERVICE_KEYS
        settings = {
            each
            for each in service.get("environment", {})
            if each.startswith("BRIDGE_")
        }
        assert settings <= (
            {"BRIDGE_ADDRESS"} if name == "client" else _worker_settings()
        )


def _worker_settings() -> set[str]:
    shown = subprocess.run(
        [python_of(".venv-jax"), "-m", "bridge_server", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return {
        "BRIDGE_" + flag.upper().replace("-", "_")
        for flag in re.findall(r"--([a-z][a-z0-9-]+)", shown.stdout)
    }


def test_commands_of_the_services_work(tmp_path: Path) -> None:
    """What the services run, run here in the environments of the frameworks, with a directory in
    place of the volume: the worker becomes healthy, the client finds its parameters, and the worker
    drains.
    """
    services = compose("compose.yaml")["services"]

    def command(name: str, words: list[str]) -> list[str]:
        bin = Path(python_of(VENV[services[name]["build"]["target"]])).parent
        program, *arguments = (
            word.replace("/run/bridge", str(tmp_path)) for word in words
        )
        return [str(bin / program), *arguments]

    def run(
        name: str, words: list[str], **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(name, words),
            cwd=DOCKER / "example",
            env=environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
        )

    health = services["worker"]["healthcheck"]["test"][1:]
    assert run("worker", health).returncode == 1
    worker = subprocess.Popen(
        command("worker", services["worker"]["command"]),
        cwd=DOCKER / "example",
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert eventually(lambda: run("worker", health).returncode == 0, 60)
        address = f"unix:{tmp_path}/bridge.sock"
        with connect(address) as session:
            assert session.models["damped"].signatures, (
                "it was healthy before it was warm"
            )
        client = run("client", services["client"]["command"], BRIDGE_ADDRESS=address)
        assert (client.returncode, client.stderr) == (0, "")
        assert client.stdout == "lane local, memory memfd: amplitude 2.00, rate 0.30\n"
        worker.terminate()
        assert worker.wait(40) == 0
        assert not list(tmp_path.iterdir())
    finally:
        worker.kill()
        worker.wait()


# Documentation ------------------------------------------------------------------------------------


def test_kubernetes_example_uses_what_there_is() -> None:
    """The manifest in docs/operations.md shares a directory of sockets between containers of one
    user, and probes by the worker's own command.
    """
    page = (ROOT / "docs" / "operations.md").read_text()
    (text,) = re.findall(
        r"^```yaml\n(apiVersion.*?)^```$", page, re.MULTILINE | re.DOTALL
    )
    spec = yaml.safe_load(text)["spec"]
    assert (
        spec["securityContext"]["runAsUser"]
        == spec["securityContext"]["fsGroup"]
        == 10001
    )
    (volume,) = spec["volumes"]
    containers = [*spec["initContainers"], *spec["containers"]]
    assert [container["volumeMounts"][0]["name"] for container in containers] == [
        volume["name"]
    ] * 2
    (worker,) = spec["initContainers"]
    assert worker["restartPolicy"] == "Always"
    assert f"--listen={SOCKET}" in worker["command"]
    for probe in ("startupProbe", "readinessProbe"):
        assert worker[probe]["exec"]["command"] == ["bridge_client", "health", SOCKET]


def test_engine_commands_in_the_files_name_the_files() -> None:
    """The commands in the comments of docker/ and in docs/operations.md name files that exist."""
    texts = [
        path.read_text()
        for path in [
            *DOCKER.glob("*ile"),
            *DOCKER.glob("*.yaml"),
            ROOT / "docs/operations.md",
        ]
    ]
    commands = [
        line
        for text in texts
        for line in re.findall(r"docker (?:compose|build) .*", text)
    ]
    named = {
        word
        for line in commands
        for word in shlex.split(line, comments=True)
        if word.startswith("docker/")
    }
    assert named == {
        "docker/Dockerfile",
        "docker/compose.yaml",
        "docker/compose.gpu.yaml",
    }
    assert all((ROOT / path).is_file() for path in named)


def test_no_command_ends_with_the_client_where_services_restart() -> None:
    """`--exit-code-from` stops everything when any container ends, so that no restart would be
    seen."""
    restarting = [
        path for path in DOCKER.glob("*.yaml") if "restart:" in path.read_text()
    ]
    assert [path.name for path in restarting] == ["compose.gpu.yaml"]
    texts = [path.read_text() for path in restarting] + [
        (ROOT / "docs/gpu.md").read_text()
    ]
    commands = [
        line
        for text in texts
        for line in re.findall(r"docker compose .*compose\.gpu\.yaml.*", text)
    ]
    assert len(commands) >= 2 and not any(
        "--exit-code-from" in command for command in commands
    )
