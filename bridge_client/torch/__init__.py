"""Remote JAX functions as torch modules. The only client package that imports torch; it never
imports jax.

A call's tensors are placed in the session's memory, or passed as they are if they lie there
already. The worker writes the outputs into blocks, and each output tensor's storage is its block. A
forward under grad keeps a residual on the worker. The autograd node holds it through a saved
tensor, so that the residual is dropped exactly when torch releases the node's saved tensors.
"""

from bridge_client.futures import gather
from bridge_client.torch.decorators import remote
from bridge_client.torch.function import RemoteJaxFunction
from bridge_client.torch.gpu import allocate_in

__all__ = ["RemoteJaxFunction", "allocate_in", "gather", "remote"]
