"""The files in docker/ and deploy/, as far as no engine is needed: the names in them exist, and the
commands work.

tests/containers builds the images and runs the Compose files and the pod.
"""

import re
import shlex
import subprocess
import sys
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
INSTRUCTIONS = {
    *("ARG", "CMD", "COPY", "ENV", "FROM", "LABEL", "RUN", "USER", "WORKDIR"),
}
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
        "mem_limit",
        "network_mode",
        "networks",
        "pid",
        "pids_limit",
        "ports",
        "pull_policy",
        "read_only",
        "restart",
        "secrets",
        "security_opt",
        "stop_grace_period",
        "tmpfs",
        "user",
        "volumes",
    ),
    "working_dir",
}
FILES = [
    ("compose.yaml",),
    ("compose.yaml", "compose.gpu.yaml"),
    ("compose.tcp.yaml",),
    ("compose.tcp.yaml", "compose.observe.yaml"),
]
each_deployment = pytest.mark.parametrize(
    "files", FILES, ids=["cpu", "gpu", "tcp", "observe"]
)
KUBERNETES = ROOT / "deploy" / "kubernetes"
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
    return not {f"!{path}", f"!{path.partition('/')[0]}"}.isdisjoint(lines)


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
    python, base = globals_
    assert (
        f"Programming Language :: Python :: {python.removeprefix('PYTHON=')}"
        in PROJECT["classifiers"]
    )
    assert base == "BASE=docker.io/library/python:${PYTHON}-slim"
    bases = {stage.base for stage in stages.values()}
    assert bases - set(stages) == {"${BASE}", "scratch"}


def test_everything_that_is_copied_is_there(dockerfile: dict[str, Stage]) -> None:
    """The sources of COPY exist and pass .dockerignore; the wheel's are all that it is made of."""
    copied = {
        name: {
            source
            for text in stage.texts("COPY")
            if not text.startswith("--from=")
            for source in text.split()[:-1]
        }
        for name, stage in dockerfile.items()
    }
    assert all(
        (ROOT / path).exists() and is_sent_to_the_builder(path)
        for paths in copied.values()
        for path in paths
    )
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    packages = tool["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert copied["wheel"] == {
        "pyproject.toml",
        PROJECT["readme"],
        *PROJECT["license-files"],
        *packages,
    }


def test_stages_that_are_named_are_there(dockerfile: dict[str, Stage]) -> None:
    """Stages copy from stages before them, and mount none.

    podman 4.3 takes a layer that mounts another stage from its cache after that stage has changed:
    the image had the old code.
    """
    seen: set[str] = set()
    for name, stage in dockerfile.items():
        named = {
            source
            for text in stage.texts("COPY")
            for source in re.findall(r"--from=(\S+)", text)
        }
        assert named <= seen
        assert not any("from=" in text for text in stage.texts("RUN"))
        seen.add(name)


def test_the_framework_has_a_layer_of_its_own(dockerfile: dict[str, Stage]) -> None:
    """The requirements, from pyproject.toml alone, are installed before the project is copied."""
    assert not (DOCKER / "Dockerfile").read_text().startswith("# syntax=")
    for name in ("jax", "torch"):
        copies = dockerfile[name].texts("COPY")
        assert [text.split()[0] for text in copies] == [
            "--from=requirements",
            "--from=wheel",
        ]
        *_, framework, project = dockerfile[name].texts("RUN")
        assert "requirements/" in framework and "/wheels" not in framework
        assert "--no-deps" in project and "--no-index" in project


def test_requirements_are_those_of_the_project(tmp_path: Path) -> None:
    """docker/requirements.py writes the project's requirements and an extra's to one file."""
    program = [sys.executable, str(DOCKER / "requirements.py")]
    subprocess.run([*program, str(ROOT / "pyproject.toml"), str(tmp_path)], check=True)
    extras = PROJECT["optional-dependencies"]
    assert {path.stem for path in tmp_path.iterdir()} == set(extras)
    for name, own in extras.items():
        lines = (tmp_path / f"{name}.txt").read_text().splitlines()
        assert set(lines) == {*PROJECT["dependencies"], *own}


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
        assert dockerfile[name].instructions[-1] == Instruction("USER", "10001:10001")
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


@each_deployment
def test_services_are_built_from_targets_that_exist(
    files: tuple[str, ...], dockerfile: dict[str, Stage]
) -> None:
    """Each service has a target of the Dockerfile, one framework each, and arguments that this
    target declares."""
    services = compose(*files)["services"]
    targets = {}
    for name, service in services.items():
        if "build" not in service:
            of_others = service["image"].startswith(
                ("docker.io/prom", "docker.io/grafana")
            )
            assert of_others or service["image"] == services["worker"]["image"], (
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
        assert set(extras) <= set(PROJECT["optional-dependencies"])
        assert set(extras) - {"cuda", "metrics"} == {build["target"]}
        targets[name] = build["target"]
    assert targets == {"worker": "jax", "client": "torch"}


def test_containers_share_nothing_but_the_sockets() -> None:
    """On CPU the services have no network and no namespace in common, one user, and one volume
    beside the example."""
    file = compose("compose.yaml")
    for service in file["services"].values():
        assert service["user"] == "10001:10001" and service["init"] is True
        assert service["network_mode"] == "none"
        assert not {"pid", "ipc"} & set(service)
        assert service["volumes"] == ["sockets:/run/bridge", "./example:/app:ro"]
    assert list(file["volumes"]) == ["sockets"] and (DOCKER / "example").is_dir()


@each_deployment
def test_services_have_no_privilege(files: tuple[str, ...]) -> None:
    """Every service drops all capabilities and gains none, has limits, and those of the project
    have a read-only root with a temporary folder."""
    for name, service in compose(*files)["services"].items():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "cap_add", "devices"} & set(service)
        if name == "namespaces":  # which only sleeps
            continue
        assert service["pids_limit"] <= 2048 and service["mem_limit"]
        if "build" in service:
            assert service["user"] == "10001:10001" and service["read_only"] is True
            assert service["tmpfs"] == ["/tmp:mode=1777,size=64m"]


def test_services_on_tcp_share_a_network_and_no_directory() -> None:
    """The network leads nowhere else, and the token, the certificate and its key are secrets."""
    file = compose("compose.tcp.yaml")
    assert file["networks"] == {"bridge": {"internal": True}}
    assert set(file["secrets"]) == {"token", "certificate", "key"}
    worker, client = (file["services"][name] for name in ("worker", "client"))
    for service in (worker, client):
        assert service["networks"] == ["bridge"] and "network_mode" not in service
        assert service["volumes"] == ["./example:/app:ro"]
    assert set(worker["secrets"]) == set(file["secrets"])
    assert set(client["secrets"]) == {"token", "certificate"}  # and no key
    used = " ".join([*worker["command"], *worker["healthcheck"]["test"]])
    assert set(re.findall(r"/run/secrets/(\w+)", used)) == set(worker["secrets"])
    assert client["depends_on"] == {"worker": {"condition": "service_healthy"}}


def test_prometheus_is_on_a_network_without_clients() -> None:
    """Prometheus reaches the worker and none of its clients, and Grafana finds the dashboard."""
    file = compose("compose.tcp.yaml", "compose.observe.yaml")
    services = file["services"]
    assert file["networks"]["metrics"] == {"internal": True}
    on = {name: set(each["networks"]) for name, each in services.items()}
    assert "metrics" in on["worker"] & on["prometheus"] & on["grafana"]
    assert "metrics" not in on["client"]
    port = services["worker"]["environment"]["BRIDGE_METRICS"].rpartition(":")[2]
    scraped = yaml.safe_load((DOCKER / "observe" / "prometheus.yaml").read_text())
    (static,) = scraped["scrape_configs"][0]["static_configs"]
    assert static["targets"] == [f"worker:{port}"]
    mounted = [
        text.partition(":")[0]
        for name in ("prometheus", "grafana")
        for text in services[name]["volumes"]
        if text.startswith("./")
    ]
    assert all((DOCKER / path).is_file() for path in mounted)
    dashboards = yaml.safe_load((DOCKER / "observe" / "dashboards.yaml").read_text())
    folder = dashboards["providers"][0]["options"]["path"]
    assert (
        f"./observe/dashboard.json:{folder}/bridge.json:ro"
        in (services["grafana"]["volumes"])
    )


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


@each_deployment
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
            {"BRIDGE_ADDRESS", "BRIDGE_TOKEN_FILE", "BRIDGE_TLS_CA"}
            if name == "client"
            else _worker_settings()
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


def _documents(name: str) -> dict[str, dict[str, Any]]:
    """Return the documents of a manifest by kind."""
    documents = yaml.safe_load_all((KUBERNETES / name).read_text())
    return {document["kind"]: document for document in documents}


def test_the_pod_runs_the_example() -> None:
    """The ConfigMap has the files of docker/example as they are."""
    data = _documents("pod.yaml")["ConfigMap"]["data"]
    assert set(data) == {path.name for path in (DOCKER / "example").glob("*.py")}
    for name, text in data.items():
        assert text == (DOCKER / "example" / name).read_text()


def test_the_pod_shares_a_directory_of_sockets() -> None:
    """The worker is a native sidecar, and both containers mount the sockets."""
    spec = _documents("pod.yaml")["Pod"]["spec"]
    (worker,), (client,) = spec["initContainers"], spec["containers"]
    for container in (worker, client):
        mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
        assert mounts["/run/bridge"] == "sockets" and mounts["/app"] == "example"
    assert worker["restartPolicy"] == "Always"
    assert f"--listen={SOCKET}" in worker["command"]
    for probe in ("startupProbe", "readinessProbe"):
        assert worker[probe]["exec"]["command"] == ["bridge_client", "health", SOCKET]
    assert "livenessProbe" not in worker
    assert client["env"] == [{"name": "BRIDGE_ADDRESS", "value": SOCKET}]


def test_the_worker_for_other_pods_reads_its_secret() -> None:
    """Every file below /secret is one that the manifest's own command makes."""
    documents = _documents("worker.yaml")
    spec = documents["Deployment"]["spec"]["template"]["spec"]
    (worker,) = spec["containers"]
    made = re.findall(r"--from-file=(\S+)", (KUBERNETES / "worker.yaml").read_text())
    probes = [worker[f"{name}Probe"]["exec"]["command"] for name in _PROBES]
    used = re.findall(r"/secret/([\w.]+)", str([worker["command"], probes]))
    assert set(used) == set(made)
    (port,) = worker["ports"]
    assert f"--listen=0.0.0.0:{port['containerPort']}" in worker["command"]
    (served,) = documents["Service"]["spec"]["ports"]
    assert served["port"] == port["containerPort"]
    selector = documents["Service"]["spec"]["selector"]
    template = documents["Deployment"]["spec"]["template"]
    assert selector == template["metadata"]["labels"]


_PROBES = ("startup", "readiness", "liveness")


@pytest.mark.parametrize("name", ["pod.yaml", "worker.yaml"])
def test_pods_conform_to_the_restricted_standard(name: str) -> None:
    """What the Pod Security Standard "restricted" asks for, and limits of memory."""
    documents = _documents(name)
    spec = (documents.get("Pod") or documents["Deployment"]["spec"]["template"])["spec"]
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "fsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
    allowed = {"emptyDir", "configMap", "secret"}
    assert all(set(volume) - {"name"} <= allowed for volume in spec["volumes"])


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
        *(f"docker/{path.name}" for path in DOCKER.glob("compose*.yaml")),
    }
    assert all((ROOT / path).is_file() for path in named)


def test_no_command_ends_with_the_client_where_services_restart() -> None:
    """`--exit-code-from` stops everything when any container ends, so that no restart would be
    seen."""
    restarting = [
        path for path in DOCKER.glob("*.yaml") if "restart:" in path.read_text()
    ]
    names = {path.name for path in restarting}
    assert names == {"compose.gpu.yaml", "compose.observe.yaml"}
    texts = [path.read_text() for path in restarting] + [
        (ROOT / "docs/gpu.md").read_text()
    ]
    commands = [
        line
        for text in texts
        for line in re.findall(
            r"docker compose .*compose\.(?:gpu|observe)\.yaml.*", text
        )
    ]
    assert len(commands) >= 2 and not any(
        "--exit-code-from" in command for command in commands
    )
