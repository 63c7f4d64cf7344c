"""The JAX models that the tests' workers host; runs in .venv-jax.

Names served by every worker are in models.txt.
"""

import importlib
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp


def sine(x):
    """Twice the sine."""
    return jnp.sin(x) * 2


# Sessions and faults ------------------------------------------------------------------------------


def square(x):
    """The square: its residual is its input."""
    return x * x


def outer(x):
    """A large output from a small input."""
    return x[:, None] * x[None, :]


def total(x):
    """A small output from a large input."""
    return x.sum()


def refusing(x):
    """Raises while it is traced."""
    raise ValueError(f"no arrays of shape {x.shape} here")


def failing(x):
    """Raises while it runs."""
    return jax.pure_callback(_fail, x, x)


def gated(x, gate, when="forward"):
    """Twice the input; the forward or the backward pass waits until the file `gate` exists."""

    def held(value, phase):
        return (
            jax.pure_callback(lambda v: _pass(gate, v), value, value)
            if phase == when
            else value
        )

    @jax.custom_vjp
    def doubled(x):
        return held(x * 2, "forward")

    doubled.defvjp(
        lambda x: (doubled(x), None),
        lambda _, cotangent: (held(cotangent * 2, "backward"),),
    )
    return doubled(x)


def gated_outer(x, gate):
    """A large output, once the file `gate` exists."""
    return outer(gated(x, gate))


def gated_while_traced(x):
    """Twice the input; tracing waits until the file BRIDGE_TEST_GATE exists."""
    _pass(os.environ["BRIDGE_TEST_GATE"], x)
    return x * 2


@jax.custom_vjp
def wrong_vjp(x, y):
    """A product whose VJP forgets a factor of `y`."""
    return x * y


wrong_vjp.defvjp(
    lambda x, y: (x * y, (x, y)),
    lambda kept, cotangent: (cotangent, cotangent * kept[0]),
)


@jax.custom_jvp
def wrong_jvp(x):
    """A square whose JVP, and so its VJP, is that of half of it."""
    return x * x


wrong_jvp.defjvp(
    lambda primals, tangents: (wrong_jvp(*primals), primals[0] * tangents[0])
)


def square_factory():
    """Makes a model, for --factory."""
    return square


def documented(x, scale=2.0, *, mode="a"):
    """Scale an array.

    The rest is for --json.
    """
    return x * scale


def multiple_factory(factor, of=None):
    """Makes a model from arguments of JSON."""
    more = (of or {}).get("more", [0])[0]
    return lambda x: factor * x + 2 * more


def failing_factory():
    """Fails to make a model."""
    raise RuntimeError("the checkpoint is missing")


def _fail(value):
    raise ValueError(f"the value {value} is not to my taste")


def _pass(gate, value):
    """Say so beside the gate, and wait until it opens.

    Forgotten tests must not keep a worker for ever.
    """
    Path(f"{gate}.waiting").touch()
    deadline = time.monotonic() + 60
    while not os.path.exists(gate):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody opened {gate}")
        time.sleep(0.002)
    return value


# tests/client/torch_client ------------------------------------------------------------------------


def __getattr__(name):
    """Find the models of tests/client/torch_client, which only a worker that hosts them imports:
    flax takes a while."""
    # None has; but flax and equinox would be imported to find out.
    if name.endswith("_shardings"):
        raise AttributeError(name)
    for module in ("functions", "gradient_cases", "flax_models", "equinox_models"):
        found = importlib.import_module(f"tests.client.torch_client.{module}")
        if hasattr(found, name):
            return getattr(found, name)
    raise AttributeError(name)
