"""JAX on the host, posing as JAX on the GPU that is none: the few lines that only CUDA can run
are replaced."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from bridge_client.jax import callbacks, gpu, memory, primitives, runs
from bridge_wire.memory.cuda import device_of, gpus


def _pointer_of(self: gpu.OnGpu, array: jax.Array) -> int:
    return array.block_until_ready().unsafe_buffer_pointer()


@contextlib.contextmanager
def jax_on_gpu() -> Iterator[int]:
    """Let all arrays of jax lie on the one GPU there is, but for those that are on another of the
    host's devices. Gives XLA's stream there.

    XLA on the host waits for no stream: so the end of each callback waits for this one.
    """
    device = device_of(gpus()[0].uuid)
    stream = device.new_stream()
    deliver = callbacks._deliver

    def delivered(*arguments: Any) -> None:
        deliver(*arguments)
        device.synchronize(stream)

    with pytest.MonkeyPatch.context() as patch:
        for module in (memory, runs):
            patch.setattr(module, "has_one_cpu", lambda: False)
        for module in (gpu, runs):
            patch.setattr(
                module, "ordinal_of", lambda array: next(iter(array.devices())).id or 0
            )
        patch.setattr(gpu, "stream_of", lambda device: stream)
        patch.setattr(gpu, "stream_of_callback", lambda context: stream)
        patch.setattr(gpu.OnGpu, "pointer_of", _pointer_of)
        patch.setattr(
            gpu.OnGpu,
            "reference_to",
            lambda self, array: array.addressable_data(0).__dlpack__(),
        )
        patch.setattr(callbacks, "_deliver", delivered)
        primitives.lower_as(callbacks.call_back_on_gpu, "cpu")
        try:
            yield stream
        finally:
            primitives.lower_as(callbacks.call_back_on_buffers, "cpu")
            device.synchronize(stream)
            device.destroy_stream(stream)
