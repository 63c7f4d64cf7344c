"""Images of one's own, as docs/operations.md describes them."""

import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, eventually
from tests.containers.running import APART, SOCKET, TORCH, Containers, secrets_in
from tests.containers.test_compose import DOCKER, Project
from tools.containers import CACHE, Engine, tag_of

pytestmark = pytest.mark.containers

_METRICS = """
FROM bridge-jax
USER root
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \\
    pip --python /opt/bridge install prometheus-client
USER 10001:10001
"""


def _build(engine: Engine, folder: Path, text: str, tag: str) -> str:
    """Build a Dockerfile on the image of tests; return the tag."""
    (folder / "Dockerfile").write_text(text.replace("bridge-jax", tag_of("jax")))
    secret = f"--secret=id=pip,src={CACHE / 'pip.conf'}"
    options = ("--network=host", secret, f"--tag={tag}")
    engine.run("build", *options, str(folder), timeout_s=300)
    return tag


def test_three_lines_make_an_image_of_ones_own(
    containers: Containers, tmp_path: Path
) -> None:
    """The page's Dockerfile, with the example's model, serves this model by its own command."""
    page = (ROOT / "docs" / "operations.md").read_text()
    (text,) = re.findall(r"^```\n(FROM bridge-jax\n.*?)^```$", page, re.M | re.S)
    assert len(text.splitlines()) == 3
    shutil.copy(DOCKER / "example" / "model.py", tmp_path)
    (tmp_path / "model.py").chmod(0o644)
    image = _build(containers.engine, tmp_path, text, "localhost/bridge-test-own")
    # no mount at /app, which would hide the image's own
    options = (*APART, f"--volume={containers.volume}:/run/bridge")
    worker = f"{containers.prefix}-own"
    containers.engine.run("run", "--detach", f"--name={worker}", *options, image)
    containers.wait_healthy(worker, SOCKET)
    done = containers.run(TORCH, "bridge_client", "describe", SOCKET)
    assert "damped(t, amplitude, rate)" in done.stdout, done.stderr


def test_metrics_are_scraped(engine: Engine, app: Path, tmp_path: Path) -> None:
    """With prometheus-client added to its image, the worker of compose.observe.yaml serves numbers
    to containers of the network `metrics`."""
    image = _build(engine, tmp_path, _METRICS, "localhost/bridge-test-metrics")
    secrets = secrets_in(tmp_path / "secrets", "worker")
    project = Project(
        engine,
        "bridge-test-observe",
        DOCKER / "compose.tcp.yaml",
        DOCKER / "compose.observe.yaml",
        BRIDGE_SECRETS=str(secrets),
        BRIDGE_METRICS_IMAGE=image,
    )
    project.close()
    try:
        status, output = project.run("up", "--no-build", "--detach", "worker")
        assert status == 0, output
        program = (
            "import urllib.request as u;"
            "print(u.urlopen('http://worker:9100/metrics', timeout=5).read().decode())"
        )

        def scraped(network: str) -> str:
            option = f"--network={project.name}_{network}"
            command = ("python", "-c", program)
            done = engine.run("run", "--rm", option, TORCH, *command, is_checked=False)
            return done.stdout

        assert eventually(lambda: "bridge_uptime_seconds" in scraped("metrics"), 60)
        assert "bridge_requests_total" in scraped("metrics")
    finally:
        project.close()
