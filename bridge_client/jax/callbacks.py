"""Runs within compiled code, as callbacks of three kinds: on XLA's host buffers, on its GPU
buffers, and on copies.

A callback never calls a jax function: that could wait for the computation that waits for the
callback.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bridge_client.arguments import Values
from bridge_client.jax.errors import named
from bridge_client.jax.gpu import HAS_BUFFERS, OnGpu, gpu_of_callback
from bridge_client.jax.memory import JAX_DTYPES, Source
from bridge_client.jax.runs import Action
from bridge_client.jax.x64 import check_range, converted, extremes
from bridge_wire.memory.dlpack import data_pointer
from bridge_wire.memory.pool import Block

if HAS_BUFFERS:
    from jax.experimental.buffer_callback import buffer_callback


def call_back_on_buffers(action: Action, *values: Any) -> Values:
    """Return an action's outputs for traced values, by a callback on XLA's own buffers."""
    results = action.result_types
    if not results:
        return []
    dtypes = [np.dtype(value.dtype) for value in values]
    result_dtypes = [result.dtype for result in results]

    def callback(_: Any, outputs: Values, *inputs: Any) -> None:
        try:
            sources = list(map(Source, map(data_pointer, inputs), dtypes))
            blocks = action(sources)
            targets = zip(map(data_pointer, outputs), result_dtypes, strict=True)
            action.write(blocks, targets)
        except (
            Exception,
            KeyboardInterrupt,
        ) as error:  # as in _crossing, without another call
            crossing = named(error)
        else:
            return
        raise crossing

    # XLA drops callbacks whose outputs are all empty; but the model may raise, or return another
    # shape now.
    is_empty = not any(result.size for result in results)
    call = buffer_callback(callback, results, has_side_effect=is_empty)
    arrays: Values = call(*values)
    return arrays


def call_back_on_gpu(action: Action, *values: Any) -> Values:
    """Return an action's outputs for traced values on a GPU, by a callback on XLA's own buffers
    there.

    The callback puts everything on XLA's stream. It waits only for values that a host has to read:
    handles of residuals, Python numbers, and the range of integers that jax must hold in fewer
    bits. If the worker's GPU is another one, or shares no memory, everything goes through the host.
    """
    results = action.result_types
    if not results:
        return []
    if action.session.gpu_pool() is None:
        return call_back_on_arrays(action, *values, is_staged=True)
    widened = action.widened(values)
    passed = [(np.dtype(value.dtype), tuple(value.shape)) for value in widened]
    wide_types = [
        jax.ShapeDtypeStruct(spec.shape, JAX_DTYPES[spec.dtype])
        for spec in action.outputs
    ]

    @_crossing
    def callback(context: Any, outputs: Values, *inputs: Any) -> None:
        gpu = gpu_of_callback(action.session, context, [*outputs, *inputs])
        pointers = list(map(data_pointer, inputs))
        sources = _sources_in(gpu, action, pointers, passed)
        blocks = action(sources, None if gpu.pool is None else gpu)
        targets = list(map(data_pointer, outputs))
        _deliver(gpu, action, blocks, targets)

    is_empty = not any(result.size for result in results)
    with jax.enable_x64(True):
        call = buffer_callback(callback, wide_types, has_side_effect=is_empty)
        arrays: Values = call(*widened)
    dtypes = [result.dtype for result in results]
    if [array.dtype for array in arrays] == dtypes:
        return arrays
    _check_ranges(action, arrays, dtypes)
    return list(map(converted, arrays, dtypes))


def _sources_in(
    gpu: OnGpu,
    action: Action,
    pointers: Sequence[int],
    passed: Sequence[tuple[np.dtype, tuple[int, ...]]],
) -> list[Source]:
    """Return a callback's inputs on a GPU. Inputs that a host reads are copied to the host; if the
    run is the host's, all are."""
    sources: list[Source] = []
    for pointer, (dtype, _) in zip(pointers, passed, strict=True):
        sources.append(Source(pointer, dtype, None, gpu))
    for_host = list(range(len(sources)))
    if gpu.pool is not None:
        for_host = list(filter(action.is_for_host, for_host))
    if for_host:
        dtypes, shapes = zip(*(passed[i] for i in for_host), strict=True)
        arrays = gpu.to_host([pointers[i] for i in for_host], dtypes, shapes)
        for i, array in zip(for_host, arrays, strict=True):
            sources[i] = _source_over(array)
        if gpu.pool is None:
            action.session.note_staged(sum(array.nbytes for array in arrays))
    return sources


def _deliver(
    gpu: OnGpu, action: Action, blocks: Sequence[Block], pointers: Sequence[int]
) -> None:
    """Copy the outputs of a run into XLA's buffers on a GPU."""
    for block, pointer in zip(blocks, pointers, strict=True):
        if block.nbytes:
            gpu.copy(pointer, block.pointer, block.nbytes)
    if gpu.pool is None:  # the blocks are the host's, and may be reused at once
        gpu.device.synchronize(gpu.stream)
        action.session.note_staged(sum(block.nbytes for block in blocks))


def _check_ranges(action: Action, arrays: Values, dtypes: Sequence[np.dtype]) -> None:
    """Have compiled code fail if an output does not fit jax's dtype for it."""
    pairs: list[Any] = []
    described: list[tuple[np.dtype, np.dtype, str]] = []
    for array, dtype, label in zip(arrays, dtypes, action.labels, strict=True):
        if array.dtype != dtype and array.size:
            pairs.append(extremes(array))
            described.append((np.dtype(array.dtype), dtype, label))
    count = len(pairs)
    if not count:
        return

    @_crossing
    def callback(context: Any, _: Any, *buffers: Any) -> None:
        gpu = gpu_of_callback(action.session, context, buffers)
        pointers = list(map(data_pointer, buffers))
        dtypes, shapes = [np.dtype(np.float64)] * count, [(2,)] * count
        bounds = gpu.to_host(pointers, dtypes, shapes)
        for pair, (wide, narrow, label) in zip(bounds, described, strict=True):
            check_range(pair, wide, narrow, label)

    result = jax.ShapeDtypeStruct((1,), np.int32)
    with jax.enable_x64(True):
        buffer_callback(callback, result, has_side_effect=True)(*pairs)


def _crossing(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Return a callback whose exceptions cross XLA with their types."""

    def called(*arguments: Any) -> Any:
        try:
            return callback(*arguments)
        except (Exception, KeyboardInterrupt) as error:
            crossing = named(error)
        raise crossing  # outside of the handler, whose exception holds the frames of the call

    return called


def call_back_on_arrays(
    action: Action, *values: Any, is_staged: bool = False
) -> Values:
    """Return an action's outputs for traced values, by a callback on copies on the host;
    `is_staged` if these are copies of memory on a GPU."""
    results = action.result_types
    if not results:
        return []

    @_crossing
    def callback(*inputs: Any) -> list[np.ndarray]:
        arrays = [np.asarray(x, order="C") for x in inputs]
        blocks = action(list(map(_source_over, arrays)))
        outputs = [np.empty(result.shape, result.dtype) for result in results]
        targets = [(array.ctypes.data, array.dtype) for array in outputs]
        action.write(blocks, targets)
        if is_staged:
            staged = [*arrays, *outputs]
            action.session.note_staged(sum(array.nbytes for array in staged))
        return outputs

    arrays: Values = jax.pure_callback(callback, results, *values)
    return arrays


def _source_over(array: np.ndarray) -> Source:
    return Source(array.ctypes.data, array.dtype, array)
