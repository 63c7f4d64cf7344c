"""The set-up finds interpreters that run, says what it lacks, and takes no failed environment
for ready."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/setup.py of a checkout in a temporary folder, with no interpreter on PATH and no
    pyenv."""
    for name in ("tools/setup.py", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    spec = importlib.util.spec_from_file_location(
        "project_setup", tmp_path / "tools" / "setup.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PATH", str(tmp_path / "pyenv" / "shims"))
    monkeypatch.delenv("PYENV_ROOT", raising=False)
    return module


def write_program(path: Path, line: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def write_python(path: Path, major: int, minor: int, micro: int) -> str:
    """Write a program that answers the set-up's probe as that version of Python does."""
    return write_program(path, f"""echo '[{major}, {minor}, {micro}, "{path}"]'""")


def test_shim_that_does_not_run_leads_to_pyenv_s_newest(
    setup: ModuleType, tmp_path: Path
) -> None:
    """Where a shim fails because its version is not active, the newest such version of its pyenv
    is taken."""
    pyenv = tmp_path / "pyenv"
    write_program(pyenv / "shims" / "python3.13", "exit 127")
    write_python(pyenv / "versions" / "3.13.2" / "bin" / "python3.13", 3, 13, 2)
    newest = write_python(
        pyenv / "versions" / "3.13.10" / "bin" / "python3.13", 3, 13, 10
    )
    write_python(pyenv / "versions" / "3.13.11t" / "bin" / "python3.13", 3, 13, 11)
    assert setup.find_python(13) == setup.Interpreter(newest, (3, 13, 10))


def test_interpreter_of_the_next_environment_is_newer(
    setup: ModuleType, tmp_path: Path
) -> None:
    """.venv-jax-next gets a Python newer than the others', or none."""
    write_python(tmp_path / "pyenv" / "shims" / "python3.12", 3, 12, 1)
    assert setup.find_newer_python(
        setup.Interpreter("python3.11", (3, 11, 7))
    ).version == (
        3,
        12,
        1,
    )
    assert setup.find_newer_python(setup.Interpreter("python3.12", (3, 12, 1))) is None


def test_python_3_11_is_preferred(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user names another, a Python 3.11 is taken where one runs, even beside a newer
    one."""
    newer = write_python(tmp_path / "bin" / "python3", 3, 14, 0)
    monkeypatch.setattr(sys, "executable", newer)
    assert setup.choose_python(None).version == (3, 14, 0)
    write_python(tmp_path / "pyenv" / "shims" / "python3.11", 3, 11, 7)
    assert setup.choose_python(None).version == (3, 11, 7)
    assert setup.choose_python(newer).version == (3, 14, 0)


def test_python_too_old_is_refused(setup: ModuleType, tmp_path: Path) -> None:
    """A Python older than 3.11 is refused with its version and what to do."""
    old = write_python(tmp_path / "python3.9", 3, 9, 18)
    with pytest.raises(
        setup.SetupFailed,
        match=r"3\.11 or newer is needed, .* is Python 3\.9\.18; .*PYTHON=",
    ):
        setup.choose_python(old)


def test_changed_requirement_makes_environments_stale(
    setup: ModuleType, tmp_path: Path
) -> None:
    """The stamp's key changes with a requirement, and not with the settings of a linter."""
    pyproject = tmp_path / "pyproject.toml"
    key = setup.requirements_key(None)
    pyproject.write_text(
        pyproject.read_text().replace("line-length = 100", "line-length = 88")
    )
    assert setup.requirements_key(None) == key
    pyproject.write_text(
        pyproject.read_text().replace("torch==2.13.0", "torch==2.13.1")
    )
    assert setup.requirements_key(None) != key


def test_failed_environment_is_not_current(setup: ModuleType) -> None:
    """An environment whose installation failed has no stamp, and the failure quotes the end of
    the log."""
    environment = setup.Environment("broken", "", packages=("./no-such-package",))
    with pytest.raises(
        setup.SetupFailed,
        match=r"(?s)\.venv-broken failed: .*no-such-package.*setup\.log",
    ):
        setup.create(environment, setup.probe(sys.executable), "key")
    assert not environment.is_current("key")
