"""Both frameworks in one process: the only client package that may import both, and `bridge_server`."""

from bridge_client.inproc.arrays import to_jax, to_torch
from bridge_client.inproc.session import host

__all__ = ["host", "to_jax", "to_torch"]
