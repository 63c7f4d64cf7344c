"""The generated files are the pinned generator's, and run on the oldest packages that the
project admits."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GENERATED = "bridge_wire/pb"


def check(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, checkout / "tools" / "generate_proto.py", "--check"],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def copied_checkout(tmp_path: Path) -> Path:
    """A folder with copies of the generator's script, its source, its pin and its output."""
    for folder in ("tools", "proto", GENERATED):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_checked_in_files_are_those_generated() -> None:
    """Every generated file in the tree is byte for byte what the pinned generator writes."""
    run = check(ROOT)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "name", ["bridge_pb2.py", "bridge_pb2.pyi", "bridge_pb2_grpc.py"]
)
def test_truncated_file_fails_the_check(copied_checkout: Path, name: str) -> None:
    """A generated file without its last line fails the check, which names it."""
    path = copied_checkout / GENERATED / name
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    run = check(copied_checkout)
    assert run.returncode == 1
    assert f"{GENERATED}/{name} differs" in run.stderr


def test_missing_file_fails_the_check(copied_checkout: Path) -> None:
    """A generated file that is absent fails the check, which names it."""
    (copied_checkout / GENERATED / "bridge_pb2.pyi").unlink()
    run = check(copied_checkout)
    assert run.returncode == 1
    assert f"{GENERATED}/bridge_pb2.pyi is missing" in run.stderr


def test_superfluous_file_fails_the_check(copied_checkout: Path) -> None:
    """A file that no source generates fails the check, which names it."""
    (copied_checkout / GENERATED / "old_pb2.py").write_text("")
    run = check(copied_checkout)
    assert run.returncode == 1
    assert f"{GENERATED}/old_pb2.py is not generated from the source" in run.stderr


def test_unpinned_generator_fails_the_check(copied_checkout: Path) -> None:
    """A generator other than the pinned one is refused before anything is compared."""
    pyproject = copied_checkout / "pyproject.toml"
    pyproject.write_text(
        re.sub("grpcio-tools==[0-9.]+", "grpcio-tools==0.0.1", pyproject.read_text())
    )
    run = check(copied_checkout)
    assert run.returncode == 1
    assert "generated with 0.0.1" in run.stderr


@pytest.mark.parametrize(
    ("package", "file", "header"),
    [
        ("grpcio", "bridge_pb2_grpc.py", r"GRPC_GENERATED_VERSION = '([0-9.]+)'"),
        ("protobuf", "bridge_pb2.py", r"# Protobuf Python Version: ([0-9.]+)"),
    ],
)
def test_dependency_floor_is_the_generated_code_s(
    package: str, file: str, header: str
) -> None:
    """The oldest grpcio and protobuf that the project admits are those its generated code asks
    for."""
    match = re.search(header, (ROOT / GENERATED / file).read_text())
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "dependencies"
    ]
    assert match and f"{package}>={match[1]}" in dependencies
