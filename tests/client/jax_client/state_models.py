"""Torch models whose arguments and results are of classes of their own. No jax."""

import collections
import dataclasses
import enum
from typing import Any

import torch
from torch.utils import _pytree as pytree


class Cache:
    """Registered with torch's pytrees, with a list as context."""

    def __init__(self, keys, n):
        self.keys, self.n = keys, n


pytree.register_pytree_node(
    Cache,
    lambda value: ([value.keys], {"n": [value.n]}),
    lambda children, context: Cache(children[0], context["n"][0]),
)


def cache(x):
    return Cache(x, 3)


def read(cache):
    return cache.keys * cache.n


class Output(collections.OrderedDict[str, Any]):
    """As transformers' ModelOutput."""

    @property
    def logits(self):
        return self["logits"]


pytree.register_pytree_node(
    Output,
    lambda value: (list(value.values()), list(value)),
    lambda values, keys: Output(zip(keys, values, strict=True)),
)


def output(x):
    return Output(logits=2 * x, hidden=(x, x))


def logits(output):
    return output.logits


class Mode(enum.Enum):
    EVAL = "eval"


def mixed(x):
    """A result with more than tensors in it."""
    return {
        "x": x,
        "size": len(x),
        "shape": x.shape,
        "ratio": 0.5,
        "mode": Mode.EVAL,
        "dtype": x.dtype,
    }


def unmixed(value):
    is_right = value["mode"] is Mode.EVAL and value["dtype"] is torch.float32
    return value["x"] * is_right * (value["size"] == 3)


@dataclasses.dataclass
class Settings:
    """A state with a number and a text."""

    x: torch.Tensor
    n: int = 1
    how: str = "add"


def settings(x, n=1):
    return Settings(x, n)


def stepped(state):
    assert type(state.n) is int and state.how == "add"
    return dataclasses.replace(state, x=state.x + state.n)
