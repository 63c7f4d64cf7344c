"""A target's parts: a pure function with its state; and the arguments of one call of it."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bridge_server.runtime import CALL
from bridge_server.signatures import (
    MODE_ARGUMENTS,
    Methods,
    only_method,
    positional_names,
)
from bridge_wire.errors import CallerError

RngStreams = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Invocation:
    """The arguments and options of one call of a model.

    `training` is the mode for this call, or None for the model's own. `method` is an attribute of
    the model's object, or empty for the object itself.
    """

    args: Sequence[Any]
    kwargs: dict[str, Any]
    rng_streams: RngStreams
    mutable: bool = False
    training: bool | None = None
    method: str = ""

    def function_of(self, target: Any) -> Any:
        """Return the method of an object that the call names, or the object itself."""
        if not self.method:
            return target
        return getattr(target, self.method)


# The result, and the state after the call, which matters only for a mutable call.
Outcome = tuple[Any, Any]
Call = Callable[[Any, Invocation], Outcome]


class Parts(NamedTuple):
    """A target split into a pure function and its state, which contains all arrays.

    `call(state, invocation)` raises CallerError for a random stream or a change that the model
    does not support.
    """

    call: Call
    state: Any
    documented: Any  # the callable whose docstring describes the model
    methods: Methods
    is_trainable: Callable[[str], bool] = lambda label: True
    has_modes: bool = False
    is_function: bool = False  # whether it is a function or object without state
    is_pair: bool = False  # whether it is a pair (apply, params)

    def only(self, owner: Any, name: str) -> "Parts":
        """Return these parts with a method of their object in the place of all methods."""
        function = getattr(owner, name)
        methods = only_method(function, attribute="" if name == CALL else name)
        return self._replace(documented=function, methods=methods)


def with_keys(function: Callable[..., Any], invocation: Invocation) -> dict[str, Any]:
    """Return the keyword arguments, and the key of each random stream by the stream's name.

    Raises:
      CallerError: the function has no argument of that name, or the caller passes it.
    """
    keys, kwargs = invocation.rng_streams, invocation.kwargs
    if not keys:
        return kwargs
    if both := keys.keys() & kwargs.keys():
        raise CallerError(
            f"{sorted(both)} are passed as arguments and named in rngs; leave out one of them"
        )
    accepted = keywords_of(function)
    if accepted is not None and (missing := keys.keys() - accepted):
        raise CallerError(
            f"the model takes no arguments {sorted(missing)} for the keys of these random streams;"
            f" its arguments are {sorted(accepted)}"
        )
    return {**kwargs, **keys}


def keywords_of(function: Callable[..., Any]) -> set[str] | None:
    """Return the names of a function's keywords; None if it takes any, or has no signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {each.name for each in parameters if _is_keyword(each)}


def mode_arguments(function: Callable[..., Any]) -> dict[str, bool]:
    """Return the names of a function's arguments for the mode, and whether true means training."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    names = [each.name for each in parameters if _is_keyword(each) and _is_flag(each)]
    return {name: MODE_ARGUMENTS[name] for name in names if name in MODE_ARGUMENTS}


def with_mode(
    function: Callable[..., Any], invocation: Invocation, *, skipped: int = 0
) -> Invocation:
    """Return a call with its mode as an argument, unless the caller passes such an argument.

    The call's arguments follow the first `skipped` ones of the function.
    """
    if invocation.training is None:
        return invocation
    modes = mode_arguments(function)
    names = positional_names(function, skipped=skipped)
    passed = {*names[: len(invocation.args)], *invocation.kwargs}
    if not passed.isdisjoint(modes):
        return invocation
    values = {name: invocation.training is means for name, means in modes.items()}
    return replace(invocation, kwargs={**invocation.kwargs, **values})


def _is_keyword(parameter: inspect.Parameter) -> bool:
    kind = parameter.kind
    return kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _is_flag(parameter: inspect.Parameter) -> bool:
    """Whether a default, if there is one, is that of a flag."""
    default = parameter.default
    return default is parameter.empty or isinstance(default, bool | None)


def only_key(invocation: Invocation) -> Any:
    """Return the key of a model's only random stream, or None.

    Raises:
      CallerError: the call names several streams.
    """
    keys = invocation.rng_streams
    if len(keys) > 1:
        raise CallerError(
            f"the model draws from one random stream, not from {sorted(keys)}; name one in rngs"
        )
    return next(iter(keys.values()), None)


def nested(named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the tree of dicts whose paths are the names, such as `layers.0.weight`."""
    tree: dict[str, Any] = {}
    for name, value in named:
        *branches, leaf = name.split(".")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[leaf] = value
    return tree


def unnested(tree: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the leaves of a tree of dicts by their names."""
    return {
        name: functools.reduce(operator.getitem, name.split("."), tree)
        for name in names
    }
