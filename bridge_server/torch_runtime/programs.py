"""Programs of torch code: a composed call, a call that keeps its graph, a graph's pullback."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from bridge_server import runtime
from bridge_server.model_errors import is_models, remote
from bridge_server.torch_runtime.attention import no_fast_path
from bridge_server.torch_runtime.border import Border
from bridge_server.torch_runtime.graphs import nbytes_saved
from bridge_server.torch_runtime.randomness import drawing
from bridge_server.torch_runtime.transforms import Composed, pull_back
from bridge_wire import trees
from bridge_wire.errors import BridgeError, CallerError
from bridge_wire.specs import Spec

# Returns a program's inputs, moved to its device.
ToDevice = Callable[[Sequence[Any]], Sequence[Any]]
# Returns the outputs and the new residual for inputs and a residual.
RunCode = Callable[[Sequence[Any], Any], tuple[Sequence[Tensor], Any]]

_NOTHING: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How the runs of a program draw random numbers, move inputs, and react to writes."""

    draws: bool = False
    is_seeded: bool = False
    draws_in_row_major_order: bool = False
    has_fast_path: bool = True
    # Moves inputs; None where the program runs on the host.
    to_device: ToDevice | None = None
    # Called when a run has written to its inputs: gives copies of the inputs to later runs.
    protect: Callable[[], None] = lambda: None


_DEFAULTS = RunOptions()


class Program(runtime.Program):
    """Code with its signature, run without autograd's recording."""

    def __init__(
        self,
        inputs: tuple[Spec, ...],
        outputs: tuple[Spec, ...],
        where: str,
        code: RunCode,
        options: RunOptions = _DEFAULTS,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.output_nbytes = tuple(spec.nbytes for spec in outputs)
        self.result = trees.flat(len(outputs))
        self.where = where
        self.draws = options.draws
        self._options = options
        self._code = code
        self._attention = no_fast_path if options.has_fast_path else _NOTHING
        self._border = Border(outputs, where)

    def run(self, inputs: Sequence[Any], residual: Any) -> tuple[Sequence[Any], Any]:
        try:
            with torch.no_grad(), self._attention, self._drawing():
                if self._options.to_device is not None:
                    inputs = self._options.to_device(inputs)
                before = _versions(inputs)
                outputs, kept = self._code(inputs, residual)
                if _versions(inputs) != before:
                    self._refuse_writes()
                return self._border.checked(outputs), kept
        except BridgeError:
            raise
        except BaseException as error:
            if not is_models(error):
                raise
            raise remote(error, self.where) from error

    def _drawing(self) -> AbstractContextManager[None]:
        options = self._options
        if not options.draws:
            return _NOTHING
        return drawing(
            is_seeded=options.is_seeded,
            in_row_major_order=options.draws_in_row_major_order,
        )

    def _refuse_writes(self) -> None:
        self._options.protect()
        raise CallerError(
            f"{self.where} wrote into its arguments, unlike when the call was prepared: the"
            " caller's arrays may have changed. From now on it gets copies"
        )


class Kept(NamedTuple):
    """A residual: the graph of one run, by its two ends.

    Of the run's tensors, it holds only those that backward formulas have saved.
    """

    # A GradientEdge per output; None where it depends on no input.
    outputs: Sequence[Any]
    primals: Sequence[Tensor]


class KeepingProgram(Program):
    """A program whose runs keep the graph from the inputs `wrt`."""

    residual_nbytes: int = 0  # measured by the first run

    def __init__(
        self, composed: Composed, wrt: tuple[int, ...], where: str, options: RunOptions
    ) -> None:
        super().__init__(composed.inputs, composed.outputs, where, self._keep, options)
        outputs = enumerate(composed.outputs)
        self.wrt = wrt
        self.differentiable = tuple(i for i, spec in outputs if spec.dtype.is_inexact)
        self._f = composed.f
        self._is_measured = False

    def _keep(self, inputs: Sequence[Any], _: None) -> tuple[Sequence[Tensor], Kept]:
        arrays = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        primals = [arrays[i].requires_grad_() for i in self.wrt]
        with torch.enable_grad():
            outputs = self._f(arrays)
        edges = [get_gradient_edge(y) if y.requires_grad else None for y in outputs]
        if not self._is_measured:
            self.residual_nbytes = nbytes_saved(
                edges, [x for x in inputs if _is_clients(x)]
            )
            self._is_measured = True
        return [y.detach() for y in outputs], Kept(edges, primals)

    def pullback(
        self, wrt: Sequence[int], outputs: Sequence[int], to_device: ToDevice | None
    ) -> Program:
        """Return the program from a residual and cotangents of `outputs` to cotangents of `wrt`."""
        positions = [self.wrt.index(i) for i in wrt]

        def pull(
            cotangents: Sequence[Tensor], kept: Kept
        ) -> tuple[Sequence[Tensor], None]:
            edges = [kept.outputs[i] for i in outputs]
            primals = [kept.primals[i] for i in positions]
            # A client may pull back along a residual any number of times.
            return pull_back(edges, primals, cotangents, retain_graph=True), None

        # A checkpoint draws its numbers again, from the state that the forward pass has saved.
        options = replace(
            self._options, is_seeded=False, to_device=to_device, protect=lambda: None
        )
        program = Program(
            tuple(self.outputs[i] for i in outputs),
            tuple(self.inputs[i] for i in wrt),
            f"the VJP of {self.where}",
            pull,
            options,
        )
        program.pullback_of = self
        return program


def _versions(tensors: Sequence[Any]) -> list[int]:
    """Return the number of writes to each tensor, including those through detached aliases."""
    return [x._version for x in tensors if isinstance(x, Tensor)]


def _is_clients(x: Any) -> bool:
    """Return whether an input lies in the client's memory, and not in memory of torch's own."""
    return isinstance(x, Tensor) and not x.untyped_storage().resizable()
