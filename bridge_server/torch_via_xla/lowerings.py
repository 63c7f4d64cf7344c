"""ATen operators as JAX functions that torchax lacks or defines unlike torch.

Imports both frameworks. The symmetric solvers read one triangle, as LAPACK does; their gradients
follow torch's formulas and are Hermitian matrices. Random operators take a key, and have no
derivative.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from bridge_server.torch_via_xla.aliases import jax_dtype, with_value

aten = torch.ops.aten

# Symmetric and Hermitian matrices -----------------------------------------------------------------


def _adjoint(a: Any) -> Any:
    return jnp.conj(jnp.swapaxes(a, -1, -2))


def _reflected(a: Any, upper: bool) -> Any:
    """Return the Hermitian matrix with this triangle."""
    triangle = jnp.triu(a) if upper else jnp.tril(a)
    strict = jnp.triu(a, 1) if upper else jnp.tril(a, -1)
    whole = triangle + _adjoint(strict)
    if not jnp.iscomplexobj(a):
        return whole
    is_diagonal = jnp.eye(a.shape[-1], dtype=bool)
    return jnp.where(is_diagonal, whole.real.astype(a.dtype), whole)


def _hermitian(a: Any, upper: bool = False) -> Any:
    """Return the Hermitian matrix with this triangle, and the derivative of the Hermitian part."""
    hermitian_part = (a + _adjoint(a)) / 2
    return with_value(hermitian_part, _reflected(a, upper))


def _eigh(a: Any, UPLO: str = "L", compute_v: bool = True) -> tuple[Any, Any]:
    a = _hermitian(a, UPLO.upper() == "U")
    if not a.shape[-1]:
        return jnp.zeros(a.shape[:-1], a.real.dtype), a
    vectors, values = jax.lax.linalg.eigh(
        a, symmetrize_input=False, sort_eigenvalues=True
    )
    return values, vectors if compute_v else jnp.zeros((0,), a.dtype)


def _cholesky(a: Any, upper: bool = False) -> Any:
    lower = jax.lax.linalg.cholesky(_hermitian(a, upper), symmetrize_input=False)
    return _adjoint(lower) if upper else lower


def _cholesky_ex(
    a: Any, upper: bool = False, check_errors: bool = False
) -> tuple[Any, Any]:
    factor = _cholesky(a, upper)
    # XLA returns NaNs for a matrix that is not positive definite, without the failing minor.
    has_failed = _has_nan(factor) & ~_has_nan(a)
    return factor, has_failed.astype(jnp.int32)


def _has_nan(a: Any) -> Any:
    return jnp.isnan(a).any((-1, -2))


def _pinv(
    a: Any,
    rcond: Any = None,
    hermitian: bool = False,
    *,
    atol: Any = None,
    rtol: Any = None,
) -> Any:
    """Compute torch.linalg.pinv; torch itself computes the tolerances in float64."""
    *batch, rows, columns = a.shape
    if a.size == 0:
        return jnp.zeros((*batch, columns, rows), a.dtype)
    rtol = rcond if rtol is None else rtol
    if rtol is None:
        rtol = 0.0 if atol is not None else max(rows, columns) * jnp.finfo(a.dtype).eps
    whole = _reflected(a, upper=False) if hermitian else a
    if atol is not None:
        largest = jnp.linalg.norm(whole, 2, (-2, -1))
        scale = jnp.where(largest == 0, 1, largest)
        rtol = jnp.maximum(rtol, jnp.asarray(atol) / scale)
    tolerance = jax.lax.stop_gradient(jnp.asarray(rtol, a.real.dtype))
    inverse = jnp.linalg.pinv(jax.lax.stop_gradient(whole), rtol=tolerance)
    return _inverted(a, inverse)


@jax.custom_jvp
def _inverted(a: Any, inverse: Any) -> Any:
    """Return the pseudo-inverse of a matrix, with the derivative of torch's pinv_jvp."""
    return inverse


@_inverted.defjvp
def _inverted_jvp(
    primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[Any, Any]:
    a, inverse = primals
    p = _inverted(a, inverse)
    slope = _adjoint(tangents[0])
    p_adjoint = _adjoint(p)
    k = p_adjoint @ slope
    within = k - _adjoint(k) - k @ (a @ p)
    beyond = slope - p @ (a @ slope)
    return p, p @ within + beyond @ (p_adjoint @ p)


def _solve_ex(
    a: Any, b: Any, left: bool = True, check_errors: bool = False
) -> tuple[Any, ...]:
    is_vector = b.ndim == 1 or b.shape == a.shape[:-1]
    b = b[..., None] if is_vector else b
    x = jnp.linalg.solve(a, b) if left else _solved_from_right(a, b)
    x = x[..., 0] if is_vector else x
    info = jnp.zeros(a.shape[:-2], jnp.int32)
    return (x, *_lu(a), info)


def _solved_from_right(a: Any, b: Any) -> Any:
    """Solve x @ a = b."""
    transposed = jnp.linalg.solve(jnp.swapaxes(a, -1, -2), jnp.swapaxes(b, -1, -2))
    return jnp.swapaxes(transposed, -1, -2)


def _lu(a: Any) -> tuple[Any, Any]:
    factors, pivots, _ = jax.lax.linalg.lu(jax.lax.stop_gradient(a))
    return factors, pivots + 1


def _det(a: Any) -> tuple[Any, ...]:
    # JAX cannot differentiate the determinant of an empty matrix, which is one.
    det = jnp.linalg.det(a) if a.shape[-1] else jnp.ones(a.shape[:-2], a.dtype)
    return (det, *_lu(a))


def _lstsq(
    a: Any, b: Any, rcond: Any = None, *, driver: str | None = None
) -> tuple[Any, ...]:
    """Compute torch.linalg.lstsq with the pseudo-inverse, whose derivative is more exact."""
    rows, columns = a.shape[-2:]
    is_vector = b.ndim == a.ndim - 1 and b.shape == a.shape[:-1]
    b = b[..., None] if is_vector else b
    rcond = max(rows, columns) * jnp.finfo(a.dtype).eps if rcond is None else rcond
    x = _pinv(a, rtol=0.0 if driver == "gels" else rcond) @ b
    residuals, rank, values = _about_lstsq(a, x, b, rcond, driver)
    return x[..., 0] if is_vector else x, residuals, rank, values


def _about_lstsq(
    a: Any, x: Any, b: Any, rcond: Any, driver: str | None
) -> tuple[Any, Any, Any]:
    """Return the residuals, rank and singular values that the driver reports."""
    rows, columns = a.shape[-2:]
    empty = jnp.zeros((0,), a.real.dtype)
    integer = jax.dtypes.canonicalize_dtype(jnp.int64)
    if driver == "gels":
        is_tall = rows > columns
        residuals = (jnp.abs(a @ x - b) ** 2).sum(-2) if is_tall else empty
        return residuals, jnp.zeros((0,), integer), empty
    by_values = driver in ("gelsd", "gelss")
    if by_values and rows > columns:
        raise NotImplementedError(
            f"with driver={driver!r}, values decide whether there are residuals"
        )
    sizes = jnp.linalg.svd(jax.lax.stop_gradient(a), compute_uv=False)
    threshold = rcond * sizes.max(-1, keepdims=True, initial=0)
    rank = (sizes > threshold).sum(-1).astype(integer)
    return empty, rank, sizes if by_values else empty


def _slogdet(a: Any) -> tuple[Any, ...]:
    if not a.shape[-1]:
        sign = jnp.ones(a.shape[:-2], a.dtype)
        return (sign, jnp.zeros(a.shape[:-2], a.real.dtype), *_lu(a))
    sign, size = jnp.linalg.slogdet(a)
    return (sign, size, *_lu(a))


# Special functions --------------------------------------------------------------------------------


def _inexact(x: Any) -> Any:
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def _polygamma(n: int, x: Any) -> Any:
    x = _inexact(x)
    if n == 0:
        return digamma(x)
    # Reflection: (-1)^n psi_n(1 - x) - psi_n(x) is the n-th derivative of pi cot(pi x).
    is_left = x < 0.5
    is_pole = x == jnp.floor(x)
    right = jax.scipy.special.polygamma(n, jnp.where(is_left, 1 - x, x))
    derivative: Callable[[Any], Any] = _cot
    for _ in range(n):
        derivative = _derivative(derivative)
    regular = jnp.where(is_left & ~is_pole, x, 0.25)
    left = (-1) ** n * right - derivative(regular)
    left = jnp.where(is_pole, jnp.inf, left)
    return jnp.where(is_left, left, right)


def _cot(x: Any) -> Any:
    return jnp.pi / jnp.tan(jnp.pi * x)


def _derivative(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]


@jax.custom_jvp
def digamma(x: Any) -> Any:
    """Compute the digamma function; JAX has its derivative for positive numbers only."""
    return jax.scipy.special.digamma(x)


@digamma.defjvp
def _digamma_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    return digamma(*primals), _polygamma(1, *primals) * tangents[0]


def _log_ndtr(x: Any) -> Any:
    is_floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.scipy.special.log_ndtr(x if is_floating else x.astype(jnp.float32))


def _spherical_bessel_j0(x: Any) -> Any:
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    is_small = jnp.abs(x) < 0.5
    z = jnp.where(is_small, x * x, 0)
    series = jnp.ones_like(x)
    for n in range(6, 0, -1):
        series = 1 - z / (2 * n * (2 * n + 1)) * series
    safe = jnp.where(is_small, 1, x)
    quotient = jnp.where(jnp.isinf(x), 0, jnp.sin(safe) / safe)
    return jnp.where(is_small, series, quotient)


def _safe_softmax(x: Any, dim: int, dtype: Any = None) -> Any:
    x = x if dtype is None else x.astype(jax_dtype(dtype))
    is_masked = jnp.all(x == -jnp.inf, dim, keepdims=True)
    y = jax.nn.softmax(jnp.where(is_masked, 0, x), dim)
    return jnp.where(is_masked, 0, y)


# Pooling and positions ----------------------------------------------------------------------------


def _max_unpool(
    x: Any,
    indices: Any,
    output_size: Sequence[int],
    stride: Any = None,
    padding: Any = None,
) -> Any:
    """Compute torch's max_unpool.

    Of several values at a position one remains, and all have its derivative.
    """
    lead = x.shape[: -len(output_size)]
    values = x.reshape(*lead, -1)
    positions = indices.reshape(*lead, -1)
    empty = jnp.zeros((*lead, int(np.prod(output_size))), x.dtype)
    constants = jax.lax.stop_gradient(values)
    last = jnp.put_along_axis(empty, positions, constants, -1, inplace=False)
    *rows, _ = np.ix_(*map(np.arange, lead), np.zeros(1, int))
    total = empty.at[(*rows, positions)].add(values)
    return with_value(total, last).reshape(*lead, *output_size)


def _adaptive_max_pool(x: Any, output_size: Sequence[int]) -> tuple[Any, Any]:
    spatial = len(output_size)
    lead = x.shape[:-spatial]
    sizes = x.shape[-spatial:]
    windows, masks = zip(*map(_windows, sizes, output_size), strict=True)
    places = np.broadcast_arrays(*_spread(windows))
    flat = np.ravel_multi_index(places, sizes).reshape(*output_size, -1)
    mask = functools.reduce(np.logical_and, _spread(masks)).reshape(*output_size, -1)
    elements = x.reshape(*lead, -1)[..., flat]
    elements = jnp.where(mask, elements, -jnp.inf)
    at = jnp.argmax(elements, -1, keepdims=True)
    positions = jnp.broadcast_to(flat, elements.shape)
    largest = jnp.take_along_axis(elements, at, -1)
    where = jnp.take_along_axis(positions, at, -1)
    return largest[..., 0], where[..., 0]


def _spread(of_axes: Sequence[Any]) -> list[Any]:
    """Give arrays of one axis each all axes: those of the result first, those of windows last."""
    count = len(of_axes)
    spread = []
    for axis, each in enumerate(of_axes):
        others = [i for i in range(2 * count) if i not in (axis, count + axis)]
        spread.append(np.expand_dims(each, others))
    return spread


def _windows(size: int, count: int) -> tuple[Any, Any]:
    """Return the positions of an adaptive pool's windows along an axis, and the windows' masks."""
    starts = np.arange(count) * size // count
    ends = -(-(np.arange(count) + 1) * size // count)
    positions = starts[:, None] + np.arange((ends - starts).max())
    return np.minimum(positions, size - 1), positions < ends[:, None]


def linspace(start: Any, end: Any, steps: int, *, dtype: Any = None, **_: Any) -> Any:
    """Compute torch.linspace between numbers or scalars."""
    return _spaced(jnp.linspace(start, end, steps), dtype)


def logspace(
    start: Any,
    end: Any,
    steps: int,
    base: float = 10.0,
    *,
    dtype: Any = None,
    **_: Any,
) -> Any:
    """Compute torch.logspace between numbers or scalars."""
    return _spaced(base ** jnp.linspace(start, end, steps), dtype)


def _spaced(x: Any, dtype: Any) -> Any:
    if dtype is None and jnp.iscomplexobj(x):
        return x
    return x.astype(jax_dtype(torch.get_default_dtype() if dtype is None else dtype))


def _take_along_dim(x: Any, indices: Any, dim: int | None = None) -> Any:
    if dim is None:
        return jnp.take_along_axis(x.reshape(-1), indices.reshape(-1), 0)
    return _along(x, indices, dim)


def _along(x: Any, indices: Any, dim: int) -> Any:
    dim %= x.ndim
    shape = np.broadcast_shapes(
        _resized(x.shape, dim, 1), _resized(indices.shape, dim, 1)
    )
    x = jnp.broadcast_to(x, _resized(shape, dim, x.shape[dim]))
    indices = jnp.broadcast_to(indices, _resized(shape, dim, indices.shape[dim]))
    return jnp.take_along_axis(x, indices, dim)


def _resized(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


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
    dtype = jnp.int32 if out_int32 else jax.dtypes.canonicalize_dtype(jnp.int64)
    return search(ordered, jnp.asarray(values)).astype(dtype)


_MEAN, _MAX = 1, 2  # modes of embedding bags; 0 is the sum


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
    padding = padding_idx + weight.shape[0] if padding_idx < -1 else padding_idx
    is_used = (indices != padding)[:, None]
    rows = weight[indices]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    sizes = jax.ops.segment_sum(is_used[:, 0].astype(jnp.int32), bags, count)
    if mode == _MAX:
        pooled = jax.ops.segment_max(jnp.where(is_used, rows, -jnp.inf), bags, count)
        pooled = jnp.where(sizes[:, None] > 0, pooled, 0)
    else:
        pooled = jax.ops.segment_sum(jnp.where(is_used, rows, 0), bags, count)
    if mode == _MEAN:
        pooled = pooled / jnp.maximum(sizes, 1)[:, None]
    return pooled, bags, sizes, jnp.zeros_like(sizes)


OPERATORS: Mapping[Any, Callable[..., Any]] = {
    aten._embedding_bag: _embedding_bag,
    aten._embedding_bag_forward_only: _embedding_bag,
    aten._linalg_det: _det,
    aten._linalg_eigh: _eigh,
    aten._linalg_slogdet: _slogdet,
    aten._linalg_solve_ex: _solve_ex,
    aten._safe_softmax: _safe_softmax,
    aten.adaptive_max_pool2d: _adaptive_max_pool,
    aten.adaptive_max_pool3d: _adaptive_max_pool,
    aten.cholesky: _cholesky,
    aten.digamma: lambda x: digamma(_inexact(x)),
    aten.linalg_cholesky_ex: _cholesky_ex,
    aten.linalg_lstsq: _lstsq,
    aten.max_unpool2d: _max_unpool,
    aten.max_unpool3d: _max_unpool,
    aten.polygamma: _polygamma,
    aten.searchsorted.Tensor: _searchsorted,
    aten.special_log_ndtr: _log_ndtr,
    aten.special_spherical_bessel_j0: _spherical_bessel_j0,
    torch.linalg.pinv: _pinv,
    torch.pinverse: _pinv,
    torch.take_along_dim: _take_along_dim,
    torch.Tensor.take_along_dim: _take_along_dim,
}

# Random operators ---------------------------------------------------------------------------------


def _like(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Return a draw with the shape and type of a tensor."""

    def drawn(key: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        kind = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
        return draw(key, x.shape, kind, *args, **kwargs).astype(x.dtype)

    return drawn


def _exponential(key: Any, shape: Any, kind: Any, lambd: float = 1) -> Any:
    return jax.random.exponential(key, shape, kind) / lambd


def _cauchy(
    key: Any, shape: Any, kind: Any, median: float = 0, sigma: float = 1
) -> Any:
    return jax.random.cauchy(key, shape, kind) * sigma + median


def _geometric(key: Any, shape: Any, kind: Any, p: float) -> Any:
    return jax.random.geometric(key, p, shape)


def _normal(key: Any, shape: Any, kind: Any, mean: float = 0, std: float = 1) -> Any:
    return jax.random.normal(key, shape, kind) * std + mean


def _log_normal(
    key: Any, shape: Any, kind: Any, mean: float = 1, std: float = 2
) -> Any:
    return jnp.exp(_normal(key, shape, kind, mean, std))


def _uniform(key: Any, x: Any, *bounds: float, **named: float) -> Any:
    passed = (*bounds, *named.values())
    low, high = (*passed, *(0.0, 1.0)[len(passed) :])
    return jax.random.uniform(key, x.shape, x.dtype, low, high)


def _integers(key: Any, x: Any, low: int = 0, high: int | None = None) -> Any:
    if high is None:
        digits = (
            jnp.finfo(x.dtype).nmant + 1
            if jnp.issubdtype(x.dtype, jnp.floating)
            else 31
        )
        high = min(2**digits, 2**31 - 1)
    return jax.random.randint(key, x.shape, low, high).astype(x.dtype)


def _normal_of(
    key: Any, mean: Any, std: Any = 1.0, size: Any = None, dtype: Any = None, **_: Any
) -> Any:
    """Compute torch.normal, of tensors or of numbers with a size."""
    if size is not None:
        kind = jax_dtype(dtype or torch.get_default_dtype())
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
