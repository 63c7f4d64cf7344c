"""Loader of `mod:attr` targets from the command line; the only module that imports code by name.

Imports no framework.
"""

import contextlib
import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bridge_wire.errors import TargetError


class Target(NamedTuple):
    """A parsed `[NAME=]mod:attr`."""

    name: str
    module: str
    attribute: str


def parse(text: str) -> Target:
    """Return the parts of `[NAME=]mod:attr`; the name defaults to the attribute's last part."""
    name, equals, path = text.rpartition("=")
    module, colon, attribute = path.partition(":")
    if not (module and colon and attribute) or (equals and not name):
        raise TargetError(
            f"the target {text!r} is not of the form [NAME=]module:attribute"
        )
    return Target(name or attribute.rpartition(".")[2], module, attribute)


def load(target: Target) -> Any:
    """Import a target's module and return its attribute.

    An attribute of a pair (model, state) is the model's: `net.encode` is `(net[0].encode, net[1])`.

    Raises:
      TargetError: the module or attribute does not exist; the text suggests similar names.
    """
    # `python -m` has the working directory on sys.path, a console script does not.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with no_exit(f"importing {target.module!r}"):
            value = importlib.import_module(target.module)
    except TargetError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{target.module}.".startswith(f"{error.name}."):
            raise TargetError(
                f"importing {target.module!r} failed: {error}{_trail(error)}"
            ) from error
        raise TargetError(
            f"there is no module {error.name!r}, as named by {target.module}:{target.attribute}"
            f"{_near(error.name, _sibling_modules(error.name))}"
        ) from error
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise TargetError(
            f"importing {target.module!r} failed: {said}{_trail(error)}"
        ) from error
    seen = target.module
    for part in target.attribute.split("."):
        try:
            value = _attribute_of(value, part)
        except AttributeError as error:
            raise TargetError(
                f"{seen!r} has no attribute {part!r}{_near(part, dir(value))}"
            ) from error
        seen = f"{seen}.{part}"
    return value


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
            f"{what} called sys.exit({error.code!r}){_trail(error)}"
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
            f"{target.module}:{name} is a {type(found).__qualname__}; expected a dict from path to"
            " sharding"
        )
    return found


def _trail(error: BaseException) -> str:
    """Return the traceback through the imported modules as lines of text."""
    ours = (__file__, contextlib.__file__, importlib.__file__, "<frozen importlib")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(ours)
    ]
    return "".join(f"\n{line.rstrip()}" for line in traceback.format_list(frames))


def near_matches(word: str, choices: list[str]) -> list[str]:
    """Return the choices that resemble the word, best first."""
    return difflib.get_close_matches(word, choices, n=3, cutoff=0.5)


def _near(word: str, choices: list[str]) -> str:
    matches = near_matches(word.rpartition(".")[2], choices)
    return (
        f"; did you mean {' or '.join(repr(match) for match in matches)}?"
        if matches
        else ""
    )


def _sibling_modules(module: str) -> list[str]:
    parent = module.rpartition(".")[0]
    try:
        path = importlib.import_module(parent).__path__ if parent else sys.path
    except (ImportError, AttributeError):
        return []
    return [found.name for found in pkgutil.iter_modules(path)]
