"""Both frameworks in one process: the only client package that may import both frameworks and
`bridge_server`."""

from bridge_client.inproc.session import host
from bridge_server.torch_via_xla import to_jax, to_torch, trace_torch

__all__ = ["host", "to_jax", "to_torch", "trace_torch"]
