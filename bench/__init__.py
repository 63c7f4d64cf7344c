"""The benchmark behind the performance budget; `make bench` runs it. This file imports no
framework: the worker, which has no torch, imports bench.models, and the client of bench.soak has no
jax.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Of the MLP, in either framework.
WIDTH = 64
LAYERS = 3
