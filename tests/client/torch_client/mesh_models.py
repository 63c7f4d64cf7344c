"""Models for several devices; run by the worker. No torch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P


def _dense(params, x):
    """A layer; says at compile time how its arrays lie."""
    jax.debug.inspect_array_sharding(
        params["kernel"],
        callback=lambda s: print("kernel:", s.shard_shape(params["kernel"].shape)),
    )
    jax.debug.inspect_array_sharding(
        x, callback=lambda s: print("x:", s.shard_shape(x.shape))
    )
    return jnp.tanh(x @ params["kernel"] + params["bias"])


_rng = np.random.default_rng(40)
dense = (
    _dense,
    {
        "kernel": _rng.normal(size=(4, 6)).astype(np.float32),
        "bias": _rng.normal(size=6).astype("float32"),
    },
)
dense_shardings = {"args[0]": P("data"), "kernel": P(None, "model"), "*": P("model")}


def where(x):
    """The number of the device that computes each element."""

    def number(x: Any) -> Any:
        return jnp.zeros_like(x) + 2 * lax.axis_index("data") + lax.axis_index("model")

    return jax.shard_map(
        number, in_specs=P("data", "model"), out_specs=P("data", "model")
    )(x)


def constrained(x, y):
    """A model that names the mesh's axes itself; its second argument is a number."""
    return lax.with_sharding_constraint(jnp.sin(x), P("data", None)) * y


misspelt = dense
misspelt_shardings = {"krenel": P("model")}
