"""A model's code as a callable for several threads, with the model's or the caller's state.

A call never changes the module: it runs on a copy with the module's tensors, or with the caller's
tensors in their place. Changes of the copy's attributes are dropped after the call.
torch.func.functional_call would swap tensors in the module itself, where other threads' calls see
them.
"""

import contextlib
import copy
import logging
import operator
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from bridge_server.torch_runtime.checkpoints import without_reentry
from bridge_server.torch_runtime.python_state import PythonState
from bridge_server.torch_runtime.scripted import Place, places_in
from bridge_wire.errors import CallerError

_log = logging.getLogger(__name__)


# One tensor per parameter and buffer; None for the model's own.
Values = Sequence[Tensor] | None
# The result, and the state after the call.
Outcome = tuple[Any, Sequence[Tensor]]


class Arguments(NamedTuple):
    """The arguments of one call, for a method of the target or, if it is empty, the target."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    method: str = ""

    def passed_to(self, target: Any) -> Any:
        """Return the result of the call."""
        function = getattr(target, self.method) if self.method else target
        if not torch.is_grad_enabled():
            return function(*self.args, **self.kwargs)
        with without_reentry:
            return function(*self.args, **self.kwargs)


Called = Callable[[Values, Arguments], Outcome]


class Code(ABC):
    """The code that a call runs."""

    def __init__(self, target: Any) -> None:
        self._target = target
        # Set after a call has kept tensors where copies share them: from then on, one call at a
        # time.
        self._turns: threading.RLock | None = None

    def __call__(self, values: Values, arguments: Arguments) -> Outcome:
        """Return the result, and the state after the call; values None are the model's own."""
        if self._turns is None:
            return self._called(values, arguments)
        with self._turns:
            before = self.python_state()
            try:
                return self._called(values, arguments)
            finally:
                before.restore_tensors()

    @abstractmethod
    def _called(self, values: Values, arguments: Arguments) -> Outcome: ...

    def isolated(self) -> Called:
        """Return the callable for calls that may leave fake tensors in the model's attributes."""
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
                " global or cache, and reads them in later calls: the bridge drops them after each"
                " call, and runs one call at a time",
                where,
            )

    def use_copies_once(self) -> None:
        """Use a new copy for each call from now on: calls write to tensors that are not state."""
        return

    def work_on_the_original(self) -> bool:
        """Call the original from now on, not copies; return whether this is a change."""
        return False


class CodeOfFunction(Code):
    """A function without state."""

    def _called(self, values: Values, arguments: Arguments) -> Outcome:
        return arguments.passed_to(self._target), ()


class CodeOfPair(Code):
    """A function whose first argument is its state."""

    def __init__(
        self, function: Callable[..., Any], structure: Any, own: Sequence[Tensor]
    ) -> None:
        super().__init__(function)
        self._structure = structure
        self._own = own

    def _called(self, values: Values, arguments: Arguments) -> Outcome:
        state = list(self._own if values is None else values)
        params = pytree.tree_unflatten(state, self._structure)
        args, kwargs, _ = arguments
        passed = Arguments((params, *args), kwargs)
        return passed.passed_to(self._target), state


class CodeOfModule(Code):
    """A module: each call in flight leases a copy, whose attributes are restored afterwards.

    A module that cannot be copied, or whose copies use the original's tensors, serves one call at a
    time itself, and holds its own state between calls.
    """

    def __init__(
        self, module: nn.Module, own: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        super().__init__(module)
        scripted = list(places_in(module, module, own))
        self._original = _Refillable(module, own, scripted)
        self._own = own
        self._values = values
        self._idle: list[_Refillable] = []
        self._one_at_a_time: threading.RLock | None = None
        self._uses_copies_once = False
        try:
            self._idle.append(self._copied())
        except Exception as error:
            name = type(module).__name__
            _log.warning(
                "%s cannot be copied, so it serves one call at a time: %s", name, error
            )
            self._one_at_a_time = threading.RLock()

    def _called(self, values: Values, arguments: Arguments) -> Outcome:
        if self._one_at_a_time is not None:
            with self._one_at_a_time:
                if values is None:
                    return self._original.call(self._values, arguments)
                return self._original.call_alone(values, arguments)
        with self._leased() as leased:
            return leased.call(values, arguments)

    def isolated(self) -> Called:
        return self._called if self._one_at_a_time is not None else self._copied().call

    def work_on_the_original(self) -> bool:
        if self._one_at_a_time is not None:
            return False
        self._one_at_a_time = threading.RLock()
        name = type(self._original.module).__name__
        _log.warning(
            "copies of %s use its own tensors, perhaps by a closure, so it serves one call at a"
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
        # deepcopy takes objects from the memo: the copy gets these values for the module's tensors.
        memo: dict[int, Any] = dict(zip(map(id, self._own), self._values, strict=True))
        original = self._original.module
        # A trace must not see the copy's own tensors, or it takes them for the call's.
        with _disable_current_modes():
            copied = copy.deepcopy(original, memo)
            scripted = list(places_in(copied, original, self._own))
            for place in scripted:
                place.fill(self._values)
            return _Refillable(copied, self._values, scripted)


class _Refillable:
    """A module whose state can be replaced for a call; then its present state is restored."""

    def __init__(
        self,
        module: nn.Module,
        state: Sequence[Tensor],
        scripted: Sequence[Place],
    ) -> None:
        self.module = module
        self._scripted = scripted
        positions = {id(each): i for i, each in enumerate(state)}
        # The places of each tensor in the module; tied tensors have several.
        self._places: list[tuple[dict[str, Any], str, int]] = [
            (held, name, positions[id(each)])
            for part in module.modules()
            for held in (part._parameters, part._buffers)
            for name, each in held.items()
            if id(each) in positions
        ]
        self._first = {i: (held, name) for held, name, i in reversed(self._places)}
        self._recurrent = [
            part for part in module.modules() if isinstance(part, nn.RNNBase)
        ]
        self._parts = list(module.modules())
        self._at_rest = PythonState(module)
        # Whether the last call's graph may call the module again, as torch.utils.checkpoint does.
        # Then the module keeps that call's values, and lives as long as the graph (or exception).
        self.is_held = False

    def call(self, values: Values, arguments: Arguments) -> Outcome:
        """Call the module with these values, or with its own.

        Afterwards, restore its state; if a graph holds the module, keep the values.
        """
        references = (
            list(map(sys.getrefcount, self._parts)) if torch.is_grad_enabled() else []
        )
        if values is not None:
            self._fill(values)
        try:
            result = arguments.passed_to(self.module)
            places = map(
                self._first.__getitem__, range(0 if values is None else len(values))
            )
            return result, [held[name] for held, name in places]
        finally:
            now = map(sys.getrefcount, self._parts)
            self.is_held = torch.is_grad_enabled() and any(
                map(operator.gt, now, references)
            )
            self._at_rest.restore()
            if self.is_held and values is not None:
                self._fill(values)

    def call_alone(self, values: Sequence[Tensor], arguments: Arguments) -> Outcome:
        """Call the module with these values.

        Raises:
          CallerError: the call's graph would call the module again, and find other values.
        """
        try:
            called = self.call(values, arguments)
            if self.is_held:
                raise CallerError(
                    f"{type(self.module).__name__} runs parts of itself again in its backward pass,"
                    " as under torch.utils.checkpoint, and cannot be copied: make it copyable, or"
                    " do without the second run"
                )
            return called
        finally:
            self._at_rest.restore()

    def _fill(self, values: Sequence[Tensor]) -> None:
        for held, name, i in self._places:
            held[name] = values[i]
        for part in self._recurrent:
            part._init_flat_weights()  # a list of the same tensors
        for place in self._scripted:
            place.fill(values)
