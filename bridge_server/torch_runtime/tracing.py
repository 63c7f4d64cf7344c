"""What a call returns and touches, found out before its first run.

The call is made once with fake tensors, which have types and no data. A model that cannot be called so, because it
looks at values, is run on zeros; if it refuses these or does not end on them, on ones, or on identity matrices.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bridge_server.model_errors import is_models, remote, text_of
from bridge_server.torch_runtime.randomness import drawing
from bridge_server.torch_runtime.types import zeros
from bridge_wire.errors import BridgeError, CallerError
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)

# Operators that keep statistics write these arguments, and their schemas do not say so.
_STATISTICS = frozenset({"running_mean", "running_var"})

# A run on made-up values that takes so many operators, some seconds, seems to have no end: others are tried. If it has
# none on any of them, each gets more, a minute or two.
_MOST_OPERATORS = (100_000, 3_000_000)

Function = Callable[[Sequence[Tensor], Sequence[Any]], object]
# Makes an input of a type on a device.
Filling = Callable[[Spec, torch.device], Any]


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
      RemoteModelError: the model raises, whatever the values.
      CallerError: it does not end, whatever the values.
    """
    call = _Call(f, state, dtypes, inputs, device)
    try:
        return call.made(zeros, math.inf, is_fake=True)
    except BaseException as error:
        if not is_models(error):
            raise
        why = error
    return _traced_on_values(call, why, where)


def _traced_on_values(call: "_Call", why: BaseException, where: str) -> Traced:
    """Make the call on whichever values it takes; on fake tensors it has failed with `why`."""
    refused: dict[str, BaseException] = {}
    for most_operators in _MOST_OPERATORS:
        for name, filling in _FILLINGS.items():
            if not isinstance(refused.get(name, _Endless()), _Endless):
                continue
            try:
                traced = call.made(filling, most_operators, is_fake=False)
            except BaseException as error:
                # A model may use this very package: on fake tensors, that is an error of ours, too.
                if isinstance(error, BridgeError) or not is_models(error):
                    raise
                if _first_line(error) == _first_line(why):  # then it is not for the values
                    raise remote(error, where) from error
                refused[name] = error
                continue
            _log.warning("%s was run once on %s, since it cannot be traced: %s", where, name, _first_line(why))
            return traced
    if endless := [name for name, error in refused.items() if isinstance(error, _Endless)]:
        raise CallerError(
            f"{where} looks at values, so it was run to find out what it returns, and did not end within "
            f"{_MOST_OPERATORS[-1]} operators on {' or on '.join(endless)}; bound its loops by a number of steps"
        )
    raise remote(refused["zeros"], where) from refused["zeros"]


@dataclass(frozen=True, slots=True)
class _Call:
    """A call to be made on state like this and made-up inputs."""

    f: Function
    state: Sequence[Tensor]
    dtypes: Sequence[torch.dtype]
    inputs: Sequence[Spec]
    device: torch.device

    def made(self, filling: Filling, most_operators: float, *, is_fake: bool) -> Traced:
        """Make the call; once more with autograd recording, if it fails without."""
        try:
            return self._made(filling, most_operators, is_fake=is_fake, needs_grad=False)
        except Exception as error:
            if isinstance(error, BridgeError) and not is_fake:
                raise
            return self._made(filling, most_operators, is_fake=is_fake, needs_grad=True)

    def _made(self, filling: Filling, most_operators: float, *, is_fake: bool, needs_grad: bool) -> Traced:
        state = list(zip(self.state, self.dtypes, strict=True))
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(needs_grad))
            if is_fake:
                stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
                copies = [torch.empty(each.shape, dtype=dtype, device=each.device) for each, dtype in state]
            else:
                # What is drawn here is missed nowhere; fake tensors draw nothing.
                stack.enter_context(drawing(is_seeded=True))
                copies = [each.detach().to(dtype, copy=True) for each, dtype in state]
            arrays = [filling(spec, self.device) for spec in self.inputs]
            watch = stack.enter_context(_Watch([*copies, *arrays], self.state, most_operators))
            self.f(copies, arrays)
        return Traced(frozenset(watch.written), frozenset(watch.strays), watch.draws, needs_grad, is_fake)


def _ones(spec: Spec, device: torch.device) -> Any:
    """Return ones; but zeros where there are no floats: they may be indices."""
    made = zeros(spec, device)
    return made if spec.weak or not spec.dtype.is_inexact else made.fill_(1)


def _identities(spec: Spec, device: torch.device) -> Any:
    """Return identity matrices where the shape and type are of such, else ones."""
    made = zeros(spec, device)
    if spec.weak:
        return made
    is_matrix = spec.dtype.is_inexact and len(spec.shape) > 1 and spec.shape[-1] == spec.shape[-2]
    (made.diagonal(dim1=-2, dim2=-1) if is_matrix else made).fill_(1)
    return made


_FILLINGS: Mapping[str, Filling] = {"zeros": zeros, "ones": _ones, "identity matrices": _identities}


class _Endless(BaseException):
    """A run has taken more operators than it may. Not for a model to catch."""


class _Watch(TorchDispatchMode):
    """Sees every operator that runs, and notes what it does besides returning tensors."""

    def __init__(self, tensors: Sequence[Any], originals: Sequence[Tensor], most_operators: float) -> None:
        super().__init__()
        self._left = most_operators
        self.draws = False
        self.written: set[int] = set()
        self.strays: set[int] = set()
        self._positions = {_storage(x): i for i, x in enumerate(tensors) if isinstance(x, Tensor)}
        self._originals = {_storage(x): i for i, x in enumerate(originals)}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _Endless
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


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {text_of(error)}".partition("\n")[0]
