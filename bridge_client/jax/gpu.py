"""Arrays on a GPU: reading, making and waiting for them. The only module that knows XLA's streams.

XLA runs its computations on a GPU one after the other on one stream, and releases memory, also
other owners' memory, in the order of that stream: a computation may be about to read it. So
everything here is done on XLA's own stream. There, a copy finds the results of earlier
computations, a block is reused after its last reader, and no host waits.
"""

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bridge_client.arguments import Values
from bridge_client.session import Session
from bridge_wire.errors import CudaError
from bridge_wire.memory.cuda import Device, device_of, gpus
from bridge_wire.memory.cuda_memory import GpuPool
from bridge_wire.memory.dlpack import DeviceExporter
from bridge_wire.memory.pool import Block
from bridge_wire.specs import Spec

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # jax may move it: it is marked experimental
    HAS_BUFFERS = False
else:
    HAS_BUFFERS = True


# From jax 0.11 on, XLA writes into imported memory that is donated: that is the array's own as long
# as nobody else refers to it. Before, that path ended in LOG(FATAL) ("ForeignRawSEDeviceMemory
# cannot be donated").
DONATION_ENDS_PROCESS = jax.__version_info__ < (0, 11)


class OnGpu(NamedTuple):
    """XLA's stream on a GPU, and the memory there that is shared with the worker; None if its
    models run elsewhere."""

    device: Device
    stream: int
    pool: GpuPool | None

    def lease(self, nbytes: int) -> Block:
        """Return a block for use on the stream."""
        assert self.pool is not None, "only a run on the GPU has memory there"
        return self.pool.lease(nbytes, self.stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Put a copy on the stream: from the GPU or the host, to either."""
        self.device.copy(target, source, nbytes, self.stream)

    def to_host(
        self,
        pointers: Sequence[int],
        dtypes: Sequence[np.dtype],
        shapes: Values,
    ) -> list[np.ndarray]:
        """Return the values at some places on the GPU, at this point of the stream. The only wait
        of the host."""
        arrays = list(map(np.empty, shapes, dtypes))
        for array, pointer in zip(arrays, pointers, strict=True):
            if array.nbytes:
                self.copy(array.ctypes.data, pointer, array.nbytes)
        self.device.synchronize(self.stream)
        return arrays

    def holds(self, value: Any) -> bool:
        """Whether a value is an array in this GPU's memory."""
        return (
            isinstance(value, jax.Array)
            and ordinal_of(value) == self.device.gpu.ordinal
        )

    def pointer_of(self, array: jax.Array) -> int:
        """Return an array's address; later work on the stream finds its value there."""
        array.__dlpack__(stream=self.stream)  # type: ignore[call-arg]
        return array.unsafe_buffer_pointer()

    def array_over(self, block: Block, spec: Spec) -> jax.Array:
        """Return the array over a block that has its value for later work on the stream."""
        location = self.device.dlpack_device
        exporter = DeviceExporter(block.pointer, spec, block, location, self._let_wait)
        array: jax.Array = jax.dlpack.from_dlpack(exporter)
        return array

    def keep_from_donation(self, array: jax.Array) -> None:
        """Prevent the donation of an array over a block, where XLA would end the process instead of
        taking memory that it does not own."""
        if DONATION_ENDS_PROCESS:
            weakref.finalize(array, _let_go, self.reference_to(array)).atexit = False

    def reference_to(self, array: jax.Array) -> Any:
        """Return a reference to an array's memory: XLA does not donate memory with another
        reference."""
        # By an object other than the array itself, which the reference must not keep alive.
        return array.addressable_data(0).__dlpack__(stream=self.stream)  # type: ignore[call-arg]

    def _let_wait(self, stream: int | None) -> None:
        if stream is None:
            self.device.synchronize(self.stream)
        elif stream != self.stream:
            assert self.pool is not None, "only a run on the GPU leaves blocks there"
            self.pool.let_wait(stream, self.stream)


def _let_go(reference: Any) -> None:
    """Do nothing: the argument was the last reference."""


def gpu_for(session: Session, values: Values) -> OnGpu | None:
    """Return the GPU of a run on these arrays if one is on the worker's GPU; else None."""
    ordinals = {
        ordinal_of(value): value for value in values if isinstance(value, jax.Array)
    }
    ordinals.pop(None, None)
    pool = session.gpu_pool() if ordinals and HAS_BUFFERS else None
    array = None if pool is None else ordinals.get(pool.device.gpu.ordinal)
    if pool is None or array is None:
        return None
    (device,) = array.devices()
    return OnGpu(pool.device, stream_of(device), pool)


def gpu_of_callback(session: Session, context: Any, buffers: Values) -> OnGpu:
    """Return the GPU of a callback's buffers; there must be at least one buffer."""
    _, ordinal = buffers[0].__dlpack_device__()
    pool = session.gpu_pool()
    if pool is not None and pool.device.gpu.ordinal == ordinal:
        return OnGpu(pool.device, stream_of_callback(context), pool)
    return OnGpu(_device_at(ordinal), stream_of_callback(context), None)


def ordinal_of(array: jax.Array) -> int | None:
    """Return this process's number of the GPU that holds a whole array; else None."""
    devices = array.devices()
    device = next(iter(devices))
    if (
        len(devices) > 1
        or device.platform != "gpu"
        or array.sharding.memory_kind not in ("device", None)
    ):
        return None
    ordinal: int = device.local_hardware_id
    return ordinal


@functools.cache
def stream_of(device: jax.Device) -> int:
    """Return XLA's stream on a GPU, which XLA tells callbacks only."""
    streams: list[int] = []
    called = buffer_callback(
        lambda context, _, x: streams.append(stream_of_callback(context)),
        jax.ShapeDtypeStruct((1,), np.int32),
        has_side_effect=True,
    )
    with jax.ensure_compile_time_eval():
        argument = jax.device_put(np.zeros(1, np.int32), device)
        jax.block_until_ready(jax.jit(called)(argument))
    return streams[0]


def stream_of_callback(context: Any) -> int:
    """Return the stream on which XLA's computation has come to a callback."""
    return int(context.stream)


def is_committed(values: Values) -> bool:
    """Whether jax must keep results of these values on their device."""
    return any(
        getattr(value, "committed", True)
        for value in values
        if isinstance(value, jax.Array)
    )


def uncommitted(array: jax.Array) -> jax.Array:
    """Return an array that jax may move to the device of other arrays, if there are any; jax never
    moves imported arrays."""
    if jax.local_device_count() == 1:
        return array
    try:
        from jax._src.array import ArrayImpl

        return ArrayImpl(array.aval, array.sharding, [array], committed=False)  # type: ignore[list-item]
    except (ImportError, TypeError):
        return array


@functools.cache
def _device_at(ordinal: int) -> Device:
    gpu = next((gpu for gpu in gpus() if gpu.ordinal == ordinal), None)
    if gpu is None:
        raise CudaError(
            f"an array is on the GPU {ordinal}, but CUDA knows none of that number in this process"
        )
    return device_of(gpu.uuid)
