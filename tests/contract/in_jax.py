"""The models of the runtimes' contract in JAX; runs in .venv-jax."""

import jax.numpy

from tests.contract.models import MODELS

globals().update({name: make(jax.numpy) for name, make in MODELS.items()})
