"""What importing each part of the project loads. A fresh interpreter answers, never this one.

The rule: torch is imported in four places, jax in four places, and neither comes with anything
else; `bridge_wire` and `bridge_client` do without numpy too. The contracts in `pyproject.toml`
prove it from the sources; here it is seen at run time. Each guard is also shown to fail.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINTER = Path(sys.executable).parent / "lint-imports"
PACKAGES = ("bridge_wire", "bridge_server", "bridge_client")
FRAMEWORKS_OF = {
    "bridge_server.jax_runtime": {"jax"},
    "bridge_server.torch_runtime": {"torch"},
    "bridge_server.torch_via_xla": {"jax", "torch"},
    "bridge_client.jax": {"jax"},
    "bridge_client.jax.flax": {"jax"},
    "bridge_client.torch": {"torch"},
    "bridge_client.inproc": {"jax", "torch"},
    # NumPy alone.
    "bridge_client.numpy": set(),
    "bridge_client.commands.gradients": set(),
}


def modules_of(package: str) -> list[str]:
    """Return the names of a package's modules, found in the file system: nothing is imported for
    it.

    Without `__main__`, which is there to be run: what it does is in other modules.
    """
    paths = (
        path.relative_to(ROOT).with_suffix("")
        for path in (ROOT / package).rglob("*.py")
    )
    return sorted(
        ".".join(path.parts).removesuffix(".__init__")
        for path in paths
        if path.name != "__main__"
    )


def framework_free_modules_of(package: str) -> list[str]:
    """Return the modules of a package that may import no framework."""
    return [
        name
        for name in modules_of(package)
        if not any(f"{name}.".startswith(f"{own}.") for own in FRAMEWORKS_OF)
    ]


def frameworks_loaded_by(*modules: str) -> set[str]:
    """Return which of jax, torch and numpy a fresh interpreter has loaded after importing the
    modules."""
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(*{'jax', 'torch', 'numpy'} & sys.modules.keys())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the import linter on the packages in a folder that also holds pyproject.toml."""
    wide = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [LINTER, "--no-cache"],
        cwd=folder,
        env=wide,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def copied_sources(tmp_path: Path) -> Path:
    """A folder with copies of the three packages and of pyproject.toml."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package,
            tmp_path / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_wire_loads_neither_framework_nor_numpy() -> None:
    """Importing bridge_wire with all its modules loads neither jax nor torch nor numpy."""
    assert frameworks_loaded_by(*framework_free_modules_of("bridge_wire")) == set()


def test_client_without_an_adapter_loads_neither_framework_nor_numpy() -> None:
    """Importing bridge_client without its framework modules loads neither jax nor torch nor
    numpy."""
    assert frameworks_loaded_by(*framework_free_modules_of("bridge_client")) == set()


def test_server_without_a_runtime_loads_no_framework() -> None:
    """Importing bridge_server without its runtimes loads neither jax nor torch."""
    assert not frameworks_loaded_by(*framework_free_modules_of("bridge_server")) & {
        "jax",
        "torch",
    }


def test_tests_of_wire_load_no_framework() -> None:
    """The tests of bridge_wire, and the fixtures that they use, load neither jax nor torch."""
    tests = [
        f"tests.wire.{path.stem}"
        for path in (ROOT / "tests" / "wire").glob("test_*.py")
    ]
    assert len(tests) > 10
    assert not frameworks_loaded_by("tests.conftest", *tests) & {"jax", "torch"}


@pytest.mark.parametrize(
    "module",
    [
        name
        for package in PACKAGES
        for name in modules_of(package)
        if name in FRAMEWORKS_OF
    ],
)
def test_framework_module_loads_its_own_framework_only(module: str) -> None:
    """A module that belongs to one framework loads that one and not the other."""
    assert frameworks_loaded_by(module) & {"jax", "torch"} == FRAMEWORKS_OF[module]


def test_client_of_torch_loads_no_compiler() -> None:
    """Importing bridge_client.torch loads Dynamo only where torch itself does: that would take
    seconds, and a writable temporary directory."""
    program = (
        "import sys, torch\n"
        "alone = 'torch._dynamo' in sys.modules\n"
        "import bridge_client.torch\n"
        "print(alone, 'torch._dynamo' in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    alone, together = run.stdout.split()
    assert together == alone, run.stderr


@pytest.mark.parametrize("framework", ["jax", "torch", "numpy"])
def test_fresh_interpreter_guard_reports_a_framework(framework: str) -> None:
    """The guard above names a framework that comes with an import of bridge_wire: it can fail."""
    assert framework in frameworks_loaded_by("bridge_wire", framework)


def test_linter_accepts_the_sources_as_they_are(copied_sources: Path) -> None:
    """The import contracts hold for an unchanged copy of the packages."""
    run = lint(copied_sources)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("module", "imported", "contract"),
    [
        (
            "bridge_wire/extra.py",
            "bridge_server.cli",
            "bridge_wire imports neither of its users",
        ),
        ("bridge_wire/extra.py", "numpy", "bridge_wire imports neither of its users"),
        (
            "bridge_server/extra.py",
            "bridge_client",
            "bridge_server does not import bridge_client",
        ),
        (
            "bridge_client/extra.py",
            "bridge_server.cli",
            "bridge_client imports bridge_server in",
        ),
        ("bridge_server/extra.py", "jax.numpy", "jax is imported in"),
        ("bridge_client/extra.py", "flax.linen", "jax is imported in"),
        ("bridge_client/extra.py", "torch.nn", "torch is imported in"),
        ("bridge_client/numpy/extra.py", "torch.nn", "torch is imported in"),
        ("bridge_client/numpy/extra.py", "jax.numpy", "jax is imported in"),
        ("bridge_client/extra.py", "numpy", "numpy is imported in"),
        (
            "bridge_wire/memory/extra.py",
            "bridge_wire.lane.frames",
            "bridge_wire's rooms",
        ),
        (
            "bridge_client/remote/extra.py",
            "bridge_client.commands",
            "bridge_client's rooms",
        ),
        (
            "bridge_server/process/extra.py",
            "bridge_server.serving",
            "bridge_server's rooms",
        ),
    ],
)
def test_linter_rejects_a_forbidden_import(
    copied_sources: Path, module: str, imported: str, contract: str
) -> None:
    """One import against the rule, in an otherwise unchanged copy, breaks the contract that
    forbids it."""
    (copied_sources / module).write_text(f"import {imported}\n")
    run = lint(copied_sources)
    broken = [line for line in run.stdout.splitlines() if " BROKEN" in line]
    assert run.returncode != 0
    assert any(line.startswith(contract) for line in broken), run.stdout


def test_linter_rejects_a_room_without_a_floor(copied_sources: Path) -> None:
    """A new room that no layer of the contract names breaks it."""
    (copied_sources / "bridge_wire" / "extra.py").write_text("import os\n")
    run = lint(copied_sources)
    assert run.returncode != 0
    assert "bridge_wire.extra" in run.stdout


@pytest.mark.parametrize(
    ("environment", "present", "absent"),
    [("jax", "jax", "torch"), ("torch", "torch", "jax")],
)
def test_environment_of_one_framework_lacks_the_other(
    environment: str, present: str, absent: str
) -> None:
    """The worker's .venv-jax cannot import torch, and the trainer's .venv-torch cannot import
    jax."""
    program = (
        "import importlib.util, sys; print([bool(importlib.util.find_spec(name)) for name in"
        " sys.argv[1:]])"
    )
    python = ROOT / f".venv-{environment}" / "bin" / "python"
    run = subprocess.run(
        [python, "-c", program, present, absent],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout.strip() == "[True, False]", run.stderr
