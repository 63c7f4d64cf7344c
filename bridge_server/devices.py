"""Which device a worker's models run on. Decided before any framework is imported; never imports one."""

from bridge_wire.cuda import Gpu, gpus


def gpu_at(ordinal: int | None) -> Gpu | None:
    """Return the GPU that frameworks in this process know by that number; None if there is none, as of the host."""
    return None if ordinal is None else next((gpu for gpu in gpus() if gpu.ordinal == ordinal), None)
