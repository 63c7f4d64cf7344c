"""In-place operators and out= forms of ATen, each as the operator that returns new tensors.

Imports torch only.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from bridge_wire.errors import CallerError

# Operators that change a tensor's sizes and not its elements, by the view that the tensor becomes
# of its old self.
_BECOMES = ("squeeze_", "unsqueeze_", "transpose_", "t_", "as_strided_", "detach_")


class Written(NamedTuple):
    """Where an operator writes: the argument's name, and its alias set, which returned tensors
    bear as well."""

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
    """Return the operator that returns what this one writes.

    Raises:
      CallerError: ATen has none.
    """
    namespace, _, name = operator._schema.name.partition("::")
    for candidate in _overloads(namespace, name.removesuffix("_")):
        if not candidate._schema.is_mutable and _takes(candidate, operator):
            return candidate
    raise CallerError(
        f"the torch code calls {operator}, which writes in place and has no form that returns new"
        " tensors: tracing needs one; write the code without it, or run it by RemoteTorchFunction"
    )


@functools.cache
def becomes(operator: Any) -> Any:
    """Return the view that an operator makes of its argument's old self, or None if it makes
    none."""
    name = operator._schema.name.partition("::")[2]
    return functional(operator) if name in _BECOMES else None


def arguments(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    names = [each.name for each in operator._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def call_of(operator: Any, given: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional arguments and keywords for an operator that takes these by name."""
    schema = operator._schema.arguments
    last = max(
        (i for i, each in enumerate(schema) if not each.kwarg_only and each.name in given),
        default=-1,
    )
    args = tuple(given.get(each.name, each.default_value) for each in schema[: last + 1])
    return args, {
        each.name: given[each.name] for each in schema if each.kwarg_only and each.name in given
    }


def returned(operator: Any, targets: Mapping[str, Any], values: Sequence[Any]) -> Any:
    """Return what an operator returns: the tensors that it has written into, by alias set, and
    these new values."""
    new = iter(values)
    made = tuple(
        targets[next(iter(each.alias_info.before_set))] if each.alias_info else next(new)
        for each in operator._schema.returns
    )
    return made[0] if len(made) == 1 else made or None


def _takes(candidate: Any, operator: Any) -> bool:
    """Whether an operator takes the arguments of another, save those that it only writes into."""
    expected = [
        (each.name, str(each.type)) for each in operator._schema.arguments if not each.is_out
    ]
    found = [(each.name, str(each.type)) for each in candidate._schema.arguments]
    return found[: len(expected)] == expected


def _overloads(namespace: str, name: str) -> list[Any]:
    library = getattr(torch.ops, namespace)
    packets = [getattr(library, each, None) for each in (name, f"{name}_functional")]
    return [
        getattr(packet, each)
        for packet in packets
        if packet is not None
        for each in packet.overloads()
    ]
