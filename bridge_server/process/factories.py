"""Factories: functions that return models, and their arguments, which are JSON and never code.

Imports no framework.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bridge_server.process import targets
from bridge_wire.commands import did_you_mean, near_matches
from bridge_wire.errors import CallerError, RemoteModelError, TargetError

_TARGET = re.compile(r"[\w./~-]+:[A-Za-z_][\w.]*")
_ON, _OFF = ("", "1", "true", "yes", "on"), ("0", "false", "no", "off")


def is_argument(word: str) -> bool:
    """Whether the word after --factory is its argument, not a target of the command line."""
    name, equals, _ = word.partition("=")
    is_on_or_off = word.lower() in (*_ON, *_OFF)
    return bool(equals and name.isidentifier()) or word[:1] == "{" or is_on_or_off


def like_targets(arguments: Mapping[str, Any]) -> list[str]:
    """Return the arguments that look like named targets, such as wave=model.py:make."""
    return [
        f"{name}={value}"
        for name, value in arguments.items()
        if isinstance(value, str) and _TARGET.fullmatch(value)
    ]


def parse(words: Sequence[str]) -> dict[str, Any] | None:
    """Return the arguments of all --factory flags; None if no target is a factory.

    Raises:
      CallerError: a word is neither NAME=VALUE nor a JSON object, or a name comes twice.
    """
    if all(word.lower() in _OFF for word in words):
        return None
    arguments: dict[str, Any] = {}
    for word in words:
        if word.lower() in _ON:
            continue
        for name, value in _parsed(word).items():
            if name in arguments:
                raise CallerError(f"--factory gives the argument {name!r} twice")
            arguments[name] = value
    return arguments


def _parsed(word: str) -> dict[str, Any]:
    if word.startswith("{"):
        return dict(_json(word, word))
    name, equals, text = word.partition("=")
    if not (equals and name.isidentifier()):
        raise CallerError(
            f"--factory {word!r} is neither NAME=VALUE nor a JSON object; expected an argument such"
            " as depth=3"
        )
    if text.startswith(("{", "[", '"')):
        return {name: _json(word, text)}
    try:
        return {name: json.loads(text)}
    except ValueError:
        return {name: text}


def _json(word: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CallerError(
            f"--factory {word!r} has a malformed value: {error}"
        ) from error


def call(text: str, factory: Any, arguments: Mapping[str, Any]) -> Any:
    """Return the model of a factory, the value of the target `text`.

    Raises:
      TargetError: it is no function, or has other parameters.
      RemoteModelError: it raised.
    """
    if not callable(factory):
        raise TargetError(
            f"--factory: {text!r} is a {type(factory).__qualname__}; expected a function that"
            " returns the model"
        )
    _check(text, factory, arguments)
    try:
        with targets.no_exit(f"the factory {text!r}"):
            return factory(**arguments)
    except TargetError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise RemoteModelError(
            f"the factory {text!r} failed: {said}{targets.trail(error)}"
        ) from error


def _check(
    text: str, factory: Callable[..., Any], arguments: Mapping[str, Any]
) -> None:
    """Raise TargetError unless the factory takes the arguments."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # of C code
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        names = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY)
        ]
        unknown = [name for name in arguments if name not in names]
        near = near_matches(unknown[0], names) if unknown else []
        raise TargetError(
            f"the factory {text!r} takes {signature}, and --factory gives"
            f" {', '.join(arguments) or 'no arguments'}: {error}{did_you_mean(near)}"
        ) from error
