"""Shared code of both sides of the bridge: types, trees, memory, frames, errors.

Never imports torch or jax.
"""

__version__ = "0.1.0"

# Oldest and newest supported version of proto/bridge/v1.
PROTOCOLS = (1, 1)
