"""The JAX models of workers whose GPU is none: they run on the host, whose memory the GPU's is.

Runs in .venv-jax.
"""

import threading
import time

import fake_cuda
import jax
import jax.numpy as jnp
import numpy as np

from bridge_server.jax_runtime import JaxRuntime
from bridge_server.serving import conversation
from bridge_server.turns import Turn
from bridge_wire.memory.cuda import gpus

JaxRuntime.gpu = lambda self: gpus()[0]
conversation.STUCK_S = 0.5  # no test waits for longer


def sine(x):
    """Twice the sine."""
    return jnp.sin(x) * 2


def scaled(x, y, by=1.0):
    """A product that needs all of its inputs, also the number."""
    return x * y * by


def refusing(x):
    """Raises while it runs."""

    def refuse(_):
        raise ValueError("not today")

    return jax.pure_callback(refuse, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


_is_late = False


def late(x):
    """The input plus one, which is on its way to the client until the file beside this machine's
    memory exists."""

    def delay(value):
        global _is_late
        _is_late = True
        return value

    return jax.pure_callback(delay, jax.ShapeDtypeStruct(x.shape, x.dtype), x) + 1


def _copy_late(self, target, source, nbytes, *owners):
    global _is_late
    if _is_late:
        threading.Thread(
            target=_release, args=(fake_cuda.hold(self.stream),), daemon=True
        ).start()
        _is_late = False
    _copy(self, target, source, nbytes, *owners)


def _release(held):
    _wait_for_gate()
    held.set()


def _wait_for_gate():
    while not (fake_cuda.directory().parent / "gate").exists():
        time.sleep(0.01)


_copy, Turn.copy = Turn.copy, _copy_late


def gated(x):
    """The input, once the file beside this machine's memory exists."""

    def wait(value):
        _wait_for_gate()
        return value

    return jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def _affine(params, x):
    return (x @ params["kernel"] + params["bias"]).sum(-1)


# A pair (apply, params).
trained = (
    _affine,
    {"kernel": np.ones((3, 2), np.float32), "bias": np.zeros(2, np.float32)},
)
