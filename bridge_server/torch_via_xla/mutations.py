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
    return tuple(
        Written(each.name, next(iter(each.alias_info.before_set), ""))
        for each in (schema.arguments if schema is not None else ())
        if each.alias_info is not None and each.alias_info.is_write
    )


@functools.cache
def functional(operator: Any) -> Any:
    """Return the operator that returns new tensors for the writes of this operator.

    Raises:
      CallerError: ATen has none.
    """
    namespace, _, name = operator._schema.name.partition("::")
    for candidate in _overloads(namespace, name.removesuffix("_")):
        if not candidate._schema.is_mutable and _takes(candidate, operator):
            return candidate
    raise CallerError(
        f"the torch code calls {operator}, which writes in place and has no form that returns new"
        " tensors, as tracing needs; write the code without it, or run it by RemoteTorchFunction"
    )


@functools.cache
def becomes(operator: Any) -> Any:
    """Return the view that its argument becomes in a reshaping operator, None for others."""
    name = operator._schema.name.partition("::")[2]
    return functional(operator) if name in _RESHAPING else None


def arguments(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    names = [each.name for each in operator._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def call_of(
    operator: Any, named: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split named arguments into an operator's positional arguments and keywords."""
    schema = operator._schema.arguments
    passed = [i for i, each in enumerate(schema) if each.name in named]
    positional = [i for i in passed if not schema[i].kwarg_only]
    count = max(positional, default=-1) + 1
    args = tuple(named.get(each.name, each.default_value) for each in schema[:count])
    keywords = [schema[i].name for i in passed if schema[i].kwarg_only]
    return args, {name: named[name] for name in keywords}


def returned(operator: Any, targets: Mapping[str, Any], values: Sequence[Any]) -> Any:
    """Return an operator's outputs: its written tensors, by alias set, and new values."""
    new = iter(values)
    outputs = tuple(
        targets[next(iter(each.alias_info.before_set))]
        if each.alias_info
        else next(new)
        for each in operator._schema.returns
    )
    return outputs[0] if len(outputs) == 1 else outputs or None


def _takes(candidate: Any, operator: Any) -> bool:
    """Return whether a candidate takes the arguments of an operator, except out= arguments."""
    inputs = [each for each in operator._schema.arguments if not each.is_out]
    expected = [(each.name, str(each.type)) for each in inputs]
    actual = [(each.name, str(each.type)) for each in candidate._schema.arguments]
    return actual[: len(expected)] == expected


def _overloads(namespace: str, name: str) -> list[Any]:
    library = getattr(torch.ops, namespace)
    packets = [getattr(library, each, None) for each in (name, f"{name}_functional")]
    existing = [packet for packet in packets if packet is not None]
    return [getattr(packet, each) for packet in existing for each in packet.overloads()]
