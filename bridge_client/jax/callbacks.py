"""Runs within compiled code: as callbacks, by whichever kind of callback there is.

No jax function is called while a callback runs: that could wait for the very computation which
waits for the callback.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bridge_client.jax.errors import named
from bridge_client.jax.gpu import HAS_BUFFERS, OnGpu, gpu_of_callback
from bridge_client.jax.memory import JAX_DTYPES, Source, write
from bridge_client.jax.runs import Action
from bridge_client.jax.x64 import check_range, extremes, narrowed, widened
from bridge_wire.memory.dlpack import data_pointer
from bridge_wire.memory.pool import Block

if HAS_BUFFERS:
    from jax.experimental.buffer_callback import buffer_callback


def call_back_on_buffers(action: Action, *values: Any) -> Sequence[Any]:
    """Return what an action makes of traced values, by a callback that sees XLA's own buffers."""
    results, into = action.result_types, list(zip(action.outputs, action.labels, strict=True))
    if not results:
        return []
    dtypes = [np.dtype(value.dtype) for value in values]
    result_dtypes = [result.dtype for result in results]

    def callback(_: Any, outputs: Sequence[Any], *inputs: Any) -> None:
        try:
            blocks = action(
                [Source(data_pointer(x), dtype) for x, dtype in zip(inputs, dtypes, strict=True)]
            )
            for block, (spec, label), output, dtype in zip(
                blocks, into, outputs, result_dtypes, strict=True
            ):
                write(block, spec, data_pointer(output), dtype, label)
        except (Exception, KeyboardInterrupt) as error:  # as in _crossing, without another call
            crossing = named(error)
        else:
            return
        raise crossing

    # XLA leaves out what makes empty arrays only; but the model may raise, or return another shape
    # now.
    is_empty = not any(result.size for result in results)
    return buffer_callback(callback, results, has_side_effect=is_empty)(*values)


def call_back_on_gpu(action: Action, *values: Any) -> Sequence[Any]:
    """Return what an action makes of traced values on a GPU, by a callback that sees XLA's own
    buffers there.

    It puts everything on XLA's stream and waits for nothing, but for what a host has to read:
    handles of residuals, Python numbers, and the range of integers that jax must hold in fewer
    bits. Where the worker's GPU is another one, or shares no memory, all goes through the host.
    """
    results = action.result_types
    if not results:
        return []
    if action.session.gpu_pool() is None:
        return call_back_on_arrays(action, *values, is_staged=True)
    wanted = enumerate(zip(values, action.inputs, strict=True))
    values = tuple(
        x if action.is_for_host(i) else widened(x, JAX_DTYPES[spec.dtype])
        for i, (x, spec) in wanted
    )
    passed = [(np.dtype(value.dtype), tuple(value.shape)) for value in values]
    described = [
        jax.ShapeDtypeStruct(spec.shape, JAX_DTYPES[spec.dtype]) for spec in action.outputs
    ]

    @_crossing
    def callback(context: Any, outputs: Sequence[Any], *inputs: Any) -> None:
        gpu = gpu_of_callback(action.session, context, [*outputs, *inputs])
        sources = _sources_in(gpu, action, [data_pointer(x) for x in inputs], passed)
        blocks = action(sources, None if gpu.pool is None else gpu)
        _deliver(gpu, action, blocks, [data_pointer(x) for x in outputs])

    is_empty = not any(result.size for result in results)
    with jax.enable_x64(True):
        made = buffer_callback(callback, described, has_side_effect=is_empty)(*values)
    changed = [
        i
        for i, (y, result) in enumerate(zip(made, results, strict=True))
        if y.dtype != result.dtype
    ]
    _check_ranges(action, {i: made[i] for i in changed if made[i].size}, results)
    return (
        [narrowed(y, result.dtype) for y, result in zip(made, results, strict=True)]
        if changed
        else made
    )


def _sources_in(
    gpu: OnGpu,
    action: Action,
    pointers: Sequence[int],
    passed: Sequence[tuple[np.dtype, tuple[int, ...]]],
) -> list[Source]:
    """Return a callback's inputs on a GPU; on the host what is read there, and everything if the
    run is the host's."""
    sources = [
        Source(pointer, dtype, None, gpu)
        for pointer, (dtype, _) in zip(pointers, passed, strict=True)
    ]
    wanted = [i for i in range(len(sources)) if gpu.pool is None or action.is_for_host(i)]
    if wanted:
        arrays = gpu.to_host(
            [pointers[i] for i in wanted], *zip(*(passed[i] for i in wanted), strict=True)
        )
        for i, array in zip(wanted, arrays, strict=True):
            sources[i] = Source(array.ctypes.data, array.dtype, array)
        if gpu.pool is None:
            action.session.note_staged(sum(array.nbytes for array in arrays))
    return sources


def _deliver(gpu: OnGpu, action: Action, blocks: Sequence[Block], pointers: Sequence[int]) -> None:
    """Put the outputs of a run where XLA wants them on a GPU."""
    for block, pointer in zip(blocks, pointers, strict=True):
        if block.nbytes:
            gpu.copy(pointer, block.pointer, block.nbytes)
    if gpu.pool is None:  # the blocks are the host's, and may be used again at once
        gpu.device.synchronize(gpu.stream)
        action.session.note_staged(sum(block.nbytes for block in blocks))


def _check_ranges(
    action: Action, wide: Mapping[int, Any], results: Sequence[jax.ShapeDtypeStruct]
) -> None:
    """Have compiled code fail where an output, by its position, does not fit the type that jax
    has for it."""
    if not wide:
        return
    found = [extremes(y) for y in wide.values()]
    described = [(np.dtype(y.dtype), results[i].dtype, action.labels[i]) for i, y in wide.items()]
    count = len(found)

    @_crossing
    def callback(context: Any, _: Any, *buffers: Any) -> None:
        gpu = gpu_of_callback(action.session, context, buffers)
        pairs = gpu.to_host(
            [data_pointer(x) for x in buffers], [np.dtype(np.float64)] * count, [(2,)] * count
        )
        for pair, (dtype, narrow, label) in zip(pairs, described, strict=True):
            check_range(pair, dtype, narrow, label)

    with jax.enable_x64(True):
        buffer_callback(callback, jax.ShapeDtypeStruct((1,), np.int32), has_side_effect=True)(
            *found
        )


def _crossing(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Return a callback whose exceptions get through XLA with their types."""

    def called(*arguments: Any) -> Any:
        try:
            return callback(*arguments)
        except (Exception, KeyboardInterrupt) as error:
            crossing = named(error)
        raise crossing  # not from within the handler, whose exception holds the frames of the call

    return called


def call_back_on_arrays(action: Action, *values: Any, is_staged: bool = False) -> Sequence[Any]:
    """Return what an action makes of traced values, by a callback that sees copies on the host:
    `is_staged` says that they are of memory on a GPU.
    """
    results = action.result_types
    if not results:
        return []

    @_crossing
    def callback(*inputs: Any) -> list[np.ndarray]:
        arrays = [np.asarray(x, order="C") for x in inputs]
        blocks = action([Source(array.ctypes.data, array.dtype, array) for array in arrays])
        made = [np.empty(result.shape, result.dtype) for result in results]
        for block, spec, label, array in zip(
            blocks, action.outputs, action.labels, made, strict=True
        ):
            write(block, spec, array.ctypes.data, array.dtype, label)
        if is_staged:
            action.session.note_staged(sum(array.nbytes for array in (*arrays, *made)))
        return made

    return jax.pure_callback(callback, results, *values)
