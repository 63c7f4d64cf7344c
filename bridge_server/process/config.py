"""The file of --config: a worker's options as TOML, below flags and variables.

Imports no framework.
"""

import argparse
import json
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bridge_wire.commands import did_you_mean, near_matches
from bridge_wire.errors import CallerError

_TABLE = "worker"


def read(path: str, names: Collection[str]) -> dict[str, Any]:
    """Return the values of a file's table [worker], by the options' names with underscores.

    Raises:
      CallerError: the file cannot be read, is no TOML, or has other tables or options.
    """
    try:
        tables = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise CallerError(f"cannot read --config {path}: {error.strerror}") from error
    except ValueError as error:
        raise CallerError(f"--config {path} is no TOML: {error}") from error
    table = tables.pop(_TABLE, None)
    if tables or not isinstance(table, dict):
        seen = ", ".join(map(repr, tables)) or f"no table {_TABLE!r}"
        raise CallerError(f"--config {path} has {seen}; expected one table [{_TABLE}]")
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in values:
            raise CallerError(
                f"--config {path} has both {name.replace('_', '-')!r} and {name!r}, which are one"
                " option; remove one of them"
            )
        values[name] = value
    for key in values.keys() - names:
        shown = [name.replace("_", "-") for name in near_matches(key, names)[:1]]
        raise CallerError(
            f"--config {path} has the unknown option {key!r}{did_you_mean(shown)}"
        )
    return values


def words(action: argparse.Action, value: Any, path: str) -> list[str]:
    """Return a value of the file as words of the command line.

    Raises:
      CallerError: it is of a type that the option does not have.
    """
    flag = f"{action.option_strings[-1]}=" if action.option_strings else ""
    is_switch = action.nargs == 0
    if isinstance(value, bool) and (is_switch or action.nargs == "?"):
        return [flag.removesuffix("=") if is_switch else flag] if value else []
    if isinstance(value, dict) and action.dest == "factory":
        return [f"{flag}{json.dumps(value)}"]
    is_list = isinstance(action.default, list) or not flag
    items = value if isinstance(value, list) and is_list else [value]
    is_plain = all(isinstance(each, str | int | float) for each in items)
    if is_switch or not is_plain or any(isinstance(each, bool) for each in items):
        expected = "true or false" if is_switch else "a text or a number"
        name = action.dest.replace("_", "-")
        raise CallerError(f"--config {path}: {name} is {value!r}; expected {expected}")
    return [f"{flag}{each}" for each in items]


def as_toml(values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """Return the options that are set as a file for --config, each with its origin."""
    lines = [f"[{_TABLE}]"]
    for name, origin in origins.items():
        lines.append(
            f"{name.replace('_', '-')} = {_value(name, values[name])}  # {origin}"
        )
    return "\n".join(lines)


def _value(name: str, value: Any) -> str:
    if name == "mesh":
        value = ",".join(f"{axis}={size}" for axis, size in value.items())
    elif isinstance(value, dict):  # the arguments of factories
        value = json.dumps(value)
    return json.dumps(value, ensure_ascii=False)
