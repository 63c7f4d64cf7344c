"""The torch runtime: the only package of the worker that imports torch. Never imports jax.

`runtime` answers what `bridge_server.runtime` asks for, out of `models` (what may be served, taken
apart), `codes` (how it is called by many threads), `calls` (a model's call as a function of flat
arrays), `results` and `tracing` (what it returns and touches), `transforms` (its derivatives and
batches), `programs` (what runs), and of smaller things: `types`, `randomness`, `modes`, `graphs`
and `attention`.
"""

from bridge_server.torch_runtime.runtime import TorchRuntime

__all__ = ["TorchRuntime"]
