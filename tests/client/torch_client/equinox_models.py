"""A model with parameters, written with equinox; run by the worker, and by the tests as the
reference.

No torch.
"""

import equinox
import jax
import jax.numpy as jnp
import numpy as np


class Stack(equinox.Module):
    """Layers in a list, which are arrays, and a number and a function, which are not."""

    layers: list[jax.Array]
    slope: float
    activation: object = jax.nn.leaky_relu

    def __call__(self, x):
        for layer in self.layers:
            x = self.activation(x @ layer, self.slope)
        return x


_rng = np.random.default_rng(20)
stack = Stack(
    [
        jnp.asarray(_rng.normal(size=shape), jnp.float32)
        for shape in ((3, 4), (4, 4), (4, 2))
    ],
    0.2,
)
