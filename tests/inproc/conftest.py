"""What these tests share: JAX is up before any of them, so that none is blamed for its threads
and descriptors."""

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(scope="session", autouse=True)
def jax_is_up() -> None:
    """XLA has started its threads."""
    jax.jit(jnp.sin)(1.0).block_until_ready()
