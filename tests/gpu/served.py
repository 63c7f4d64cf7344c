"""Models of a worker that takes the fake GPU for its own: JAX computes on the host all the same."""

from bridge_server.jax_runtime.runtime import JaxRuntime
from bridge_wire import cuda


def sine(x):
    import jax.numpy as jnp

    return jnp.sin(x) * 2


JaxRuntime.gpu = lambda self: cuda.gpus()[0]
