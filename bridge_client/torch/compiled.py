"""Calls that torch.compile traces, on tensors without values. Importing this imports Dynamo.

Dynamo does not look into such a call (nonstrict_trace), and lets only some values through; the
others are encoded.
"""

import collections
import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.utils._pytree import TreeSpec

from bridge_client.arguments import Args, Kwargs
from bridge_client.torch import modes
from bridge_client.torch.graphs import function_of
from bridge_wire.classes import instantiate
from bridge_wire.errors import BridgeError
from bridge_wire.instances import PeerMapping, unchanged_keys

_log = logging.getLogger(__name__)


def call(
    number: int,
    own: Sequence[Tensor],
    args: Args,
    kwargs: Kwargs,
    mode: int,
    is_stateful: bool,
) -> Any:
    """Call the function with this number; its runs become operators of the graph."""
    arguments = _encoded((args, kwargs))
    return _decoded(_traced_call(number, own, arguments, mode, is_stateful))


@torch._dynamo.nonstrict_trace
def _traced_call(
    number: int, own: Sequence[Tensor], arguments: Any, mode: int, is_stateful: bool
) -> Any:
    """Call a function on tensors without values, while torch.compile traces."""
    if modes.is_exporting():
        _pass_structures()
    try:
        result = function_of(number).call_traced(
            own, _decoded(arguments), mode, is_stateful
        )
    except BridgeError as error:  # Dynamo's own error forgets the cause
        _log.error("a call that torch.compile traces has failed: %s", error)
        raise
    return _encoded(result)


# Values that nonstrict_trace refuses are encoded as the only key of a dict.
_NONE = "torch-jax-bridge: None"
_TEXT = "torch-jax-bridge: text "
_CLASS = "torch-jax-bridge: class "
_named: list[Any] = []  # classes of instances, by number


def _encoded(value: Any) -> Any:
    """Return a pytree in a form that nonstrict_trace lets through.

    Dynamo traces this function, and `_decoded`.
    """
    if value is None:
        return {_NONE: 0}
    if type(value) is str:
        return {_TEXT + value: 0}
    if (fields := _fields_of(type(value))) is not None:
        return {
            f"{_CLASS}{_number_of(type(value))}": [
                _encoded(getattr(value, field)) for field in fields
            ]
        }
    if (keys := _keys_of(type(value))) is not None:
        if len(value) != len(keys):
            unchanged_keys(value)  # raises
        return {
            f"{_CLASS}{_number_of(type(value))}": [_encoded(value[key]) for key in keys]
        }
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    if isinstance(value, tuple):
        return tuple([_encoded(item) for item in value])
    if isinstance(value, Mapping):
        items = [(key, _encoded(value[key])) for key in value]
        return (
            collections.OrderedDict(items)
            if isinstance(value, collections.OrderedDict)
            else dict(items)
        )
    return value


def _decoded(value: Any) -> Any:
    """Return the pytree that was encoded."""
    if type(value) is list:
        return [_decoded(item) for item in value]
    if type(value) is tuple:
        return tuple([_decoded(item) for item in value])
    if not isinstance(value, dict):
        return value
    key = next(iter(value)) if len(value) == 1 else None
    if type(key) is not str or not key.startswith("torch-jax-bridge: "):
        return type(value)([(key, _decoded(item)) for key, item in value.items()])
    if key.startswith(_CLASS):
        cls = _named[int(key[len(_CLASS) :])]
        fields = _fields_of(cls) or _keys_of(cls) or ()
        return instantiate(cls, fields, [_decoded(item) for item in value[key]])
    return None if key == _NONE else key[len(_TEXT) :]


# Dynamo takes the results of these functions as constants: they depend on classes only, and a
# class has its number from its first use.
@torch.compiler.assume_constant_result
def _fields_of(cls: type) -> tuple[str, ...] | None:
    """Return the names of the fields of a namedtuple, or of a dataclass that is no dict; None for
    any other class."""
    if issubclass(cls, tuple):
        return getattr(cls, "_fields", None)
    if not dataclasses.is_dataclass(cls) or issubclass(cls, Mapping | list):
        return None
    return tuple([field.name for field in dataclasses.fields(cls)])


@torch.compiler.assume_constant_result
def _keys_of(cls: type) -> tuple[Any, ...] | None:
    """Return the keys of a class of mappings that stands for a worker's; None for any other."""
    return cls._bridge_fields if issubclass(cls, PeerMapping) else None


@torch.compiler.assume_constant_result
def _number_of(cls: type) -> int:
    """Return the number of a class."""
    if cls not in _named:
        _named.append(cls)
    return _named.index(cls)


def _pass_structures() -> None:
    """Give values to the constants of Dynamo's graph: strict export takes each constant without a
    value for a tensor, even the structures of arguments that nonstrict_trace puts there itself
    (torch 2.13)."""
    with contextlib.suppress(AttributeError):  # in non-strict export there is no Dynamo
        for node in InstructionTranslator.current_tx().output.graph.nodes:
            if isinstance(node.meta.get("example_value"), TreeSpec):
                node.meta.setdefault("val", None)
