"""Torch models whose results are instances of classes that no pytree knows. No jax."""

import collections
import threading
from typing import Any

import torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal


class Layer:
    """As a layer of transformers' DynamicCache."""

    keys: Any = None

    def __init__(self, keys):
        self.keys, self.dtype, self.device = keys, keys.dtype, keys.device
        self.count, self.is_full = len(keys), False


class Cache:
    """As transformers' DynamicCache: a list that grows, a class, and a dict of flags."""

    def __init__(self):
        self.layers, self.kind, self.updated = [], Layer, {0: False}

    def append(self, keys):
        self.layers.append(self.kind(keys))
        self.updated[len(self.layers)] = True


def cached(x, cache=None):
    """Twice the sum of all keys, and a cache with x as its newest keys."""
    cache = cache or Cache()
    assert type(cache) is Cache and cache.kind is Layer
    cache.append(x)
    assert all(layer.dtype is torch.float32 for layer in cache.layers)
    return 2 * sum(layer.keys for layer in cache.layers), cache


class Gaussian(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x):
        return Independent(Normal(x, self.scale.exp(), validate_args=False), 1)


gaussian = Gaussian()


def logarithm(distribution, x):
    """The logarithm of the density, by a distribution that was passed back."""
    assert isinstance(distribution.batch_shape, torch.Size)
    return distribution.log_prob(x)


def categorical(x):
    return Categorical(logits=x)


class Pickled(Layer):
    def __getstate__(self):
        return {}


class Stack(list[Any]):
    pass


class Slotted:
    __slots__ = ("__dict__", "keys")

    def __init__(self, keys):
        self.keys, self.count = keys, 1


def pickled(x):
    return Pickled(x)


def stacked(x):
    return _with(keys=Stack([x, x]))


def ordered(x):
    return _with(keys=collections.OrderedDict(b=x, a=x))


def locked(x):
    return _with(keys=x, lock=threading.Lock())


def cyclic(x):
    made = _with(keys=x)
    made.owners = [{"owner": made}]
    return made


def slotted(x):
    return Slotted(x)


def unusual(x):
    return _with(**{"keys": x, "a b": 1})


class Counting:
    """Its attribute counts the calls."""

    calls = 0

    def __call__(self, x):
        self.calls += 1
        return _with(keys=x, count=self.calls)


counting = Counting()


def local(x):
    """A class that each call makes anew."""

    class Local(Layer):
        pass

    return _with(keys=x, kind=Local)


def keys_of(value):
    return value.keys


def _with(**attributes):
    made = object.__new__(Layer)
    vars(made).update(attributes)
    return made
