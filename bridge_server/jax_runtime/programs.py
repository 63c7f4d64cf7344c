"""What was compiled, ready to run: with its signature, and for one that keeps residuals, with
its pullback."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.interpreters import ad
from jax.interpreters.partial_eval import dce_jaxpr

from bridge_server import runtime
from bridge_server.jax_runtime.transforms import Flat
from bridge_server.jax_runtime.types import specs_of
from bridge_server.model_errors import is_models, remote
from bridge_wire import trees
from bridge_wire.errors import BridgeError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec


class Program(runtime.Program):
    """Compiled code with the signature it was compiled for."""

    called: tuple[runtime.Model, pb.Call]  # unset for parameters and pullbacks

    def __init__(
        self,
        inputs: tuple[Spec, ...],
        outputs: Sequence[Any],
        run: Callable[[Sequence[Any], Any], Any],
        where: str,
        *,
        is_enqueued: bool = False,
    ) -> None:
        """Make a program of a function of its inputs and a residual; `is_enqueued` says that it
        runs on a GPU."""
        self.inputs = inputs
        self.outputs = specs_of(outputs)
        self.output_nbytes = tuple(spec.nbytes for spec in self.outputs)
        self.result = trees.flat(len(outputs))
        self.where = where
        # What comes after a run there waits for its outputs, but where there are none to wait for.
        self._is_awaited = not is_enqueued or not any(self.output_nbytes)
        self._run = run

    def run(self, inputs: Sequence[Any], residual: Any) -> tuple[Sequence[Any], Any]:
        try:
            outputs, residual = self._run(inputs, residual)
            if self._is_awaited:
                for output in outputs:
                    output.block_until_ready()
        except BridgeError:
            raise
        except BaseException as error:
            if not is_models(error):
                raise
            raise remote(error, self.where) from error
        return outputs, residual


class KeepingProgram(Program):
    """A program whose runs keep what the pullback to the inputs `wrt` needs, as a flat list of
    arrays."""

    def __init__(
        self,
        inputs: tuple[Spec, ...],
        outputs: Sequence[Any],
        run: Callable[[Sequence[Any], Any], Any],
        where: str,
        wrt: tuple[int, ...],
        differentiable: tuple[int, ...],
        residual_avals: Sequence[Any],
        structure: Any,
        *,
        is_enqueued: bool = False,
    ) -> None:
        super().__init__(inputs, outputs, run, where, is_enqueued=is_enqueued)
        self.wrt = wrt
        self.differentiable = differentiable
        self.residual_avals = residual_avals
        self.residual_nbytes = sum(aval.size * aval.dtype.itemsize for aval in residual_avals)
        self._structure = structure

    def pullback(self, wrt: Sequence[int], outputs: Sequence[int], *, is_pruned: bool) -> Flat:
        """Return the function of the residual, and of the cotangents of `outputs`, to the
        cotangents of `wrt`."""
        positions = [self.wrt.index(i) for i in wrt]
        used = [i in outputs for i in self.differentiable]
        zero = _symbolic_zero if is_pruned else _zeros

        def pull(residual: Sequence[Any], *cotangents: Any) -> list[Any]:
            given = dict(zip(outputs, cotangents, strict=True))
            full = [given[i] if i in given else zero(self.outputs[i]) for i in self.differentiable]
            linear = jax.tree_util.tree_unflatten(self._structure, residual)
            gradients = (_pruned(linear, used) if is_pruned and not all(used) else linear)(full)
            return [gradients[i] for i in positions]

        return pull


def _pruned(linear: Any, used: Sequence[bool]) -> Any:
    """Return a VJP without what it does for outputs that are not used: scans and custom_vjps there
    would run on zeros.

    Reaches into jax 0.10's VJP; where it fails, the caller does without.
    """
    spec, known, jaxpr, avals = linear.fun.args
    unknown = [u for u, k in zip(used, known, strict=True) if not k]
    pruned, _ = dce_jaxpr(jaxpr, unknown, True)
    kept = iter(pruned.outvars)
    outvars = [
        next(kept) if u else Literal(0.0, v.aval)
        for u, v in zip(unknown, jaxpr.outvars, strict=True)
    ]
    jaxpr = pruned.replace(outvars=outvars, debug_info=jaxpr.debug_info)
    function = functools.partial(linear.fun.func, spec, known, jaxpr, avals)
    return type(linear)(
        function, linear.in_tree, linear.out_tree, linear.args_res, linear.opaque_residuals
    )


def _symbolic_zero(spec: Spec) -> Any:
    return ad.Zero(jax.core.ShapedArray(spec.shape, jnp.dtype(spec.dtype.name)))


def _zeros(spec: Spec) -> Any:
    return jnp.zeros(spec.shape, spec.dtype.name)
