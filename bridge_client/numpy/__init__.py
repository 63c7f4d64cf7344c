"""Remote functions on NumPy arrays. Imports NumPy, and neither torch nor jax.

Inputs are written into memory that both processes map. Each result is an array over such memory,
which returns to the pool when the array and its last view have died.
"""

from bridge_client.numpy.function import RemoteFunction
from bridge_client.numpy.memory import empty

__all__ = ["RemoteFunction", "empty"]
