"""gymnax's CartPole, for the worker of examples/cartpole.py. Needs gymnax."""

from typing import Any

import gymnax
import jax

_env, _parameters = gymnax.make("CartPole-v1")


def keys(seed: Any, count: int) -> Any:
    """Return `count` random keys."""
    return jax.random.split(jax.random.key(seed), count)


def reset(key: Any) -> Any:
    """Return the first observation and the state of an episode."""
    return _env.reset(key, _parameters)


def step(key: Any, state: Any, action: Any) -> Any:
    """Return the next key, observation and state, the reward, and whether the episode is over."""
    key, used = jax.random.split(key)
    observation, state, reward, done, *_ = _env.step(used, state, action, _parameters)
    return key, observation, state, reward, done
