"""brax's inverted pendulum, for the worker of examples/pendulum.py. Needs brax."""

from typing import Any

import brax.envs
import jax

_env = brax.envs.get_environment("inverted_pendulum", backend="positional")


def reset(seed: Any) -> Any:
    """Return the state at the beginning of an episode."""
    return _env.reset(jax.random.key(seed))


def step(state: Any, action: Any) -> Any:
    """Return the next state: brax's class, with its observation `obs`."""
    return _env.step(state, action)
