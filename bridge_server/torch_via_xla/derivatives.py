"""Operators with torch's derivatives at points where the derivative is undefined or infinite.

These points are zeros and borders: a norm of zeros has the derivative zero in torch and none in
JAX, the larger end of a clamp belongs to it, and the first of equal maxima gets the whole gradient.
torchax would use JAX's derivatives. The values are the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch

from bridge_server.torch_via_xla.aliases import jax_dtype

aten = torch.ops.aten


def _abs(x: Any) -> Any:
    return x * jnp.sign(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.abs(x)


def _atan2(y: Any, x: Any) -> Any:
    is_origin = (x == 0) & (y == 0)
    at_origin = jax.lax.stop_gradient(jnp.arctan2(y, x))
    elsewhere = jnp.arctan2(y, jnp.where(is_origin, 1, x))
    return jnp.where(is_origin, at_origin, elsewhere)


def _cdist(x: Any, y: Any, p: float = 2.0, compute_mode: Any = None) -> Any:
    differences = x[..., :, None, :] - y[..., None, :, :]
    return _vector_norm(differences, p, (-1,))


def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    x = x if min is None else jnp.where(x < min, min, x)
    return x if max is None else jnp.where(x > max, max, x)


def _hardtanh(x: Any, min_val: Any = -1, max_val: Any = 1) -> Any:
    y = jnp.where(x >= max_val, max_val, x)
    y = jnp.where(x <= min_val, min_val, y)
    return y.astype(x.dtype)


def _leaky_relu(x: Any, negative_slope: float = 0.01) -> Any:
    return jnp.where(x > 0, x, x * negative_slope)


def _softplus(x: Any, beta: float = 1, threshold: float = 20) -> Any:
    is_linear = x * beta > threshold
    exponent = jnp.where(is_linear, 0, x * beta)
    curve = jnp.log1p(jnp.exp(exponent)) / beta
    return jnp.where(is_linear, x, curve)


def _vector_norm(
    x: Any, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Any:
    x = x if dtype is None else x.astype(jax_dtype(dtype))
    if dim is None or dim == []:
        dim = range(x.ndim)
    axes = tuple(dim) if isinstance(dim, list | tuple | range) else (dim,)
    is_zero = jnp.all(x == 0, axes, keepdims=True)
    sizes = jnp.where(is_zero, 1, _abs(x))
    norm = jnp.where(is_zero, 0, _norm(sizes, ord, axes))
    return norm if keepdim else jnp.squeeze(norm, axes)


def _norm(sizes: Any, ord: float, axes: tuple[int, ...]) -> Any:
    """Return the norms of numbers of these absolute values, which are not all zero."""
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
    """Return a function that takes the elements at positions along an axis, and the positions."""

    def take(x: Any, dim: int, keepdim: bool = False) -> tuple[Any, Any]:
        if not x.ndim:
            return x, jnp.argmax(x)
        at = position(x, dim, keepdims=True)
        values = jnp.take_along_axis(x, at, dim)
        if keepdim:
            return values, at
        return jnp.squeeze(values, dim), jnp.squeeze(at, dim)

    return take


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
