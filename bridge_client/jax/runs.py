"""Runs of programs: at once, or as callbacks from compiled code, by whichever kind of callback there is.

No jax function is called while a callback runs: that could wait for the very computation which waits for the callback.
"""

import atexit
import contextlib
import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge_client.jax.errors import named
from bridge_client.jax.memory import Source, beside, dtype_of, from_block, has_one_cpu, place, source_of, write
from bridge_client.jax.residuals import HANDLE, residuals_of
from bridge_client.programs import Program
from bridge_wire.dlpack import data_pointer
from bridge_wire.errors import ResidualGone
from bridge_wire.pool import Block
from bridge_wire.specs import Spec

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # jax may move it: it is marked experimental
    HAS_BUFFERS = False
else:
    HAS_BUFFERS = True


@atexit.register
def _finish() -> None:
    """Have the calls under way end before their sessions are closed: what is registered later runs earlier."""
    with contextlib.suppress(Exception):  # who wants a call's error has waited for the call
        jax.effects_barrier()


class Action(ABC):
    """What happens when a primitive runs: from inputs in memory to outputs in blocks."""

    outputs: tuple[Spec, ...]
    labels: tuple[str, ...]

    @abstractmethod
    def __call__(self, sources: Sequence[Source]) -> Sequence[Block]:
        """Run on inputs that are valid during the call."""

    def at_once(self, values: Sequence[Any]) -> list[jax.Array]:
        """Run on concrete arrays and Python numbers; return arrays over the blocks."""
        self._check_outputs()
        blocks = self([source_of(value) for value in values])
        made = [from_block(*each) for each in zip(blocks, self.outputs, self.labels, strict=True)]
        _check_special(made, self.labels)
        return made if has_one_cpu() else beside(values, made)

    def _check_outputs(self) -> None:
        """Raise DTypeError, before anything runs, for an output that jax cannot hold."""
        for spec, label in zip(self.outputs, self.labels, strict=True):
            dtype_of(spec, label)

    @property
    def result_types(self) -> list[jax.ShapeDtypeStruct]:
        """The outputs as jax holds them."""
        described = zip(self.outputs, self.labels, strict=True)
        return [jax.ShapeDtypeStruct(spec.shape, dtype_of(spec, label)) for spec, label in described]


class Run(Action):
    """A run of a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.outputs = program.outputs
        self.labels = _labels_of(program)

    def __call__(self, sources: Sequence[Source]) -> Sequence[Block]:
        placed, copied = place(self.program, sources)
        return self.program.session.run(self.program, placed, copied=copied)


class RunKeeping(Action):
    """A run of a program that keeps a residual, whose handle is the last output."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.outputs = (*program.outputs, HANDLE)
        self.labels = (*_labels_of(program), "the handle")
        self._residuals = residuals_of(program.session)

    def __call__(self, sources: Sequence[Source]) -> Sequence[Block]:
        blocks, id, copied = self._run(sources)
        return [*blocks, self._residuals.leave(id, self.program, copied)]

    def at_once(self, values: Sequence[Any]) -> list[jax.Array]:
        self._check_outputs()
        blocks, id, _ = self._run([source_of(value) for value in values])
        made = [*map(from_block, blocks, self.outputs[:-1], self.labels[:-1])]
        _check_special(made, self.labels[:-1])
        made.append(self._residuals.own(id, self.program))
        return made if has_one_cpu() else beside(values, made)

    def _run(self, sources: Sequence[Source]) -> tuple[Sequence[Block], int, int]:
        placed, copied = place(self.program, sources, lasting=True)
        blocks, id = self.program.session.run_keeping(self.program, placed, copied=copied)
        return blocks, id, copied


class PullBack(Action):
    """From a residual's handle, the inputs of its run and cotangents of the outputs `given` to those of `wrt`."""

    def __init__(self, program: Program, kept: tuple[int, ...], wrt: tuple[int, ...], given: tuple[int, ...]) -> None:
        self._keeping = program.keeping(kept)
        self._pullback = self._keeping.pullback(wrt, given)
        self._afresh: Callable[[], Program] = lambda: program.vjp(wrt, given)
        self._count = len(program.inputs)
        self._residuals = residuals_of(program.session)
        self.outputs = self._pullback.outputs
        self.labels = _labels_of(self._pullback)

    def __call__(self, sources: Sequence[Source]) -> Sequence[Block]:
        id = ctypes.c_uint64.from_address(sources[0].pointer).value
        pullback = self._pullback
        try:
            self._residuals.check(id, self._keeping)
            placed, copied = place(pullback, sources[1 + self._count :])
            blocks: Sequence[Block] = pullback.session.run_pullback(pullback, id, placed, copied=copied)
        except ResidualGone:
            blocks = Run(self._afresh())(sources[1:])
        finally:
            self._residuals.claim(id)
        return blocks


def call_back_on_buffers(action: Action, *values: Any) -> Sequence[Any]:
    """Return what an action makes of traced values, by a callback that sees XLA's own buffers."""
    results, into = action.result_types, list(zip(action.outputs, action.labels, strict=True))
    if not results:
        return []
    dtypes = [np.dtype(value.dtype) for value in values]
    result_dtypes = [result.dtype for result in results]

    def callback(_: Any, outputs: Sequence[Any], *inputs: Any) -> None:
        try:
            blocks = action([Source(data_pointer(x), dtype) for x, dtype in zip(inputs, dtypes, strict=True)])
            for block, (spec, label), output, dtype in zip(blocks, into, outputs, result_dtypes, strict=True):
                write(block, spec, data_pointer(output), dtype, label)
        except Exception as error:
            crossing = named(error)
        else:
            return
        raise crossing

    # XLA leaves out what makes empty arrays only; but the model may raise, or return another shape now.
    is_empty = not any(result.size for result in results)
    return buffer_callback(callback, results, has_side_effect=is_empty)(*values)


def call_back_on_arrays(action: Action, *values: Any) -> Sequence[Any]:
    """Return what an action makes of traced values, by a callback that sees copies on the host."""
    results = action.result_types
    if not results:
        return []

    def callback(*inputs: Any) -> list[np.ndarray]:
        try:
            arrays = [np.asarray(x, order="C") for x in inputs]
            blocks = action([Source(array.ctypes.data, array.dtype, array) for array in arrays])
            made = [np.empty(result.shape, result.dtype) for result in results]
            for block, spec, label, array in zip(blocks, action.outputs, action.labels, made, strict=True):
                write(block, spec, array.ctypes.data, array.dtype, label)
        except Exception as error:
            crossing = named(error)
        else:
            return made
        raise crossing  # not from within the handler, whose exception holds the frames of the call

    return jax.pure_callback(callback, results, *values)


def _check_special(arrays: Sequence[jax.Array], labels: Sequence[str]) -> None:
    """Raise what jax raises of its own operations' results under `jax.debug_nans` and `jax.debug_infs`."""
    nans, infs = jax.config.jax_debug_nans, jax.config.jax_debug_infs  # type: ignore[attr-defined]
    if not nans and not infs:
        return
    for array, label in zip(arrays, labels, strict=True):
        if jnp.issubdtype(array.dtype, jnp.inexact):
            values = np.asarray(array)
            for name, is_wrong in (("nan", nans and np.isnan(values).any()), ("inf", infs and np.isinf(values).any())):
                if is_wrong:
                    raise FloatingPointError(f"invalid value ({name}) encountered in {label}")


def _labels_of(program: Program) -> tuple[str, ...]:
    return tuple(f"output {i} of {program!r}" for i in range(len(program.outputs)))
