"""A model's call as a function of a flat list of arrays, from which all transforms start."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bridge_server.runtime import Model
from bridge_server.torch_runtime.callables import Arguments
from bridge_server.torch_runtime.randomness import seed
from bridge_server.torch_runtime.results import Results
from bridge_server.torch_runtime.tracing import Traced, Trial, variables_among
from bridge_server.torch_runtime.types import TORCH_DTYPES
from bridge_wire import trees
from bridge_wire.classes import Classes
from bridge_wire.errors import CallerError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)


class Call:
    """A function of parameters (if passed), a key (if random streams are named) and leaves.

    It leaves its arguments unchanged, even if the model writes into them.
    """

    def __init__(
        self,
        model: Model,
        call: pb.Call,
        inputs: tuple[Spec, ...],
        classes: Classes,
        device: torch.device,
        where: str,
    ) -> None:
        self.inputs = inputs
        self.device = device
        self.where = where
        self._model = model
        self._classes = classes
        self._arguments = call.arguments
        self._examples = list(call.examples)
        self._method = model.method(call.method).attribute
        self._is_flat = _is_flat(call.arguments)
        self._passed = len(model.parameters) if call.parameters else 0
        self._is_bound = not call.parameters
        self.key = self._passed if call.rngs else None  # its position among the inputs
        self.leaves = self._passed + (self.key is not None)  # the first leaf's position
        self._trainable = [each.trainable for each in model.parameters]
        buffers = [i for i, is_trained in enumerate(self._trainable) if not is_trained]
        # Positions of buffers to return.
        self._buffers = buffers if call.mutable else []
        paths = [model.parameters[i].path for i in self._buffers]
        self._results = Results(model.name, classes, paths)
        self._is_traced = False
        self._has_warned = False
        self.is_opaque = False  # whether torch.func has failed on it
        traced = self._trial().trace()
        if traced.unregistered_uses and model.apply.work_on_the_original():
            traced = self._trial().trace()
        if traced.reads_kept:
            model.apply.take_turns(where)
        if traced.overwrites:
            model.apply.use_copies_once()
        if traced.unregistered_uses and call.parameters:
            self._refuse_unregistered_uses(traced)
        self._is_traced = True
        self.result, self.outputs = self._results.tree, self._results.specs
        self.operators = traced.operators
        self.draws = traced.draws or self.key is not None
        self.draws_by_layout = traced.draws_by_layout
        self.has_fast_path = traced.has_fast_path
        self.runs_torchscript = traced.runs_torchscript
        self._needs_grad = traced.needs_grad
        self._needs_variables = traced.needs_variables
        written = self._written(traced)
        count = len(model.values)
        self._written_state = [i for i in written if i < count]
        self._written_leaves = [i - count for i in written if i >= count]

    def __call__(self, arrays: Sequence[Any]) -> list[Tensor]:
        """Return the outputs: the result's tensors, then the buffers if the call is mutable."""
        state: Sequence[Tensor] | None = (
            None if self._is_bound else arrays[: self._passed]
        )
        leaves = arrays[self.leaves :]
        if self._written_state:
            state = _cloned(
                self._model.values if state is None else state, self._written_state
            )
        if self._needs_variables:
            state = self._model.values if state is None else state
            state = variables_among(state, self._trainable)
        if self._written_leaves:
            leaves = _cloned(leaves, self._written_leaves)
        if self.key is not None:
            seed(arrays[self.key])
        if self._needs_grad:
            with torch.enable_grad():
                return self._outputs_of(state, leaves, self._model.apply)
        return self._outputs_of(state, leaves, self._model.apply)

    def warn_if_unkeyed(self) -> None:
        """Log, once, that a derivative which runs the call again uses other random numbers."""
        if self.draws and self.key is None and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "%s draws random numbers without a key, so a derivative that runs the call again"
                " uses other numbers than its value; pass a key",
                self.where,
            )

    def protect_inputs(self) -> None:
        """Give the model copies of all inputs from now on.

        A trace cannot show writes that depend on Python's state.
        """
        leaves = self.inputs[self.leaves :]
        self._written_state = list(range(len(self._model.values)))
        self._written_leaves = [i for i, spec in enumerate(leaves) if not spec.weak]

    @functools.cached_property
    def has_custom_functions(self) -> bool:
        """Whether derivatives of the call pass an autograd.Function; True if unknown."""
        return self._trial().has_custom_functions()

    def _trial(self) -> Trial:
        state = self._model.values
        if self._is_bound:
            dtypes = [each.dtype for each in state]
        else:  # the caller may have cast them
            dtypes = [TORCH_DTYPES[spec.dtype] for spec in self.inputs[: self._passed]]
        inputs = self.inputs[self.leaves :]
        snapshot = self._model.apply.python_state
        return Trial(
            self._isolated,
            state,
            dtypes,
            inputs,
            self.device,
            self.where,
            snapshot,
            self._trainable,
            self._examples,
        )

    def _refuse_unregistered_uses(self, traced: Traced) -> None:
        path = self._model.parameters[min(traced.unregistered_uses)].path
        raise CallerError(
            f"model {self._model.name!r} reads its parameter {path!r} through an unregistered"
            " reference, such as a list or a closure, so the caller's value cannot replace it; read"
            " the registered parameter, or leave the parameters on the worker"
        )

    def _written(self, traced: Traced) -> set[int]:
        """Return the positions to copy before each call, among the state and then the leaves."""
        written = set(traced.written)
        parameters = self._model.parameters
        leaves = self.inputs[self.leaves :]
        if not traced.is_fake:
            # Other values may take another branch. Weights can be large, and no known model changes
            # only weights.
            written |= {
                i for i, parameter in enumerate(parameters) if not parameter.trainable
            }
        # A trace holds for its numbers only.
        has_numbers = any(spec.weak for spec in leaves)
        if has_numbers or not traced.is_fake:
            written |= {
                len(parameters) + i for i, spec in enumerate(leaves) if not spec.weak
            }
        return written

    def _isolated(
        self,
    ) -> Callable[[Sequence[Tensor] | None, Sequence[Any]], list[Tensor]]:
        return functools.partial(self._outputs_of, apply=self._model.apply.isolated())

    def _outputs_of(
        self,
        state: Sequence[Tensor] | None,
        leaves: Sequence[Any],
        apply: Callable[..., tuple[Any, Any]],
    ) -> list[Tensor]:
        if self._is_flat:
            arguments = Arguments(tuple(leaves), {}, self._method)
        else:
            args, kwargs = trees.build(self._arguments, leaves, self._classes)
            arguments = Arguments(args, kwargs, self._method)
        value, after = apply(state, arguments)
        # No gradient passes through state.
        buffers = [after[i].detach() for i in self._buffers]
        flatten = self._results.take if self._is_traced else self._results.learn
        return flatten(value, buffers)


def _is_flat(arguments: pb.Tree) -> bool:
    args, kwargs = arguments.tuple.items
    return not kwargs.dict.items and all(
        each.HasField("leaf") for each in args.tuple.items
    )


def _cloned(tensors: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    copies = list(tensors)
    for i in positions:
        copies[i] = copies[i].clone()
    return copies
