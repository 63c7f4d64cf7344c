"""A model's call as a function of a flat list of arrays: what every transform starts from."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bridge_server.runtime import Model
from bridge_server.torch_runtime.randomness import seed
from bridge_server.torch_runtime.results import Results
from bridge_server.torch_runtime.tracing import Traced, Trial
from bridge_server.torch_runtime.types import TORCH_DTYPES
from bridge_wire import trees
from bridge_wire.errors import CallerError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)


class Call:
    """The function from parameters (if the caller passes them), a key (if streams are named) and
    leaves to outputs.

    It changes none of the arrays that it is given, whatever the model does to them.
    """

    def __init__(
        self,
        model: Model,
        call: pb.Call,
        inputs: tuple[Spec, ...],
        classes: trees.Classes,
        device: torch.device,
        where: str,
    ) -> None:
        self.inputs = inputs
        self.device = device
        self.where = where
        self._model = model
        self._classes = classes
        self._arguments = call.arguments
        self._is_flat = _is_flat(call.arguments)
        self._passed = len(model.parameters) if call.parameters else 0
        self._is_bound = not call.parameters
        self.key = self._passed if call.rngs else None  # where it is among the inputs
        self.leaves = self._passed + (self.key is not None)  # where they begin
        self._changing = [
            i for i, p in enumerate(model.parameters) if call.mutable and not p.trainable
        ]
        self._results = Results(
            model.name, classes, [model.parameters[i].path for i in self._changing]
        )
        self._is_traced = False
        self._is_told = False
        self.is_opaque = False  # whether torch.func was seen to fail on it
        traced = self._trial().trace()
        if traced.strays and model.apply.work_on_the_original():
            traced = self._trial().trace()
        if traced.reads_kept:
            model.apply.take_turns(where)
        if traced.overwrites:
            model.apply.use_copies_once()
        if traced.strays and call.parameters:
            self._refuse_strays(traced)
        self._is_traced = True
        self.result, self.outputs = self._results.tree, self._results.specs
        self.operators = traced.operators
        self.draws = traced.draws or self.key is not None
        self.draws_by_layout = traced.draws_by_layout
        self.has_fast_path = traced.has_fast_path
        self._needs_grad = traced.needs_grad
        written = self._written(traced)
        self._written_state = [i for i in written if i < len(model.values)]
        self._written_leaves = [i - len(model.values) for i in written if i >= len(model.values)]

    def __call__(self, arrays: Sequence[Any]) -> list[Tensor]:
        """Return the outputs: those of the result, and the changed state if it may change."""
        state: Sequence[Tensor] | None = None if self._is_bound else arrays[: self._passed]
        leaves = arrays[self.leaves :]
        if self._written_state:
            state = _cloned(self._model.values if state is None else state, self._written_state)
        if self._written_leaves:
            leaves = _cloned(leaves, self._written_leaves)
        if self.key is not None:
            seed(arrays[self.key])
        if self._needs_grad:
            with torch.enable_grad():
                return self._outputs_of(state, leaves, self._model.apply)
        return self._outputs_of(state, leaves, self._model.apply)

    def tell_if_unkeyed(self) -> None:
        """Say, once, if a derivative that runs the call again cannot be that of the value."""
        if self.draws and self.key is None and not self._is_told:
            self._is_told = True
            _log.warning(
                "%s draws random numbers without a key, so derivatives of it which run it again are"
                " taken with others than its value; pass a key",
                self.where,
            )

    def protect_inputs(self) -> None:
        """Give the model copies of all inputs from now on: a trace cannot show writes that
        depend on Python's state."""
        self._written_state = list(range(len(self._model.values)))
        self._written_leaves = [
            i for i, spec in enumerate(self.inputs[self.leaves :]) if not spec.weak
        ]

    @functools.cached_property
    def has_custom_functions(self) -> bool:
        """Whether derivatives of the call pass an autograd.Function, as far as can be told."""
        return self._trial().has_custom_functions()

    def _trial(self) -> Trial:
        state = self._model.values
        passed = [
            TORCH_DTYPES[spec.dtype] for spec in self.inputs[: self._passed]
        ]  # which the caller may have cast
        dtypes = [each.dtype for each in state] if self._is_bound else passed
        inputs, snapshot = self.inputs[self.leaves :], self._model.apply.python_state
        return Trial(self._isolated, state, dtypes, inputs, self.device, self.where, snapshot)

    def _refuse_strays(self, traced: Traced) -> None:
        paths = [self._model.parameters[i].path for i in sorted(traced.strays)]
        raise CallerError(
            f"model {self._model.name!r} uses its parameter {paths[0]!r} by another way than its"
            " registration, such as a list or a closure, so that the caller's cannot take its"
            " place; use the registered one, or leave the parameters on the worker"
        )

    def _written(self, traced: Traced) -> set[int]:
        """Return what has to be copied before the model gets it, among the state and then the
        leaves."""
        written = set(traced.written)
        parameters, leaves = self._model.parameters, self.inputs[self.leaves :]
        if not traced.is_fake:
            # Other values may lead elsewhere. Weights can be large, and no model was seen to change
            # only them.
            written |= {i for i, parameter in enumerate(parameters) if not parameter.trainable}
        if not traced.is_fake or any(
            spec.weak for spec in leaves
        ):  # a trace holds for the numbers it was made with
            written |= {len(parameters) + i for i, spec in enumerate(leaves) if not spec.weak}
        return written

    def _isolated(self) -> Callable[[Sequence[Tensor] | None, Sequence[Any]], list[Tensor]]:
        return functools.partial(self._outputs_of, apply=self._model.apply.isolated())

    def _outputs_of(
        self,
        state: Sequence[Tensor] | None,
        leaves: Sequence[Any],
        apply: Callable[..., tuple[Any, Any]],
    ) -> list[Tensor]:
        args, kwargs = (
            (tuple(leaves), {})
            if self._is_flat
            else trees.build(self._arguments, leaves, self._classes)
        )
        value, after = apply(state, args, kwargs)
        buffers = [after[i].detach() for i in self._changing]  # no gradient goes through state
        return (
            self._results.take(value, buffers)
            if self._is_traced
            else self._results.learn(value, buffers)
        )


def _is_flat(arguments: pb.Tree) -> bool:
    args, kwargs = arguments.tuple.items
    return not kwargs.dict.items and all(each.HasField("leaf") for each in args.tuple.items)


def _cloned(tensors: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    made = list(tensors)
    for i in positions:
        made[i] = made[i].clone()
    return made
