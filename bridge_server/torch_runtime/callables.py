"""A model's code, called with its own state or with somebody else's, by several threads at once.

A call of a module never changes that module: it is made on a copy that shares the module's tensors,
or, where the caller passes its own, has those in their place. What it leaves in the copy's
attributes is dropped. torch.func.functional_call would swap them in the module itself, where calls
of other threads see them.
"""

import contextlib
import copy
import logging
import operator
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from bridge_server.torch_runtime.python_state import PythonState
from bridge_wire.errors import CallerError

_log = logging.getLogger(__name__)


Called = Callable[
    [Sequence[Tensor] | None, Sequence[Any], Mapping[str, Any]], tuple[Any, Sequence[Tensor]]
]


class Code(ABC):
    """What a call runs."""

    def __init__(self, target: Any) -> None:
        self._target = target
        # Set once a call was seen to keep tensors where its copies share them: calls then take
        # turns.
        self._turns: threading.RLock | None = None

    def __call__(
        self, values: Sequence[Tensor] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Sequence[Tensor]]:
        """Return the result, and the state after the call.

        The state's values are the model's own if None.
        """
        if self._turns is None:
            return self._called(values, args, kwargs)
        with self._turns:
            before = self.python_state()
            try:
                return self._called(values, args, kwargs)
            finally:
                before.restore_tensors()

    @abstractmethod
    def _called(
        self, values: Sequence[Tensor] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Sequence[Tensor]]: ...

    def isolated(self) -> Called:
        """Return what to call where calls may leave tensors without values in the model's
        attributes."""
        return self._called

    def python_state(self) -> PythonState:
        """Return a snapshot of all Python state that calls share."""
        return PythonState(self._target, follows_code=True)

    def take_turns(self, where: str) -> None:
        """Put all Python state back after each call from now on."""
        if self._turns is None:
            self._turns = threading.RLock()
            _log.warning(
                "%s keeps tensors that depend on its arguments or parameters in a class, closure,"
                " global or cache, and reads them in later calls: they are dropped after each call,"
                " and calls run one after the other",
                where,
            )

    def use_copies_once(self) -> None:
        """Make each call on a new copy from now on: calls write to tensors that are no state."""
        return

    def work_on_the_original(self) -> bool:
        """Call no copies from now on; return whether that changes anything."""
        return False


class CodeOfFunction(Code):
    """A function without state."""

    def _called(
        self, values: Sequence[Tensor] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Sequence[Tensor]]:
        return self._target(*args, **kwargs), ()


class CodeOfPair(Code):
    """A function whose first argument is its state."""

    def __init__(self, function: Callable[..., Any], structure: Any, own: Sequence[Tensor]) -> None:
        super().__init__(function)
        self._structure = structure
        self._own = own

    def _called(
        self, values: Sequence[Tensor] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Sequence[Tensor]]:
        state = list(self._own if values is None else values)
        return self._target(pytree.tree_unflatten(state, self._structure), *args, **kwargs), state


class CodeOfModule(Code):
    """A module: each call under way has a copy of it, which gets its attributes back afterwards.

    Of a module that cannot be copied, or whose copies would still use the original's tensors, the
    original itself serves one call at a time, and holds its own state whenever it does not.
    """

    def __init__(self, module: nn.Module, own: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__(module)
        self._original = _Refillable(module, own)
        self._own = own
        self._values = values
        self._idle: list[_Refillable] = []
        self._one_at_a_time: threading.RLock | None = None
        self._uses_copies_once = False
        try:
            self._idle.append(self._copied())
        except Exception as error:
            name = type(module).__name__
            _log.warning("%s cannot be copied, so it serves one call at a time: %s", name, error)
            self._one_at_a_time = threading.RLock()

    def _called(
        self, values: Sequence[Tensor] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Sequence[Tensor]]:
        if self._one_at_a_time is not None:
            with self._one_at_a_time:
                if values is None:
                    return self._original.call(self._values, args, kwargs)
                return self._original.call_alone(values, args, kwargs)
        with self._leased() as leased:
            return leased.call(values, args, kwargs)

    def isolated(self) -> Called:
        return self._called if self._one_at_a_time is not None else self._copied().call

    def work_on_the_original(self) -> bool:
        if self._one_at_a_time is not None:
            return False
        self._one_at_a_time = threading.RLock()
        name = type(self._original.module).__name__
        _log.warning(
            "copies of %s use its own tensors, by a closure perhaps, so it serves one call at a"
            " time",
            name,
        )
        return True

    def use_copies_once(self) -> None:
        self._uses_copies_once = True
        self._idle.clear()

    @contextlib.contextmanager
    def _leased(self) -> "Iterator[_Refillable]":
        try:
            leased = self._idle.pop()  # atomic
        except IndexError:
            leased = self._copied()
        try:
            yield leased
        finally:
            if not leased.is_held and not self._uses_copies_once:
                self._idle.append(leased)

    def _copied(self) -> "_Refillable":
        # What is in the memo already is not copied: the copy has these tensors where the module has
        # its own.
        memo: dict[int, Any] = {
            id(mine): value for mine, value in zip(self._own, self._values, strict=True)
        }
        with (
            _disable_current_modes()
        ):  # a trace must not take the copy's own tensors for made by the call
            return _Refillable(copy.deepcopy(self._original.module, memo), self._values)


class _Refillable:
    """A module whose state can be replaced.

    Between calls it holds the tensors and attributes that it has now.
    """

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
        self._recurrent = [part for part in module.modules() if isinstance(part, nn.RNNBase)]
        self._parts = list(module.modules())
        self._at_rest = PythonState(module)
        # Whether a graph that the last call has left may call the module again, as
        # torch.utils.checkpoint has it do: then it must find that call's values, and the module
        # goes with the graph. (Or with an exception.)
        self.is_held = False

    def call(
        self, values: Sequence[Tensor] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Sequence[Tensor]]:
        """Call the module with these values, or with those that it has. Afterwards it has all that
        it had before, but keeps the values if it is held.
        """
        references = list(map(sys.getrefcount, self._parts)) if torch.is_grad_enabled() else []
        if values is not None:
            self._fill(values)
        try:
            result = self.module(*args, **kwargs)
            places = map(self._first.__getitem__, range(0 if values is None else len(values)))
            return result, [held[name] for held, name in places]
        finally:
            now = map(sys.getrefcount, self._parts)
            self.is_held = torch.is_grad_enabled() and any(map(operator.gt, now, references))
            self._at_rest.restore()
            if self.is_held and values is not None:
                self._fill(values)

    def call_alone(
        self, values: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Sequence[Tensor]]:
        """Call the module with these values.

        Raises:
          CallerError: the call has left a graph that would call the module again, and find other
            values.
        """
        try:
            called = self.call(values, args, kwargs)
            if self.is_held:
                raise CallerError(
                    f"{type(self.module).__name__} runs parts of itself again in its backward pass,"
                    " as under torch.utils.checkpoint, and cannot be copied: let it be copied, or"
                    " do without"
                )
            return called
        finally:
            self._at_rest.restore()

    def _fill(self, values: Sequence[Tensor]) -> None:
        for held, name, i in self._places:
            held[name] = values[i]
        for part in self._recurrent:
            part._init_flat_weights()  # they have a list of the same tensors, too
