"""The JAX models that the tests' workers host; runs in .venv-jax. Names served by every worker are in models.txt."""

import jax.numpy as jnp


def sine(x):
    """Twice the sine."""
    return jnp.sin(x) * 2
