"""The way in from torch.compile: a call of a function, traced with tensors that have types only.

Dynamo does not look into it (nonstrict_trace), and lets only some values through; the others go in other words.
"""

import contextlib
import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.utils._pytree import TreeSpec

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
    key: int, own: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], is_stateful: bool = False
) -> Any:
    """Call the function of that number; its runs become operators of the graph."""
    args, kwargs = _mapped(_hidden, (args, kwargs))
    return _mapped(_meant, _traced_call(key, own, args, kwargs, is_stateful))


@torch._dynamo.nonstrict_trace
def _traced_call(
    key: int, own: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], is_stateful: bool = False
) -> Any:
    """Call a function while torch.compile traces, with tensors that have types only: its runs become operators."""
    if torch.compiler.is_exporting():
        _pass_structures()
    args, kwargs = _mapped(_found, (args, kwargs))
    try:
        made = _functions[key]._call_traced(own, args, kwargs, is_stateful)
    except BridgeError as error:
        _log.error("a call that torch.compile traces has failed: %s", error)  # Dynamo's own error forgets the cause
        raise
    return _mapped(_paraphrased, made)


# What nonstrict_trace refuses goes through it in other words: None as an argument by a text, and None, texts and
# namedtuples of a result as the one key of a dict.
_NONE = "torch-jax-bridge: None"
_TEXT = "torch-jax-bridge: text "
_CLASS = "torch-jax-bridge: class "
_named: list[Any] = []  # the classes that results were instances of


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return a pytree with the function applied to its leaves: as Dynamo can trace it, through the usual containers."""
    if type(tree) is dict:
        return function({key: _mapped(function, value) for key, value in tree.items()})
    if type(tree) is list:
        return [_mapped(function, value) for value in tree]
    if type(tree) is tuple:
        return tuple([_mapped(function, value) for value in tree])
    return function(tree)


def _hidden(leaf: Any) -> Any:
    if isinstance(leaf, tuple) and hasattr(leaf, "_fields"):
        return type(leaf)(*[_mapped(_hidden, value) for value in leaf])
    return _NONE if leaf is None else leaf


def _found(leaf: Any) -> Any:
    if isinstance(leaf, tuple) and hasattr(leaf, "_fields"):
        return type(leaf)(*[_mapped(_found, value) for value in leaf])
    return None if type(leaf) is str and leaf == _NONE else leaf


def _paraphrased(leaf: Any) -> Any:
    if leaf is None:
        return {_NONE: 0}
    if isinstance(leaf, tuple):
        if type(leaf) not in _named:
            _named.append(type(leaf))
        return {f"{_CLASS}{_named.index(type(leaf))}": [_mapped(_paraphrased, value) for value in leaf]}
    return {_TEXT + leaf: 0} if type(leaf) is str else leaf


def _meant(value: Any) -> Any:
    key = next(iter(value), None) if type(value) is dict and len(value) == 1 else None
    if type(key) is not str or not key.startswith("torch-jax-bridge: "):
        return value
    if key.startswith(_CLASS):
        return _named[int(key[len(_CLASS) :])](*value[key])
    return None if key == _NONE else key[len(_TEXT) :]


def _pass_structures() -> None:
    """Let strict export go on: it takes each constant of Dynamo's graph without a value for a tensor, even the
    structures of arguments that nonstrict_trace puts there itself (torch 2.13)."""
    with contextlib.suppress(AttributeError):  # in non-strict export there is no Dynamo
        for node in InstructionTranslator.current_tx().output.graph.nodes:
            if isinstance(node.meta.get("example_value"), TreeSpec):
                node.meta.setdefault("val", None)
