"""The benchmark behind the performance budget, run by `make bench`.

This file imports no framework: the worker imports bench.models without torch, and the client of
bench.soak runs without jax.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The MLP's shape, in both frameworks.
WIDTH = 64
LAYERS = 3
