"""docs/api.txt: the public names and signatures, and the tool that writes it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import api

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with copies of the sources, the tool and its file."""
    skipped = shutil.ignore_patterns("__pycache__")
    for folder in ("bridge_client", "bridge_server", "bridge_wire"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skipped)
    for file in ("tools/api.py", "docs/api.txt"):
        (tmp_path / file).parent.mkdir()
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def run(checkout: Path, *args: str) -> subprocess.CompletedProcess[str]:
    tool = [sys.executable, checkout / "tools" / "api.py", *args]
    return subprocess.run(tool, capture_output=True, text=True, timeout=60)


def test_checked_in_names_are_those_of_the_sources() -> None:
    """After a change of public names, `tools/api.py` writes the file again."""
    assert api.SNAPSHOT.read_text() == api.dump()


def test_dump_names_functions_methods_properties_and_errors() -> None:
    """The dump has the defaults of arguments, and no names that begin with an underscore."""
    lines = api.dump().splitlines()
    assert "bridge_client.Session.framework: str" in lines
    assert "class bridge_wire.errors.SessionClosed(CallerError)" in lines
    assert "bridge_client.torch.RemoteJaxFunction.method(self, name: str)" in "".join(
        lines
    )
    (line,) = (line for line in lines if line.startswith("bridge_client.connect("))
    assert "retry_s: float=30.0" in line
    names = [line.partition("(")[0].rpartition(".")[2] for line in lines]
    assert not [name for name in names if name[:1] == "_" and name[:2] != "__"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("retry_s: float = 30.0,", "retry_s: float = 20.0,"),
        ("    retries: int = 0,\n", ""),
        ("def connect(", "def connected("),
    ],
)
def test_change_of_a_public_name_is_seen(
    checkout: Path, before: str, after: str
) -> None:
    """--check tells the lines that are gone, with status 1; writing the file mends it."""
    assert run(checkout, "--check").returncode == 0
    path = checkout / "bridge_client" / "remote" / "connecting.py"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    done = run(checkout, "--check")
    assert done.returncode == 1
    assert "1 lines of it are gone" in done.stderr
    assert "\n-bridge_client.connect(" in done.stdout
    assert run(checkout).returncode == 0
    assert run(checkout, "--check").returncode == 0


def test_new_name_is_no_break() -> None:
    """Lines that come are told apart from lines that go."""
    assert api.breaks("a\nb\n", "a\nb\nc\n") == []
    assert api.breaks("a\nb\n", "b(x)\na\n") == ["b"]
