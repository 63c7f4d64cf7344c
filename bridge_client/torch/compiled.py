"""The way in from torch.compile: a call of a function, traced with tensors that have types only.

Dynamo does not look into it (nonstrict_trace), and lets only some values through; the others go in
other words.
"""

import collections
import contextlib
import dataclasses
import itertools
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.utils._pytree import TreeSpec

from bridge_wire import trees
from bridge_wire.errors import BridgeError

if TYPE_CHECKING:
    from bridge_client.torch.function import RemoteJaxFunction

_log = logging.getLogger(__name__)

# By which number compiled code names a function.
_functions: "weakref.WeakValueDictionary[int, RemoteJaxFunction]" = weakref.WeakValueDictionary()
_keys = itertools.count()


def name(function: "RemoteJaxFunction") -> int:
    """Return a number by which compiled code can name a function."""
    key = next(_keys)
    _functions[key] = function
    return key


def call(
    key: int,
    own: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: int,
    is_stateful: bool = False,
) -> Any:
    """Call the function of that number; its runs become operators of the graph."""
    args, kwargs = _paraphrased((args, kwargs))
    return _meant(_traced_call(key, own, args, kwargs, mode, is_stateful))


@torch._dynamo.nonstrict_trace
def _traced_call(
    key: int,
    own: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: int,
    is_stateful: bool = False,
) -> Any:
    """Call a function while torch.compile traces, with tensors that have types only: its runs
    become operators."""
    if torch.compiler.is_exporting():
        _pass_structures()
    args, kwargs = _meant((args, kwargs))
    try:
        made = _functions[key]._call_traced(own, args, kwargs, mode, is_stateful)
    except BridgeError as error:
        _log.error(
            "a call that torch.compile traces has failed: %s", error
        )  # Dynamo's own error forgets the cause
        raise
    return _paraphrased(made)


# What nonstrict_trace refuses goes through it in other words, as the one key of a dict.
_NONE = "torch-jax-bridge: None"
_TEXT = "torch-jax-bridge: text "
_CLASS = "torch-jax-bridge: class "
_named: list[Any] = []  # the namedtuples and dataclasses that were met


def _paraphrased(value: Any) -> Any:
    """Return a pytree in words that nonstrict_trace lets through.

    Dynamo traces it, and `_meant`.
    """
    if value is None:
        return {_NONE: 0}
    if type(value) is str:
        return {_TEXT + value: 0}
    if (fields := _fields_of(type(value))) is not None:
        return {
            f"{_CLASS}{_number_of(type(value))}": [
                _paraphrased(getattr(value, field)) for field in fields
            ]
        }
    if isinstance(value, list):
        return [_paraphrased(item) for item in value]
    if isinstance(value, tuple):
        return tuple([_paraphrased(item) for item in value])
    if isinstance(value, Mapping):
        items = [(key, _paraphrased(value[key])) for key in value]
        return (
            collections.OrderedDict(items)
            if isinstance(value, collections.OrderedDict)
            else dict(items)
        )
    return value


def _meant(value: Any) -> Any:
    """Return the pytree that was paraphrased so."""
    if type(value) is list:
        return [_meant(item) for item in value]
    if type(value) is tuple:
        return tuple([_meant(item) for item in value])
    if not isinstance(value, dict):
        return value
    key = next(iter(value)) if len(value) == 1 else None
    if type(key) is not str or not key.startswith("torch-jax-bridge: "):
        return type(value)([(key, _meant(item)) for key, item in value.items()])
    if key.startswith(_CLASS):
        cls = _named[int(key[len(_CLASS) :])]
        return trees.instantiate(cls, _fields_of(cls) or (), [_meant(item) for item in value[key]])
    return None if key == _NONE else key[len(_TEXT) :]


# Dynamo sees of these two what they return: they look at classes only, and a class that is met has
# its number at once.
@torch.compiler.assume_constant_result
def _fields_of(cls: type) -> tuple[str, ...] | None:
    """Return the names of the fields of a namedtuple, or of a dataclass that is no dict; of any
    other class, None."""
    if issubclass(cls, tuple):
        return getattr(cls, "_fields", None)
    if not dataclasses.is_dataclass(cls) or issubclass(cls, Mapping | list):
        return None
    return tuple([field.name for field in dataclasses.fields(cls)])


@torch.compiler.assume_constant_result
def _number_of(cls: type) -> int:
    """Return by which number a class is named."""
    if cls not in _named:
        _named.append(cls)
    return _named.index(cls)


def _pass_structures() -> None:
    """Let strict export go on: it takes each constant of Dynamo's graph without a value for a
    tensor, even the structures of arguments that nonstrict_trace puts there itself (torch 2.13).
    """
    with contextlib.suppress(AttributeError):  # in non-strict export there is no Dynamo
        for node in InstructionTranslator.current_tx().output.graph.nodes:
            if isinstance(node.meta.get("example_value"), TreeSpec):
                node.meta.setdefault("val", None)
