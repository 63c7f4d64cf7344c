"""Operators whose derivatives torchax leaves to JAX, and torch defines otherwise where they are
none or are not finite.

At zero and on borders, that is: a norm of zeros has the derivative zero in torch and none in JAX,
the larger end of a clamp belongs to it, and the first of equal maxima has all of the gradient. The
values are the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch

aten = torch.ops.aten


def _abs(x: Any) -> Any:
    return x * jnp.sign(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.abs(x)


def _atan2(y: Any, x: Any) -> Any:
    is_origin = (x == 0) & (y == 0)
    return jnp.where(
        is_origin,
        jax.lax.stop_gradient(jnp.arctan2(y, x)),
        jnp.arctan2(y, jnp.where(is_origin, 1, x)),
    )


def _cdist(x: Any, y: Any, p: float = 2.0, compute_mode: Any = None) -> Any:
    return _vector_norm(x[..., :, None, :] - y[..., None, :, :], p, (-1,))


def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    x = x if min is None else jnp.where(x < min, min, x)
    return x if max is None else jnp.where(x > max, max, x)


def _hardtanh(x: Any, min_val: Any = -1, max_val: Any = 1) -> Any:
    return jnp.where(x <= min_val, min_val, jnp.where(x >= max_val, max_val, x)).astype(x.dtype)


def _leaky_relu(x: Any, negative_slope: float = 0.01) -> Any:
    return jnp.where(x > 0, x, x * negative_slope)


def _softplus(x: Any, beta: float = 1, threshold: float = 20) -> Any:
    is_linear = x * beta > threshold
    return jnp.where(is_linear, x, jnp.log1p(jnp.exp(jnp.where(is_linear, 0, x * beta))) / beta)


def _vector_norm(
    x: Any, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Any:
    x = x if dtype is None else x.astype(str(dtype).removeprefix("torch."))
    axes = (
        tuple(range(x.ndim))
        if dim is None or dim == []
        else tuple(dim)
        if isinstance(dim, list | tuple)
        else (dim,)
    )
    is_zero = jnp.all(x == 0, axes, keepdims=True)
    sizes = _abs(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.abs(x)
    made = jnp.where(is_zero, 0, _norm(jnp.where(is_zero, 1, sizes), ord, axes))
    return made if keepdim else jnp.squeeze(made, axes)


def _norm(sizes: Any, ord: float, axes: tuple[int, ...]) -> Any:
    """Return the norms of numbers of these sizes, which are not all zero."""
    if ord == float("inf"):
        return sizes.max(axes, keepdims=True)
    if ord == float("-inf"):
        return sizes.min(axes, keepdims=True)
    if ord == 0:
        return (sizes != 0).sum(axes, keepdims=True).astype(sizes.dtype)
    if ord == 1:
        return sizes.sum(axes, keepdims=True)
    if ord == 2:
        return jnp.sqrt((sizes * sizes).sum(axes, keepdims=True))
    return (sizes**ord).sum(axes, keepdims=True) ** (1 / ord)


def _first(position: Callable[..., Any]) -> Callable[..., Any]:
    """Return what takes the elements along an axis that are at these positions, and the
    positions."""

    def taken(x: Any, dim: int, keepdim: bool = False) -> tuple[Any, Any]:
        if not x.ndim:
            return x, jnp.argmax(x)
        at = position(x, dim, keepdims=True)
        values = jnp.take_along_axis(x, at, dim)
        return (values, at) if keepdim else (jnp.squeeze(values, dim), jnp.squeeze(at, dim))

    return taken


OPERATORS: Mapping[Any, Callable[..., Any]] = {
    aten.abs: _abs,
    aten.atan2: _atan2,
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.clamp_min: _clamp,
    aten.hardtanh: _hardtanh,
    aten.leaky_relu: _leaky_relu,
    aten.linalg_vector_norm: _vector_norm,
    aten.max.dim: _first(jnp.argmax),
    aten.min.dim: _first(jnp.argmin),
    aten.sinc: jnp.sinc,
    aten.softplus: _softplus,
    aten._cdist_forward: _cdist,
    torch.cdist: _cdist,
}
