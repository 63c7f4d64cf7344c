"""Compiled programs with their signatures; those that keep residuals also give their pullbacks."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

    # The model and the call that the program was prepared for; unset for parameters and pullbacks.
    request: tuple[runtime.Model, pb.Call]

    def __init__(
        self,
        inputs: tuple[Spec, ...],
        outputs: Sequence[Any],
        run: Callable[[Sequence[Any], Any], Any],
        where: str,
        *,
        is_async: bool = False,
    ) -> None:
        """Make a program of a function of inputs and a residual; `is_async`: it runs on a GPU."""
        self.inputs = inputs
        self.outputs = specs_of(outputs)
        self.output_nbytes = tuple(spec.nbytes for spec in self.outputs)
        self.result = trees.flat(len(outputs))
        self.where = where
        # Readers of an asynchronous run wait for its outputs; nothing waits for empty outputs.
        self._is_awaited = not is_async or not any(self.output_nbytes)
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


@dataclass(frozen=True, slots=True)
class Linearization:
    """The derivative that a program keeps: between which arrays, and its residual's layout."""

    wrt: tuple[int, ...]
    differentiable: tuple[int, ...]
    residual_avals: Sequence[Any]
    structure: Any  # of jax's VJP, whose leaves are the residual


class KeepingProgram(Program):
    """A program whose runs keep a residual for the pullback, as a flat list of arrays."""

    def __init__(
        self,
        inputs: tuple[Spec, ...],
        outputs: Sequence[Any],
        run: Callable[[Sequence[Any], Any], Any],
        where: str,
        linearization: Linearization,
        *,
        is_async: bool = False,
    ) -> None:
        super().__init__(inputs, outputs, run, where, is_async=is_async)
        avals = linearization.residual_avals
        self.wrt = linearization.wrt
        self.differentiable = linearization.differentiable
        self.residual_avals = avals
        self.residual_nbytes = sum(aval.size * aval.dtype.itemsize for aval in avals)
        self._structure = linearization.structure

    def pullback(
        self, wrt: Sequence[int], outputs: Sequence[int], *, is_pruned: bool
    ) -> Flat:
        """Return the function from a residual and cotangents of `outputs` to cotangents of `wrt`.

        `is_pruned` leaves out the work for other outputs; not all releases of jax can do so.
        """
        positions = [self.wrt.index(i) for i in wrt]
        used = [i in outputs for i in self.differentiable]
        zero = _symbolic_zero if is_pruned else _zeros

        def pull(residual: Sequence[Any], *cotangents: Any) -> list[Any]:
            passed = dict(zip(outputs, cotangents, strict=True))
            specs = {i: self.outputs[i] for i in self.differentiable}
            full = [
                passed[i] if i in passed else zero(spec) for i, spec in specs.items()
            ]
            linear = jax.tree_util.tree_unflatten(self._structure, residual)
            if is_pruned and not all(used):
                linear = _pruned(linear, used)
            gradients = linear(full)
            return [gradients[i] for i in positions]

        return pull


def _pruned(linear: Any, used: Sequence[bool]) -> Any:
    """Return a VJP without its work for unused outputs: scans and custom_vjps would run on zeros.

    Depends on private parts of jax 0.10's VJP; after a failure, the caller uses the whole VJP.
    """
    spec, known, jaxpr, avals = linear.fun.args
    unknown = [u for u, k in zip(used, known, strict=True) if not k]
    pruned, _ = dce_jaxpr(jaxpr, unknown, True)
    remaining = iter(pruned.outvars)
    pairs = zip(unknown, jaxpr.outvars, strict=True)
    outvars = [next(remaining) if u else Literal(0.0, v.aval) for u, v in pairs]
    jaxpr = pruned.replace(outvars=outvars, debug_info=jaxpr.debug_info)
    function = functools.partial(linear.fun.func, spec, known, jaxpr, avals)
    return type(linear)(
        function,
        linear.in_tree,
        linear.out_tree,
        linear.args_res,
        linear.opaque_residuals,
    )


def _symbolic_zero(spec: Spec) -> Any:
    return ad.Zero(jax.core.ShapedArray(spec.shape, jnp.dtype(spec.dtype.name)))


def _zeros(spec: Spec) -> Any:
    return jnp.zeros(spec.shape, spec.dtype.name)
