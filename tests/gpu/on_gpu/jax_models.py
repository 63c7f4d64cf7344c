"""Models of the JAX workers on the GPU."""

import jax
import jax.numpy as jnp

from tests.gpu.on_gpu.machine import REHEARSED

_SIDE, _STEPS = (64, 3) if REHEARSED else (4096, 400)


def sine(x):
    return jnp.sin(x) * 2


def unchanged(x):
    return x


def pair(x, y):
    return {"sum": x + y, "product": [x * y]}


def outer(x):
    """A large output from a small input."""
    return x[:, None] * x[None, :]


def late(x):
    """The input plus one, when the GPU has worked for a second or so."""
    work = jnp.full((_SIDE, _SIDE), 1e-3, jnp.float32)
    value = jax.lax.fori_loop(
        0,
        _STEPS,
        lambda _, value: jnp.tanh(jnp.matmul(value, work, precision="highest")),
        work,
    )
    return x + 1 + 0 * value[0, 0].astype(x.dtype)


def dense():
    """A pair (apply, params)."""
    return (lambda params, x: x @ params["kernel"] + params["bias"]), {
        "kernel": jnp.ones((4, 3)) / 7,
        "bias": jnp.zeros(3),
    }


trainable = dense()
