"""The JAX models, hosted by the worker and run in one process by the baseline.

Never imports torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import LAYERS, WIDTH


def affine(x: jax.Array) -> jax.Array:
    """Hardly any work and no residual, so that the transport is measured."""
    return 2 * x + 1


def sine(x: jax.Array) -> jax.Array:
    """Has a residual as large as the input."""
    return jnp.sin(x) * 2


@jax.tree_util.register_dataclass
@dataclass
class State:
    """A simulator's state: its arrays, and a static part."""

    arrays: tuple[jax.Array, ...]
    version: int = field(metadata={"static": True}, default=1)


def reset(x: jax.Array) -> State:
    """A state of 20 arrays."""
    return State(reset_tuple(x))


def step(state: State) -> State:
    """The next state."""
    return State(step_tuple(state.arrays), state.version)


def reset_tuple(x: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays of a state."""
    return tuple(x + i for i in range(20))


def step_tuple(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The arrays of the next state."""
    return tuple(array * 0.5 for array in arrays)


def _apply_mlp(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Three layers of one width, with ReLU in between."""
    for i in range(LAYERS):
        layer = params[f"layer_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i < LAYERS - 1 else x
    return x


def _make_params() -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, WIDTH**-0.5, shape), jnp.float32)

    return {
        f"layer_{i}": {"bias": normal(WIDTH), "kernel": normal(WIDTH, WIDTH)}
        for i in range(LAYERS)
    }


mlp = (_apply_mlp, _make_params())


def flat(name: str) -> tuple[Callable[..., Any], list[jax.Array]]:
    """Return a model as a jitted function of (x, *parameters), and its parameters by path order."""
    model = globals()[name]
    if callable(model):
        return jax.jit(model), []
    apply, params = model
    leaves, structure = jax.tree.flatten(params)
    return jax.jit(
        lambda x, *leaves: apply(jax.tree.unflatten(structure, leaves), x)
    ), leaves
