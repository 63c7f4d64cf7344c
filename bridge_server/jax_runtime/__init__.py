"""The JAX runtime: the only package of the worker that imports jax. Never imports torch.

`runtime` implements `bridge_server.runtime` with `models` (targets, split into function and state),
`randomness` (keys of random streams), `meshes` (several devices), `transforms` (derivatives and
batches of a call), `programs` (compiled programs) and `types`.
"""

from bridge_server.jax_runtime.runtime import JaxRuntime

__all__ = ["JaxRuntime"]
