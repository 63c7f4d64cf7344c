"""Tasks that call torch code from JAX under jit, forward and VJP, one per way.

Imports torch and jax.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from bench import LAYERS, ROOT, WIDTH, models, torch_models
from bridge_client import Session, spawn
from bridge_client.inproc import trace_torch
from bridge_client.jax import RemoteTorchFunction

_ELEMENTS = 256  # 1 KiB
_BATCH = 1024
_AGREEMENT = 1e-4


def worker() -> Session:
    """Return a session with a torch worker in .venv-torch."""
    return spawn(
        torch_model="bench.torch_models:sine",
        python=ROOT / ".venv-torch/bin/python",
        cwd=ROOT,
        require="memfd",
    )


def tasks(session: Session) -> Mapping[str, Callable[[], object]]:
    """Return each task by its name in `report.TASKS`.

    Raises:
      RuntimeError: two equivalent tasks disagree.
    """
    x, cotangent = (jax.random.normal(jax.random.key(i), (_ELEMENTS,)) for i in (0, 1))
    batch = jax.random.normal(jax.random.key(2), (_BATCH, WIDTH))
    # A module has `params`, a function has not.
    traced: Any = trace_torch(torch_models.mlp())
    made = {
        "torch worker": _compiled(RemoteTorchFunction(session), (x,), cotangent),
        "pure_callback": _compiled(_by_callback, (x,), cotangent),
        "traced": _compiled(traced, (traced.params, batch), batch),
        "in jax": _compiled(_handwritten, (_kernels(traced.params), batch), batch),
    }
    for one, other in (("torch worker", "pure_callback"), ("traced", "in jax")):
        for a, b in zip(made[one](), made[other](), strict=True):
            if not np.allclose(a, b, rtol=_AGREEMENT, atol=_AGREEMENT):
                raise RuntimeError(f"{one} disagrees with {other}")
    return made


def _compiled(
    f: Callable[..., Any], primals: tuple[Any, ...], cotangent: jax.Array
) -> Callable[[], Any]:
    """Return a task: the value and the gradient of the last argument, comparable for all ways."""

    @jax.jit
    def step(*primals: Any) -> tuple[jax.Array, Any]:
        value, pullback = jax.vjp(f, *primals)
        return value, *pullback(cotangent)

    def task() -> tuple[Any, Any]:
        value, *gradients = jax.block_until_ready(step(*primals))
        return value, gradients[-1]

    return task


# The same torch work in one process, as a callback of XLA -----------------------------------------


@jax.custom_vjp
def _by_callback(x: jax.Array) -> jax.Array:
    return jax.pure_callback(_forward, x, x)


def _forward(x: Any) -> np.ndarray:
    with torch.no_grad():
        return torch_models.sine(torch.from_numpy(np.array(x))).numpy()


def _backward(x: Any, cotangent: Any) -> np.ndarray:
    x = torch.from_numpy(np.array(x)).requires_grad_()
    (gradient,) = torch.autograd.grad(
        torch_models.sine(x), x, torch.from_numpy(np.array(cotangent))
    )
    return gradient.numpy()


_by_callback.defvjp(
    lambda x: (_by_callback(x), x),
    lambda x, cotangent: (jax.pure_callback(_backward, x, x, cotangent),),
)


# The network written in JAX -----------------------------------------------------------------------


def _kernels(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of the torch network in the form of models.mlp."""
    return {
        f"layer_{i}": {
            "kernel": jnp.asarray(params[f"{2 * i}.weight"]).T,
            "bias": params[f"{2 * i}.bias"],
        }
        for i in range(LAYERS)
    }


def _handwritten(params: Any, x: jax.Array) -> jax.Array:
    return models.mlp[0](params, x)
