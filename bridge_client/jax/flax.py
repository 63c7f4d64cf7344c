"""A remote torch module as a layer of a Flax model: for flax.linen and for flax.nnx."""

import functools
from typing import Any

import flax.linen as linen
import jax
from flax import nnx

from bridge_client.jax.function import RemoteTorchFunction


class LinenModule(linen.Module):
    """A remote torch module as a flax.linen module.

    Its parameters begin as the worker's and have the same names, in the collection `params`. Its
    buffers are in `batch_stats`, and follow the model's if that collection is mutable. Random
    numbers come from the stream `rng`, if the caller passes one.

    Attributes:
      function: the remote module.
      rng: the stream's name.
    """

    function: RemoteTorchFunction
    rng: str = "dropout"

    @linen.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        params = {
            name: self.param(name, lambda _, value=value: value)
            for name, value in self.function.params.items()
        }
        buffers = {
            name: self.variable("batch_stats", name, lambda value=value: value)
            for name, value in self.function.buffers.items()
        }
        result, changed = _applied(
            self.function,
            params,
            {name: variable.value for name, variable in buffers.items()},
            self.make_rng(self.rng) if self.has_rng(self.rng) else None,
            self.is_mutable_collection("batch_stats") and not self.is_initializing(),
            args,
            kwargs,
        )
        for name, value in changed.items():
            buffers[name].value = value
        return result


class NnxModule(nnx.Module):
    """A remote torch module as a flax.nnx module.

    Its parameters are nnx.Params and its buffers nnx.BatchStats, each under its name in the model;
    they begin as the worker's. Buffers follow the model's in each call while `train()` is on, and
    stay under `eval()`. Random numbers come from the stream of `rngs` named `rng`, if it is given.
    """

    def __init__(
        self,
        function: RemoteTorchFunction,
        *,
        rngs: nnx.Rngs | None = None,
        rng: str = "dropout",
    ) -> None:
        params, buffers = function.params.items(), function.buffers.items()
        self.params = nnx.Dict({name: nnx.Param(value) for name, value in params})
        self.buffers = nnx.Dict({name: nnx.BatchStat(value) for name, value in buffers})
        self.rngs = rngs
        self.use_running_average = False
        self._function = function
        self._rng = rng

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = self.rngs[self._rng]() if self.rngs is not None else None
        result, changed = _applied(
            self._function,
            {name: variable[...] for name, variable in self.params.items()},
            {name: variable[...] for name, variable in self.buffers.items()},
            key,
            not self.use_running_average,
            args,
            kwargs,
        )
        for name, value in changed.items():
            self.buffers[name][...] = value
        return result


def _applied(
    function: RemoteTorchFunction,
    params: dict[str, Any],
    buffers: dict[str, Any],
    rng: Any,
    is_mutable: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, jax.Array]]:
    """Call the function; return its result and the buffers' new values, if there are buffers that
    may change."""
    apply = functools.partial(function.apply, params, buffers=buffers, rng=rng)
    if not is_mutable or not buffers:
        return apply(*args, **kwargs), {}
    result, new_buffers = apply(*args, mutable=True, **kwargs)
    return result, new_buffers
