"""Functions that RemoteJaxFunction is tested with; run by the worker. No torch."""

import collections
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def identity(x):
    return x


def echo(*args, **kwargs):
    """Return all arguments in one structure."""
    return {"args": list(args), "kwargs": kwargs}


def product(x, y):
    return x * y


def cast(x, dtype):
    return x.astype(dtype)


def matmul(x, y):
    return x @ y


def weighted(batch, weights):
    """Of dicts: `batch["x"] @ weights["w"]`."""
    return batch["x"] @ weights["w"]


_programs = 0


def program_number(x, scale):
    """Also return how many programs had been made of this function when this one was: two calls
    of one agree."""
    global _programs
    _programs += 1
    return x * scale, _programs


def power(x, exponent):
    """The exponent must be static: Python counts with it."""
    result = jnp.ones_like(x)
    for _ in range(exponent):
        result = result * x
    return result


def halved(x):
    """The mean of each pair of rows; of an odd number, all but the last."""
    half = x.shape[0] // 2
    return (x[: 2 * half : 2] + x[1::2][:half]) / 2


def long_or_short(x):
    """Python branches on a size."""
    return x * 2 if x.shape[0] > 4 else x


def branch(x, flag, mode=None):
    """Python branches on the flag and on the mode."""
    scaled = x * 2 if flag else x
    return {None: scaled, "negate": -scaled, "shift": scaled + 1}[mode]


def doubled_until_ten(x):
    """The input times that power of two which makes its sum ten or more: no reverse mode."""
    return jax.lax.while_loop(lambda y: y.sum() < 10, lambda y: y * 2, x)


def windowed(x):
    """Sums of windows: no reverse rule, since the sums start at one."""
    return jax.lax.reduce_window(
        x, jnp.ones((), x.dtype), jax.lax.add, (2,), (1,), "VALID"
    )


def next_after(x):
    """The floats above: no derivative in either mode."""
    return jnp.nextafter(x, x + 1)


@jax.custom_jvp
def forward_only(x):
    """The input; its tangent goes through a loop that cannot be transposed."""
    return x


@forward_only.defjvp
def _forward_only_jvp(primals, tangents):
    return primals[0], jax.lax.while_loop(
        lambda t: t.sum() < 10, lambda t: t * 2, tangents[0]
    )


def sine_and_square(x):
    return jnp.sin(x), x**2


# Classes ------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    mean: Any
    variance: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Report:
    moments: Moments
    extra: dict[str, Any]
    total: Any


@jax.tree_util.register_pytree_with_keys_class
class Interval:
    """A pytree node of the model's own making."""

    def __init__(self, low, high):
        self.low, self.high = low, high

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return ((key("low"), self.low), (key("high"), self.high)), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def moments(x):
    return Moments(x.mean(), x.var())


def report(x):
    return Report(
        moments(x),
        {"none": None, "pair": (x, [x * 2]), "empty": {}, "text": "fine"},
        x.sum(),
    )


def interval(x):
    return Interval(x.min(), x.max())


def spread(value):
    """Of what `moments` and `report` returned, as the very classes."""
    if isinstance(value, Report):
        value = value.moments
    if not isinstance(value, Moments):
        raise TypeError(f"spread of a {type(value)}")
    return jnp.sqrt(value.variance) / value.mean


# Counting -----------------------------------------------------------------------------------------

_tally: collections.Counter[str] = collections.Counter()


def _bump(key, value):
    _tally[key] += 1
    return np.asarray(value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def counted(key, x):
    """x, whose VJP is counted under the key each time it is computed."""
    return x


def _counted_backward(key, _, cotangent):
    shape = jax.ShapeDtypeStruct(cotangent.shape, cotangent.dtype)
    return (jax.pure_callback(functools.partial(_bump, key), shape, cotangent),)


counted.defvjp(lambda key, x: (x, None), _counted_backward)


def tally(key, _):
    """Return how often what is counted under the key was computed so far.

    The argument makes it no constant.
    """
    return jax.pure_callback(
        lambda _: np.int32(_tally[key]), jax.ShapeDtypeStruct((), jnp.int32), _
    )


def counted_inputs(x, y):
    return jnp.sin(counted("x", x)) * 2 + jnp.cos(counted("y", y))


def counted_outputs(x):
    """Of two branches of what jax transposes even for cotangents known to be zero: custom_vjp,
    and scan."""

    def branch(key, f):
        return jax.lax.scan(
            lambda carry, _: (f(carry), None), counted(key, x), None, length=2
        )[0]

    return branch("first", jnp.sin), branch("second", jnp.cos)


def _counted_affine(params, x):
    return x @ counted("weight", params["weight"]) + counted("bias", params["bias"])


counted_affine = (
    _counted_affine,
    {"weight": np.ones((3, 2), np.float32), "bias": np.zeros(2, np.float32)},
)

# Failing ------------------------------------------------------------------------------------------


def raises_at_trace(x):
    raise ValueError("this model dislikes every input")


def _refuse_negative(x):
    if (np.asarray(x) < 0).any():
        raise ArithmeticError("this model dislikes negative numbers")
    return np.asarray(x)


def _checked(x):
    return jax.pure_callback(
        _refuse_negative, jax.ShapeDtypeStruct(x.shape, x.dtype), x
    )


@jax.custom_vjp
def raises_below_zero(x):
    """Twice x; raises at run time where x is negative, and in the VJP where the cotangent is."""
    return _checked(x) * 2


raises_below_zero.defvjp(
    lambda x: (raises_below_zero(x), None), lambda _, ct: (_checked(ct) * 2,)
)

# Parameters ---------------------------------------------------------------------------------------


def affine_weights(n=3, m=2, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        "weight": rng.normal(size=(n, m)).astype(dtype),
        "bias": rng.normal(size=m).astype(dtype),
    }


def _affine(params, x):
    """An affine map."""
    return x @ params["weight"] + params["bias"]


def _tied(params, x):
    """An autoencoder whose decoder is its encoder transposed."""
    return jnp.tanh(x @ params["weight"] + params["bias"]) @ params["weight"].T


affine = (_affine, affine_weights())
tied = (_tied, affine_weights())
