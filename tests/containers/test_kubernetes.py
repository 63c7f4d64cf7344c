"""The manifests of deploy/kubernetes, played by podman."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, eventually
from tests.containers.running import JAX, TORCH
from tools.containers import Engine

pytestmark = pytest.mark.containers

MANIFESTS = ROOT / "deploy" / "kubernetes"
_IMAGES = {"bridge-jax": JAX, "bridge-torch": TORCH}


def with_ordinary_containers(text: str) -> str:
    """Return a manifest for `podman kube play`, which refuses native sidecars (4.3 and 5.4): they
    become ordinary containers. The client waits for the worker by itself."""
    documents: list[dict[str, Any]] = list(yaml.safe_load_all(text))
    for document in documents:
        if document["kind"] == "Pod":
            spec = document["spec"]
            sidecars = spec.pop("initContainers")
            assert [each.pop("restartPolicy") for each in sidecars] == ["Always"]
            spec["containers"] = sidecars + spec["containers"]
            for container in spec["containers"]:
                container["image"] = _IMAGES[container["image"]]
    return yaml.safe_dump_all(documents)


@pytest.fixture
def played(engine: Engine, tmp_path: Path) -> Iterator[Engine]:
    """The engine, which plays pod.yaml."""
    if engine.program != "podman":
        pytest.skip("only podman plays manifests")
    path = tmp_path / "pod.yaml"
    text = (MANIFESTS / "pod.yaml").read_text()
    path.write_text(with_ordinary_containers(text))
    engine.run("kube", "down", str(path), is_checked=False)
    engine.run("kube", "play", "--network=none", str(path))
    yield engine
    engine.run("kube", "down", str(path))


def test_the_pod_trains(played: Engine) -> None:
    """The documented pod trains over memfd; its containers have no privilege and a read-only
    root."""
    played.run("wait", "train-client", timeout_s=180)
    log = played.run("logs", "train-client")
    assert log.stdout == "lane local, memory memfd: amplitude 2.00, rate 0.30\n"
    for name in ("train-worker", "train-client"):
        (seen,) = json.loads(played.run("inspect", name).stdout)
        assert seen["HostConfig"]["ReadonlyRootfs"] and not seen["EffectiveCaps"]
        assert seen["Config"]["User"].split(":")[0] == "10001"
    assert eventually(
        lambda: "bridge_server ready" in played.run("logs", "train-worker").stdout
    )
