"""What the worker of docker/compose.yaml serves: a damped oscillation. Its image has no torch."""

import jax.numpy as jnp


def damped(t, amplitude, rate):
    """Return the elongation at the times `t`."""
    return amplitude * jnp.exp(-rate * t) * jnp.cos(t)
