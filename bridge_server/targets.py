"""Finds what `mod:attr` on the command line names. The only place where code is imported by name."""

import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Mapping
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
        raise TargetError(f"the target {text!r} is not of the form [NAME=]module:attribute")
    return Target(name or attribute.rpartition(".")[2], module, attribute)


def load(target: Target) -> Any:
    """Import a target's module and return its attribute.

    Raises:
      TargetError: there is no such module or attribute; says which, with near matches.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:  # a console script does not have it, `python -m` does
        sys.path.insert(0, os.getcwd())
    try:
        value = importlib.import_module(target.module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{target.module}.".startswith(f"{error.name}."):
            raise TargetError(f"importing {target.module!r} failed: {error}") from error
        raise TargetError(
            f"there is no module {error.name!r}, which {target.module}:{target.attribute} names"
            f"{_near(error.name, _sibling_modules(error.name))}"
        ) from error
    except Exception as error:
        raise TargetError(f"importing {target.module!r} failed: {type(error).__name__}: {error}") from error
    seen = target.module
    for part in target.attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as error:
            raise TargetError(f"{seen!r} has no attribute {part!r}{_near(part, dir(value))}") from error
        seen = f"{seen}.{part}"
    return value


def shardings_beside(target: Target) -> Mapping[str, Any]:
    """Return what `attr_shardings`, in the module of a loaded `attr`, says of how its arrays lie on several devices.

    Raises:
      TargetError: it is no mapping.
    """
    name = f"{target.attribute.rpartition('.')[2]}_shardings"
    found = getattr(sys.modules[target.module], name, None)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise TargetError(f"{target.module}:{name} is a {type(found).__qualname__}; expected a dict of path: sharding")
    return found


def near_matches(word: str, choices: list[str]) -> list[str]:
    """Return the choices that look like the word, best first."""
    return difflib.get_close_matches(word, choices, n=3, cutoff=0.5)


def _near(word: str, choices: list[str]) -> str:
    matches = near_matches(word.rpartition(".")[2], choices)
    return f"; did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def _sibling_modules(module: str) -> list[str]:
    parent = module.rpartition(".")[0]
    try:
        path = importlib.import_module(parent).__path__ if parent else sys.path
    except (ImportError, AttributeError):
        return []
    return [found.name for found in pkgutil.iter_modules(path)]
