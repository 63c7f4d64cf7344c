"""Remote torch functions as JAX functions. The only client package that imports jax; it never
imports torch.

A call is a primitive of this package. Outside compiled code it runs at once, on arrays that lie in
the session's memory or are copied there, and its results are arrays over blocks. Compiled code
calls back: inputs are copied once into blocks, outputs once into XLA's buffers. Every
transformation of a call is a call of another program.
"""

from bridge_client.jax.function import RemoteTorchFunction

__all__ = ["RemoteTorchFunction"]
