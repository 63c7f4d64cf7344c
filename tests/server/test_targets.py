"""Targets by module and by file: their parsing, loading and errors, and the choice of the
framework. Imports no framework."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge_server.process import frameworks, options, targets
from bridge_wire.commands import VARIABLES
from bridge_wire.errors import CallerError, TargetError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with some modules; imports from it are undone."""
    (tmp_path / "wave.py").write_text(
        "import side\ndef damped(x): return side.twice * x\n"
    )
    (tmp_path / "side.py").write_text("twice = 2\n")
    (tmp_path / "notes.txt").write_text("no code\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "net.py").write_text("import layer\nlayer_of = layer.value\n")
    (tmp_path / "parts" / "layer.py").write_text("value = 7\n")
    (tmp_path / "parts" / "wave.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def load(text: str) -> object:
    return targets.load(targets.parse(text))


# Forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "module", "is_path"),
    [
        ("pkg.mod:fn", "fn", "pkg.mod", False),
        ("pkg.mod:obj.fn", "fn", "pkg.mod", False),
        ("mine=pkg.mod:fn", "mine", "pkg.mod", False),
        ("model.py:fn", "fn", "model", True),
        ("mine=model.py:fn", "mine", "model", True),
        ("./model.py:fn", "fn", "model", True),
        ("/a/b=c/model.py:fn", "fn", "model", True),
        ("mine=/a/b=c/model.py:fn", "mine", "model", True),
        ("/a:b/model.py:fn", "fn", "model", True),
        ("notes.txt:fn", "fn", "notes", True),
    ],
)
def test_forms_of_targets(
    folder: Path, text: str, name: str, module: str, is_path: bool
) -> None:
    """A target is a module or a file, before an attribute and after an optional name."""
    target = targets.parse(text)
    assert (target.name, target.module) == (name, module)
    assert (target.path is not None) == is_path


@pytest.mark.parametrize("text", ["model.py", "model.py:", ":fn", "=model.py:fn"])
def test_other_forms_are_refused(text: str) -> None:
    """A target without a source, an attribute or, after =, a name is refused with both forms."""
    with pytest.raises(TargetError, match=r"module:attribute or .*file.py:attribute"):
        targets.parse(text)


# Files --------------------------------------------------------------------------------------------


def test_file_is_imported_under_its_stem(folder: Path) -> None:
    """The module of a file is `sys.modules[stem]`, and is executed once."""
    damped = load("wave.py:damped")
    assert damped(3) == 6
    assert sys.modules["wave"].damped is damped
    assert load(f"again={folder}/wave.py:damped") is damped


def test_file_imports_its_neighbours_first(folder: Path) -> None:
    """The directory of a file comes first on sys.path, as for `python FILE`."""
    assert load("parts/net.py:layer_of") == 7
    assert sys.path[0] == str(folder / "parts")


def test_home_directory_is_expanded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shell expands the ~ of a target in a Python program, so the worker does."""
    monkeypatch.setenv("HOME", str(folder))
    assert load("~/parts/net.py:layer_of") == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wvae.py:damped", "there is no file 'wvae.py' in .*did you mean 'wave.py'"),
        ("no/wave.py:damped", "its directory .*/no does not exist"),
        ("./parts:fn", "'./parts' is a directory; expected .*parts/layer.py:ATTR"),
        ("notes.txt:fn", "'notes.txt' is not a .py file"),
        ("./wave:damped", "there is no file './wave' in .*did you mean 'wave.py'"),
        ("wave.py:damped.x", "'wave.py.damped' has no attribute 'x'"),
        ("wave.py:dmped", "'wave.py' has no attribute 'dmped'; did you mean 'damped'"),
    ],
)
def test_file_that_cannot_be_served_is_named(
    folder: Path, text: str, said: str
) -> None:
    """Each mistake in a file's name or attribute is one sentence, with similar names."""
    with pytest.raises(TargetError, match=said) as caught:
        load(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["parts/wave.py:x", "parts/json.py:x"])
def test_file_with_the_name_of_a_loaded_module_is_refused(
    folder: Path, text: str
) -> None:
    """A second file of a stem, or one named as a loaded module, never replaces the first."""
    (folder / "parts" / "json.py").write_text("x = 1\n")
    load("wave.py:damped")
    with pytest.raises(TargetError, match=r"a module that is loaded from .*rename the"):
        load(text)


def test_file_that_fails_is_shown_and_forgotten(folder: Path) -> None:
    """An import that fails names the exception and the line, and leaves no half a module."""
    (folder / "bad.py").write_text("\n1 / 0\n")
    with pytest.raises(TargetError, match="failed: ZeroDivisionError") as caught:
        load("bad.py:fn")
    assert f'File "{folder}/bad.py", line 2' in str(caught.value)
    assert "bad" not in sys.modules


# Frameworks ---------------------------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let exactly these frameworks be found."""
    find = importlib.util.find_spec

    def found(name: str) -> object:
        return name in names if name in ("jax", "torch") else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", found)


@pytest.mark.parametrize("name", ["jax", "torch"])
def test_only_framework_is_chosen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Where one framework is installed, a target is of that framework."""
    install(monkeypatch, name)
    assert frameworks.framework_of(["wave.py:damped"]) == name


def test_no_framework_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is installed, the error names the interpreter."""
    install(monkeypatch)
    with pytest.raises(CallerError, match=f"neither .* for {sys.executable}"):
        frameworks.framework_of(["wave.py:damped"])


@pytest.mark.parametrize(
    ("source", "framework"),
    [
        ("import jax.numpy as jnp", "jax"),
        ("from equinox import nn", "jax"),
        ("from torch import nn", "torch"),
        ("def f():\n    import torch", "torch"),
    ],
)
def test_imports_of_the_module_choose_the_framework(
    folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, framework: str
) -> None:
    """Where both are installed, the imports of the target's module decide, without running it."""
    install(monkeypatch, "jax", "torch")
    (folder / "model.py").write_text(f"{source}\nraise SystemExit\n")
    for text in ("model.py:f", "model:f"):
        assert frameworks.framework_of([text]) == framework


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        (["import jax, torch"], "imports both jax and torch: .*--jax-model"),
        (["import math"], "imports neither jax nor torch: .*--torch-model"),
        (["import jax", "import torch"], "start one worker for each"),
    ],
)
def test_undecided_framework_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sources: list[str], said: str
) -> None:
    """Modules that import both, neither or different frameworks need a flag."""
    install(monkeypatch, "jax", "torch")
    texts = []
    for number, source in enumerate(sources):
        (folder / f"m{number}.py").write_text(source)
        texts.append(f"m{number}.py:f")
    with pytest.raises(CallerError, match=said):
        frameworks.framework_of(texts)


def test_every_option_has_a_known_variable() -> None:
    """The table of known variables has one for each flag of `bridge_server`, except --port."""
    names = {action.dest for action in options._parser()._actions}
    names -= options._WITHOUT_VARIABLE
    assert {f"BRIDGE_{name.upper()}" for name in names} <= VARIABLES
