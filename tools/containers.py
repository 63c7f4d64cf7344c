#!/usr/bin/env python3
"""Container engine, base image and images of docker/Dockerfile, for tests/containers.

Standard library only. The engine is podman or docker, whichever is on PATH. Podman gets
configuration, storage and temporary folders of its own below the user's cache, so a run changes
nothing of the machine. The base image is the one that is named, or the official python image,
present or pulled, or else a Debian that debootstrap makes once and the cache keeps.

    tools/containers.py [--engine podman|docker] [--base IMAGE]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import http.server
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    / "torch-jax-bridge"
    / "containers"
)
ENGINES = ("podman", "docker")
TARGETS = ("jax", "torch")
OFFICIAL_BASE = "docker.io/library/python:3.11-slim"
OWN_BASE = "localhost/torch-jax-bridge-base:bookworm"
_DEBIAN = "bookworm"  # its Python is 3.11
_PACKAGES = "ca-certificates,python3,python3-pip,python3-venv"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
_PULL_S = 180.0
_BUILD_S = 1200.0
_DEBOOTSTRAP_S = 900.0
# More descriptors or processes than the hard limit need a capability that root may lack.
_MOST_FILES = _MOST_PROCESSES = 4096

CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
[network]
network_backend = "netavark"
network_config_dir = "{cache}/networks"
[engine]
cgroup_manager = "{cgroups}"
events_logger = "file"
image_copy_tmp_dir = "{cache}/tmp"
runtime = "{runtime}"
tmp_dir = "{run}/libpod"
"""
STORAGE_CONF = """\
[storage]
driver = "overlay"
graphroot = "{cache}/storage"
runroot = "{run}/storage"
"""


class ContainersFailed(Exception):
    """A step failed; the text names the step, the end of its output and a remedy."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """A container engine: its program, and the environment that its commands run in."""

    program: str
    environment: Mapping[str, str]

    def run(
        self,
        *arguments: str,
        timeout_s: float = 120.0,
        is_checked: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of the engine and return its output.

        Raises:
          ContainersFailed: it did not end with status 0, and is checked, or not in time.
        """
        return execute(
            [self.program, *arguments],
            self.environment,
            timeout_s=timeout_s,
            is_checked=is_checked,
        )

    def has_image(self, name: str) -> bool:
        """Whether an image of this name is in the engine's storage."""
        found = self.run("image", "inspect", name, is_checked=False)
        return found.returncode == 0


def execute(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    timeout_s: float,
    is_checked: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output as text.

    Raises:
      ContainersFailed: it did not end with status 0, and is checked, or not in time.
    """
    text = " ".join(command)
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as expired:
        raise ContainersFailed(
            f"`{text}` was still running after {timeout_s:.0f} s"
        ) from expired
    if is_checked and done.returncode != 0:
        lines = (done.stdout + done.stderr).splitlines()[-15:]
        end = "\n".join("    " + line for line in lines)
        raise ContainersFailed(
            f"`{text}` exited with {done.returncode}. Its output's end:\n{end}"
        )
    return done


def say(text: str) -> None:
    print(f"containers: {text}", flush=True)


# Engine


def find_engine(name: str | None = None) -> Engine:
    """Return the named engine, or the first of podman and docker that is on PATH.

    Raises:
      ContainersFailed: there is none.
    """
    for each in [name] if name else ENGINES:
        if shutil.which(each):
            settings = podman_settings() if each == "podman" else {}
            return Engine(each, os.environ | settings)
    raise ContainersFailed(
        f"found no {name or ' or '.join(ENGINES)} on PATH; install one, on Debian and Ubuntu as"
        " root: apt-get install --no-install-recommends podman buildah runc netavark"
        " aardvark-dns catatonit iptables debootstrap"
    )


def podman_settings() -> dict[str, str]:
    """Write podman's configuration below the cache; return the variables that name it."""
    run = Path("/run" if os.access("/run", os.W_OK) else tempfile.gettempdir())
    run /= f"torch-jax-bridge-containers-{os.geteuid()}"
    for folder in (CACHE / "tmp", CACHE / "networks", run):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    values = {
        "cache": str(CACHE),
        "run": str(run),
        "runtime": "crun" if shutil.which("crun") else "runc",
        "cgroups": "systemd" if Path("/run/systemd/system").is_dir() else "cgroupfs",
        "files": str(_at_most(resource.RLIMIT_NOFILE, _MOST_FILES)),
        "processes": str(_at_most(resource.RLIMIT_NPROC, _MOST_PROCESSES)),
    }
    texts = {"containers.conf": CONTAINERS_CONF, "storage.conf": STORAGE_CONF}
    for name, text in texts.items():
        (CACHE / name).write_text(text.format(**values))
    return {
        "CONTAINERS_CONF": str(CACHE / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(CACHE / "storage.conf"),
        # Where buildah keeps the cache mounts of builds.
        "TMPDIR": str(CACHE / "tmp"),
    }


def _at_most(which: int, limit: int) -> int:
    hard = resource.getrlimit(which)[1]
    return limit if hard == resource.RLIM_INFINITY else min(limit, hard)


def compose_command(engine: Engine) -> list[str]:
    """Return the command that runs Compose files; podman-compose is installed into the cache."""
    if engine.program == "docker":
        return ["docker", "compose"]
    folder = CACHE / "podman-compose"
    program = folder / "bin" / "podman-compose"
    if not program.exists():
        venv.create(folder, clear=True)
        python = str(folder / "bin" / "python")
        _pip("--python", python, "install", "podman-compose>=1.5")
    return [str(program)]


# Base image


def base_image(engine: Engine, given: str | None = None) -> str:
    """Return the name of an image with Python 3.11 and pip, which is in the engine's storage.

    Raises:
      ContainersFailed: none was named, none can be pulled, and debootstrap cannot make one.
    """
    if given:
        if not engine.has_image(given):
            engine.run("pull", given, timeout_s=_PULL_S)
        return given
    for present in (OFFICIAL_BASE, OWN_BASE):
        if engine.has_image(present):
            return present
    with contextlib.suppress(ContainersFailed):
        engine.run("pull", OFFICIAL_BASE, timeout_s=_PULL_S)
        return OFFICIAL_BASE
    if not shutil.which("debootstrap", path=_PATH) or os.geteuid() != 0:
        raise ContainersFailed(
            f"{OFFICIAL_BASE} cannot be pulled, and only root can make a base image, with"
            " debootstrap installed; name an image that has Python 3.11 and pip: BASE=IMAGE"
        )
    _import_debian(engine)
    return OWN_BASE


_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def _import_debian(engine: Engine) -> None:
    """Make a Debian with Python by debootstrap, and import it as an image."""
    root = CACHE / "debian"
    archive = CACHE / "debian.tar"
    if not archive.exists():
        say(f"{OFFICIAL_BASE} cannot be pulled; debootstrap makes a base image")
        shutil.rmtree(root, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}"]
        execute(
            [*command, _DEBIAN, str(root)],
            {**os.environ, "PATH": _PATH},
            timeout_s=_DEBOOTSTRAP_S,
        )
        _make_like_the_official(root)
        part = archive.with_suffix(".part")
        # numeric owners, so that no name of this machine counts
        tar = ["tar", "--numeric-owner", "-C", str(root), "-cf", str(part), "."]
        execute(tar, os.environ, timeout_s=_BUILD_S)
        part.rename(archive)
        shutil.rmtree(root)
    engine.run(
        "import",
        "--change=ENV LANG=C.UTF-8",
        '--change=CMD ["python3"]',
        str(archive),
        OWN_BASE,
        timeout_s=_BUILD_S,
    )


def _make_like_the_official(root: Path) -> None:
    """Name python as in the official image, and trust the certificates of this machine."""
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    if Path(_CERTIFICATES).exists():
        shutil.copy(_CERTIFICATES, root / _CERTIFICATES.lstrip("/"))
    for downloads in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / downloads, ignore_errors=True)


# Images


@dataclasses.dataclass(frozen=True)
class Builder:
    """Builds targets of the Dockerfile on one base image, with packages of this machine's pip."""

    engine: Engine
    base: str
    pip_conf: Path
    arguments: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def build(
        self,
        target: str,
        tag: str,
        *options: str,
        context: Path = ROOT,
    ) -> None:
        """Build a target and tag the image.

        Raises:
          ContainersFailed: the build failed.
        """
        arguments = {"BASE": self.base, **self.arguments}
        given = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        is_podman = self.engine.program == "podman"
        self.engine.run(
            "build",
            "--network=host",
            *(["--pull=never"] if is_podman else []),
            f"--secret=id=pip,src={self.pip_conf}",
            f"--file={context / 'docker' / 'Dockerfile'}",
            f"--target={target}",
            f"--tag={tag}",
            *given,
            *options,
            str(context),
            timeout_s=_BUILD_S,
        )

    def size(self, name: str) -> int:
        """Return the size of an image in bytes."""
        text = self.engine.run("image", "inspect", "--format={{.Size}}", name).stdout
        return int(text)


@contextlib.contextmanager
def builder(engine: Engine, base: str) -> Iterator[Builder]:
    """Yield a builder; while it lives, a folder with torch's wheel is served on loopback.

    PyPI's torch for Linux has gigabytes of CUDA. A machine that keeps the CPU's wheel in a folder
    of pip's `find-links` needs no other index.
    """
    lines = ["[global]"]
    if base == OWN_BASE and Path(_CERTIFICATES).exists():
        lines.append(f"cert = {_CERTIFICATES}")
    conf = CACHE / "pip.conf"
    conf.parent.mkdir(parents=True, exist_ok=True)
    wheels = folder_of_torch()
    if wheels is None:
        conf.write_text("\n".join([*lines, ""]))
        yield Builder(engine, base, conf)
        return
    with _served(wheels) as address:
        # In the secret and not an argument: a layer's key has the arguments, and the port differs.
        conf.write_text("\n".join([*lines, f"find-links = {address}", ""]))
        index = {"TORCH_INDEX": "https://pypi.org/simple"}
        yield Builder(engine, base, conf, index)


def folder_of_torch() -> Path | None:
    """Return the folder of pip's find-links that has a wheel of torch for the CPU."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    done = subprocess.run(command, capture_output=True, text=True)
    named = f"{os.environ.get('PIP_FIND_LINKS', '')} {done.stdout}".split()
    for folder in map(Path, named):
        if folder.is_dir() and any(folder.glob("torch-*+cpu-*.whl")):
            return folder
    return None


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port of loopback; yield the address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments]
    execute(command, os.environ, timeout_s=_BUILD_S)


def tag_of(target: str) -> str:
    """Return the name of a target's image in tests."""
    return f"localhost/bridge-test-{target}:latest"


def prepare(engine_name: str | None, base_name: str | None) -> tuple[Engine, str]:
    """Find the engine, provide the base and build the images; return the engine and the base.

    Raises:
      ContainersFailed: a step failed.
    """
    engine = find_engine(engine_name)
    base = base_image(engine, base_name)
    say(f"engine {engine.program}, base {base}")
    with builder(engine, base) as images:
        for target in TARGETS:
            begun = time.monotonic()
            images.build(target, tag_of(target))
            megabytes = images.size(tag_of(target)) / 1e6
            elapsed_s = time.monotonic() - begun
            say(f"{tag_of(target)}: {megabytes:.0f} MB, built in {elapsed_s:.0f} s")
    return engine, base


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the images for tests.")
    parser.add_argument("--engine", choices=ENGINES, help="default: the first on PATH")
    parser.add_argument("--base", help="an image with Python 3.11 and pip")
    options = parser.parse_args()
    try:
        engine, _ = prepare(options.engine, options.base)
        compose_command(engine)
    except ContainersFailed as failure:
        print(f"containers: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
