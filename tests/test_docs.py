"""What the documentation shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bridge_client import Session
from bridge_client.commands import doctor
from bridge_client.remote.link import Terms
from bridge_wire.lane.frames import encode
from bridge_wire.pb import bridge_pb2 as pb
from tests.conftest import ROOT, python_of
from tests.house import PACKAGES
from tests.pages import save_programs, shown_after

PROTOCOL = ROOT / "docs" / "protocol.md"
OPERATIONS = ROOT / "docs" / "operations.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def headings_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_program_in_the_readme_works(tmp_path: Path) -> None:
    """The two files that README.md shows find the parameters that it prints."""
    page = ROOT / "README.md"
    save_programs(page, tmp_path)
    (tmp_path / ".venv-jax").symlink_to(ROOT / ".venv-jax")
    shown = run(python_of(".venv-torch"), "train.py", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    found, printed = (
        text.split(", loss ") for text in (shown.stdout, shown_after(page, "train.py"))
    )
    assert found[0] == printed[0]
    assert float(found[1]) < 1e-8


def test_program_in_one_process_in_the_readme_works(tmp_path: Path) -> None:
    """The file that README.md shows for one process prints the gradient that it shows."""
    page = ROOT / "README.md"
    save_programs(page, tmp_path)
    shown = run(python_of(".venv-both"), "both.py", cwd=tmp_path)
    assert (shown.returncode, shown.stdout) == (0, shown_after(page, "both.py")), (
        shown.stderr
    )


def test_program_in_the_page_of_the_jax_client_works(tmp_path: Path) -> None:
    """The two files that docs/jax-client.md shows train the torch module."""
    page = ROOT / "docs" / "jax-client.md"
    save_programs(page, tmp_path)
    (tmp_path / ".venv-torch").symlink_to(ROOT / ".venv-torch")
    shown = run(python_of(".venv-jax"), "fit.py", cwd=tmp_path)
    assert (shown.returncode, shown.stdout) == (0, shown_after(page, "fit.py")), (
        shown.stderr
    )


def test_program_in_the_page_of_the_numpy_client_works(tmp_path: Path) -> None:
    """The two files that docs/numpy.md shows find the minimum that it prints."""
    page = ROOT / "docs" / "numpy.md"
    save_programs(page, tmp_path)
    (tmp_path / ".venv-jax").symlink_to(ROOT / ".venv-jax")
    shown = run(python_of(".venv-both"), "minimum.py", cwd=tmp_path)
    assert (shown.returncode, shown.stdout) == (0, shown_after(page, "minimum.py")), (
        shown.stderr
    )


def test_client_in_the_protocol_page_works(tmp_path: Path, jax_worker: Session) -> None:
    """The client that docs/protocol.md shows gets the value and the gradient that it prints."""
    save_programs(PROTOCOL, tmp_path)
    shown = run(sys.executable, "client.py", jax_worker.address, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == shown_after(PROTOCOL, "client.py")


def test_bytes_in_the_protocol_page_are_those_of_the_messages() -> None:
    """The frames that docs/protocol.md spells out are what its messages encode to."""
    page = PROTOCOL.read_text().split("## A call, byte by byte")[1].split("```")[1]
    page = page.replace("02 ... 1e", " ".join(f"{byte:02x}" for byte in range(2, 0x1F)))
    hexadecimal = re.findall(
        r"^(?:-> | *)((?:[0-9a-f]{2} +)*[0-9a-f]{2})(?: {2,}|$)", page, re.MULTILINE
    )
    frames = [
        pb.LaneRequest(attach=pb.Attach(session=bytes(range(32)))),
        pb.LaneReply(done=pb.Done()),
        pb.LaneRequest(share=pb.Share(base=4096, nbytes=16 << 20)),
        pb.LaneReply(done=pb.Done()),
        pb.LaneRequest(run=pb.Run(program=1, inputs=[4096], outputs=[4160])),
        pb.LaneReply(ran=pb.Ran()),
    ]
    expected = b"".join(encode(frame.SerializeToString()) for frame in frames)
    assert bytes.fromhex(" ".join(hexadecimal)) == expected


def test_operations_page_names_every_option() -> None:
    """The table of options in docs/operations.md has those of `bridge_server --help`, and no
    others."""
    help_text = run(
        python_of(".venv-jax"), "-m", "bridge_server", "--help", cwd=ROOT
    ).stdout
    options = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", help_text, re.MULTILINE))
    assert set(
        re.findall(r"^\| `(--[\w-]+)", OPERATIONS.read_text(), re.MULTILINE)
    ) == options - {"--help", "--print-completion"}


def test_operations_page_shows_what_a_doctor_looks_at(jax_worker: Session) -> None:
    """The checks in docs/operations.md are, one by one, those that a doctor makes on a CPU host."""
    page = (
        OPERATIONS.read_text()
        .split("bridge_client doctor unix:", 1)[1]
        .split("```", 1)[0]
    )
    shown = re.findall(r"^(?:ok|slow|broken) +(.*?)  ", page, re.MULTILINE)
    made = [check.name for check in doctor.examine(jax_worker.address, Terms())]
    assert shown == [name for name in made if name not in ("GPUs to use", "MPS")]


@pytest.mark.parametrize("page", ["transforms.md", "training.md", "security.md"])
def test_tests_that_a_page_names_exist(page: str) -> None:
    """The tests that a page's tables name, and the files that it links to, are there."""
    text = (ROOT / "docs" / page).read_text()
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)[`\[]", text))
    assert len(named) > 10 and named <= defined, named - defined
    links = re.findall(r"\]\((\.\./[^)]+)\)", text)
    assert all((ROOT / "docs" / link).exists() for link in links)


def test_design_page_names_every_room() -> None:
    """The tables in docs/design.md name every file and folder at the top of the three packages."""
    text = (
        (ROOT / "docs" / "design.md")
        .read_text()
        .split("## The rooms")[1]
        .split("\n## ")[0]
    )
    tables = re.findall(
        r"^\*\*`(\w+)`\*\*(.*?)(?=^\*\*`|\Z)", text, re.MULTILINE | re.DOTALL
    )
    assert [package for package, _ in tables] == [
        "bridge_wire",
        "bridge_client",
        "bridge_server",
    ]
    for package, table in tables:
        named = set(re.findall(r"^\| `([\w./]+)`", table, re.MULTILINE))
        files = {path.name for path in (ROOT / package).glob("[!_]*.py")}
        folders = {
            f"{path.parent.name}/" for path in (ROOT / package).glob("*/__init__.py")
        }
        assert named == (files | folders) - {"pb/"}


def test_design_page_names_files_that_exist() -> None:
    """Every file that docs/design.md names is in a package, or below the root."""
    text = (ROOT / "docs" / "design.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    folders = [ROOT, *(ROOT / package for package in PACKAGES)]
    assert len(named) > 20
    assert not [
        name for name in named if not any((f / name).is_file() for f in folders)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    """The files and headings of the repository that a page links to are there."""
    for target, heading in re.findall(
        r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()
    ):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        if heading:
            assert heading in headings_of(linked), (target, heading)
