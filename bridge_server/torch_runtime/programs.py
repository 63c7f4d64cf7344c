"""What runs: a composed call, a call that keeps its graph, and the pullback along such a graph."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from bridge_server import runtime
from bridge_server.model_errors import is_models, remote
from bridge_server.torch_runtime.graphs import nbytes_saved
from bridge_server.torch_runtime.randomness import drawing
from bridge_server.torch_runtime.transforms import Composed, pull_back
from bridge_wire import trees
from bridge_wire.errors import BridgeError
from bridge_wire.specs import Spec

# Returns a program's inputs as they are on its device.
Placing = Callable[[Sequence[Any]], Sequence[Any]]


class Program(runtime.Program):
    """Code with its signature. `run` is what subclasses say; this calls it, with nothing recorded by autograd."""

    def __init__(
        self,
        inputs: tuple[Spec, ...],
        outputs: tuple[Spec, ...],
        where: str,
        code: Callable[[Sequence[Any], Any], tuple[Sequence[Tensor], Any]],
        *,
        draws: bool = False,
        is_seeded: bool = False,
        placing: Placing | None = None,
    ) -> None:
        """Make a program of code; `placing` brings its inputs to where it runs, where that is not the host."""
        self.inputs = inputs
        self.outputs = outputs
        self.output_nbytes = tuple(spec.nbytes for spec in outputs)
        self.result = trees.flat(len(outputs))
        self.where = where
        self.draws = draws
        self._is_seeded = is_seeded
        self._placing = placing
        self._code = code

    def run(self, inputs: Sequence[Any], residual: Any) -> tuple[Sequence[Any], Any]:
        try:
            with torch.no_grad():
                if self._placing is not None:
                    inputs = self._placing(inputs)
                if not self.draws:
                    return self._code(inputs, residual)
                with drawing(is_seeded=self._is_seeded):
                    return self._code(inputs, residual)
        except BridgeError:
            raise
        except BaseException as error:
            if not is_models(error):
                raise
            raise remote(error, self.where) from error


class Kept(NamedTuple):
    """A residual: the graph of one run, by its two ends. It holds what backward formulas have saved, no more."""

    outputs: Sequence[Any]  # a GradientEdge for each; None where an output depends on nothing
    primals: Sequence[Tensor]


class KeepingProgram(Program):
    """A program whose runs keep the graph from the inputs `wrt`."""

    residual_nbytes: int = 0  # once a run has shown how much it is

    def __init__(self, composed: Composed, wrt: tuple[int, ...], where: str, **how: Any) -> None:
        super().__init__(composed.inputs, composed.outputs, where, self._keep, **how)
        self.wrt = wrt
        self.differentiable = tuple(i for i, spec in enumerate(composed.outputs) if spec.dtype.is_inexact)
        self._f = composed.f
        self._is_measured = False

    def _keep(self, inputs: Sequence[Any], _: None) -> tuple[Sequence[Tensor], Kept]:
        arrays = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        primals = [arrays[i].requires_grad_() for i in self.wrt]
        with torch.enable_grad():
            outputs = self._f(arrays)
        kept = Kept([get_gradient_edge(y) if y.requires_grad else None for y in outputs], primals)
        if not self._is_measured:
            self.residual_nbytes = nbytes_saved(kept.outputs, [x for x in inputs if _is_clients(x)])
            self._is_measured = True
        return [y.detach() for y in outputs], kept

    def pullback(self, wrt: Sequence[int], outputs: Sequence[int], placing: Placing | None) -> Program:
        """Return the program from a residual and cotangents of `outputs` to cotangents of `wrt`."""
        positions = [self.wrt.index(i) for i in wrt]

        def pull(cotangents: Sequence[Tensor], kept: Kept) -> tuple[Sequence[Tensor], None]:
            edges = [kept.outputs[i] for i in outputs]
            # A client may pull back along a residual as often as it likes.
            return pull_back(edges, [kept.primals[i] for i in positions], cotangents, retain_graph=True), None

        program = Program(
            tuple(self.outputs[i] for i in outputs),
            tuple(self.inputs[i] for i in wrt),
            f"the VJP of {self.where}",
            pull,
            draws=self.draws,  # a checkpoint draws its numbers once more
            placing=placing,
        )
        program.pullback_of = self
        return program


def _is_clients(x: Any) -> bool:
    """Whether an input lies in the client's memory: what was brought to the device has memory of torch's own."""
    return isinstance(x, Tensor) and not x.untyped_storage().resizable()
