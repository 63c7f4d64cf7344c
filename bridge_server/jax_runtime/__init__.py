"""The JAX runtime: the only package of the worker that imports jax. Never imports torch.

`runtime` answers what `bridge_server.runtime` asks for, out of `models` (what may be served, taken
apart), `randomness` (the keys of its streams), `meshes` (several devices), `transforms`
(derivatives and batches of a call), `programs` (what was compiled) and `types`.
"""

from bridge_server.jax_runtime.runtime import JaxRuntime

__all__ = ["JaxRuntime"]
