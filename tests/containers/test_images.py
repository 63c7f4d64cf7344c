"""The images: their contents, their user, and the cost of building them again."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.containers.running import APART, JAX, TORCH, Containers
from tools.containers import Builder, Engine, builder, tag_of

pytestmark = pytest.mark.containers

_LARGEST_CHANGE = 5_000_000  # bytes
# The sizes that docs/operations.md states, with room for new releases of the frameworks.
_LARGEST = {"jax": 959e6, "torch": 1.08e9}


@pytest.fixture
def images(prepared: tuple[Engine, str]) -> Iterator[Builder]:
    with builder(*prepared) as images:
        yield images


@pytest.mark.parametrize(("image", "other"), [(JAX, "torch"), (TORCH, "jax")])
def test_an_image_has_one_framework(
    containers: Containers, image: str, other: str
) -> None:
    """Neither image has the other framework, nor a library of models."""
    program = "import importlib.util as u, sys; print(*map(u.find_spec, sys.argv[1:]))"
    done = containers.run(image, "python", "-c", program, other, "flax", "equinox")
    assert done.stdout.split() == ["None"] * 3, done.stderr


@pytest.mark.parametrize("image", [JAX, TORCH])
def test_an_image_is_no_root_and_its_doctor_finds_nothing_broken(
    containers: Containers, image: str
) -> None:
    """By itself a container runs the doctor, as a user by number that cannot log in."""
    user = containers.run(
        image, "sh", "-c", "id -u; id -g", options=("--network=none",)
    )
    assert user.stdout.split() == ["10001", "10001"], user.stderr
    done = containers.run(image)
    assert done.stdout.rstrip().endswith(" 0 broken"), done.stdout + done.stderr
    configured = containers.engine.run(
        "image", "inspect", "--format={{json .Config}}", image
    )
    config = json.loads(configured.stdout)
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_torch_starts_without_a_word(containers: Containers) -> None:
    """`import torch` warns of nothing, and tensors become numpy's arrays."""
    program = "import torch; print(torch.ones(2).numpy().tolist())"
    done = containers.run(TORCH, "python", "-c", program)
    assert (done.stdout, done.stderr) == ("[1.0, 1.0]\n", "")


def test_a_client_needs_no_temporary_folder(containers: Containers) -> None:
    """With a read-only root and no /tmp the client's package is imported."""
    options = tuple(each for each in APART if not each.startswith("--tmpfs"))
    options += ("--read-only-tmpfs=false",) * (containers.engine.program == "podman")
    program = "import bridge_client.torch; print('imported')"
    done = containers.run(TORCH, "python", "-c", program, options=options)
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.parametrize("target", ["jax", "torch"])
def test_an_image_is_small(images: Builder, target: str) -> None:
    """An image with the framework alone is smaller than those with model libraries were."""
    assert images.size(tag_of(target)) < _LARGEST[target]


def test_a_changed_line_costs_one_small_layer(
    images: Builder, containers: Containers, tmp_path: Path
) -> None:
    """A change of the source is in the next image, which has less than 5 MB of new layers."""
    context = _copied_sources(tmp_path)
    tag = f"{containers.prefix}-changed"
    images.build("jax", tag, context=context)
    before = _layers(images, tag)
    with (context / "bridge_client" / "__init__.py").open("a") as file:
        file.write("\nCHANGED = 'by the test'\n")
    begun = time.monotonic()
    images.build("jax", tag, context=context)
    print(f"built again in {time.monotonic() - begun:.0f} s")
    done = containers.run(
        tag, "python", "-c", "import bridge_client as b; print(b.CHANGED)"
    )
    assert done.stdout == "by the test\n", done.stderr
    after = _layers(images, tag)
    kept = [layer for layer in after if layer in before]
    assert len(kept) > len(after) / 2
    new = sum(_newest_sizes(images, tag)[: len(after) - len(kept)])
    assert 0 < new < _LARGEST_CHANGE, f"{new} bytes in new layers"
    images.engine.run("rmi", "--force", tag, is_checked=False)


def test_two_builds_have_the_same_files(
    images: Builder, containers: Containers
) -> None:
    """An image that is built without any cache has the files of the one before."""
    tag = f"{containers.prefix}-again"
    images.build("jax", tag, "--no-cache")
    listing = ("find", "/opt", "/run", "/etc/passwd", "/home", "-printf", "%M %u %p\n")
    first, second = (
        sorted(containers.run(image, *listing, options=()).stdout.splitlines())
        for image in (JAX, tag)
    )
    assert first == second and len(first) > 1000
    images.engine.run("rmi", "--force", tag, is_checked=False)


def test_a_locked_image_has_the_versions_of_the_lock(
    images: Builder, containers: Containers
) -> None:
    """With LOCKED=1 pip checks the hashes, and installs the lock's packages and no other."""
    tag = f"{containers.prefix}-locked"
    images.build("jax", tag, "--build-arg=LOCKED=1")
    program = (
        "import importlib.metadata as m;"
        "print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
    )
    done = containers.run(tag, "python", "-c", program)
    text = (ROOT / "docker" / "jax.lock").read_text()
    locked = set(re.findall(r"^[\w.-]+==\S+", text, re.MULTILINE))
    installed = {each.lower().replace("_", "-") for each in done.stdout.split()}
    assert {each for each in installed if "torch-jax-bridge" not in each} == locked
    images.engine.run("rmi", "--force", tag, is_checked=False)


def test_the_bill_of_materials_names_the_packages(
    images: Builder, tmp_path: Path
) -> None:
    """The stage jax-sbom leaves one file, with Python's packages and Debian's."""
    bill = tmp_path / "bill"
    output = f"--output=type=local,dest={bill}"
    images.build("jax-sbom", "localhost/bridge-test-sbom", output)
    (path,) = bill.iterdir()
    read = json.loads(path.read_text())
    assert (read["bomFormat"], read["specVersion"]) == ("CycloneDX", "1.5")
    urls = {each["purl"].partition("@")[0] for each in read["components"]}
    assert {"pkg:pypi/jaxlib", "pkg:pypi/torch-jax-bridge", "pkg:deb/debian/libc6"} <= (
        urls
    )
    assert "pkg:pypi/torch" not in urls


def _copied_sources(folder: Path) -> Path:
    """Copy the files that the Dockerfile reads."""
    context = folder / "context"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("bridge_client", "bridge_server", "bridge_wire", "docker"):
        shutil.copytree(ROOT / name, context / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".dockerignore"):
        shutil.copy(ROOT / name, context / name)
    return context


def _layers(images: Builder, name: str) -> list[str]:
    """Return the digests of an image's layers, the base's first."""
    form = "--format={{json .RootFS.Layers}}"
    return json.loads(images.engine.run("image", "inspect", form, name).stdout)


def _newest_sizes(images: Builder, name: str) -> list[float]:
    """Return the sizes of an image's layers that are not empty, in bytes, the newest first."""
    done = images.engine.run("history", "--format={{.Size}}", name)
    units = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
    sizes = (
        float(number) * units[unit]
        for number, unit in re.findall(r"^([\d.]+) ?([kMG]?)B$", done.stdout, re.M)
    )
    return [size for size in sizes if size]
