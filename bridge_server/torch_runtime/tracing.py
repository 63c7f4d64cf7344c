"""What a call returns and touches, found out before its first run.

The call is made once with fake tensors, which have types and no data. A model that cannot be called so, because it
looks at values, is run on zeros.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bridge_server.model_errors import remote
from bridge_server.torch_runtime.randomness import drawing
from bridge_server.torch_runtime.types import zeros
from bridge_wire.errors import BridgeError
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)

# Operators that keep statistics write these arguments, and their schemas do not say so.
_STATISTICS = frozenset({"running_mean", "running_var"})

Function = Callable[[Sequence[Tensor], Sequence[Any]], object]


class Traced(NamedTuple):
    """What a trace has found out."""

    written: frozenset[int]  # positions of what was changed in place, among the state and then the inputs
    strays: frozenset[int]  # positions of state of which the original was used instead of what was passed
    draws: bool  # whether random numbers were drawn
    needs_grad: bool  # whether it works only while autograd records, as a model does that differentiates inside
    is_fake: bool  # whether it holds whatever the values are


def trace(
    f: Function,
    state: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    inputs: Sequence[Spec],
    device: torch.device,
    where: str,
) -> Traced:
    """Call `f(state, inputs)` with tensors like these, but of these dtypes, and inputs of these types on a device.

    Return what it does.

    Raises:
      RemoteModelError: the model raises, on zeros too.
    """
    errors: list[Exception] = []
    for is_fake, needs_grad in ((True, False), (True, True), (False, False), (False, True)):
        try:
            traced = _attempt(f, state, dtypes, inputs, device, is_fake=is_fake, needs_grad=needs_grad)
        except Exception as error:
            if isinstance(error, BridgeError) and not is_fake:  # a model may use this very package: see on zeros
                raise
            errors.append(error)
            continue
        if not is_fake:
            _log.warning("%s was run once on zeros, since it cannot be traced: %s", where, _first_line(errors[0]))
        return traced
    raise remote(errors[-1], where) from errors[-1]


def _attempt(
    f: Function,
    state: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    inputs: Sequence[Spec],
    device: torch.device,
    *,
    is_fake: bool,
    needs_grad: bool,
) -> Traced:
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(needs_grad))
        if is_fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            copies = [
                torch.empty(each.shape, dtype=dtype, device=each.device)
                for each, dtype in zip(state, dtypes, strict=True)
            ]
        else:
            stack.enter_context(
                drawing(is_seeded=True)
            )  # what is drawn here is missed nowhere; fake tensors draw nothing
            copies = [each.detach().to(dtype, copy=True) for each, dtype in zip(state, dtypes, strict=True)]
        arrays = [zeros(spec, device) for spec in inputs]
        watch = stack.enter_context(_Watch([*copies, *arrays], originals=state))
        f(copies, arrays)
    return Traced(frozenset(watch.written), frozenset(watch.strays), watch.draws, needs_grad, is_fake)


class _Watch(TorchDispatchMode):
    """Sees every operator that runs, and notes what it does besides returning tensors."""

    def __init__(self, tensors: Sequence[Any], *, originals: Sequence[Tensor]) -> None:
        super().__init__()
        self.draws = False
        self.written: set[int] = set()
        self.strays: set[int] = set()
        self._positions = {_storage(x): i for i, x in enumerate(tensors) if isinstance(x, Tensor)}
        self._originals = {_storage(x): i for i, x in enumerate(originals)}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {each.name: each.default_value for each in operator._schema.arguments} | dict(kwargs or {})
        for argument, value in zip(operator._schema.arguments, args, strict=False):
            given[argument.name] = value
        # Attention bears the tag with and without dropout.
        if torch.Tag.nondeterministic_seeded in operator.tags and given.get("dropout_p") != 0:
            self.draws = True
        for argument in operator._schema.arguments:
            value = given.get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written or argument.name in _STATISTICS:
                self.written |= _positions_of(value, self._positions)
            self.strays |= _positions_of(value, self._originals)
        return operator(*args, **(kwargs or {}))


def _positions_of(value: Any, positions: Mapping[int | None, int]) -> set[int]:
    tensors = [each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, Tensor)]
    return {positions[storage] for storage in map(_storage, tensors) if storage in positions}


def _storage(tensor: Tensor) -> int | None:
    """Return what tensors that share memory have in common."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
