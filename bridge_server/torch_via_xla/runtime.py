"""XlaRuntime: XLA runs torch models. Imports both frameworks."""

from typing import Any

from bridge_server.jax_runtime import JaxRuntime
from bridge_server.runtime import Model
from bridge_server.torch_via_xla.tracing import trace_torch


class XlaRuntime(JaxRuntime):
    """Serves torch models as JAX models: traced into JAX and compiled once per signature."""

    def adapt(self, name: str, target: Any) -> Model:
        return super().adapt(name, trace_torch(target))
