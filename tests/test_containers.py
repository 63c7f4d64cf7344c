"""tools/containers.py and helpers of tests/containers, as far as no engine is needed."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.containers.running import HARDENED
from tests.containers.test_kubernetes import with_ordinary_containers
from tools import containers, lock


def test_without_an_engine_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`make test-containers` fails where there is neither podman nor docker, and names packages."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["containers.py"])
    assert containers.main() == 1
    text = capsys.readouterr().err
    assert "found no podman or docker on PATH" in text and "apt-get install" in text


def test_a_base_that_nobody_can_provide_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the official image and debootstrap, the text names BASE."""
    program = tmp_path / "podman"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(containers, "_PATH", str(tmp_path))
    engine = containers.Engine(str(program), {})
    with pytest.raises(containers.ContainersFailed, match="BASE=IMAGE"):
        containers.base_image(engine)


def test_a_command_that_fails_is_quoted(tmp_path: Path) -> None:
    """The text has the command, its status and the end of its output."""
    command = ["sh", "-c", "echo seen; exit 3"]
    with pytest.raises(containers.ContainersFailed, match=r"exited with 3[^$]*seen"):
        containers.execute(command, {}, timeout_s=10)
    with pytest.raises(containers.ContainersFailed, match="still running"):
        containers.execute(["/bin/sleep", "10"], {}, timeout_s=0.1)


def test_podman_keeps_everything_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each path of podman's configuration is below the cache, or in a folder of /run of its own."""
    monkeypatch.setattr(containers, "CACHE", tmp_path)
    settings = containers.podman_settings()
    assert all(Path(value).is_relative_to(tmp_path) for value in settings.values())
    text = (tmp_path / "containers.conf").read_text()
    text += (tmp_path / "storage.conf").read_text()
    paths = [line.split('"')[1] for line in text.splitlines() if '"/' in line]
    assert len(paths) == 5
    for path in map(Path, paths):
        own = any("torch-jax-bridge-containers-" in part for part in path.parts)
        assert path.is_relative_to(tmp_path) or own


def test_containers_of_tests_are_those_of_compose() -> None:
    """The options of tests/containers are the settings of docker/compose.yaml."""
    file = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    service = file["services"]["worker"]
    assert set(HARDENED) == {
        *(f"--cap-drop={name}" for name in service["cap_drop"]),
        "--security-opt=no-new-privileges",
        "--read-only",
        *(f"--tmpfs={path}" for path in service["tmpfs"]),
        f"--user={service['user']}",
        "--init",
    }


def test_a_sidecar_becomes_an_ordinary_container() -> None:
    """For podman the pod's containers are the same, in the same order, without the sidecar's
    policy."""
    text = (ROOT / "deploy" / "kubernetes" / "pod.yaml").read_text()
    _, pod = yaml.safe_load_all(with_ordinary_containers(text))
    assert "initContainers" not in pod["spec"]
    worker, client = pod["spec"]["containers"]
    assert (worker["name"], client["name"]) == ("worker", "client")
    assert "restartPolicy" not in worker and pod["spec"]["restartPolicy"] == "Never"


# Locks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["jax", "torch"])
def test_a_lock_is_that_of_the_requirements(target: str) -> None:
    """docker/*.lock was made from the requirements that pyproject.toml has now; otherwise run
    `make lock`. Each of them is met, and each package has hashes."""
    text = lock.lock_of(target).read_text()
    assert text.startswith(lock.header(target)), "run `make lock`"
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))
    for line in lock.requirements(target):
        required = Requirement(line)
        version = pinned[canonicalize_name(required.name)]
        assert required.specifier.contains(version), f"{line} and {version}"
    entries = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(pinned)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    other = {"jax": "torch", "torch": "jax"}[target]
    assert other not in pinned


def test_a_changed_requirement_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A requirement that is added changes the header of the lock."""
    before = lock.header("jax")
    monkeypatch.setitem(lock.ALSO, "jax", ["jax", "chex"])
    assert lock.header("jax") != before
