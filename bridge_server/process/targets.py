"""Loader of `mod:attr` and `file.py:attr` targets; the only module that imports code by name.

Imports no framework.
"""

import contextlib
import importlib
import importlib.util
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from bridge_wire.commands import did_you_mean, near_matches
from bridge_wire.errors import TargetError


class Target(NamedTuple):
    """A parsed `[NAME=]mod:attr` or `[NAME=]file.py:attr`.

    `source` is the module or the file as it was written, `module` the name of the module.
    """

    name: str
    module: str
    attribute: str
    source: str
    path: Path | None = None


def parse(text: str) -> Target:
    """Return the parts of a target; the name defaults to the attribute's last part."""
    name, equals, place = text.partition("=")
    if not equals or "/" in name:  # a folder's name may have a "="
        name, equals, place = "", "", text
    source, _, attribute = place.rpartition(":")
    if not (source and attribute) or (equals and not name):
        raise TargetError(
            f"the target {text!r} is not of the form [NAME=]module:attribute or"
            f" [NAME=]file.py:attribute, such as {source or place}:function"
        )
    name = name or attribute.rpartition(".")[2]
    if not _is_path(source):
        return Target(name, source, attribute, source)
    try:
        path = Path(source).expanduser().absolute()
    except RuntimeError as error:
        raise TargetError(f"the target {text!r}: {error}") from error
    return Target(name, path.stem, attribute, source, path)


def _is_path(source: str) -> bool:
    if "/" in source or source.endswith(".py"):
        return True
    return "." in source and os.path.isfile(source)


def load(target: Target) -> Any:
    """Import a target's module and return its attribute.

    An attribute of a pair (model, state) is the model's: `net.encode` is `(net[0].encode, net[1])`.

    Raises:
      TargetError: the module or attribute does not exist; the text suggests similar names.
    """
    import_from_working_directory()
    value: Any = _module(target)
    seen = target.source
    for part in target.attribute.split("."):
        try:
            value = _attribute_of(value, part)
        except AttributeError as error:
            raise TargetError(
                f"{seen!r} has no attribute {part!r}{_near(part, dir(value))}"
            ) from error
        seen = f"{seen}.{part}"
    return value


def import_from_working_directory() -> None:
    """Put the working directory on sys.path: `python -m` has it, a console script has not."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _module(target: Target) -> ModuleType:
    try:
        with no_exit(f"importing {target.source!r}"):
            if target.path is not None:
                return _import_file(target, target.path)
            return importlib.import_module(target.module)
    except TargetError:
        raise
    except ModuleNotFoundError as error:
        if target.path or not _is_within(target.module, error.name):
            raise TargetError(
                f"importing {target.source!r} failed: {error}{trail(error)}"
            ) from error
        missing = error.name or ""
        raise TargetError(
            f"there is no module {missing!r}, as named by {target.module}:{target.attribute}"
            f"{_near(missing, _sibling_modules(missing))}"
        ) from error
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise TargetError(
            f"importing {target.source!r} failed: {said}{trail(error)}"
        ) from error


def _is_within(module: str, package: str | None) -> bool:
    return package is not None and f"{module}.".startswith(f"{package}.")


def _import_file(target: Target, path: Path) -> ModuleType:
    """Import a file under its stem, with its directory first on sys.path as `python FILE` has."""
    check_file(target.source, path)
    name = target.module
    loaded = sys.modules.get(name)
    if loaded is not None:
        other = getattr(loaded, "__file__", None)
        if other and os.path.samefile(other, path):
            return loaded
        raise TargetError(
            f"{target.source!r} cannot be imported as {name!r}, the name of a module that is"
            f" loaded from {other or 'the interpreter'}; rename the file"
        )
    directory = str(path.resolve().parent)
    if sys.path[:1] != [directory]:
        sys.path.insert(0, directory)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{target.source!r} is not a .py file; expected Python code")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return sys.modules.get(name, module)


def check_file(source: str, path: Path) -> None:
    """Raise TargetError unless a path names a Python file."""
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.py"))
        inside = f", such as {path.name}/{names[0]}:ATTR" if names else ""
        raise TargetError(f"{source!r} is a directory; expected a .py file{inside}")
    if not path.exists():
        folder = path.parent
        if not folder.is_dir():
            raise TargetError(
                f"there is no file {source!r}: its directory {folder} does not exist"
            )
        stems = [file.stem for file in folder.glob("*.py")]
        near = [f"{stem}.py" for stem in near_matches(path.stem, stems)]
        raise TargetError(
            f"there is no file {source!r} in {folder}{did_you_mean(near)}"
        )
    if path.suffix != ".py":
        beside = path.with_suffix(".py")
        hint = f"; did you mean {beside.name!r}?" if beside.exists() else ""
        raise TargetError(f"{source!r} is not a .py file{hint}")


def _attribute_of(value: Any, name: str) -> Any:
    if type(value) is tuple and len(value) == 2 and not hasattr(value, name):
        model, state = value
        return getattr(model, name), state
    return getattr(value, name)


@contextlib.contextmanager
def no_exit(what: str) -> Iterator[None]:
    """Raise TargetError if a model's code calls sys.exit during `what`."""
    try:
        yield
    except SystemExit as error:
        raise TargetError(
            f"{what} called sys.exit({error.code!r}){trail(error)}"
        ) from error


def shardings_beside(target: Target) -> Mapping[str, Any]:
    """Return the shardings in `attr_shardings`, in the module of a loaded `attr`.

    Raises:
      TargetError: `attr_shardings` is not a mapping.
    """
    name = f"{target.attribute.rpartition('.')[2]}_shardings"
    found = getattr(sys.modules[target.module], name, None)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise TargetError(
            f"{target.source}:{name} is a {type(found).__qualname__}; expected a dict from path to"
            " sharding"
        )
    return found


def trail(error: BaseException) -> str:
    """Return the traceback through the imported modules as lines of text."""
    here = os.path.dirname(__file__)
    ours = (here, contextlib.__file__, importlib.__file__, "<frozen importlib")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(ours)
    ]
    return "".join(f"\n{line.rstrip()}" for line in traceback.format_list(frames))


def _near(word: str, choices: list[str]) -> str:
    return did_you_mean(near_matches(word.rpartition(".")[2], choices))


def _sibling_modules(module: str) -> list[str]:
    parent = module.rpartition(".")[0]
    try:
        path = importlib.import_module(parent).__path__ if parent else sys.path
    except (ImportError, AttributeError):
        return []
    return [found.name for found in pkgutil.iter_modules(path)]
