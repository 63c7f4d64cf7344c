"""Both frameworks in one process: array exchange, and torch code traced into JAX by torchax.

The first trace imports torchax and undoes the import's other changes of torch: a process without
traces stays unchanged, and torch.compile works in a process with traces.
"""

from bridge_server.torch_via_xla.arrays import to_jax, to_torch
from bridge_server.torch_via_xla.runtime import XlaRuntime
from bridge_server.torch_via_xla.tracing import (
    TracedFunction,
    TracedModule,
    trace_torch,
)

__all__ = [
    "TracedFunction",
    "TracedModule",
    "XlaRuntime",
    "to_jax",
    "to_torch",
    "trace_torch",
]
