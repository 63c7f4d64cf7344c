"""autograd.Functions in traced code: their backward passes are custom derivatives of JAX."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from bridge_wire.errors import CallerError

_plain_apply = Function.__dict__["apply"]


def take_over(apply: Callable[..., Any]) -> Callable[[], None]:
    """Have `SomeFunction.apply(*args, **kwargs)` call `apply(SomeFunction, args, kwargs)`, in every
    thread. Return what ends that.
    """

    def give_back() -> None:
        Function.apply = _plain_apply  # type: ignore[method-assign]

    Function.apply = classmethod(lambda cls, *args, **kwargs: apply(cls, args, kwargs))  # type: ignore
    return give_back


def apply_plainly(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Apply an autograd.Function as torch does."""
    return _plain_apply.__get__(None, function)(*args, **kwargs)


def applied(env: Any, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Apply an autograd.Function to arguments of which some are traced tensors of the
    environment."""
    if function is CheckpointFunction:  # XLA decides itself what is computed again
        return args[0](*args[2:])
    has_setup = function.setup_context is not Function.setup_context
    if has_setup:
        bound = inspect.signature(function.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        args, kwargs = bound.args, bound.kwargs
    positions = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
    others = _without_tensors(args)
    arrays = env.unwrapped([args[i] for i in positions])
    dtypes = [x.dtype for x in arrays]
    left: dict[
        str, Any
    ] = {}  # by the latest trace of the forward pass, which the backward pass is never older than

    def traced_forward(arrays: Sequence[jax.Array]) -> tuple[list[Any], list[Any]]:
        given = _filled(env, others, arrays)
        context = _Context([isinstance(x, Tensor) and x.is_floating_point() for x in given])
        output = function.forward(*([] if has_setup else [context]), *given, **kwargs)
        if has_setup:
            function.setup_context(context, tuple(given), output)
        outputs, left["result"] = pytree.tree_flatten(output)
        kept, left["structure"] = pytree.tree_flatten(context.__dict__)
        left["outputs"], left["kept"] = _without_tensors(outputs), _without_tensors(kept)
        return _arrays_in(env, outputs), _arrays_in(env, kept)

    def traced_backward(residuals: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        context = _Context([])
        kept = _filled(env, left["kept"], residuals)
        context.__dict__.update(pytree.tree_unflatten(kept, left["structure"]))
        given = _filled(env, left["outputs"], list(map(_materialized, cotangents)))
        made = function.backward(context, *(x if isinstance(x, Tensor) else None for x in given))
        gradients: list[Any] = env.unwrapped(list(made) if isinstance(made, tuple) else [made])
        return gradients

    # When a trace ends, no tensor of it may be left: so they live in calls of their own.
    def forward(key: Any, arrays: Sequence[jax.Array]) -> tuple[list[Any], list[Any]]:
        with env.within(key), torch.enable_grad():  # a second derivative goes through what it saves
            return traced_forward(arrays)

    def backward(residuals: Sequence[Any], cotangents: Sequence[Any]) -> tuple[None, list[Any]]:
        with env.within(None), torch.enable_grad():
            gradients = traced_backward(residuals, cotangents)
        return None, [
            _gradient(gradients[i], dtype) for i, dtype in zip(positions, dtypes, strict=True)
        ]

    call = jax.custom_vjp(lambda key, arrays: forward(key, arrays)[0])
    call.defvjp(forward, backward)
    outputs = call(env.key_for_a_part(), arrays)
    if not torch.is_grad_enabled():
        outputs = jax.lax.stop_gradient(outputs)
    return pytree.tree_unflatten(_filled(env, left["outputs"], outputs), left["result"])


_TENSOR = object()  # where there was one


def _without_tensors(leaves: Sequence[Any]) -> list[Any]:
    return [_TENSOR if isinstance(x, Tensor) else x for x in leaves]


def _filled(env: Any, leaves: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """Return leaves with tensors of these arrays where there were tensors."""
    tensors = iter(env.wrapped(list(arrays)))
    return [next(tensors) if x is _TENSOR else x for x in leaves]


def _arrays_in(env: Any, leaves: Sequence[Any]) -> list[Any]:
    return list(env.unwrapped([x for x in leaves if isinstance(x, Tensor)]))


def _materialized(cotangent: Any) -> Any:
    """Return a cotangent as torch has it; jax has none of integers."""
    if cotangent.dtype == jax.dtypes.float0:
        return jnp.zeros(cotangent.shape, jnp.float32)
    return cotangent


def _gradient(gradient: Any, dtype: Any) -> Any:
    return (
        None
        if gradient is None or not jnp.issubdtype(dtype, jnp.inexact)
        else gradient.astype(dtype)
    )


class _Context:
    """What torch calls ctx: a place for what the backward pass needs."""

    def __init__(self, needs_input_grad: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(needs_input_grad)
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        """Forward mode is jax's."""

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """The backward pass ignores their cotangents anyway."""

    def set_materialize_grads(self, value: bool) -> None:
        """Cotangents are always there."""

    def mark_dirty(self, *tensors: Any) -> None:
        raise CallerError(
            "an autograd.Function that writes into its inputs cannot be traced; return new tensors"
        )
