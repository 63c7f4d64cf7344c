"""Choice of the framework of targets that were given without --jax-model or --torch-model.

Imports no framework, and no module of a target: it reads their sources.
"""

import ast
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from bridge_server.process import targets
from bridge_wire.errors import CallerError

_FRAMEWORKS = ("jax", "torch")
# The framework by the packages that a model's module imports.
_OF_PACKAGE = {
    "torch": "torch",
    "jax": "jax",
    "flax": "jax",
    "equinox": "jax",
    "haiku": "jax",
    "penzai": "jax",
    "optax": "jax",
    "diffrax": "jax",
}


def framework_of(texts: Sequence[str]) -> str:
    """Return "jax" or "torch": the only one that is installed, or that the targets import.

    Raises:
      CallerError: neither is installed, or the targets import both, neither or different ones.
    """
    installed = [name for name in _FRAMEWORKS if importlib.util.find_spec(name)]
    if not installed:
        raise CallerError(
            f"neither jax nor torch is installed for {sys.executable}; install the models'"
            " framework, or start the worker with an interpreter that has it"
        )
    if len(installed) == 1:
        return installed[0]
    chosen = {text: _imported(targets.parse(text)) for text in texts}
    for text, names in chosen.items():
        if len(names) != 1:
            seen = "both jax and torch" if names else "neither jax nor torch"
            raise CallerError(
                f"jax and torch are installed, and the module of {text!r} imports {seen}: name"
                " the model with --jax-model or --torch-model"
            )
    (framework, *others) = set[str]().union(*chosen.values())
    if others:
        raise CallerError(
            f"the targets {', '.join(texts)} are of jax and of torch: start one worker for each"
            " framework"
        )
    return framework


def _imported(target: targets.Target) -> set[str]:
    """Return the frameworks whose packages a target's module imports."""
    if target.path:
        targets.check_file(target.source, target.path)
    path = target.path or _file_of(target.module)
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # loading the target tells the error
        return {_FRAMEWORKS[0]}
    packages = {name.partition(".")[0] for name in _imports(tree)}
    return {_OF_PACKAGE[name] for name in packages & _OF_PACKAGE.keys()}


def _file_of(module: str) -> Path:
    targets.import_from_working_directory()
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return Path(module)  # loading the target tells the error
    origin = spec.origin if spec else None
    return Path(origin or module)


def _imports(tree: ast.Module) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
    return names
