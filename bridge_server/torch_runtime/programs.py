"""What runs: a composed call, a call that keeps its graph, and the pullback along such a graph."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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

# Returns a program's inputs as they are on its device.
Placing = Callable[[Sequence[Any]], Sequence[Any]]

_NOTHING: AbstractContextManager[None] = nullcontext()


class Program(runtime.Program):
    """Code with its signature.

    `run` is what subclasses say; this calls it, with nothing recorded by autograd.
    """

    def __init__(
        self,
        inputs: tuple[Spec, ...],
        outputs: tuple[Spec, ...],
        where: str,
        code: Callable[[Sequence[Any], Any], tuple[Sequence[Tensor], Any]],
        *,
        draws: bool = False,
        is_seeded: bool = False,
        draws_in_row_major_order: bool = False,
        has_fast_path: bool = True,
        placing: Placing | None = None,
        protect: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a program of code.

        `placing` brings its inputs to where it runs, where that is not the host. `protect` makes
        later runs get copies of their inputs: it is called when a run has written to them.
        """
        self.inputs = inputs
        self.outputs = outputs
        self.output_nbytes = tuple(spec.nbytes for spec in outputs)
        self.result = trees.flat(len(outputs))
        self.where = where
        self.draws = draws
        self._is_seeded = is_seeded
        self._draws_in_row_major_order = draws_in_row_major_order
        self._has_fast_path = has_fast_path
        self._placing = placing
        self._protect = protect
        self._code = code
        self._border = Border(outputs, where)

    def run(self, inputs: Sequence[Any], residual: Any) -> tuple[Sequence[Any], Any]:
        try:
            with torch.no_grad(), no_fast_path if self._has_fast_path else _NOTHING, self._random():
                if self._placing is not None:
                    inputs = self._placing(inputs)
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

    def _random(self) -> AbstractContextManager[None]:
        if not self.draws:
            return _NOTHING
        return drawing(is_seeded=self._is_seeded, in_row_major_order=self._draws_in_row_major_order)

    def _refuse_writes(self) -> None:
        self._protect()
        raise CallerError(
            f"{self.where} wrote into its arguments, which it did not do when the call was"
            " prepared: the caller's arrays may have changed. From now on it gets copies"
        )


class Kept(NamedTuple):
    """A residual: the graph of one run, by its two ends.

    It holds what backward formulas have saved, no more.
    """

    outputs: Sequence[Any]  # a GradientEdge for each; None where an output depends on nothing
    primals: Sequence[Tensor]


class KeepingProgram(Program):
    """A program whose runs keep the graph from the inputs `wrt`."""

    residual_nbytes: int = 0  # once a run has shown how much it is

    def __init__(self, composed: Composed, wrt: tuple[int, ...], where: str, **how: Any) -> None:
        super().__init__(composed.inputs, composed.outputs, where, self._keep, **how)
        self.wrt = wrt
        self.differentiable = tuple(
            i for i, spec in enumerate(composed.outputs) if spec.dtype.is_inexact
        )
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

    def pullback(
        self, wrt: Sequence[int], outputs: Sequence[int], placing: Placing | None
    ) -> Program:
        """Return the program from a residual and cotangents of `outputs` to cotangents of `wrt`."""
        positions = [self.wrt.index(i) for i in wrt]

        def pull(cotangents: Sequence[Tensor], kept: Kept) -> tuple[Sequence[Tensor], None]:
            edges = [kept.outputs[i] for i in outputs]
            # A client may pull back along a residual as often as it likes.
            return (
                pull_back(
                    edges, [kept.primals[i] for i in positions], cotangents, retain_graph=True
                ),
                None,
            )

        program = Program(
            tuple(self.outputs[i] for i in outputs),
            tuple(self.inputs[i] for i in wrt),
            f"the VJP of {self.where}",
            pull,
            draws=self.draws,  # a checkpoint draws its numbers once more
            draws_in_row_major_order=self._draws_in_row_major_order,
            has_fast_path=self._has_fast_path,
            placing=placing,
        )
        program.pullback_of = self
        return program


def _versions(tensors: Sequence[Any]) -> list[int]:
    """Return how often each tensor has been written to: a detached alias counts for its
    original."""
    return [x._version for x in tensors if isinstance(x, Tensor)]


def _is_clients(x: Any) -> bool:
    """Whether an input lies in the client's memory: what was brought to the device has memory of
    torch's own."""
    return isinstance(x, Tensor) and not x.untyped_storage().resizable()
