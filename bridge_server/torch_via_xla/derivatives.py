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

Axes = tuple[int, ...]
Function = Callable[..., Any]


def _abs(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x * jnp.sign(x)
    return jnp.abs(x)


def _atan2(y: Any, x: Any) -> Any:
    is_origin = (x == 0) & (y == 0)
    angle = jnp.arctan2(y, x)
    at_origin = jax.lax.stop_gradient(angle)
    safe = jnp.where(is_origin, 1, x)
    elsewhere = jnp.arctan2(y, safe)
    return jnp.where(is_origin, at_origin, elsewhere)


def _cdist(x: Any, y: Any, p: float = 2.0, compute_mode: Any = None) -> Any:
    rows = jnp.expand_dims(x, -2)
    columns = jnp.expand_dims(y, -3)
    return _vector_norm(rows - columns, p, (-1,))


def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    if min is not None:
        x = jnp.where(x < min, min, x)
    if max is not None:
        x = jnp.where(x > max, max, x)
    return x


def _hardtanh(x: Any, min_val: Any = -1, max_val: Any = 1) -> Any:
    y = jnp.where(x >= max_val, max_val, x)
    y = jnp.where(x <= min_val, min_val, y)
    return y.astype(x.dtype)


def _leaky_relu(x: Any, negative_slope: float = 0.01) -> Any:
    left = x * negative_slope
    return jnp.where(x > 0, x, left)


def _softplus(x: Any, beta: float = 1, threshold: float = 20) -> Any:
    scaled = x * beta
    is_linear = scaled > threshold
    exponent = jnp.where(is_linear, 0, scaled)
    power = jnp.exp(exponent)
    curve = jnp.log1p(power) / beta
    return jnp.where(is_linear, x, curve)


def _vector_norm(
    x: Any, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Any:
    if dtype is not None:
        x = x.astype(jax_dtype(dtype))
    axes = _axes(dim, x.ndim)
    is_zero = jnp.all(x == 0, axes, keepdims=True)
    sizes = jnp.where(is_zero, 1, _abs(x))
    norm = _norm(sizes, ord, axes)
    norm = jnp.where(is_zero, 0, norm)
    if keepdim:
        return norm
    return jnp.squeeze(norm, axes)


def _axes(dim: Any, ndim: int) -> Axes:
    if dim is None or dim == []:
        return tuple(range(ndim))
    if isinstance(dim, list | tuple):
        return tuple(dim)
    return (dim,)


def _norm(sizes: Any, ord: float, axes: Axes) -> Any:
    """Return the norms of numbers of these absolute values, which are not all zero."""
    if ord == float("inf"):
        return sizes.max(axes, keepdims=True)
    if ord == float("-inf"):
        return sizes.min(axes, keepdims=True)
    if ord == 0:
        is_counted = sizes != 0
        count = is_counted.sum(axes, keepdims=True)
        return count.astype(sizes.dtype)
    if ord == 1:
        return sizes.sum(axes, keepdims=True)
    if ord == 2:
        squares = sizes * sizes
        total = squares.sum(axes, keepdims=True)
        return jnp.sqrt(total)
    powers = sizes**ord
    total = powers.sum(axes, keepdims=True)
    return total ** (1 / ord)


def _first(position: Function) -> Function:
    """Return a function that takes the elements at positions along an axis, and the positions."""

    def take(x: Any, dim: int, keepdim: bool = False) -> tuple[Any, Any]:
        if not x.ndim:
            return x, jnp.argmax(x)
        at = position(x, dim, keepdims=True)
        values = jnp.take_along_axis(x, at, dim)
        if not keepdim:
            values = jnp.squeeze(values, dim)
            at = jnp.squeeze(at, dim)
        return values, at

    return take


OPERATORS: Mapping[Any, Function] = {
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
