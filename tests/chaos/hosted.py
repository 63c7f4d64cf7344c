"""The models of the chaos suite, as text: a restart with another model changes the factor.

A gate is a file; a run waits while the file is there, and makes the file `NAME.reached` first.
"""

_SOURCE = '''
import itertools
import os
import time
from pathlib import Path

import jax
import numpy as np

from bridge_server.serving import run_queue

# A full queue stays full: its runs wait at gates for long, but not for each other.
run_queue._STANDSTILL_TICKS = float("inf")

FACTOR = {factor}
HERE = Path(__file__).parent
_CROWD = itertools.count()


def _wait(name):
    gate = HERE / name
    if gate.exists():
        mark = f"{{next(_CROWD)}}.crowded" if name == "crowd" else f"{{name}}.reached"
        (HERE / mark).touch()
        while gate.exists():
            time.sleep(0.01)
    return np.float32(1)


def _waited(name, x):
    """One, after a wait at a gate."""
    one = jax.ShapeDtypeStruct((), np.float32)
    return jax.pure_callback(lambda _: _wait(name), one, x[0])


@jax.custom_vjp
def gated(x):
    return FACTOR * x * x * _waited("forward", x)


gated.defvjp(
    lambda x: (gated(x), x),
    lambda x, g: (2 * FACTOR * x * g * _waited("backward", g),),
)


def plain(x):
    return FACTOR * x


@jax.custom_vjp
def squared(x):
    return FACTOR * x * x


# One residual, of the size of the input.
squared.defvjp(lambda x: (squared(x), x), lambda x, g: (2 * FACTOR * x * g,))


def crowded(x):
    return FACTOR * x * _waited("crowd", x)
'''
NAMES = ("gated", "plain", "squared", "crowded")
MODULE = "chaos_models"


def source(factor: float) -> str:
    """Return the module of the models with this factor."""
    return _SOURCE.format(factor=factor)
