"""Runs of programs as actions, and their execution at once, on concrete arrays.

Arrays on the worker's GPU stay there; arrays on other GPUs go through the host.
"""

import atexit
import contextlib
import ctypes
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bridge_client.arguments import Values
from bridge_client.jax.gpu import (
    OnGpu,
    gpu_for,
    is_committed,
    ordinal_of,
    uncommitted,
)
from bridge_client.jax.memory import (
    JAX_DTYPES,
    Source,
    dtype_of,
    from_block,
    from_block_on,
    has_one_cpu,
    home_of,
    is_importable,
    place,
    source_of,
    write,
)
from bridge_client.jax.residuals import HANDLE, residuals_of
from bridge_client.jax.x64 import converted
from bridge_client.programs import Positions, Program, tag_of
from bridge_client.session import Session
from bridge_wire.errors import ResidualGone
from bridge_wire.memory.pool import Block
from bridge_wire.specs import Spec

Sources = Sequence[Source]
Blocks = Sequence[Block]
Arrays = list[jax.Array]
Specs = tuple[Spec, ...]
Labels = tuple[str, ...]


@atexit.register
def _finish() -> None:
    """Wait for the calls under way before their sessions are closed: exit functions run in the
    reverse order of their registration."""
    # a caller that needs a call's error has waited for the call
    with contextlib.suppress(Exception):
        jax.effects_barrier()


class Action(ABC):
    """The execution of a primitive: from inputs in memory to outputs in blocks."""

    def __init__(
        self,
        program: Program,
        inputs: Specs,
        outputs: Specs,
        labels: Labels,
    ) -> None:
        self.session: Session = program.session
        self.program = program
        self.inputs = inputs
        self.outputs = outputs
        self.labels = labels

    def __call__(self, sources: Sources, gpu: OnGpu | None = None) -> Blocks:
        """Run on inputs that are valid during the call. With a GPU, inputs may be there, and
        outputs are."""
        return self._run(sources, gpu).blocks

    def at_once(self, values: Values) -> Arrays:
        """Run on concrete arrays and Python numbers; return arrays over the blocks."""
        for spec, label in zip(self.outputs, self.labels, strict=True):
            # Before anything runs, since jax may be unable to hold an output.
            dtype_of(spec, label)
        if has_one_cpu():
            ran = self._run(list(map(source_of, values)), None)
            arrays = list(map(from_block, ran.blocks, self.outputs, self.labels))
        else:
            ran, arrays = self._beside(values)
        _check_special(arrays, self.labels)
        if ran.residual:
            handle = residuals_of(self.session).own(ran.residual, ran.program)
            arrays.append(handle)
        return arrays

    def is_for_host(self, position: int) -> bool:
        """Whether an input is read by a host, here or on the worker."""
        return self.inputs[position].weak

    @abstractmethod
    def _run(self, sources: Sources, gpu: OnGpu | None) -> "_Ran": ...

    def _beside(self, values: Values) -> tuple["_Ran", Arrays]:
        """Run where there are other devices than the host; return the outputs on the inputs'
        device."""
        gpu = gpu_for(self.session, values)
        if gpu is not None:
            ran = self._run(self._sources_on(gpu, values), gpu)
            return ran, self._arrays_on(gpu, ran.blocks, values)
        ran = self._run(list(map(source_of, values)), None)
        make = functools.partial(from_block, home=home_of(values))
        arrays = list(map(make, ran.blocks, self.outputs, self.labels))
        staged = [
            x for x in values if isinstance(x, jax.Array) and ordinal_of(x) is not None
        ]
        if staged:
            self.session.note_staged(_nbytes_of([*staged, *arrays]))
        return ran, arrays

    def _sources_on(self, gpu: OnGpu, values: Values) -> list[Source]:
        return [
            source_of(value) if self.is_for_host(i) else source_of(value, gpu)
            for i, value in enumerate(self.widened(values))
        ]

    def _arrays_on(self, gpu: OnGpu, blocks: Blocks, values: Values) -> Arrays:
        first = next(x for x in values if gpu.holds(x))
        device = next(iter(first.devices()))
        arrays: Arrays = []
        staged = 0
        for block, spec, label in zip(blocks, self.outputs, self.labels, strict=False):
            array = from_block_on(gpu, block, spec, label, device)
            arrays.append(array)
            if not is_importable(JAX_DTYPES[spec.dtype]):
                staged += array.nbytes
        if staged:
            self.session.note_staged(staged)
        if not is_committed(values):
            arrays = list(map(uncommitted, arrays))
        for block, array in zip(blocks, arrays, strict=True):
            if block.nbytes and array.unsafe_buffer_pointer() == block.pointer:
                gpu.keep_from_donation(array)
        return arrays

    def widened(self, values: Values) -> list[Any]:
        """Return values, traced or not, in the dtypes that the worker expects on a GPU."""
        widened = list(values)
        for i, spec in enumerate(self.inputs):
            if not self.is_for_host(i):
                widened[i] = converted(values[i], JAX_DTYPES[spec.dtype])
        return widened

    def write(self, blocks: Blocks, targets: Iterable[tuple[int, np.dtype]]) -> None:
        """Copy the outputs of a run to memory: a pointer and a dtype for each."""
        outputs = zip(blocks, self.outputs, self.labels, strict=True)
        for (block, spec, label), (pointer, dtype) in zip(
            outputs, targets, strict=True
        ):
            write(block, spec, pointer, dtype, label)

    @property
    def result_types(self) -> list[jax.ShapeDtypeStruct]:
        """The outputs' types in jax.

        Raises:
          DTypeError: jax cannot hold an output.
        """
        dtypes = map(dtype_of, self.outputs, self.labels)
        shapes = [spec.shape for spec in self.outputs]
        return list(map(jax.ShapeDtypeStruct, shapes, dtypes))


class _Ran(NamedTuple):
    """The outputs of a run: blocks, a residual if the program keeps one, and the number of bytes
    copied."""

    program: Program
    blocks: Blocks
    copied: int
    residual: int = 0


class Run(Action):
    """A run of a program."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, program.inputs, program.outputs, _labels_of(program))

    def _run(self, sources: Sources, gpu: OnGpu | None) -> _Ran:
        program = self.program
        placed, copied = place(program, sources)
        blocks = self.session.run(
            program, placed, copied=copied, stream=_stream_of(gpu)
        )
        return _Ran(program, blocks, copied)


class RunKeeping(Action):
    """A run of a program that keeps a residual, whose handle is the last output."""

    def __init__(self, program: Program) -> None:
        outputs = (*program.outputs, HANDLE)
        labels = (*_labels_of(program), "the handle")
        super().__init__(program, program.inputs, outputs, labels)
        self._residuals = residuals_of(program.session)

    def __call__(self, sources: Sources, gpu: OnGpu | None = None) -> Blocks:
        ran = self._run(sources, gpu)
        pool = self.session.pool if gpu is None or gpu.pool is None else gpu.pool
        handle = self._residuals.leave(
            ran.residual, self.program, ran.copied, pool.max_bytes
        )
        return [*ran.blocks, handle]

    def _run(self, sources: Sources, gpu: OnGpu | None) -> _Ran:
        placed, copied = place(self.program, sources, lasting=True)
        blocks, id = self.session.run_keeping(
            self.program, placed, copied=copied, stream=_stream_of(gpu)
        )
        return _Ran(self.program, blocks, copied, id)


class PullBack(Action):
    """From a residual's handle, the inputs of its run and cotangents of the outputs `given` to
    cotangents of `wrt`."""

    def __init__(
        self,
        program: Program,
        kept: Positions,
        wrt: Positions,
        given: Positions,
    ) -> None:
        self._plain = program
        self._wrt, self._given = wrt, given
        self._keeping = program.keeping(kept)
        self._residuals = residuals_of(program.session)
        pullback = self._keeping.pullback(wrt, given)
        inputs = (HANDLE, *program.inputs, *pullback.inputs)
        super().__init__(pullback, inputs, pullback.outputs, _labels_of(pullback))

    def is_for_host(self, position: int) -> bool:
        return position == 0 or super().is_for_host(position)

    def _run(self, sources: Sources, gpu: OnGpu | None) -> _Ran:
        id = ctypes.c_uint64.from_address(sources[0].pointer).value
        pullback = self.program
        first_cotangent = 1 + len(self._plain.inputs)
        try:
            self._residuals.check(id, self._keeping)
            placed, copied = place(pullback, sources[first_cotangent:])
            stream = _stream_of(gpu)
            blocks = self.session.run_pullback(
                pullback, id, placed, copied=copied, stream=stream
            )
        except ResidualGone:
            tag = 0 if self._residuals.is_of_another(id, self._keeping) else tag_of(id)
            vjp = self._plain.on_model(tag).vjp(self._wrt, self._given)
            return Run(vjp)._run(sources[1:], gpu)
        finally:
            self._residuals.claim(id)
        return _Ran(pullback, blocks, copied)


def _stream_of(gpu: OnGpu | None) -> int | None:
    return None if gpu is None else gpu.stream


def _check_special(arrays: Arrays, labels: Sequence[str]) -> None:
    """Raise as jax does for results of its own operations under `jax.debug_nans` and
    `jax.debug_infs`."""
    nans, infs = jax.config.jax_debug_nans, jax.config.jax_debug_infs  # type: ignore[attr-defined]
    if not nans and not infs:
        return
    for array, label in zip(arrays, labels, strict=False):  # a handle has a label only
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            continue
        values = np.asarray(array)
        is_nan = nans and np.isnan(values).any()
        is_inf = infs and np.isinf(values).any()
        if is_nan or is_inf:
            name = "nan" if is_nan else "inf"
            raise FloatingPointError(f"invalid value ({name}) encountered in {label}")


def _nbytes_of(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays)


def _labels_of(program: Program) -> Labels:
    return tuple(f"output {i} of {program!r}" for i in range(len(program.outputs)))
