"""Torch functions and modules as pure functions of JAX arrays. Imports both frameworks."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from bridge_server.signatures import bound_method
from bridge_server.torch_runtime.attention import simple_attention
from bridge_server.torch_runtime.python_state import PythonState
from bridge_server.torch_via_xla.arrays import to_jax
from bridge_server.torch_via_xla.environment import environment
from bridge_wire.errors import CallerError, StructureError


def trace_torch(
    target: nn.Module | Callable[..., Any],
) -> "TracedModule | TracedFunction":
    """Return torch code as a pure function of JAX arrays, for jit, vmap, grad, and any device.

    For a module, the function's first argument is the parameters: see TracedModule. Other tensors
    in the code, as attributes or in closures, are constants.

    A bound method of a module has the module's parameters.

    Raises:
      CallerError: torchax is not installed.
      StructureError: the target is neither a module nor callable.
      DTypeError: the module has 64-bit floats, but JAX runs without x64.
    """
    if isinstance(target, nn.Module):
        return TracedModule(target)
    binding = bound_method(target, [nn.Module])
    if binding is not None:
        module, name = binding
        return TracedModule(module).method(name)
    if not callable(target):
        raise StructureError(
            f"trace_torch got a {type(target).__qualname__}; expected an nn.Module or a function"
        )
    return TracedFunction(target)


class TracedFunction:
    """A torch function of tensors as a function of arrays.

    Numbers, strings and None pass unchanged.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        environment()
        functools.update_wrapper(self, function, updated=())
        self._function = function

    def __call__(self, *args: Any, rng: jax.Array | None = None, **kwargs: Any) -> Any:
        """Call the function; `rng` is the key of its random numbers."""
        with _tracing(rng) as env:
            return _called(env, self._function, args, kwargs)


class TracedModule:
    """A torch module as a function of its parameters and of arrays, `h(h.params, x)`.

    The module's mode, train or eval, is read when the function is traced.

    Attributes:
      params: copies of the parameters, named as in `named_parameters()`. Tied parameters have one
        name, and stay tied.
      buffers: copies of the buffers, named as in `named_buffers()`.
    """

    def __init__(self, module: nn.Module) -> None:
        environment()
        self.module = module
        self._with_buffers = _WithBuffers(module, module)
        with torch.no_grad():
            self.params: dict[str, jax.Array] = to_jax(
                dict(module.named_parameters()), copy=True
            )
            self.buffers: dict[str, jax.Array] = to_jax(
                dict(module.named_buffers()), copy=True
            )

    @property
    def function(self) -> Callable[..., Any]:
        """The module's method that is called, by default `forward`."""
        function = self._with_buffers.function
        return self.module.forward if function is self.module else function

    def method(self, name: str) -> "TracedModule":
        """Return a method of the module as a function of the same parameters.

        Raises:
          CallerError: the module has no such method.
        """
        module = self.module
        function = getattr(type(module), name, None)
        if not callable(function) or isinstance(function, type):
            raise CallerError(
                f"a {type(module).__qualname__} has no method {name!r}; name a method of its class"
            )
        is_whole = name in ("__call__", "forward")
        traced = copy.copy(self)
        traced._with_buffers = _WithBuffers(
            module, module if is_whole else getattr(module, name)
        )
        return traced

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
          params: arrays by name; missing names keep the module's values.
          buffers: as params.
          mutable: return `(result, buffers)` with the buffers after the call, such as BatchNorm's
            statistics.
          rng: the key of the module's random numbers.
        Raises:
          CallerError: the module has no such name, or draws random numbers without `rng`.
          DTypeError: the code computes in 64 bits, but JAX runs without x64.
        """
        state = _merged("params", params, self.params) | _merged(
            "buffers", buffers, self.buffers
        )
        before = PythonState(self.module)
        with _tracing(rng) as env:
            call = functools.partial(self._call, env)
            try:
                result, after = _called(env, call, (state, *args), kwargs)
            finally:
                before.restore()
        if not mutable:
            return result
        return result, {
            name: jax.lax.stop_gradient(after[name]) for name in self.buffers
        }

    apply = __call__

    def _call(
        self, env: Any, state: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        originals = (*self.module.named_parameters(), *self.module.named_buffers())
        for name, original in originals:
            env.param.stand_in(original, state[name])
        tensors = {f"module.{name}": tensor for name, tensor in state.items()}
        return functional_call(self._with_buffers, tensors, args, kwargs)


class _WithBuffers(nn.Module):
    """A module, or a method of it, that also returns its buffers after the call."""

    function: Callable[..., Any]

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.__dict__["function"] = function  # not as a second submodule

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        return self.function(*args, **kwargs), dict(self.module.named_buffers())


def _merged(
    kind: str, passed: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    if unknown := passed.keys() - own.keys():
        raise CallerError(
            f"the module has no {kind} named {sorted(unknown)}; it has {sorted(own)}"
        )
    return {**own, **passed}


def _called(env: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call torch code with arrays, and return arrays.

    The caller's variables never hold a traced tensor.
    """
    args, kwargs = env.wrapped((args, kwargs))
    result = env.unwrapped(function(*args, **kwargs))
    if not any(map(_tensors_of, pytree.tree_leaves(result))):
        return result
    # What torch's pytrees do not know, jax's may.
    leaves, structure = jax.tree.flatten(result)
    return jax.tree.unflatten(structure, [_array_of(env, leaf) for leaf in leaves])


def _tensors_of(leaf: Any) -> list[Tensor]:
    """Return the tensors in an object: itself, or its attributes."""
    parts = (leaf, getattr(leaf, "__dict__", None))
    return [each for each in pytree.tree_leaves(parts) if isinstance(each, Tensor)]


def _array_of(env: Any, leaf: Any) -> Any:
    if isinstance(leaf, Tensor) or not _tensors_of(leaf):
        return env.unwrapped(leaf)
    raise CallerError(
        f"the torch code returns a {type(leaf).__module__}.{type(leaf).__qualname__}, which is no"
        " pytree node for jax; register it, as by jax.tree_util.register_dataclass, or return a"
        " dict or a namedtuple"
    )


@contextlib.contextmanager
def _tracing(rng: jax.Array | None) -> Iterator[Any]:
    env = environment()
    # Fused attention needs memory, which traced tensors do not have.
    with simple_attention, env.within(rng):
        yield env
