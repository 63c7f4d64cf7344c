"""Models with state and randomness; run by the worker, and by the tests as the reference.

No torch.
"""

import equinox
import flax.linen as nn
import haiku
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.client.torch_client.flax_models import _normal


class Noisy(nn.Module):
    """Normalised and thinned out; `train` says how."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        self.sow("intermediates", "normed", x)
        return nn.Dropout(0.5, deterministic=not train)(x)


noisy = (
    Noisy(),
    {
        "params": {"BatchNorm_0": {"scale": _normal(30, 3), "bias": _normal(31, 3)}},
        "batch_stats": {
            "BatchNorm_0": {"mean": _normal(32, 3), "var": np.abs(_normal(33, 3)) + 1}
        },
    },
)


class Counted(nnx.Module):
    """A statistic that the result depends on, and dropout with a stream of its own."""

    def __init__(self):
        self.weight = nnx.Param(jnp.asarray(_normal(34, 3)))
        self.calls = nnx.BatchStat(jnp.asarray(1.0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=0))

    def __call__(self, x, train=True):
        scaled = x * self.weight * self.calls
        if train:
            self.calls[...] += 1
        return self.dropout(scaled, deterministic=not train)


counted = Counted()


class Normed(equinox.Module):
    """Running statistics in an equinox.nn.State."""

    norm: equinox.nn.BatchNorm
    dropout: equinox.nn.Dropout

    def __init__(self):
        self.norm = equinox.nn.BatchNorm(3, axis_name="batch", mode="batch")
        self.dropout = equinox.nn.Dropout(0.5)

    def __call__(self, x, state, *, key=None, inference=False):
        def one(x, state, key):
            x, state = self.norm(x, state, inference=inference)
            return self.dropout(x, key=key, inference=inference), state

        keys = None if key is None else jax.random.split(key, len(x))
        batched = jax.vmap(
            one,
            in_axes=(0, None, None if key is None else 0),
            out_axes=(0, None),
            axis_name="batch",
        )
        return batched(x, state, keys)


equinox_normed = equinox.nn.make_with_state(Normed)()


def _moving(x):
    """The input less its moving average, with noise."""
    average = haiku.get_state("average", (3,), init=jnp.zeros)
    weight = haiku.get_parameter("weight", (3,), init=jnp.ones)
    haiku.set_state("average", 0.5 * average + 0.5 * x.mean(0))
    noise = jax.random.normal(haiku.next_rng_key(), x.shape)
    return weight * (x - average) + noise


moving = (
    haiku.transform_with_state(_moving),
    ({"~": {"weight": _normal(35, 3)}}, {"~": {"average": np.zeros(3, np.float32)}}),
)
noisy_haiku = (
    haiku.transform(
        lambda x: (
            x * haiku.get_parameter("w", (), init=jnp.ones)
            + jax.random.normal(haiku.next_rng_key())
        )
    ),
    {"~": {"w": np.float32(2)}},
)


def noise(x, key):
    """The input plus noise."""
    return x + jax.random.normal(key, x.shape)


def two_noises(x, left, right):
    """Noise from two streams."""
    return jax.random.normal(left, x.shape), jax.random.normal(right, x.shape)


noisy_pair = (
    lambda params, x, *, key: params["w"] * noise(x, key),
    {"w": np.float32(3)},
)
counting = (lambda params, x: x * params["count"], {"count": np.int32(2)})


# Models whose mode is an attribute: no argument of a call says how they are used ------------------


class Regular(nnx.Module):
    """BatchNorm and dropout as nnx models are usually written."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(x))


class Repeated(nnx.Module):
    """Dropout in a scan, which replaces all variables whether or not anything is drawn."""

    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(
            in_axes=(nnx.StateAxes({...: nnx.Carry}), nnx.Carry),
            out_axes=nnx.Carry,
            length=2,
        )
        def step(module, x):
            return module.dropout(x) * 2

        return step(self, x)


class Inferring(equinox.Module):
    """Dropout as equinox models are usually written."""

    dropout: equinox.nn.Dropout

    def __init__(self):
        self.dropout = equinox.nn.Dropout(0.5)

    def __call__(self, x, key=None):
        return self.dropout(x, key=key)


class InferringNormed(equinox.Module):
    """Likewise with running statistics."""

    norm: equinox.nn.BatchNorm

    def __init__(self):
        self.norm = equinox.nn.BatchNorm(3, axis_name="batch", mode="ema")

    def __call__(self, x, state):
        return jax.vmap(
            self.norm, in_axes=(0, None), out_axes=(0, None), axis_name="batch"
        )(x, state)


def regular():
    return Regular(nnx.Rngs(0))


def regular_in_eval():
    model = Regular(nnx.Rngs(0))
    model.eval()
    return model


def repeated():
    return Repeated(nnx.Rngs(0))


def inferring():
    return Inferring()


def inferring_normed():
    module, state = equinox.nn.make_with_state(InferringNormed)()
    x = jnp.arange(12.0).reshape(4, 3)
    return module, module(x, state)[1]  # the statistics of one batch
