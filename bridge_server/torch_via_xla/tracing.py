"""Torch functions and modules as pure functions of JAX arrays. Imports both frameworks."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import torch
from torch import Tensor, nn
from torch.func import functional_call

from bridge_server.torch_runtime.attention import simple_attention
from bridge_server.torch_runtime.python_state import PythonState
from bridge_server.torch_via_xla.arrays import to_jax
from bridge_server.torch_via_xla.environment import environment
from bridge_wire.errors import CallerError, StructureError


def trace_torch(target: nn.Module | Callable[..., Any]) -> "TracedModule | TracedFunction":
    """Return torch code as a pure function of JAX arrays: for jit, vmap, grad, any of JAX's
    devices.

    Of a module it takes the parameters first: see TracedModule. Tensors that the code holds in
    other ways, as attributes or in closures, are constants.

    Raises:
      CallerError: torchax is not installed.
      StructureError: the target is neither a module nor callable.
      DTypeError: the module has 64-bit floats, but JAX runs without x64.
    """
    if isinstance(target, nn.Module):
        return TracedModule(target)
    if not callable(target):
        raise StructureError(
            f"a {type(target).__qualname__} is no torch code; expected an nn.Module or a function"
        )
    return TracedFunction(target)


class TracedFunction:
    """A torch function of tensors as a function of arrays.

    Numbers, strings and None are passed on as they are.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        environment()
        functools.update_wrapper(self, function, updated=())
        self._function = function

    def __call__(self, *args: Any, rng: jax.Array | None = None, **kwargs: Any) -> Any:
        """Call the function; `rng` is the key of what it draws at random."""
        with _tracing(rng) as env:
            return _called(env, self._function, args, kwargs)


class TracedModule:
    """A torch module as a function of its parameters and of arrays, `h(h.params, x)`.

    The module's mode, train or eval, is the one it has when the function is traced.

    Attributes:
      params: arrays named as in `named_parameters()`, copied. Tied ones have one name, and stay
        tied.
      buffers: likewise of `named_buffers()`.
    """

    def __init__(self, module: nn.Module) -> None:
        environment()
        self.module = module
        self._whole = _Whole(module)
        with torch.no_grad():
            self.params: dict[str, jax.Array] = to_jax(dict(module.named_parameters()), copy=True)
            self.buffers: dict[str, jax.Array] = to_jax(dict(module.named_buffers()), copy=True)

    def __call__(
        self,
        params: Mapping[str, Any],
        *args: Any,
        buffers: Mapping[str, Any] = MappingProxyType({}),
        mutable: bool = False,
        rng: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the module.

        Args:
          params: arrays by name; those left out are the module's.
          buffers: likewise.
          mutable: also return the buffers after the call, such as BatchNorm's statistics: `(result,
            buffers)`.
          rng: the key of what the module draws at random.
        Raises:
          CallerError: a name that the module does not have, or random numbers were drawn without
            `rng`.
          DTypeError: the code computes in 64 bits, but JAX runs without x64.
        """
        state = {
            **_checked("params", params, self.params),
            **_checked("buffers", buffers, self.buffers),
        }
        before = PythonState(self.module)
        with _tracing(rng) as env:
            try:
                result, after = _called(
                    env, functools.partial(self._call, env), (state, *args), kwargs
                )
            finally:
                before.restore()
        return (
            (result, {name: jax.lax.stop_gradient(after[name]) for name in self.buffers})
            if mutable
            else result
        )

    apply = __call__

    def _call(self, env: Any, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        for name, original in {
            **dict(self.module.named_parameters()),
            **dict(self.module.named_buffers()),
        }.items():
            env.param.stand_in(original, state[name])
        named = {f"module.{name}": tensor for name, tensor in state.items()}
        return functional_call(self._whole, named, args, kwargs)


class _Whole(nn.Module):
    """A module whose result comes with its buffers, as they are after the call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        return self.module(*args, **kwargs), dict(self.module.named_buffers())


def _checked(what: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := given.keys() - own.keys():
        raise CallerError(f"the module has no {what} named {sorted(unknown)}; it has {sorted(own)}")
    return {**own, **given}


def _called(env: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call torch code with arrays, and return arrays.

    No traced tensor is left in the caller's variables.
    """
    args, kwargs = env.wrapped((args, kwargs))
    return env.unwrapped(function(*args, **kwargs))


@contextlib.contextmanager
def _tracing(rng: jax.Array | None) -> Iterator[Any]:
    env = environment()
    # Fused attention computes on the memory that these tensors do not have.
    with simple_attention, env.within(rng):
        yield env
