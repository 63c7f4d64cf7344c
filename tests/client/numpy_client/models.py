"""The JAX models of these tests; the worker imports them from this file."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


def rosenbrock(x, a=1.0, b=100.0):
    """A scalar with a curved valley."""
    return jnp.sum(b * (x[1:] - x[:-1] ** 2) ** 2 + (a - x[:-1]) ** 2)


def damped(x, w):
    """Two results of different types."""
    y = jnp.exp(-x) * w
    return {"y": y, "count": jnp.sum(x > 0)}


def loss(parameters, batch):
    """A scalar of two pytrees."""
    prediction = batch["x"] @ parameters["w"] + parameters["b"][0]
    return jnp.mean((prediction - batch["y"]) ** 2)


def echo(*args, **kwargs):
    """Return all arguments."""
    return {"args": list(args), "kwargs": kwargs}


def power(x, exponent):
    """The exponent is static."""
    for _ in range(exponent - 1):
        x = x * x
    return x


def tripled(x):
    """Three times the input."""
    return 3 * x


class State(NamedTuple):
    """A step's state."""

    position: jax.Array
    steps: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Report:
    """A state in a dataclass, with a static part."""

    state: State
    energy: jax.Array


def started(x):
    return Report(State(x, jnp.zeros((), jnp.int32)), jnp.sum(x**2))


def stepped(report, dt):
    """Take one step; the argument must be a Report."""
    if not isinstance(report, Report):
        raise TypeError(f"a {type(report).__name__} is no Report")
    state = State(report.state.position * (1 - dt), report.state.steps + 1)
    return Report(state, jnp.sum(state.position**2))


def cast(x, dtype):
    """Return the input in another dtype."""
    return x.astype(dtype)


def split(x):
    """The real and the imaginary part's squares, as one real scalar."""
    return jnp.sum(x.real**2 + 3 * x.imag**2)


_PARAMETERS = {"weight": jnp.full((3, 2), 0.5), "bias": jnp.ones(2)}
affine = (lambda p, x: x @ p["weight"] + p["bias"]), _PARAMETERS
affine_loss = (
    (lambda p, x: jnp.sum((x @ p["weight"] + p["bias"]) ** 2)),
    _PARAMETERS,
)
