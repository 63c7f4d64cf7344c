"""Runs of programs: what happens in one, and how it is made at once, on concrete arrays.

Arrays on the worker's GPU stay there; those on any other travel through the host.
"""

import atexit
import contextlib
import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bridge_client.jax.gpu import (
    HAS_BUFFERS,
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
)
from bridge_client.jax.residuals import HANDLE, residuals_of
from bridge_client.jax.x64 import widened
from bridge_client.programs import Program, tag_of
from bridge_client.session import Session
from bridge_wire.errors import ResidualGone
from bridge_wire.memory.pool import Block
from bridge_wire.specs import Spec

if HAS_BUFFERS:
    pass


@atexit.register
def _finish() -> None:
    """Have the calls under way end before their sessions are closed: what is registered later
    runs earlier."""
    with contextlib.suppress(Exception):  # who wants a call's error has waited for the call
        jax.effects_barrier()


class Action(ABC):
    """What happens when a primitive runs: from inputs in memory to outputs in blocks."""

    session: Session
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    labels: tuple[str, ...]

    def __call__(self, sources: Sequence[Source], gpu: OnGpu | None = None) -> Sequence[Block]:
        """Run on inputs that are valid during the call; with a GPU, where some of them may be
        and the outputs will."""
        return self._run(sources, gpu).blocks

    def at_once(self, values: Sequence[Any]) -> list[jax.Array]:
        """Run on concrete arrays and Python numbers; return arrays over the blocks."""
        self._check_outputs()
        if has_one_cpu():
            ran = self._run([source_of(value) for value in values], None)
            made = list(map(from_block, ran.blocks, self.outputs, self.labels))
        else:
            ran, made = self._beside(values)
        _check_special(made, self.labels)
        if ran.residual:
            made.append(residuals_of(self.session).own(ran.residual, ran.program))
        return made

    def is_for_host(self, position: int) -> bool:
        """Whether an input is read by a host, here or on the worker."""
        return self.inputs[position].weak

    @abstractmethod
    def _run(self, sources: Sequence[Source], gpu: OnGpu | None) -> "_Ran": ...

    def _beside(self, values: Sequence[Any]) -> tuple["_Ran", list[jax.Array]]:
        """Run where there are more devices than the host, and return the outputs on the device
        of the inputs."""
        gpu = gpu_for(self.session, values)
        if gpu is not None:
            ran = self._run(self._sources_on(gpu, values), gpu)
            return ran, self._arrays_on(gpu, ran.blocks, values)
        home, ran = home_of(values), self._run([source_of(value) for value in values], None)
        made = [
            from_block(*each, home)
            for each in zip(ran.blocks, self.outputs, self.labels, strict=False)
        ]
        staged = [x for x in values if isinstance(x, jax.Array) and ordinal_of(x) is not None]
        if staged:
            self.session.note_staged(sum(x.nbytes for x in (*staged, *made)))
        return ran, made

    def _sources_on(self, gpu: OnGpu, values: Sequence[Any]) -> list[Source]:
        described = enumerate(zip(values, self.inputs, strict=True))
        return [
            source_of(value)
            if self.is_for_host(i)
            else source_of(widened(value, JAX_DTYPES[spec.dtype]), gpu)
            for i, (value, spec) in described
        ]

    def _arrays_on(
        self, gpu: OnGpu, blocks: Sequence[Block], values: Sequence[Any]
    ) -> list[jax.Array]:
        device = next(next(iter(x.devices())) for x in values if gpu.holds(x))
        made = [
            from_block_on(gpu, *each, device)
            for each in zip(blocks, self.outputs, self.labels, strict=False)
        ]
        staged = sum(
            y.nbytes
            for y, spec in zip(made, self.outputs, strict=False)
            if not is_importable(JAX_DTYPES[spec.dtype])
        )
        if staged:
            self.session.note_staged(staged)
        made = made if is_committed(values) else list(map(uncommitted, made))
        for block, array in zip(blocks, made, strict=True):
            if block.nbytes and array.unsafe_buffer_pointer() == block.pointer:
                gpu.keep_from_donation(array)
        return made

    def _check_outputs(self) -> None:
        """Raise DTypeError, before anything runs, for an output that jax cannot hold."""
        for spec, label in zip(self.outputs, self.labels, strict=True):
            dtype_of(spec, label)

    @property
    def result_types(self) -> list[jax.ShapeDtypeStruct]:
        """The outputs as jax holds them."""
        described = zip(self.outputs, self.labels, strict=True)
        return [
            jax.ShapeDtypeStruct(spec.shape, dtype_of(spec, label)) for spec, label in described
        ]


class _Ran(NamedTuple):
    """What a run has made: blocks, and a residual if its program keeps one; and the bytes that
    were copied for it."""

    program: Program
    blocks: Sequence[Block]
    copied: int
    residual: int = 0


class Run(Action):
    """A run of a program."""

    def __init__(self, program: Program) -> None:
        self.session = program.session
        self.program = program
        self.inputs = program.inputs
        self.outputs = program.outputs
        self.labels = _labels_of(program)

    def _run(self, sources: Sequence[Source], gpu: OnGpu | None) -> _Ran:
        placed, copied = place(self.program, sources)
        return _Ran(
            self.program,
            self.session.run(self.program, placed, copied=copied, stream=_stream_of(gpu)),
            copied,
        )


class RunKeeping(Action):
    """A run of a program that keeps a residual, whose handle is the last output."""

    def __init__(self, program: Program) -> None:
        self.session = program.session
        self.program = program
        self.inputs = program.inputs
        self.outputs = (*program.outputs, HANDLE)
        self.labels = (*_labels_of(program), "the handle")
        self._residuals = residuals_of(program.session)

    def __call__(self, sources: Sequence[Source], gpu: OnGpu | None = None) -> Sequence[Block]:
        ran = self._run(sources, gpu)
        pool = self.session.pool if gpu is None or gpu.pool is None else gpu.pool
        return [
            *ran.blocks,
            self._residuals.leave(ran.residual, self.program, ran.copied, pool.max_bytes),
        ]

    def _run(self, sources: Sequence[Source], gpu: OnGpu | None) -> _Ran:
        placed, copied = place(self.program, sources, lasting=True)
        blocks, id = self.session.run_keeping(
            self.program, placed, copied=copied, stream=_stream_of(gpu)
        )
        return _Ran(self.program, blocks, copied, id)


class PullBack(Action):
    """From a residual's handle, the inputs of its run and cotangents of the outputs `given` to
    those of `wrt`."""

    def __init__(
        self, program: Program, kept: tuple[int, ...], wrt: tuple[int, ...], given: tuple[int, ...]
    ) -> None:
        self._keeping = program.keeping(kept)
        self._pullback = self._keeping.pullback(wrt, given)
        self._afresh: Callable[[int], Program] = lambda tag: program.on_model(tag).vjp(wrt, given)
        self._count = len(program.inputs)
        self._residuals = residuals_of(program.session)
        self.session = program.session
        self.inputs = (HANDLE, *program.inputs, *self._pullback.inputs)
        self.outputs = self._pullback.outputs
        self.labels = _labels_of(self._pullback)

    def is_for_host(self, position: int) -> bool:
        return position == 0 or super().is_for_host(position)

    def _run(self, sources: Sequence[Source], gpu: OnGpu | None) -> _Ran:
        id = ctypes.c_uint64.from_address(sources[0].pointer).value
        pullback = self._pullback
        try:
            self._residuals.check(id, self._keeping)
            placed, copied = place(pullback, sources[1 + self._count :])
            stream = _stream_of(gpu)
            blocks = self.session.run_pullback(pullback, id, placed, copied=copied, stream=stream)
        except ResidualGone:
            tag = 0 if self._residuals.is_of_another(id, self._keeping) else tag_of(id)
            return Run(self._afresh(tag))._run(sources[1:], gpu)
        finally:
            self._residuals.claim(id)
        return _Ran(pullback, blocks, copied)


def _stream_of(gpu: OnGpu | None) -> int | None:
    return None if gpu is None else gpu.stream


def _check_special(arrays: Sequence[jax.Array], labels: Sequence[str]) -> None:
    """Raise what jax raises of its own operations' results under `jax.debug_nans` and
    `jax.debug_infs`."""
    nans, infs = jax.config.jax_debug_nans, jax.config.jax_debug_infs  # type: ignore[attr-defined]
    if not nans and not infs:
        return
    for array, label in zip(arrays, labels, strict=False):  # a handle has a label only
        if jnp.issubdtype(array.dtype, jnp.inexact):
            values = np.asarray(array)
            for name, is_wrong in (
                ("nan", nans and np.isnan(values).any()),
                ("inf", infs and np.isinf(values).any()),
            ):
                if is_wrong:
                    raise FloatingPointError(f"invalid value ({name}) encountered in {label}")


def _labels_of(program: Program) -> tuple[str, ...]:
    return tuple(f"output {i} of {program!r}" for i in range(len(program.outputs)))
