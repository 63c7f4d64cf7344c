"""Models whose source is a text: of spawn, of a notebook's cell, and of a decorated function."""

import functools
import gc
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bridge_client
from bridge_client import spawn
from bridge_client.commands import notebook
from bridge_client.numpy import RemoteFunction
from bridge_client.remote import environments
from bridge_client.remote.sources import SourceFile, source_of
from bridge_client.session import ModelInfo, as_html
from bridge_client.torch import RemoteJaxFunction, remote
from bridge_wire.errors import CallerError, RemoteModelError, WorkerCrashed
from tests.conftest import eventually, python_of
from tests.workers import is_running, start_program

JAX = python_of(".venv-jax")
_DAMPED = """
import jax.numpy as jnp

def damped(x, rate=1.0):
    "Decays."
    if x.ndim != 1:
        raise ValueError("one axis only")
    return jnp.exp(-rate * x)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files, which is empty again after each test."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    left = [path for path in folder.iterdir() if path.name.startswith("bridge-source")]
    for path in folder.iterdir():
        path.rmdir()
    folder.rmdir()
    assert not left


# spawn(source=...) --------------------------------------------------------------------------------


def test_source_is_served_and_removed(folder: Path) -> None:
    """A model in a text is served; its file is private, names the line of an error, and is gone
    with the session."""
    with spawn(source=_DAMPED, name="damped", python=JAX) as session:
        f = RemoteFunction(session)
        x = np.linspace(0, 1, 5, dtype=np.float32)
        np.testing.assert_allclose(f(x), np.exp(-x), rtol=1e-6)
        assert f.__doc__ == "Decays."
        (source,) = folder.glob("bridge-source-*")
        assert source.stat().st_mode & 0o777 == 0o700
        with pytest.raises(RemoteModelError, match=r"line 7.*\n.*raise ValueError"):
            f(x[:, None])
    assert not source.exists()


def test_source_of_a_forgotten_session_is_removed(folder: Path) -> None:
    """A session that is dropped without close() leaves neither its worker nor its source."""
    session = spawn(source=_DAMPED, name="damped", python=JAX)
    pid = session._host._process.pid
    child = session._host
    del session
    gc.collect()
    assert not list(folder.glob("bridge-source-*"))
    assert eventually(lambda: not is_running(pid), 20)
    child.close()


def test_source_outlives_its_worker(folder: Path) -> None:
    """A worker that died is started again with the same source."""
    with spawn(source=_DAMPED, name="damped", python=JAX) as session:
        f = RemoteFunction(session)
        x = np.ones(3, np.float32)
        first = f(x)
        os.kill(session._host._process.pid, signal.SIGKILL)
        np.testing.assert_array_equal(f(x), first)
        assert session.stats()["restarts"] == 1


def test_source_has_a_header(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The PEP 723 header of a source, or the arguments, make the worker's environment."""
    seen: list[environments.Recipe] = []

    class Made:
        python = JAX

        def close(self) -> None:
            pass

    def made(recipe: environments.Recipe) -> Made:
        seen.append(recipe)
        return Made()

    monkeypatch.setattr(environments, "environment", made)
    header = '# /// script\n# dependencies = ["jax", "optax"]\n# ///\n'
    with spawn(source=header + _DAMPED, jax_model="damped") as session:
        assert list(session.models) == ["damped"]
    with spawn(source=_DAMPED, name="damped", requirements=["jax"], python="3.12"):
        pass
    assert [recipe.requirements for recipe in seen] == [("jax", "optax"), ("jax",)]
    assert seen[1].python == "3.12"


def test_torch_source_is_served(folder: Path) -> None:
    """The framework is that of the source's imports."""
    source = "import torch\n\ndef doubled(x):\n    return torch.add(x, x)\n"
    with spawn(
        source=source, name="doubled", python=python_of(".venv-both")
    ) as session:
        assert session.framework == "torch"
        np.testing.assert_array_equal(RemoteFunction(session)(np.ones(2)), [2, 2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source": _DAMPED}, "source= needs the model's name"),
        ({"name": "damped"}, "name= names a model in source="),
        (
            {"source": _DAMPED, "name": "a", "jax_model": "b"},
            "in one of name=, jax_model=",
        ),
        (
            {"source": _DAMPED, "name": "a b"},
            "name='a b'; expected the name of a function",
        ),
        ({"source": 7, "name": "a"}, "source= is a int; expected the text of a module"),
        (
            {"source": f"# coding: latin-1\n{_DAMPED}", "name": "damped"},
            "source= declares the encoding iso-8859-1, but is a text already",
        ),
        ({}, "spawn needs either jax_model= or torch_model="),
    ],
)
def test_wrong_options_are_refused(
    folder: Path, options: dict[str, Any], said: str
) -> None:
    """A source without a name, and a name without a source, are refused."""
    with pytest.raises(CallerError, match=re.escape(said)):
        spawn(python=JAX, **options)


@pytest.mark.parametrize(
    ("source", "said"),
    [("def damped(:", "SyntaxError"), ("x = 1", "damped"), ("1 / 0", "ZeroDivision")],
)
def test_wrong_sources_are_errors_of_the_worker(
    folder: Path, source: str, said: str
) -> None:
    """A source that cannot be imported, or lacks the model, ends the worker with the reason."""
    with pytest.raises(WorkerCrashed, match=said):
        spawn(source=source, jax_model="damped", python=JAX)


_SPAWNING = """
import sys, tempfile, time
import bridge_client
tempfile.tempdir = sys.argv[1]
session = bridge_client.spawn(source='''%s''', name="damped", python=%r)
try:
    print(session._host._process.pid, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(3)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_kill_leave_no_worker(
    folder: Path, number: signal.Signals, ctrl_c: None
) -> None:
    """When a process is interrupted, or killed as a kernel is at a restart, its worker ends; an
    interrupted one removes the source too."""
    program = (
        f"import signal\nsignal.signal(2, signal.default_int_handler)\n{_SPAWNING}"
    )
    with start_program(program % (_DAMPED, JAX), str(folder)) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(number)
        process.wait(20)
        assert eventually(lambda: not is_running(pid), 20)
    if number == signal.SIGINT:
        assert process.returncode == 3
        assert not list(folder.glob("bridge-source-*"))
    for path in [*folder.glob("*/*/*"), *folder.glob("*/*"), *folder.glob("*")]:
        path.rmdir() if path.is_dir() else path.unlink()


# The decorator ------------------------------------------------------------------------------------


def test_decorated_function_is_differentiated(folder: Path) -> None:
    """A function that imports jax itself runs in a worker, as a torch module."""

    @remote(python=JAX, static_argnames="times")
    def damped(x: torch.Tensor, rate=2.0, *, times=1) -> torch.Tensor:
        """Decays."""
        import jax.numpy as jnp

        def once(y):
            return jnp.exp(-rate * y)

        for _ in range(times):
            x = once(x)
        text = """not
  dedented"""
        assert text.endswith("  dedented")
        return x

    assert isinstance(damped, RemoteJaxFunction) and damped.__doc__ == "Decays."
    x = torch.linspace(0, 1, 3, requires_grad=True)
    y = damped(x, times=1)
    y.sum().backward()
    torch.testing.assert_close(x.grad, -2 * torch.exp(-2 * x.detach()))
    damped.session.close()


def test_errors_of_decorated_functions_name_their_own_lines(folder: Path) -> None:
    """The traceback of a decorated function has the line numbers of its file."""

    @remote(python=JAX)
    def failing(x):
        raise ValueError("as planned")

    line = (
        test_errors_of_decorated_functions_name_their_own_lines.__code__.co_firstlineno
    )
    with pytest.raises(RemoteModelError, match=rf"line {line + 5}\b"):
        failing(torch.ones(2))
    failing.session.close()


_OUTSIDE = 2.0
pow = max


def _with_own_builtin(x):
    return pow(x, 2)


@functools.wraps(_with_own_builtin)
def _wrapping(x):
    return 2 * x


def _with_global(x):
    return x * _OUTSIDE


def _with_default(x, y=_OUTSIDE):
    return x * y


def _with_class(x):
    class Inner:
        value = _OUTSIDE

    return x * Inner.value


def _with_literals(x, y: "Anything" = -1.0, *, z=(1, "a", None)) -> "Anything":  # type: ignore[name-defined] # noqa: F821
    def again(n):
        return _with_literals(n) if n < 0 else len(str(n))

    return [again(i) for i in range(3)]


def _closing() -> Callable[[Any], Any]:
    factor = 3
    return lambda x: x * factor


def _closing_function() -> Callable[[Any], Any]:
    factor = 3

    def inner(x):
        return x * factor

    return inner


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (_with_global, "_with_global uses _OUTSIDE of its module"),
        (_with_class, "_with_class uses _OUTSIDE of its module"),
        (_with_own_builtin, "_with_own_builtin uses pow of its module"),
        (_wrapping, "is defined as _wrapping; expected a function under its own name"),
        (_with_default, "has the default _OUTSIDE; expected a literal"),
        (_closing_function(), "inner closes over factor"),
        (_closing(), "expected a function with a name"),
        (len, "len is a builtin_function_or_method"),
        (np.vectorize(len), "is a vectorize"),
    ],
)
def test_functions_that_do_not_stand_alone_are_refused(
    function: Callable[..., Any], said: str
) -> None:
    """Names from outside, defaults that are no literals, and lambdas are refused by name."""
    with pytest.raises(CallerError, match=re.escape(said)):
        source_of(function)


def test_function_without_a_source_is_refused() -> None:
    """A function that was made by exec has no source to send."""
    namespace: dict[str, Any] = {}
    exec("def f(x): return x", namespace)  # noqa: S102
    with pytest.raises(CallerError, match=r"source of f cannot be read.*spawn\(source"):
        source_of(namespace["f"])


def test_function_with_two_decorators_is_refused() -> None:
    """Another decorator would be lost, so it is refused."""

    def plain(function: Any) -> Any:
        return function

    @plain
    @plain
    def twice(x):
        return x

    with pytest.raises(CallerError, match="several decorators, @plain, @plain"):
        source_of(twice)


def test_function_that_stands_alone_is_accepted() -> None:
    """Annotations, literals, builtins and the function's own name are no names from outside."""
    namespace: dict[str, Any] = {}
    exec(source_of(_with_literals), namespace)  # noqa: S102
    assert namespace["_with_literals"](0) == [1, 1, 1]
    assert namespace["_with_literals"].__defaults__ == (-1.0,)


# Notebooks ----------------------------------------------------------------------------------------


class Shell:
    """Takes the place of IPython's shell, which no environment here has."""

    def __init__(self) -> None:
        self.user_ns: dict[str, Any] = {}
        self.magics: dict[str, Callable[..., None]] = {}

    def register_magic_function(
        self, function: Callable[..., None], magic_kind: str, magic_name: str
    ) -> None:
        assert magic_kind == "cell"
        self.magics[magic_name] = function


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    """A shell with the extension, whose workers have jax."""
    shell = Shell()
    monkeypatch.setattr(sys, "executable", JAX)
    bridge_client.load_ipython_extension(shell)
    yield shell
    bridge_client.unload_ipython_extension(shell)


def test_cell_is_served_and_replaced(shell: Shell, folder: Path) -> None:
    """A cell binds its name to a remote function; run again, it replaces the worker; a cell that
    fails leaves the function as it is."""
    serve = shell.magics["bridge_model"]
    serve("damped --client numpy --x64", _DAMPED)
    first = shell.user_ns["damped"]
    np.testing.assert_allclose(first(np.ones(2)), np.exp([-1.0, -1.0]))
    serve("damped", _DAMPED.replace("-rate", "rate"))
    second = shell.user_ns["damped"]
    assert isinstance(second, RemoteJaxFunction)
    torch.testing.assert_close(second(torch.ones(2)), torch.ones(2).exp())
    assert first.session.is_closed and not second.session.is_closed
    with pytest.raises(WorkerCrashed, match="SyntaxError"):
        serve("damped", "def damped(:")
    assert shell.user_ns["damped"] is second and not second.session.is_closed
    bridge_client.unload_ipython_extension(shell)
    assert second.session.is_closed


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "required: NAME; usage: %%bridge_model"),
        ("f --client tensorflow", "invalid choice: 'tensorflow'"),
        ("f 'x", "No closing quotation"),
        ("f --reqs jax", "unrecognized arguments: --reqs jax"),
    ],
)
def test_wrong_line_of_a_cell_is_an_error(shell: Shell, line: str, said: str) -> None:
    """A malformed line is a CallerError with the usage, and no exit."""
    with pytest.raises(CallerError, match=re.escape(said)):
        shell.magics["bridge_model"](line, _DAMPED)


def test_client_of_the_cells_own_framework_is_refused(
    shell: Shell, folder: Path
) -> None:
    """A JAX model is not called by the JAX client; its worker ends."""
    with pytest.raises(
        CallerError, match="--client jax, but the cell is a model of jax"
    ):
        shell.magics["bridge_model"]("damped --client jax", _DAMPED)
    assert "damped" not in shell.user_ns


def test_extension_is_loaded_once(shell: Shell) -> None:
    """A second %load_ext keeps the workers of the cells."""
    before = notebook._loaded[id(shell)]
    bridge_client.load_ipython_extension(shell)
    assert notebook._loaded[id(shell)] is before


def test_no_cell_is_served_without_the_extension(shell: Shell) -> None:
    """After %unload_ext nobody would close the worker."""
    bridge_client.unload_ipython_extension(shell)
    with pytest.raises(CallerError, match="the extension is unloaded"):
        shell.magics["bridge_model"]("damped", _DAMPED)


def test_a_source_that_cannot_be_written_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bridge_client.remote.sources.open", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        SourceFile(_DAMPED, "damped")
    assert not list(folder.glob("bridge-source-*"))


def test_a_long_name_is_no_long_file(folder: Path) -> None:
    file = SourceFile(_DAMPED, "a" * 300)
    file.close()
    assert file.target.endswith("a" * 300) and not list(folder.iterdir())


def test_tables_are_escaped() -> None:
    """Names, docstrings and titles of a worker are shown as text."""
    model = ModelInfo("<b>", "<script>alert(1)</script>\nmore", ("x",), ())
    shown = as_html("<i>", [model])
    assert "<b>" not in shown and "<script>" not in shown and "<i>" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown and "more" not in shown


def test_functions_and_sessions_are_tables(folder: Path) -> None:
    """A notebook shows a session and a function with signature and docstring, also when the
    session is closed."""
    with spawn(source=_DAMPED, name="damped", python=JAX) as session:
        functions = [RemoteFunction(session), RemoteJaxFunction(session), session]
        for each in functions:
            assert "<code>damped(x, rate=1.0)</code></td><td>Decays.</td>" in (
                each._repr_html_()
            )
    for each in functions:
        assert each._repr_html_().startswith("<p>")
