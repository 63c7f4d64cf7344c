"""What both sides of the bridge agree on: types, trees, memory, frames and errors.

Never imports torch or jax.
"""

__version__ = "0.1.0"

# The versions of proto/bridge/v1 that this package speaks, oldest and newest.
PROTOCOLS = (1, 1)
