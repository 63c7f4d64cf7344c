"""ATen's in-place operators and out= forms, each mapped to an operator that returns new tensors.

Imports torch only.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from bridge_wire.errors import CallerError

# Operators that change a tensor's sizes and not its elements: the tensor becomes a view of its old
# self.
_RESHAPING = ("squeeze_", "unsqueeze_", "transpose_", "t_", "as_strided_", "detach_")


class Written(NamedTuple):
    """An argument that an operator writes to: its name, and the alias set that outputs share."""

    name: str
    alias: str


@functools.cache
def written(operator: Any) -> tuple[Written, ...]:
    """Return the arguments that an operator writes into."""
    schema = getattr(operator, "_schema", None)
    if schema is None:
        return ()
    targets = []
    for argument in schema.arguments:
        alias = argument.alias_info
        if alias is not None and alias.is_write:
            sets = iter(alias.before_set)
            target = Written(argument.name, next(sets, ""))
            targets.append(target)
    return tuple(targets)


@functools.cache
def functional(operator: Any) -> Any:
    """Return the operator that returns new tensors for the writes of this operator.

    Raises:
      CallerError: ATen has none.
    """
    namespace, _, name = operator._schema.name.partition("::")
    base = name.removesuffix("_")
    for candidate in _overloads(namespace, base):
        if candidate._schema.is_mutable:
            continue
        if _takes(candidate, operator):
            return candidate
    raise CallerError(
        f"the torch code calls {operator}, which writes in place and has no form that returns new"
        " tensors, as tracing needs; write the code without it, or run it by RemoteTorchFunction"
    )


@functools.cache
def becomes(operator: Any) -> Any:
    """Return the view that its argument becomes in a reshaping operator, None for others."""
    _, _, name = operator._schema.name.partition("::")
    if name in _RESHAPING:
        return functional(operator)
    return None


def arguments(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    schema = operator._schema.arguments
    names = [each.name for each in schema]
    named = dict(zip(names, args, strict=False))
    named.update(kwargs)
    return named


def call_of(
    operator: Any, named: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split named arguments into an operator's positional arguments and keywords."""
    schema = operator._schema.arguments
    passed = [i for i, each in enumerate(schema) if each.name in named]
    positional = [i for i in passed if not schema[i].kwarg_only]
    count = max(positional, default=-1) + 1
    args = []
    for each in schema[:count]:
        value = named.get(each.name, each.default_value)
        args.append(value)
    keywords = [schema[i].name for i in passed if schema[i].kwarg_only]
    rest = {name: named[name] for name in keywords}
    return tuple(args), rest


def returned(operator: Any, targets: Mapping[str, Any], values: Sequence[Any]) -> Any:
    """Return an operator's outputs: its written tensors, by alias set, and new values."""
    new = iter(values)
    outputs = []
    for each in operator._schema.returns:
        alias = each.alias_info
        if alias:
            name = next(iter(alias.before_set))
            outputs.append(targets[name])
        else:
            outputs.append(next(new))
    if not outputs:
        return None
    if len(outputs) == 1:
        return outputs[0]
    return tuple(outputs)


def _takes(candidate: Any, operator: Any) -> bool:
    """Return whether a candidate takes the arguments of an operator, except out= arguments."""
    schema = operator._schema.arguments
    inputs = [each for each in schema if not each.is_out]
    expected = _signature(inputs)
    actual = _signature(candidate._schema.arguments)
    count = len(expected)
    return actual[:count] == expected


def _signature(schema: Sequence[Any]) -> list[tuple[str, str]]:
    """Return the names and types of arguments."""
    return [(each.name, str(each.type)) for each in schema]


def _overloads(namespace: str, name: str) -> list[Any]:
    library = getattr(torch.ops, namespace)
    overloads = []
    for each in (name, f"{name}_functional"):
        packet = getattr(library, each, None)
        if packet is None:
            continue
        for overload in packet.overloads():
            operator = getattr(packet, overload)
            overloads.append(operator)
    return overloads
