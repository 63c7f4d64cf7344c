"""ATen operators as JAX functions where torchax has none, or others than torch's. Imports both
frameworks.

The symmetric solvers read one triangle, as LAPACK does, and their gradients are those of torch's
formulas, which are Hermitian matrices. Random operators draw by a key, and have no derivative.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from bridge_server.torch_via_xla.aliases import with_value

aten = torch.ops.aten

# Symmetric and Hermitian matrices -----------------------------------------------------------------


def _reflected(a: Any, upper: bool) -> Any:
    """Return the Hermitian matrix that has this triangle."""
    triangle = jnp.triu(a) if upper else jnp.tril(a)
    strict = jnp.triu(a, 1) if upper else jnp.tril(a, -1)
    whole = triangle + jnp.conj(jnp.swapaxes(strict, -1, -2))
    if not jnp.iscomplexobj(a):
        return whole
    return jnp.where(jnp.eye(a.shape[-1], dtype=bool), whole.real.astype(a.dtype), whole)


def _hermitian(a: Any, upper: bool = False) -> Any:
    """Return the Hermitian matrix that has this triangle.

    Its derivative is that of the matrix's Hermitian part.
    """
    return with_value((a + jnp.conj(jnp.swapaxes(a, -1, -2))) / 2, _reflected(a, upper))


def _eigh(a: Any, UPLO: str = "L", compute_v: bool = True) -> tuple[Any, Any]:
    a = _hermitian(a, UPLO.upper() == "U")
    if not a.shape[-1]:
        return jnp.zeros(a.shape[:-1], a.real.dtype), a
    vectors, values = jax.lax.linalg.eigh(a, symmetrize_input=False, sort_eigenvalues=True)
    return values, vectors if compute_v else jnp.zeros((0,), a.dtype)


def _cholesky(a: Any, upper: bool = False) -> Any:
    lower = jax.lax.linalg.cholesky(_hermitian(a, upper), symmetrize_input=False)
    return jnp.conj(jnp.swapaxes(lower, -1, -2)) if upper else lower


def _cholesky_ex(a: Any, upper: bool = False, check_errors: bool = False) -> tuple[Any, Any]:
    made = _cholesky(a, upper)
    # XLA marks a matrix that is not positive definite by NaNs, and does not say at which minor.
    is_wrong = jnp.isnan(made).any((-1, -2)) & ~jnp.isnan(a).any((-1, -2))
    return made, is_wrong.astype(jnp.int32)


def _pinv(
    a: Any, rcond: Any = None, hermitian: bool = False, *, atol: Any = None, rtol: Any = None
) -> Any:
    """Return torch.linalg.pinv, of which torch makes the tolerances in float64."""
    rtol = rcond if rtol is None else rtol
    if rtol is None:
        rtol = 0.0 if atol is not None else max(a.shape[-2:]) * jnp.finfo(a.dtype).eps
    if a.size == 0:
        return jnp.zeros((*a.shape[:-2], a.shape[-1], a.shape[-2]), a.dtype)
    whole = _reflected(a, upper=False) if hermitian else a
    if atol is not None:
        largest = jnp.linalg.norm(whole, 2, (-2, -1))
        rtol = jnp.maximum(rtol, jnp.asarray(atol) / jnp.where(largest == 0, 1, largest))
    tolerance = jax.lax.stop_gradient(jnp.asarray(rtol, a.real.dtype))
    return _inverted(a, jnp.linalg.pinv(jax.lax.stop_gradient(whole), rtol=tolerance))


@jax.custom_jvp
def _inverted(a: Any, inverse: Any) -> Any:
    """Return the pseudo-inverse of a matrix, with the derivative that torch's pinv_jvp gives."""
    return inverse


@_inverted.defjvp
def _inverted_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    a, given = primals
    p = _inverted(a, given)
    adjoint = lambda x: jnp.conj(jnp.swapaxes(x, -1, -2))  # noqa: E731
    slope, p_adjoint = adjoint(tangents[0]), adjoint(p)
    k = p_adjoint @ slope
    return p, p @ (k - adjoint(k) - k @ (a @ p)) + (slope - p @ (a @ slope)) @ (p_adjoint @ p)


def _solve_ex(a: Any, b: Any, left: bool = True, check_errors: bool = False) -> tuple[Any, ...]:
    is_vector = b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])
    b = b[..., None] if is_vector else b
    if left:
        x = jnp.linalg.solve(a, b)
    else:
        x = jnp.swapaxes(jnp.linalg.solve(jnp.swapaxes(a, -1, -2), jnp.swapaxes(b, -1, -2)), -1, -2)
    return (x[..., 0] if is_vector else x, *_lu(a), jnp.zeros(a.shape[:-2], jnp.int32))


def _lu(a: Any) -> tuple[Any, Any]:
    factors, pivots, _ = jax.lax.linalg.lu(jax.lax.stop_gradient(a))
    return factors, pivots + 1


def _slogdet(a: Any) -> tuple[Any, ...]:
    sign, size = jnp.linalg.slogdet(a)
    return (sign, size, *_lu(a))


# Special functions --------------------------------------------------------------------------------


def _polygamma(n: int, x: Any) -> Any:
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
    if n == 0:
        return digamma(x)
    # Reflection: (-1)^n psi_n(1 - x) - psi_n(x) is the n-th derivative of pi cot(pi x).
    is_left = x < 0.5
    right = jax.scipy.special.polygamma(n, jnp.where(is_left, 1 - x, x))
    cot = lambda x: jnp.pi / jnp.tan(jnp.pi * x)  # noqa: E731
    for _ in range(n):
        cot = _derivative(cot)
    here = jnp.where(is_left & (x != jnp.floor(x)), x, 0.25)
    left = (-1) ** n * right - cot(here)
    return jnp.where(is_left, jnp.where(x == jnp.floor(x), jnp.inf, left), right)


def _derivative(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]


@jax.custom_jvp
def digamma(x: Any) -> Any:
    """Return the digamma function, whose derivative JAX has for positive numbers only."""
    return jax.scipy.special.digamma(x)


@digamma.defjvp
def _digamma_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    return digamma(*primals), _polygamma(1, *primals) * tangents[0]


def _log_ndtr(x: Any) -> Any:
    return jax.scipy.special.log_ndtr(
        x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    )


def _safe_softmax(x: Any, dim: int, dtype: Any = None) -> Any:
    x = x if dtype is None else x.astype(str(dtype).removeprefix("torch."))
    is_masked = jnp.all(x == -jnp.inf, dim, keepdims=True)
    return jnp.where(is_masked, 0, jax.nn.softmax(jnp.where(is_masked, 0, x), dim))


# Pooling and positions ----------------------------------------------------------------------------


def _max_unpool(
    x: Any, indices: Any, output_size: Sequence[int], stride: Any = None, padding: Any = None
) -> Any:
    """Return torch's max_unpool, in which one of several values at a position stays, and all
    have its derivative."""
    spatial = len(output_size)
    lead = x.shape[:-spatial]
    values, positions = (each.reshape(*lead, -1) for each in (x, indices))
    empty = jnp.zeros((*lead, int(np.prod(output_size))), x.dtype)
    last = jnp.put_along_axis(empty, positions, jax.lax.stop_gradient(values), -1, inplace=False)
    rows = tuple(jnp.ogrid[tuple(slice(n) for n in (*lead, 1))][:-1])
    return with_value(empty.at[(*rows, positions)].add(values), last).reshape(*lead, *output_size)


def _adaptive_max_pool(x: Any, output_size: Sequence[int]) -> tuple[Any, Any]:
    spatial = len(output_size)
    lead, sizes = x.shape[:-spatial], x.shape[-spatial:]
    windows, insides = zip(*map(_windows, sizes, output_size), strict=True)
    # The axes of the result first, and those of the window last.
    places = [
        np.expand_dims(each, [i for i in range(2 * spatial) if i not in (axis, spatial + axis)])
        for axis, each in enumerate(windows)
    ]
    are_inside = [
        np.expand_dims(each, [i for i in range(2 * spatial) if i not in (axis, spatial + axis)])
        for axis, each in enumerate(insides)
    ]
    flat = np.ravel_multi_index(np.broadcast_arrays(*places), sizes).reshape(*output_size, -1)
    inside = functools.reduce(np.logical_and, are_inside).reshape(*output_size, -1)
    taken = jnp.where(inside, x.reshape(*lead, -1)[..., flat], -jnp.inf)
    at = jnp.argmax(taken, -1, keepdims=True)
    positions = jnp.take_along_axis(jnp.broadcast_to(flat, taken.shape), at, -1)
    return jnp.take_along_axis(taken, at, -1)[..., 0], positions[..., 0]


def _windows(size: int, count: int) -> tuple[Any, Any]:
    """Return the positions of each window of an adaptive pool along an axis, and which of them
    are in it."""
    starts = np.arange(count) * size // count
    ends = -(-(np.arange(count) + 1) * size // count)
    positions = starts[:, None] + np.arange((ends - starts).max())
    return np.minimum(positions, size - 1), positions < ends[:, None]


def _take_along_dim(x: Any, indices: Any, dim: int | None = None) -> Any:
    return (
        jnp.take_along_axis(x.reshape(-1), indices.reshape(-1), 0)
        if dim is None
        else _along(x, indices, dim)
    )


def _along(x: Any, indices: Any, dim: int) -> Any:
    dim %= x.ndim
    shape = np.broadcast_shapes(
        *((*each.shape[:dim], 1, *each.shape[dim + 1 :]) for each in (x, indices))
    )
    x, indices = (
        jnp.broadcast_to(each, (*shape[:dim], each.shape[dim], *shape[dim + 1 :]))
        for each in (x, indices)
    )
    return jnp.take_along_axis(x, indices, dim)


def _searchsorted(
    ordered: Any,
    values: Any,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Any:
    side = side or ("right" if right else "left")
    ordered = ordered if sorter is None else jnp.take_along_axis(ordered, sorter, -1)
    search = lambda ordered, values: jnp.searchsorted(ordered, values, side=side)  # noqa: E731
    if ordered.ndim > 1:
        search = jnp.vectorize(search, signature="(n),(m)->(m)")
    found = search(ordered, jnp.asarray(values))
    return found.astype(jnp.int32 if out_int32 else jax.dtypes.canonicalize_dtype(jnp.int64))


def _embedding_bag(
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Any, ...]:
    if scale_grad_by_freq:
        raise NotImplementedError("scale_grad_by_freq=True")
    starts = offsets[:-1] if include_last_offset else offsets
    count = starts.shape[0]
    bags = jnp.searchsorted(starts, jnp.arange(indices.shape[0]), side="right") - 1
    counts = indices != (padding_idx + weight.shape[0] if padding_idx < -1 else padding_idx)
    rows = weight[indices]
    rows = rows if per_sample_weights is None else rows * per_sample_weights[:, None]
    sizes = jax.ops.segment_sum(counts.astype(jnp.int32), bags, count)
    if mode == 2:
        of_bags = jax.ops.segment_max(jnp.where(counts[:, None], rows, -jnp.inf), bags, count)
        of_bags = jnp.where(sizes[:, None] > 0, of_bags, 0)
    else:
        of_bags = jax.ops.segment_sum(jnp.where(counts[:, None], rows, 0), bags, count)
        of_bags = of_bags / jnp.maximum(sizes, 1)[:, None] if mode == 1 else of_bags
    return of_bags, bags, sizes, jnp.zeros_like(sizes)


OPERATORS: Mapping[Any, Callable[..., Any]] = {
    aten._embedding_bag: _embedding_bag,
    aten._embedding_bag_forward_only: _embedding_bag,
    aten._linalg_det: lambda a: (jnp.linalg.det(a), *_lu(a)),
    aten._linalg_eigh: _eigh,
    aten._linalg_slogdet: _slogdet,
    aten._linalg_solve_ex: _solve_ex,
    aten._safe_softmax: _safe_softmax,
    aten.adaptive_max_pool2d: _adaptive_max_pool,
    aten.adaptive_max_pool3d: _adaptive_max_pool,
    aten.cholesky: _cholesky,
    aten.digamma: lambda x: digamma(
        x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
    ),
    aten.linalg_cholesky_ex: _cholesky_ex,
    aten.max_unpool2d: _max_unpool,
    aten.max_unpool3d: _max_unpool,
    aten.polygamma: _polygamma,
    aten.searchsorted.Tensor: _searchsorted,
    aten.special_log_ndtr: _log_ndtr,
    torch.linalg.pinv: _pinv,
    torch.pinverse: _pinv,
    torch.take_along_dim: _take_along_dim,
    torch.Tensor.take_along_dim: _take_along_dim,
}

# Random operators ---------------------------------------------------------------------------------


def _like(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Return a draw of the shape and type of a tensor."""

    def drawn(key: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        kind = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
        return draw(key, x.shape, kind, *args, **kwargs).astype(x.dtype)

    return drawn


def _exponential(key: Any, shape: Any, kind: Any, lambd: float = 1) -> Any:
    return jax.random.exponential(key, shape, kind) / lambd


def _cauchy(key: Any, shape: Any, kind: Any, median: float = 0, sigma: float = 1) -> Any:
    return jax.random.cauchy(key, shape, kind) * sigma + median


def _geometric(key: Any, shape: Any, kind: Any, p: float) -> Any:
    return jax.random.geometric(key, p, shape)


def _normal(key: Any, shape: Any, kind: Any, mean: float = 0, std: float = 1) -> Any:
    return jax.random.normal(key, shape, kind) * std + mean


def _log_normal(key: Any, shape: Any, kind: Any, mean: float = 1, std: float = 2) -> Any:
    return jnp.exp(_normal(key, shape, kind, mean, std))


def _uniform(key: Any, x: Any, *bounds: float, **named: float) -> Any:
    low, high = (*bounds, *named.values(), *(0.0, 1.0)[len(bounds) + len(named) :])
    return jax.random.uniform(key, x.shape, x.dtype, low, high)


def _integers(key: Any, x: Any, low: int = 0, high: int | None = None) -> Any:
    if high is None:
        digits = jnp.finfo(x.dtype).nmant + 1 if jnp.issubdtype(x.dtype, jnp.floating) else 31
        high = min(2**digits, 2**31 - 1)
    return jax.random.randint(key, x.shape, low, high).astype(x.dtype)


def _normal_of(
    key: Any, mean: Any, std: Any = 1.0, size: Any = None, dtype: Any = None, **_: Any
) -> Any:
    """Return torch.normal, of tensors or of numbers with a size."""
    if size is not None:
        kind = str(dtype or torch.get_default_dtype()).removeprefix("torch.")
        return jax.random.normal(key, tuple(size), kind) * std + mean
    shape = jnp.broadcast_shapes(jnp.shape(mean), jnp.shape(std))
    return jax.random.normal(key, shape, jnp.result_type(mean, std)) * std + mean


RANDOM: Mapping[Any, Callable[..., Any]] = {
    aten.cauchy.default: _like(_cauchy),
    aten.exponential.default: _like(_exponential),
    aten.geometric.default: _like(_geometric),
    aten.log_normal.default: _like(_log_normal),
    aten.normal.Tensor_Tensor: _normal_of,
    aten.normal.Tensor_float: _normal_of,
    aten.normal.float_Tensor: _normal_of,
    aten.normal.float_float: _normal_of,
    aten.normal_functional.default: _like(_normal),
    getattr(aten.random, "from"): _integers,
    aten.random.default: _integers,
    aten.random.to: lambda key, x, to: _integers(key, x, 0, to),
    aten.uniform.default: _uniform,
}
