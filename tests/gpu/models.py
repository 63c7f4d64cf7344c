"""The JAX models of workers whose GPU is none: they run on the host, whose memory the GPU's is. Runs in .venv-jax."""

import jax.numpy as jnp

from bridge_server.jax_runtime import JaxRuntime
from bridge_wire.cuda import gpus

JaxRuntime.gpu = lambda self: gpus()[0]


def sine(x):
    """Twice the sine."""
    return jnp.sin(x) * 2


def scaled(x, y, *, by=1.0):
    """A product that needs all of its inputs, also the number."""
    return x * y * by
