"""JAX models of a worker whose GPU fails for good at the first error. Runs in .venv-jax."""

import jax
import numpy as np

from bridge_server.jax_runtime import JaxRuntime

JaxRuntime.has_failed = lambda self: True


def square(x):
    """Fine until then."""
    return x * x


def _raise(x):
    raise ValueError(
        "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"
    )


def failing(x):
    """Fails where the GPU would: at run time."""
    return jax.pure_callback(_raise, jax.ShapeDtypeStruct(x.shape, np.float32), x)


def untraceable(x):
    """Fails while it is prepared."""
    return _raise(x)
