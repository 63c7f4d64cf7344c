"""The JAX side of the digits demo: runs in the worker, in an environment without PyTorch."""

import importlib.util
import os

import jax
import jax.numpy as jnp
from flax import linen as nn

# The demo compares its results with torch. On recent GPUs, XLA multiplies float32 matrices in TF32
# by default; torch does not.
jax.config.update("jax_default_matmul_precision", "highest")

FEATURES, HIDDEN, CLASSES = 1024, 128, 10


class Head(nn.Module):
    """Image features -> scores of the ten digits."""

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(HIDDEN)(features))
        return nn.Dense(CLASSES)(x)


_head = Head()
# The worker's model: a flax.linen module with its variables.
model = (_head, _head.init(jax.random.key(0), jnp.zeros((1, FEATURES))))


def environment() -> dict[str, int | bool]:
    """Return this process's id and the frameworks that the process can import."""
    return {
        "pid": os.getpid(),
        **{
            name: importlib.util.find_spec(name) is not None
            for name in ("jax", "torch")
        },
    }
