"""Functions with what JAX has of its own: donation, custom derivatives, control flow, callbacks,
remat.

No torch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, donate_argnums=(0, 1))
def donating(x, y):
    """Allows jax to use its inputs' memory for its output."""
    return jnp.sin(x) * y


@jax.custom_vjp
def clipped(x):
    """The cube, with a gradient of its own."""
    return x**3


clipped.defvjp(lambda x: (x**3, x), lambda x, ct: (jnp.clip(3 * x**2 * ct, -1, 1),))


@jax.custom_jvp
def softened(x):
    """The absolute value, with a derivative of its own."""
    return jnp.abs(x)


softened.defjvps(lambda t, y, x: jnp.tanh(x) * t)


def scanned(x):
    """A recurrence over the rows."""

    def step(carry, row):
        carry = jnp.tanh(carry + row)
        return carry, carry * row

    return jax.lax.scan(step, jnp.zeros(x.shape[1:], x.dtype), x)


def looped(x, count):
    """A while loop, whose derivative is forward-mode only."""
    return jax.lax.while_loop(
        lambda s: s[0] < count, lambda s: (s[0] + 1, jnp.sin(s[1])), (0, x)
    )[1]


def bounded(x):
    """A loop over a known range."""
    return jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y), x)


def remembered(x):
    """Recomputed in the backward pass."""
    return jax.checkpoint(lambda y: jnp.sin(jnp.exp(jnp.sin(y))))(x)


def called_back(x):
    """The host computes, and gives the derivative too."""

    @jax.custom_jvp
    def sine(x):
        return jax.pure_callback(np.sin, x, x, vmap_method="expand_dims")

    sine.defjvps(
        lambda t, y, x: jax.pure_callback(np.cos, x, x, vmap_method="expand_dims") * t
    )
    return sine(x)


def printing(x):
    """Prints while it runs."""
    jax.debug.print("the sum is {}", x.sum())
    return x * 2
