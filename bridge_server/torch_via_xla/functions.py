"""autograd.Functions in traced code: JAX uses their backward passes as custom derivatives."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from bridge_wire.errors import CallerError

Arrays = Sequence[jax.Array]

_plain_apply = Function.__dict__["apply"]


def take_over(apply: Callable[..., Any]) -> Callable[[], None]:
    """Redirect `SomeFunction.apply(*args, **kwargs)` to `apply(SomeFunction, args, kwargs)`.

    The redirection holds in every thread. Return the function that ends it.
    """

    def give_back() -> None:
        Function.apply = _plain_apply  # type: ignore[method-assign]

    def redirected(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return apply(cls, args, kwargs)

    Function.apply = classmethod(redirected)  # type: ignore
    return give_back


def apply_plainly(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Apply an autograd.Function as torch does."""
    apply = _plain_apply.__get__(None, function)
    return apply(*args, **kwargs)


def applied(
    env: Any, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Apply an autograd.Function to arguments that include traced tensors of the environment."""
    # XLA decides itself which values to compute again.
    if function is CheckpointFunction:
        run, _, *rest = args
        return run(*rest)
    has_setup = function.setup_context is not Function.setup_context
    if has_setup:
        signature = inspect.signature(function.forward)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        args = bound.args
        kwargs = bound.kwargs
    args = tuple(args)
    # As in torch, tensors within a list argument are constants.
    template, tensors = _Template.of(args, is_leaf=lambda x: x is not args)
    arrays = env.unwrapped(tensors)
    application = _Application(env, function, template, kwargs, has_setup)
    call = jax.custom_vjp(application.value)
    call.defvjp(application.forward, application.backward)
    key = env.key_for_a_part()
    outputs = call(key, arrays)
    if not torch.is_grad_enabled():
        outputs = jax.lax.stop_gradient(outputs)
    tensors = env.wrapped(outputs)
    return application.output.filled(tensors)


_TENSOR = object()  # takes the place of a tensor in a template


class _Template(NamedTuple):
    """A pytree with its tensors taken out."""

    leaves: Sequence[Any]
    structure: Any

    @classmethod
    def of(
        cls, tree: Any, is_leaf: Callable[[Any], bool] | None = None
    ) -> tuple["_Template", list[Tensor]]:
        """Return a pytree's template and its tensors."""
        leaves, structure = pytree.tree_flatten(tree, is_leaf)
        tensors = []
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                tensors.append(leaf)
                leaves[position] = _TENSOR
        return cls(leaves, structure), tensors

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """Return the pytree with these tensors."""
        remaining = iter(tensors)
        leaves = [next(remaining) if x is _TENSOR else x for x in self.leaves]
        return pytree.tree_unflatten(leaves, self.structure)


@dataclass(slots=True)
class _Application:
    """One application of an autograd.Function, as the passes of a jax.custom_vjp.

    The latest trace of the forward pass sets `output` and `saved`; a backward pass is traced after
    its forward pass. No tensor may outlive its trace: only the frames of `_traced_forward` and
    `_traced_backward`, and those they call, hold tensors.
    """

    env: Any
    function: Any
    inputs: _Template
    kwargs: Mapping[str, Any]
    has_setup: bool
    output: _Template = field(init=False)
    saved: _Template = field(init=False)
    dtypes: list[Any] = field(init=False)

    def value(self, key: Any, arrays: Arrays) -> list[Any]:
        """Return the output arrays."""
        outputs, _ = self.forward(key, arrays)
        return outputs

    def forward(self, key: Any, arrays: Arrays) -> tuple[list[Any], list[Any]]:
        """Return the output arrays, and the saved arrays as the residual."""
        self.dtypes = [x.dtype for x in arrays]
        # Grad mode: a second derivative passes through the saved tensors.
        with self.env.within(key), torch.enable_grad():
            return self._traced_forward(arrays)

    def backward(
        self, residual: Sequence[Any], cotangents: Sequence[Any]
    ) -> tuple[None, list[Any]]:
        """Return no cotangent for the key, and the inputs' cotangents."""
        with self.env.within(None), torch.enable_grad():
            gradients = self._traced_backward(residual, cotangents)
        typed = map(_gradient, gradients, self.dtypes)
        return None, list(typed)

    def _traced_forward(self, arrays: Arrays) -> tuple[list[Any], list[Any]]:
        tensors = self.env.wrapped(list(arrays))
        args = self.inputs.filled(tensors)
        needs_gradient = map(_is_floating, args)
        context = _Context(list(needs_gradient))
        if self.has_setup:
            output = self.function.forward(*args, **self.kwargs)
            self.function.setup_context(context, args, output)
        else:
            output = self.function.forward(context, *args, **self.kwargs)
        self.output, outputs = _Template.of(output)
        self.saved, saved = _Template.of(context.__dict__)
        values = self.env.unwrapped(outputs)
        residual = self.env.unwrapped(saved)
        return values, residual

    def _traced_backward(
        self, residual: Sequence[Any], cotangents: Sequence[Any]
    ) -> list[Any]:
        saved = self.env.wrapped(list(residual))
        context = _Context([])
        context.__dict__.update(self.saved.filled(saved))
        outputs = self._of_outputs(cotangents)
        gradients = self.function.backward(context, *outputs)
        if not isinstance(gradients, tuple):
            gradients = (gradients,)
        values = self.env.unwrapped(list(gradients))
        return self._of_tensors(values)

    def _of_outputs(self, cotangents: Sequence[Any]) -> list[Any]:
        """Return each output's cotangent as a tensor, None for outputs that are no tensors."""
        arrays = map(_materialized, cotangents)
        wrapped = self.env.wrapped(list(arrays))
        tensors = iter(wrapped)
        leaves = self.output.leaves
        return [next(tensors) if x is _TENSOR else None for x in leaves]

    def _of_tensors(self, gradients: list[Any]) -> list[Any]:
        """Return the gradients of those arguments that are tensors."""
        own = []
        for argument, gradient in zip(self.inputs.leaves, gradients, strict=False):
            if argument is _TENSOR:
                own.append(gradient)
        return own


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _materialized(cotangent: Any) -> Any:
    """Return a cotangent as an array; JAX has float0 for integers."""
    if cotangent.dtype == jax.dtypes.float0:
        return jnp.zeros(cotangent.shape, jnp.float32)
    return cotangent


def _gradient(gradient: Any, dtype: Any) -> Any:
    if gradient is None:
        return None
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None
    return gradient.astype(dtype)


class _Context:
    """The `ctx` of an autograd.Function: keeps values for the backward pass."""

    def __init__(self, needs_input_grad: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(needs_input_grad)
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        """JAX computes forward mode."""

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """The backward pass ignores their cotangents anyway."""

    def set_materialize_grads(self, value: bool) -> None:
        """Cotangents are always materialized."""

    def mark_dirty(self, *tensors: Any) -> None:
        raise CallerError(
            "the torch code applies an autograd.Function that writes into its inputs, which cannot"
            " be traced; return new tensors"
        )
