"""Environments of spawned workers: their content, how uv is called, and how they last.

A script takes the place of uv, so that no package index is needed; the last test uses uv itself.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bridge_client import cli, spawn
from bridge_client.remote import environments
from bridge_client.remote.environments import Recipe, environment, recipe_for
from bridge_client.remote.own_wheel import own_wheel
from bridge_wire.errors import CallerError, WorkerCrashed
from tests.calls import squares
from tests.conftest import ROOT, eventually, python_of

# `uv venv` makes an interpreter that is .venv-jax's; `uv pip` keeps its files. With HOLD, `uv venv`
# waits for the file go; with FAIL, `uv pip` fails.
_FAKE = """#!/bin/sh
echo "$@" >> {folder}/calls
for last; do :; done
if [ $1 = venv ]; then
  while [ -n "$HOLD" ] && [ ! -e {folder}/go ]; do sleep 0.05; done
  mkdir -p $last/bin
  printf '#!/bin/sh\\nexec {python} "$@"\\n' > $last/bin/python
  chmod +x $last/bin/python
else
  [ -n "$FAIL" ] && seq 40 >&2 && exit 2
  cp $last {folder}/requirements.txt
fi
"""
_MAKE = """
from bridge_client.remote.environments import Recipe, environment
print(environment(Recipe(("jax",), "3.12")).python)
"""
_HEADER = """# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax",
#   "equinox>=0.13",
# ]
# ///
"""
JAX = Recipe(("jax",), "3.12")


@pytest.fixture
def uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an empty cache, and with a script as the only uv on PATH."""
    folder = tmp_path / "fake"
    folder.mkdir()
    script = folder / "uv"
    script.write_text(_FAKE.format(folder=folder, python=python_of(".venv-jax")))
    script.chmod(0o755)
    monkeypatch.setitem(sys.modules, "uv", None)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def calls(uv: Path) -> list[str]:
    path = uv / "calls"
    return path.read_text().splitlines() if path.exists() else []


def remains() -> list[str]:
    """Return the names in the folder of environments, without locks."""
    names = os.listdir(environments.folder_of_environments())
    return [name for name in names if not name.endswith(".lock")]


@contextlib.contextmanager
def making(uv: Path, name: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A process that makes the environment JAX; its stderr is the file `name`."""
    # `import uv` finds no module in a folder without one.
    program = f"import sys; sys.modules['uv'] = None\n{_MAKE}"
    with (uv / name).open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, **variables},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    with process:
        yield process
        process.kill()


# Content ------------------------------------------------------------------------------------------


def test_environment_is_made_once(uv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """uv makes a relocatable environment and installs the bridge's wheel and the requirements in
    it; the next use runs no uv. Two lines on stderr tell it."""
    first = environment(JAX)
    first.close()
    part = f"{Path(first.python).parent.parent}.part"
    venv, install = calls(uv)
    assert venv == (
        f"venv --relocatable --no-project --allow-existing --python 3.12 {part}"
    )
    assert install == (
        f"pip install --python {part}/bin/python {part}/{own_wheel().name}"
        f" -r {part}/requirements.txt"
    )
    assert (uv / "requirements.txt").read_text() == "jax\n"
    making, ready = capfd.readouterr().err.splitlines()
    assert making.startswith("[bridge] making an environment with jax, once: /")
    assert ready.startswith("[bridge] the environment is ready after ")
    environment(JAX).close()
    assert len(calls(uv)) == 2
    assert capfd.readouterr().err == ""
    assert remains() == [JAX.key()]


def test_wheel_has_the_running_bridge() -> None:
    """The wheel holds every source of the three packages, and the requirements without extras."""
    wheel = zipfile.ZipFile(io.BytesIO(own_wheel().content))
    names = set(wheel.namelist())
    for package in ("bridge_wire", "bridge_client", "bridge_server"):
        for path in (ROOT / package).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            assert wheel.read(name) == path.read_bytes()
    assert not [name for name in names if "__pycache__" in name]
    (metadata,) = [name for name in names if name.endswith("/METADATA")]
    text = wheel.read(metadata).decode()
    assert "Requires-Dist: grpcio>=" in text
    assert "extra ==" not in text
    own_wheel.cache_clear()
    assert own_wheel().content == wheel.fp.getvalue()


def test_other_content_has_another_key(
    uv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requirements, Python, the bridge's own files and uv's index make the key; order does not."""
    keys = [
        JAX.key(),
        Recipe(("jax>=0.8",), "3.12").key(),
        Recipe(("jax",), "3.13").key(),
    ]
    monkeypatch.setenv("UV_INDEX_URL", "https://example.org/simple")
    keys.append(JAX.key())
    other = own_wheel()._replace(digest="0")
    monkeypatch.setattr(environments, "own_wheel", lambda: other)
    keys.append(JAX.key())
    assert len(set(keys)) == len(keys)
    unordered = [
        recipe_for([], names, None, None) for names in (["b", "a"], ["a", "b"])
    ]
    assert unordered[0] == unordered[1]


# Requests -----------------------------------------------------------------------------------------


def test_arguments_come_before_the_header(tmp_path: Path) -> None:
    """A header gives requirements and Python versions where spawn's arguments do not; an
    interpreter alone is used as it is, and a module has no header."""
    (tmp_path / "sim.py").write_text(f"{_HEADER}def f(x): return x\n")

    def recipe(
        requirements: Sequence[str] | None,
        python: str | None,
        target: str = "a=sim.py:f",
    ) -> Recipe | None:
        return recipe_for([target], requirements, python, tmp_path)

    here = os.path.realpath(sys.executable)
    written = ("equinox>=0.13", "jax")
    assert recipe(None, None) == Recipe(written, ">=3.11")
    assert recipe(None, "3.12") == Recipe(written, "3.12")
    assert recipe(["jax"], None) == Recipe(("jax",), ">=3.11")
    assert recipe(["jax"], "/opt/bin/python") == Recipe(("jax",), "/opt/bin/python")
    assert recipe(None, "/opt/bin/python") is None
    assert recipe(None, None, "sim:f") is None
    assert recipe(["jax"], None, "sim:f") == Recipe(("jax",), here)
    assert recipe(None, None, "missing.py:f") is None


@pytest.mark.parametrize(
    ("requirements", "python", "said"),
    [
        (None, "3.12", "packages are unknown: pass requirements="),
        ("jax", None, "expected a list"),
        (["-e ."], None, "no option or path"),
        (["./lib"], None, "no option or path"),
        (["jax\n-r x"], None, "no option or path"),
        (["lib @ file:///lib"], None, "build a wheel"),
        (["libs/mine"], None, "no option or path"),
        (["libs/mine-1.0.whl"], None, "no option or path"),
        (["jax --pre"], None, "no option or path"),
        (["jax>=0.8 --index-url https://x"], None, "no option or path"),
        (["jax; python_version > '3' --pre"], None, "no option or path"),
        (["jax # newest"], None, "no option or path"),
        ([""], None, "no option or path"),
    ],
)
def test_wrong_requirements_are_refused(
    requirements: Sequence[str] | None, python: str | None, said: str
) -> None:
    """Requirements are packages: each other thing is refused with the remedy."""
    with pytest.raises(CallerError, match=said):
        recipe_for(["m:f"], requirements, python, None)


@pytest.mark.parametrize(
    "requirement",
    [
        *("jax", "jax==0.10.2", "jax >= 0.8, < 1", "jax[cuda13]>=0.8", "jax~=0.8.1"),
        *("zope.interface", "jax (>=0.8)", "jax!=0.9.*", "a===1.0+local.1"),
        "jax; python_version >= '3.12' and sys_platform == 'linux'",
        "lib @ https://example.org/lib-1.0-py3-none-any.whl",
        "lib @ git+https://example.org/lib@v1.0#subdirectory=python",
        "lib @ file:///wheels/lib-1.0-py3-none-any.whl",
        "https://example.org/lib-1.0-py3-none-any.whl",
        "git+https://example.org/lib",
    ],
)
def test_requirements_of_each_form_pass(requirement: str) -> None:
    """Names with extras, versions, markers and URLs are requirements."""
    recipe = recipe_for(["m:f"], [requirement], None, None)
    assert recipe is not None and recipe.requirements == (requirement,)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("# dependencies = [", "is malformed"),
        ("# dependencies = 'jax'", "expected a list"),
        ("# [tool.uv]\n# x = 1", "set uv's variables"),
        ("#\n# ///\n\n# /// script\n#", "has 2 .*expected one"),
    ],
)
def test_wrong_header_is_refused(tmp_path: Path, header: str, said: str) -> None:
    """A header that cannot be followed exactly is an error that names the file."""
    (tmp_path / "sim.py").write_text(f"# /// script\n{header}\n# ///\n")
    with pytest.raises(CallerError, match=f"sim.py .*{said}"):
        recipe_for(["sim.py:f"], None, None, tmp_path)


def test_missing_uv_is_told(uv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without uv the error says how to install it, and how to do without it."""
    monkeypatch.setenv("PATH", str(uv.parent))
    with pytest.raises(CallerError, match=r"torch-jax-bridge\[uv\].*pass python="):
        environment(JAX)
    assert remains() == []


# Faults -------------------------------------------------------------------------------------------


def test_failure_of_uv_shows_its_last_lines(
    uv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed installation is an error with uv's last lines, and leaves no environment."""
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(WorkerCrashed, match=r"`uv pip` exited with status 2") as caught:
        environment(JAX)
    lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines[1:]] == [str(n) for n in range(26, 41)]
    assert remains() == []
    monkeypatch.delenv("FAIL")
    environment(JAX).close()
    assert remains() == [JAX.key()]


def test_remains_are_made_again(uv: Path) -> None:
    """Folders of an interrupted process, and those without an interpreter, are made again."""
    folder = environments.folder_of_environments() / JAX.key()
    (folder.parent / f"{folder.name}.part" / "junk").mkdir(parents=True)
    (folder / "bin").mkdir(parents=True)
    environment(JAX).close()
    assert not (folder.parent / f"{folder.name}.part").exists()
    (folder / "bin" / "python").unlink()
    environment(JAX).close()
    assert [call.split()[0] for call in calls(uv)] == ["venv", "pip"] * 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"python": 3}', "\x00"])
def test_malformed_record_is_told(
    uv: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """An environment whose record is malformed is named by `envs` in one sentence, is removed by
    --prune, and made again by spawn."""
    first = environment(JAX)
    first.close()
    record = Path(first.python).parent.parent / environments._RECORD
    record.write_text(text)
    capsys.readouterr()
    assert cli.main(["envs"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("no environments in ")
    assert f"{record} is malformed, so its environment is not used" in shown.err
    assert "Traceback" not in shown.err
    environment(JAX).close()
    assert json.loads(record.read_text())["requirements"] == ["jax"]
    record.write_text(text)
    assert cli.main(["envs", "--prune"]) == 0
    assert remains() == []


def test_two_processes_make_one_environment(uv: Path) -> None:
    """The second process waits, says so, and uses the environment of the first."""
    with making(uv, "first", HOLD="1") as first:
        assert eventually(lambda: len(calls(uv)) == 1, 20)
        with making(uv, "second") as second:
            waits = "waiting for another process"
            assert eventually(lambda: waits in (uv / "second").read_text(), 20)
            (uv / "go").touch()
            outputs = [
                process.communicate(timeout=20)[0] for process in (first, second)
            ]
    assert outputs[0] == outputs[1] != ""
    assert len(calls(uv)) == 2


def test_killed_process_leaves_no_half_environment(uv: Path) -> None:
    """The uv of a killed process holds the lock until it ends; the next process begins anew."""
    with making(uv, "first", HOLD="1") as first:
        assert eventually(lambda: len(calls(uv)) == 1, 20)
        first.kill()
        with making(uv, "second") as second:
            waits = "waiting for another process"
            assert eventually(lambda: waits in (uv / "second").read_text(), 20)
            (uv / "go").touch()
            output = second.communicate(timeout=20)[0]
    assert Path(output.strip()).exists()
    assert [call.split()[0] for call in calls(uv)] == ["venv", "venv", "pip"]


# Use ----------------------------------------------------------------------------------------------


def test_worker_runs_in_its_environment(
    uv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """spawn of a file with a header runs it in an environment, which lasts while it is used."""
    (tmp_path / "sim.py").write_text(f"{_HEADER}def square(x): return x * x\n")
    with spawn("sim.py:square", cwd=tmp_path) as session:
        assert squares(session, 3.0) == [9.0]
        assert list(environments.prune(0)) == []
        assert cli.main(["envs"]) == 0
        assert "in use, Python >=3.11\n  equinox>=0.13 jax\n" in capsys.readouterr().out
    assert cli.main(["envs", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert not row["in_use"]
    assert row["requirements"] == ["equinox>=0.13", "jax"]
    assert cli.main(["envs", "--prune"]) == 0
    assert capsys.readouterr().out == "0 removed\n"
    assert cli.main(["envs", "--prune", "0"]) == 0
    assert capsys.readouterr().out == f"removed {row['path']}\n1 removed\n"
    assert cli.main(["envs"]) == 0
    assert "no environments in" in capsys.readouterr().out
    assert remains() == []


def test_failed_spawn_releases_its_environment(uv: Path, tmp_path: Path) -> None:
    """A worker that cannot start leaves its environment unlocked."""
    with pytest.raises(WorkerCrashed, match="there is no file"):
        spawn("no.py:f", requirements=["jax"], cwd=tmp_path)
    assert len(list(environments.prune(0))) == 1


def test_environments_of_others_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where others can write to the folder, nor behind a link."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = environments.folder_of_environments()
    root.mkdir(parents=True)
    root.chmod(0o777)
    with pytest.raises(CallerError, match="others can write to"):
        environment(Recipe((), sys.executable))
    root.chmod(0o700)
    own = root / "own"
    (own / "bin").mkdir(parents=True)
    (own / "bin" / "python").symlink_to(sys.executable)
    (own / "bridge.json").write_text('{"python": "", "requirements": []}')
    (root / "link").symlink_to(own)
    assert [each.path.name for each in environments.listed()] == ["own"]


@pytest.mark.parametrize("model", [len, {"f": len}, 3])
def test_object_in_place_of_a_target_is_refused(model: object) -> None:
    """A function cannot be sent to another process: the error names the two forms of a target."""
    with pytest.raises(CallerError, match=r"expected its place, such as 'model.py:fun"):
        spawn(model)


@pytest.mark.skipif(
    "BRIDGE_TEST_UV" not in os.environ,
    reason="needs uv, an index, and BRIDGE_TEST_UV=1",
)
def test_real_uv_installs_the_bridge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uv's own environment imports the bridge from itself, with its requirements."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = environment(Recipe((), sys.executable))
    program = "import bridge_server.cli as it; print(it.__file__)"
    variables = {key: text for key, text in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [made.python, "-c", program],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
    )
    made.close()
    assert done.stdout.startswith(str(tmp_path)), done.stderr
