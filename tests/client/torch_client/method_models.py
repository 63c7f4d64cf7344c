"""JAX models with several methods, and with modes; run by the worker, and by the tests as the
reference.

No torch.
"""

from typing import Any

import equinox
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def _normal(seed, *shape):
    return (np.random.default_rng(seed).normal(size=shape) / 2).astype(np.float32)


# Methods ------------------------------------------------------------------------------------------


class LinenCoder(nn.Module):
    """An autoencoder."""

    activation: Any = nn.tanh

    def setup(self):
        self.encoder = nn.Dense(2)
        self.decoder = nn.Dense(3)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x, power=1):
        """The power is static: Python counts with it."""
        for _ in range(power):
            x = self.activation(x)
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(z)

    def _secret(self, x):
        return x


def _dense(seed, *shape):
    return {"kernel": _normal(seed, *shape), "bias": _normal(seed + 1, shape[-1])}


linen_coder: tuple[Any, ...] = (
    LinenCoder(),
    {"params": {"encoder": _dense(0, 3, 2), "decoder": _dense(2, 2, 3)}},
)


class NnxCoder(nnx.Module):
    """An autoencoder that counts its encodings."""

    def __init__(self):
        self.weight = nnx.Param(jnp.asarray(_normal(4, 3, 2)))
        self.count = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        return self.decode(self.encode(x))

    @nnx.jit
    def encode(self, x, power=1):
        self.count[...] += 1
        return jnp.tanh(x**power) @ self.weight

    def decode(self, z):
        return z @ self.weight.T


nnx_coder = NnxCoder()


class EquinoxCoder(equinox.Module):
    """An autoencoder with dropout."""

    weight: jax.Array
    dropout: equinox.nn.Dropout
    power: Any = jnp.square

    def __call__(self, x):
        return self.decode(self.encode(x))

    @equinox.filter_jit
    def encode(self, x, power=1):
        return jnp.tanh(x**power) @ self.weight

    def decode(self, z, key=None):
        return self.dropout(z, key=key) @ self.weight.T


equinox_coder = EquinoxCoder(
    jnp.asarray(_normal(4, 3, 2)), equinox.nn.Dropout(0.5, inference=True)
)


class Trial:
    """An environment of several steps, without a call of its own."""

    def reset(self, x):
        return jnp.zeros_like(x)

    def step(self, state, action):
        return state + action, (state * action).sum()


trial = Trial()

# Modes --------------------------------------------------------------------------------------------


_ZEROS = np.zeros(2)


class LinenModes(nn.Module):
    """Adds one in training mode; its methods name the mode in every way."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        bias = self.param("bias", lambda _: jnp.zeros(()))
        return x + bias + train

    def inverted(self, x, *, deterministic=None):
        return x + (not deterministic)

    def both(self, x, use_running_average=True, is_training=False):
        return x + is_training + 2 * (not use_running_average)

    def data(self, train, inference=_ZEROS):
        """No flags."""
        return train * 2 + inference.sum()

    def without(self, x):
        return x


linen_modes: tuple[Any, ...] = (
    LinenModes(),
    {"params": {"bias": np.zeros((), np.float32)}},
)


def _modal(x, is_training):
    return hk.Bias()(x) + is_training


haiku_modes = (
    hk.transform(_modal),
    {"bias": {"b": np.zeros(3, np.float32)}},
)
stateful_haiku_modes: tuple[Any, ...] = (
    hk.transform_with_state(_modal),
    ({"bias": {"b": np.zeros(3, np.float32)}}, {}),
)


def _running(params, state, x, *, training=False):
    """The input less its running mean, which training moves."""
    mean = state["mean"] * 0.5 + x.mean() * 0.5 if training else state["mean"]
    after = {"mean": mean, "count": state["count"] + training}
    return params["scale"] * (x - mean), after


running = (
    _running,
    {"scale": np.float32(2)},
    {"mean": np.float32(1), "count": np.int32(0)},
)
forgetful = (lambda params, state, x: x, {"w": np.float32(1)}, {"s": np.float32(1)})
