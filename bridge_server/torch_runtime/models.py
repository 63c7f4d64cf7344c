"""What may be served, taken apart into a function and its state.

A call of a module never changes that module: it is made on a copy that shares the module's tensors, or, where the
caller passes its own, has those in their place. torch.func.functional_call would swap them in the module itself, where
calls of other threads see them.
"""

import contextlib
import copy
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from bridge_server.torch_runtime.types import DTYPES
from bridge_wire.errors import TargetError

_log = logging.getLogger(__name__)


class Parts(NamedTuple):
    """A target taken apart: `apply(state, args, kwargs)`, where only `state` holds arrays."""

    apply: "Apply"
    state: Mapping[str, Tensor]
    trainable: frozenset[str]
    documented: Any  # the callable whose docstring and signature describe the model
    skips_first: bool = False  # whether that signature begins with the parameters


# (values of the state, or None for the model's own; args; kwargs) -> the result, and the values afterwards
Apply = Callable[[Sequence[Tensor] | None, Sequence[Any], Mapping[str, Any]], tuple[Any, Sequence[Tensor]]]


def parts_of(name: str, target: Any) -> Parts | None:
    """Return the parts of a function, a module, or a pair of either and its parameters; None for anything else."""
    if isinstance(target, tuple) and len(target) == 2 and callable(target[0]) and isinstance(target[1], Mapping):
        function, given = target
        if isinstance(function, nn.Module):
            return _of_module(name, function, given)
        return _of_function(name, function, given)
    if isinstance(target, nn.Module):
        return _of_module(name, target, {})
    if callable(target) and not isinstance(target, type):
        return Parts(lambda _, args, kwargs: (target(*args, **kwargs), ()), {}, frozenset(), target)
    return None


def _of_function(name: str, function: Callable[..., Any], params: Mapping[str, Any]) -> Parts:
    leaves, structure = pytree.tree_flatten_with_path(params)
    state = {".".join(str(_step(step)) for step in path): leaf for path, leaf in leaves}
    _check(name, state)

    def apply(
        values: Sequence[Tensor] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Sequence[Tensor]]:
        values = list(own if values is None else values)
        return function(pytree.tree_unflatten(values, structure), *args, **kwargs), values

    own = [leaf.detach() for leaf in state.values()]
    trainable = frozenset(label for label, leaf in state.items() if _can_be_trained(leaf))
    return Parts(apply, state, trainable, function, skips_first=True)


def _of_module(name: str, module: nn.Module, given: Mapping[str, Tensor]) -> Parts:
    """Take a module apart; tensors of the same names in `given` take the place of its own."""
    if isinstance(module, torch.jit.ScriptModule):  # it holds its tensors where Python cannot replace them
        return Parts(lambda _, args, kwargs: (module(*args, **kwargs), ()), {}, frozenset(), module.forward)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if unknown := sorted(given.keys() - own.keys()):
        raise TargetError(f"{name!r} has no parameter {unknown[0]!r}; it has {sorted(own)[:20]}")
    # What has no counterpart in the other framework, such as a quantized weight, stays with the worker.
    sent = {label: each for label, each in own.items() if each.layout is torch.strided and each.dtype in DTYPES}
    state = {label: given.get(label, each) for label, each in sent.items()}
    _check(name, state)
    trainable = {
        label
        for label, each in module.named_parameters()
        if each.requires_grad and label in state and _can_be_trained(state[label])
    }
    copies = _Copies(module, list(sent.values()), [each.detach() for each in state.values()])
    return Parts(copies.apply, state, frozenset(trainable), module.forward)


def _check(name: str, state: Mapping[str, Any]) -> None:
    for label, leaf in state.items():
        if not isinstance(leaf, Tensor) or leaf.dtype not in DTYPES:
            raise TargetError(f"the parameter {label!r} of {name!r} is {_described(leaf)}; expected a dense tensor")
        if nn.parameter.is_lazy(leaf) or leaf.is_meta:
            raise TargetError(f"the parameter {label!r} of {name!r} has no values yet; initialise the module first")


def _can_be_trained(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _described(leaf: Any) -> str:
    return f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else f"a {type(leaf).__qualname__}"


def _step(step: Any) -> Any:
    return next(getattr(step, name) for name in ("key", "idx", "name") if hasattr(step, name))


class _Copies:
    """A module's copies, which share its tensors: one for all calls with its own state, and one for each call under
    way with somebody else's. Of a module that cannot be copied there is one, for one call at a time."""

    def __init__(self, module: nn.Module, own: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self._module = module
        self._own = own
        self._values = values
        self._idle: list[_Copy] = []
        self._exclusive: threading.RLock | None = None
        try:
            self._resting = self._copy()
        except Exception as error:
            _log.warning("%s cannot be copied, and is called by one client at a time: %s", type(module).__name__, error)
            self._exclusive = threading.RLock()
            self._resting = _Copy(module, own)

    def apply(
        self, values: Sequence[Tensor] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Sequence[Tensor]]:
        if values is None and self._exclusive is None:
            return self._resting.module(*args, **kwargs), ()
        with self._leased() as leased:
            leased.fill(self._values if values is None else values)
            try:
                result = leased.module(*args, **kwargs)
                return result, leased.values()
            finally:
                leased.fill(self._values if self._exclusive is None else self._own)

    @contextlib.contextmanager
    def _leased(self) -> "Iterator[_Copy]":
        if self._exclusive is not None:
            with self._exclusive:
                yield self._resting
            return
        try:
            leased = self._idle.pop()  # atomic
        except IndexError:
            leased = self._copy()
        try:
            yield leased
        finally:
            self._idle.append(leased)

    def _copy(self) -> "_Copy":
        # What is in the memo already is not copied: the copy has these tensors where the module has its own.
        memo: dict[int, Any] = {id(mine): value for mine, value in zip(self._own, self._values, strict=True)}
        return _Copy(copy.deepcopy(self._module, memo), self._values)


class _Copy:
    """One module whose state can be replaced."""

    def __init__(self, module: nn.Module, state: Sequence[Tensor]) -> None:
        self.module = module
        positions = {id(each): i for i, each in enumerate(state)}
        # Where the module holds each tensor; tied ones are in several places.
        self._places: list[tuple[dict[str, Any], str, int]] = [
            (held, name, positions[id(each)])
            for part in module.modules()
            for held in (part._parameters, part._buffers)
            for name, each in held.items()
            if id(each) in positions
        ]
        self._first = {i: (held, name) for held, name, i in reversed(self._places)}

    def fill(self, values: Sequence[Tensor]) -> None:
        for held, name, i in self._places:
            held[name] = values[i]

    def values(self) -> list[Tensor]:
        """Return what the module holds now."""
        return [held[name] for held, name in (self._first[i] for i in range(len(self._first)))]
