"""What needs both frameworks in one process: arrays handed over, and torch code traced into JAX by
torchax.

torchax is imported when something is first traced, and what it does to torch besides is undone: a
process that traces nothing notices nothing, and torch.compile works on in one that does.
"""

from bridge_server.torch_via_xla.arrays import to_jax, to_torch
from bridge_server.torch_via_xla.runtime import XlaRuntime
from bridge_server.torch_via_xla.tracing import TracedFunction, TracedModule, trace_torch

__all__ = ["TracedFunction", "TracedModule", "XlaRuntime", "to_jax", "to_torch", "trace_torch"]
