"""The torch runtime: the only package of the worker that imports torch. Never imports jax.

`runtime` implements `bridge_server.runtime` with `models` (targets, split into code and state),
`callables` (code, called by many threads), `calls` (a model's call as a function of flat arrays),
`results` and `tracing` (the structure of results, the effects of calls), `transforms` (derivatives
and batches), `programs` (the code that runs), and `types`, `randomness`, `modes`, `graphs` and
`attention`.
"""

from bridge_server.torch_runtime.runtime import TorchRuntime

__all__ = ["TorchRuntime"]
