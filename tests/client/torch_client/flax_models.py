"""Models with parameters, written with flax; run by the worker, and by the tests as the reference.

No torch.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict


def _normal(seed, *shape):
    return (np.random.default_rng(seed).normal(size=shape) / 2).astype(np.float32)


class Perceptron(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(5)(x))
        return nn.Dense(2)(x)


def perceptron_variables():
    """Written out, since `init` would compile in every worker that hosts this."""
    return {
        "params": {
            "Dense_0": {"kernel": _normal(0, 3, 5), "bias": _normal(1, 5)},
            "Dense_1": {"kernel": _normal(2, 5, 2), "bias": _normal(3, 2)},
        }
    }


perceptron = (Perceptron(), perceptron_variables())


class Normed(nn.Module):
    """A layer, normalised with running statistics."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(2)(x))


normed: tuple[Any, ...] = (
    Normed(),
    FrozenDict(
        {
            "params": {
                "Dense_0": {"kernel": _normal(4, 3, 2), "bias": _normal(5, 2)},
                "BatchNorm_0": {"scale": _normal(6, 2), "bias": _normal(7, 2)},
            },
            "batch_stats": {
                "BatchNorm_0": {"mean": _normal(8, 2), "var": np.abs(_normal(9, 2)) + 1}
            },
        }
    ),
)


class Gate(nnx.Module):
    """With a parameter, a nested module and a statistic."""

    def __init__(self):
        self.inner = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.inner.kernel[...] = jnp.asarray(_normal(10, 3, 2))
        self.gain = nnx.Param(jnp.asarray(_normal(11, 2)))
        self.offset = nnx.BatchStat(jnp.asarray(_normal(12, 2)))

    def __call__(self, x):
        return self.inner(x) * self.gain + self.offset


gate = Gate()


def frozen(x):
    """A FrozenDict as the result."""
    return FrozenDict({"b": {"c": x * 2}, "a": x})
