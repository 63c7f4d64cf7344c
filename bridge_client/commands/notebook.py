"""The magic %%bridge_model of IPython: serves a cell in a worker, and binds a remote function.

Imports no framework itself: the module of the client that a cell uses is imported by name.
"""

import argparse
import importlib
import shlex
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from bridge_client.remote.spawning import spawn
from bridge_client.session import Session
from bridge_wire.errors import CallerError

CLASSES = {
    "torch": "RemoteJaxFunction",
    "jax": "RemoteTorchFunction",
    "numpy": "RemoteFunction",
}
# The client's framework that is at home with a worker's.
COUNTERPART = {"jax": "torch", "torch": "jax"}
_MAGIC = "bridge_model"


class _Parser(argparse.ArgumentParser):
    """Raises an error, where a command would exit."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        raise CallerError(f"%%{_MAGIC}: {message}; {usage}")


class Cells:
    """The workers of a notebook's cells, by the names that they are bound to."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._sessions: dict[str, Session] = {}
        self._is_closed = False

    def serve(self, line: str, cell: str | None = None) -> None:
        """Serve a cell, and bind its model's name to a remote function; a worker that the name had
        before is closed once the new one is ready.

        Raises:
          CallerError: the line is malformed, or the cell has no such model.
          WorkerCrashed, StartupTimeout: the worker did not become ready; the name keeps its
            function.
        """
        if self._is_closed:
            raise CallerError(
                f"%%{_MAGIC}: the extension is unloaded; run %load_ext bridge_client"
            )
        options = _options(line)
        name: str = options.name
        session = spawn(
            source=cell or "",
            name=name,
            requirements=options.requirement,
            python=options.python,
            args=options.args,
        )
        try:
            function = _function_of(session, options.client)
        except BaseException:
            session.close()
            raise
        before = self._sessions.get(name)
        self._sessions[name] = session
        self._namespace[name] = function
        if before is not None:
            before.close()

    def close(self) -> None:
        """Close all workers, and serve no more cells."""
        self._is_closed = True
        while self._sessions:
            _, session = self._sessions.popitem()
            session.close()


def _options(line: str) -> argparse.Namespace:
    parser = _Parser(f"%%{_MAGIC}", add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("name", metavar="NAME")
    add("-r", "--requirement", action="append", metavar="PACKAGE")
    add("--python", metavar="VERSION")
    add("--client", choices=tuple(CLASSES))
    add("--x64", action="append_const", dest="args", const="--x64", default=[])
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise CallerError(f"%%{_MAGIC}: {error} in {line!r}") from error
    return parser.parse_args(words)


def _function_of(session: Session, client: str | None) -> Any:
    """Return a function of the chosen client, or of the one that this process has imported."""
    if client is None:
        counterpart = COUNTERPART[session.framework]
        client = counterpart if counterpart in sys.modules else "numpy"
    elif client == session.framework:
        raise CallerError(
            f"--client {client}, but the cell is a model of {session.framework}; expected"
            f" {COUNTERPART[client]} or numpy"
        )
    module = importlib.import_module(f"bridge_client.{client}")
    make: Callable[[Session], Any] = getattr(module, CLASSES[client])
    return make(session)


_loaded: dict[int, Cells] = {}  # by the shell's id


def load(shell: Any) -> None:
    """Add the magic to a shell of IPython."""
    if id(shell) not in _loaded:
        cells = _loaded[id(shell)] = Cells(shell.user_ns)
        shell.register_magic_function(cells.serve, "cell", _MAGIC)


def unload(shell: Any) -> None:
    """Close the workers of a shell's cells."""
    cells = _loaded.pop(id(shell), None)
    if cells is not None:
        cells.close()
