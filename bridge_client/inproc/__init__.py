"""Both frameworks in one process: the only client package that may import both, and `bridge_server`."""

from bridge_client.inproc.arrays import to_jax, to_torch

__all__ = ["to_jax", "to_torch"]
