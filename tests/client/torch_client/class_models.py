"""Models whose arguments and results are of classes of their own, some with static parts.

No torch.
"""

import dataclasses
import enum
from typing import Any, NamedTuple

import equinox
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.core import FrozenDict, freeze
from flax.training.train_state import TrainState

from tests.client.torch_client import class_models_twin


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    """A static field, and a method that needs it."""

    x: Any
    n: int = dataclasses.field(metadata={"static": True}, default=1)

    def energy(self):
        return self.n * (self.x**2).sum()


@flax.struct.dataclass
class Struct:
    x: Any
    n: int = flax.struct.field(pytree_node=False, default=1)

    energy = Registered.energy


class Module(equinox.Module):
    x: Any
    n: int = equinox.field(static=True, default=1)

    def energy(self):
        return self.n * (self.x**2).sum()


@jax.tree_util.register_pytree_node_class
class Node:
    def __init__(self, x, n=1):
        self.x, self.n = x, n

    energy = Registered.energy

    def tree_flatten(self):
        return (self.x,), self.n

    @classmethod
    def tree_unflatten(cls, n, children):
        return cls(*children, n)  # type: ignore[call-arg]


@jax.tree_util.register_pytree_node_class
class Incomparable(Node):
    """Its static part is an array of NumPy."""

    def tree_flatten(self):
        return (self.x,), np.full(2, self.n)

    @classmethod
    def tree_unflatten(cls, n, children):
        return cls(*children, n[0])  # type: ignore[call-arg]


CLASSES = {
    "registered": Registered,
    "struct": Struct,
    "module": Module,
    "node": Node,
    "incomparable": Incomparable,
}


def make(x, kind, n):
    """An instance with a static part."""
    return CLASSES[kind](x, n)


def energy(state):
    return state.energy()


def class_of(state):
    """The module of a Registered, as a number: 1 for this one, 2 for the twin, 0 for neither."""
    return jnp.asarray(
        isinstance(state, Registered)
        + 2 * isinstance(state, class_models_twin.Registered)
    )


def step(state):
    return jax.tree.map(lambda x: x * 2, state)


class Pair(NamedTuple):
    """A namedtuple that computes when it is made."""

    x: Any
    y: Any

    def __add__(self, other):
        return Pair(self.x + other.x, self.y + other.y)


def pair(x):
    return Pair(x, 2 * x)


def doubled(value):
    return (value + value).y


def twin(x):
    """An instance of another class with the same name and fields."""
    return class_models_twin.Registered(x, 7)


def train_state(x):
    return TrainState.create(
        apply_fn=lambda p, x: p["w"] * x,
        params={"w": x},
        tx=optax.sgd(0.5, momentum=0.5),
    )


def trained(state, x):
    """One step of an optimizer that is a static part of the state."""
    gradients = jax.grad(lambda p: state.apply_fn(p, x).sum())(state.params)
    return state.apply_gradients(grads=gradients)


def make_twice(x, kind, n):
    """As `make`, of another revision."""
    return CLASSES[kind](2 * x, n)


class Mode(enum.Enum):
    TRAIN = "train"


def keyed(x):
    """A state with a typed random key."""
    return {"x": x, "key": jax.random.key(3)}


def drawn(state):
    key, used = jax.random.split(state["key"])
    return {"x": state["x"] + jax.random.normal(used, state["x"].shape), "key": key}


def keys(n):
    return jax.random.split(jax.random.key(1, impl="rbg"), n)


def normal(key):
    return jax.random.normal(key, (2,))


def frozen(x):
    return freeze({"a": {"b": x}, "c": 2 * x})


def is_frozen(value):
    return jnp.asarray(isinstance(value, FrozenDict)) * value["c"]


def network():
    return equinox.nn.MLP(2, 3, 4, 1, key=jax.random.key(1))


def applied(network, x):
    return network(x)


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


def split():
    return nnx.split(Linear(nnx.Rngs(0)))


def merged(graph, state, x):
    return nnx.merge(graph, state)(x)


def mixed(x):
    """A result with more than arrays in it."""
    return {"x": x, "mode": Mode.TRAIN, "text": "a", "dtype": x.dtype, "none": None}


def unmixed(value):
    is_right = value["mode"] is Mode.TRAIN and value["dtype"] == value["x"].dtype
    return value["x"] * is_right


def weighed(x, by, how):
    """Text and number may be of NumPy's or Python's subclasses."""
    return (x * by if how == "scaled" else x) / len(how)


def by_pair(values):
    return {key: 2 * value for key, value in values.items()}


@flax.struct.dataclass
class Partial:
    """A state with a field that is None, and one with text."""

    x: Any
    info: Any = None
    text: Any = "a"


def partial(x):
    return Partial(x)


def of_partial(state):
    return state.x * (state.info is None) * (state.text == "a")


def deep():
    """A module of more classes with static parts than one call's limit of old."""
    keys = jax.random.split(jax.random.key(0), 70)
    return [equinox.nn.Linear(i + 1, i + 2, key=key) for i, key in enumerate(keys)]


def through(layers, x):
    for layer in layers:
        x = layer(x)
    return x
