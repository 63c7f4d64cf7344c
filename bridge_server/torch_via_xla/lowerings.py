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
from bridge_wire.errors import CallerError

aten = torch.ops.aten
linalg = jax.lax.linalg
special = jax.scipy.special
constant = jax.lax.stop_gradient

Pair = tuple[Any, Any]
Arrays = tuple[Any, ...]
Shape = tuple[int, ...]
Function = Callable[..., Any]

# Types --------------------------------------------------------------------------------------------


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _floating(x: Any) -> Any:
    if _is_floating(x):
        return x
    return x.astype(jnp.float32)


def _inexact(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return x.astype(jnp.float32)


def _index_dtype() -> Any:
    return jax.dtypes.canonicalize_dtype(jnp.int64)


# Symmetric and Hermitian matrices -----------------------------------------------------------------


def _transposed(a: Any) -> Any:
    return jnp.swapaxes(a, -1, -2)


def _adjoint(a: Any) -> Any:
    transposed = _transposed(a)
    return jnp.conj(transposed)


def _reflected(a: Any, upper: bool) -> Any:
    """Return the Hermitian matrix with this triangle."""
    if upper:
        triangle = jnp.triu(a)
        strict = jnp.triu(a, 1)
    else:
        triangle = jnp.tril(a)
        strict = jnp.tril(a, -1)
    other = _adjoint(strict)
    whole = triangle + other
    if not jnp.iscomplexobj(a):
        return whole
    size = a.shape[-1]
    is_diagonal = jnp.eye(size, dtype=bool)
    real = whole.real.astype(a.dtype)
    return jnp.where(is_diagonal, real, whole)


def _hermitian(a: Any, upper: bool = False) -> Any:
    """Return the Hermitian matrix with this triangle, and the derivative of the Hermitian part."""
    hermitian_part = (a + _adjoint(a)) / 2
    reflected = _reflected(a, upper)
    return with_value(hermitian_part, reflected)


def _eigh(a: Any, UPLO: str = "L", compute_v: bool = True) -> Pair:
    upper = UPLO.upper() == "U"
    a = _hermitian(a, upper)
    if not a.shape[-1]:
        no_values = jnp.zeros(a.shape[:-1], a.real.dtype)
        return no_values, a
    vectors, values = linalg.eigh(a, symmetrize_input=False, sort_eigenvalues=True)
    if not compute_v:
        vectors = jnp.zeros((0,), a.dtype)
    return values, vectors


def _cholesky(a: Any, upper: bool = False) -> Any:
    whole = _hermitian(a, upper)
    lower = linalg.cholesky(whole, symmetrize_input=False)
    if upper:
        return _adjoint(lower)
    return lower


def _cholesky_ex(a: Any, upper: bool = False, check_errors: bool = False) -> Pair:
    factor = _cholesky(a, upper)
    # XLA returns NaNs for a matrix that is not positive definite, without the failing minor.
    has_failed = _has_nan(factor) & ~_has_nan(a)
    info = has_failed.astype(jnp.int32)
    return factor, info


def _has_nan(a: Any) -> Any:
    is_nan = jnp.isnan(a)
    return is_nan.any((-1, -2))


def _default_rtol(a: Any) -> Any:
    rows, columns = a.shape[-2:]
    eps = jnp.finfo(a.dtype).eps
    return max(rows, columns) * eps


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
    whole = a
    if hermitian:
        whole = _reflected(a, upper=False)
    if rtol is None:
        rtol = rcond
    if atol is not None:
        rtol = _with_atol(whole, rtol, atol)
    elif rtol is None:
        rtol = _default_rtol(a)
    rtol = jnp.asarray(rtol, a.real.dtype)
    inverse = jnp.linalg.pinv(constant(whole), rtol=constant(rtol))
    return _inverted(a, inverse)


def _with_atol(a: Any, rtol: Any, atol: Any) -> Any:
    """Return the relative tolerance of both tolerances."""
    if rtol is None:
        rtol = 0.0
    largest = jnp.linalg.norm(a, 2, (-2, -1))
    scale = jnp.where(largest == 0, 1, largest)
    relative = jnp.asarray(atol) / scale
    return jnp.maximum(rtol, relative)


@jax.custom_jvp
def _inverted(a: Any, inverse: Any) -> Any:
    """Return the pseudo-inverse of a matrix, with the derivative of torch's pinv_jvp."""
    return inverse


@_inverted.defjvp
def _inverted_jvp(primals: Pair, tangents: Pair) -> Pair:
    a, inverse = primals
    slope, _ = tangents
    p = _inverted(a, inverse)
    p_adjoint = _adjoint(p)
    slope = _adjoint(slope)
    k = p_adjoint @ slope
    skew = k - _adjoint(k)
    projector = a @ p
    within = skew - k @ projector
    moved = a @ slope
    beyond = slope - p @ moved
    gram = p_adjoint @ p
    return p, p @ within + beyond @ gram


def _solve_ex(a: Any, b: Any, left: bool = True, check_errors: bool = False) -> Arrays:
    is_vector = b.ndim == 1 or b.shape == a.shape[:-1]
    if is_vector:
        b = b[..., None]
    if left:
        x = jnp.linalg.solve(a, b)
    else:
        x = _solved_from_right(a, b)
    if is_vector:
        x = x[..., 0]
    batch = a.shape[:-2]
    info = jnp.zeros(batch, jnp.int32)
    factors, pivots = _lu(a)
    return x, factors, pivots, info


def _solved_from_right(a: Any, b: Any) -> Any:
    """Solve x @ a = b."""
    a = _transposed(a)
    b = _transposed(b)
    x = jnp.linalg.solve(a, b)
    return _transposed(x)


def _lu(a: Any) -> Pair:
    factors, pivots, _ = linalg.lu(constant(a))
    return factors, pivots + 1


def _det(a: Any) -> Arrays:
    *batch, _, size = a.shape
    if size:
        det = jnp.linalg.det(a)
    else:
        # JAX cannot differentiate the determinant of an empty matrix, which is one.
        det = jnp.ones(batch, a.dtype)
    factors, pivots = _lu(a)
    return det, factors, pivots


def _slogdet(a: Any) -> Arrays:
    *batch, _, size = a.shape
    if size:
        sign, logarithm = jnp.linalg.slogdet(a)
    else:
        sign = jnp.ones(batch, a.dtype)
        logarithm = jnp.zeros(batch, a.real.dtype)
    factors, pivots = _lu(a)
    return sign, logarithm, factors, pivots


def _lstsq(a: Any, b: Any, rcond: Any = None, *, driver: str | None = None) -> Arrays:
    """Compute torch.linalg.lstsq with the pseudo-inverse, whose derivative is more exact."""
    is_vector = b.ndim == a.ndim - 1 and b.shape == a.shape[:-1]
    if is_vector:
        b = b[..., None]
    if rcond is None:
        rcond = _default_rtol(a)
    if driver == "gels":
        inverse = _pinv(a, rtol=0.0)
        x = inverse @ b
        residuals, rank, values = _about_full_rank(a, x, b)
    else:
        inverse = _pinv(a, rtol=rcond)
        x = inverse @ b
        residuals, rank, values = _about_rank(a, rcond, driver)
    if is_vector:
        x = x[..., 0]
    return x, residuals, rank, values


def _about_full_rank(a: Any, x: Any, b: Any) -> Arrays:
    """Return the residuals, rank and singular values that the driver gels reports."""
    rows, columns = a.shape[-2:]
    empty = jnp.zeros((0,), a.real.dtype)
    no_rank = jnp.zeros((0,), _index_dtype())
    if rows <= columns:
        return empty, no_rank, empty
    distances = jnp.abs(a @ x - b)
    residuals = (distances**2).sum(-2)
    return residuals, no_rank, empty


def _about_rank(a: Any, rcond: Any, driver: str | None) -> Arrays:
    """Return the residuals, rank and singular values that another driver reports."""
    rows, columns = a.shape[-2:]
    by_values = driver in ("gelsd", "gelss")
    if by_values and rows > columns:
        raise NotImplementedError(
            f"with driver={driver!r}, values decide whether there are residuals"
        )
    empty = jnp.zeros((0,), a.real.dtype)
    values = jnp.linalg.svd(constant(a), compute_uv=False)
    largest = values.max(-1, keepdims=True, initial=0)
    is_counted = values > rcond * largest
    rank = is_counted.sum(-1).astype(_index_dtype())
    if by_values:
        return empty, rank, values
    return empty, rank, empty


# Special functions --------------------------------------------------------------------------------


def _polygamma(n: int, x: Any) -> Any:
    x = _inexact(x)
    if n == 0:
        return digamma(x)
    # Reflection: (-1)^n psi_n(1 - x) - psi_n(x) is the n-th derivative of pi cot(pi x).
    is_left = x < 0.5
    is_pole = x == jnp.floor(x)
    reflected = jnp.where(is_left, 1 - x, x)
    right = special.polygamma(n, reflected)
    derivative: Function = _cot
    for _ in range(n):
        derivative = _derivative(derivative)
    is_regular = is_left & ~is_pole
    regular = jnp.where(is_regular, x, 0.25)
    slope = derivative(regular)
    sign = (-1) ** n
    left = sign * right - slope
    left = jnp.where(is_pole, jnp.inf, left)
    return jnp.where(is_left, left, right)


def _cot(x: Any) -> Any:
    angle = jnp.pi * x
    return jnp.pi / jnp.tan(angle)


def _derivative(f: Function) -> Function:
    def derivative(x: Any) -> Any:
        ones = jnp.ones_like(x)
        _, slope = jax.jvp(f, (x,), (ones,))
        return slope

    return derivative


def _digamma(x: Any) -> Any:
    x = _inexact(x)
    return digamma(x)


@jax.custom_jvp
def digamma(x: Any) -> Any:
    """Compute the digamma function; JAX has its derivative for positive numbers only."""
    return special.digamma(x)


@digamma.defjvp
def _digamma_jvp(primals: tuple[Any], tangents: tuple[Any]) -> Pair:
    (x,) = primals
    (tangent,) = tangents
    slope = _polygamma(1, x)
    return digamma(x), slope * tangent


def _log_ndtr(x: Any) -> Any:
    x = _floating(x)
    return special.log_ndtr(x)


def _spherical_bessel_j0(x: Any) -> Any:
    x = _floating(x)
    is_small = jnp.abs(x) < 0.5
    z = jnp.where(is_small, x * x, 0)
    series = jnp.ones_like(x)
    for n in range(6, 0, -1):
        denominator = 2 * n * (2 * n + 1)
        series = 1 - z / denominator * series
    safe = jnp.where(is_small, 1, x)
    quotient = jnp.sin(safe) / safe
    is_infinite = jnp.isinf(x)
    quotient = jnp.where(is_infinite, 0, quotient)
    return jnp.where(is_small, series, quotient)


def _safe_softmax(x: Any, dim: int, dtype: Any = None) -> Any:
    if dtype is not None:
        x = x.astype(jax_dtype(dtype))
    is_infinite = x == -jnp.inf
    is_masked = jnp.all(is_infinite, dim, keepdims=True)
    logits = jnp.where(is_masked, 0, x)
    y = jax.nn.softmax(logits, dim)
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
    spatial = len(output_size)
    lead = x.shape[:-spatial]
    values = x.reshape(*lead, -1)
    positions = indices.reshape(*lead, -1)
    length = int(np.prod(output_size))
    empty = jnp.zeros((*lead, length), x.dtype)
    last = jnp.put_along_axis(empty, positions, constant(values), -1, inplace=False)
    ranges = [np.arange(size) for size in lead]
    *rows, _ = np.ix_(*ranges, np.zeros(1, int))
    index = (*rows, positions)
    total = empty.at[index].add(values)
    unpooled = with_value(total, last)
    return unpooled.reshape(*lead, *output_size)


def _adaptive_max_pool(x: Any, output_size: Sequence[int]) -> Pair:
    spatial = len(output_size)
    lead = x.shape[:-spatial]
    sizes = x.shape[-spatial:]
    flat, mask = _flat_windows(sizes, output_size)
    values = x.reshape(*lead, -1)
    elements = values[..., flat]
    elements = jnp.where(mask, elements, -jnp.inf)
    positions = jnp.broadcast_to(flat, elements.shape)
    at = jnp.argmax(elements, -1, keepdims=True)
    largest = jnp.take_along_axis(elements, at, -1)
    where = jnp.take_along_axis(positions, at, -1)
    return largest[..., 0], where[..., 0]


def _flat_windows(sizes: Shape, counts: Sequence[int]) -> Pair:
    """Return the flat positions of an adaptive pool's windows, and the windows' masks."""
    places = []
    mask: Any = True
    axes = len(counts)
    for axis in range(axes):
        window, is_within = _windows(sizes[axis], counts[axis])
        place = _spread(window, axis, axes)
        places.append(place)
        mask = mask & _spread(is_within, axis, axes)
    whole = np.broadcast_arrays(*places)
    flat = np.ravel_multi_index(whole, sizes)
    return flat.reshape(*counts, -1), mask.reshape(*counts, -1)


def _spread(windows: Any, axis: int, axes: int) -> Any:
    """Give an array of one axis all axes: those of the result first, those of windows last."""
    own = (axis, axes + axis)
    others = [i for i in range(2 * axes) if i not in own]
    return np.expand_dims(windows, others)


def _windows(size: int, count: int) -> Pair:
    """Return the positions of an adaptive pool's windows along an axis, and the windows' masks."""
    numbers = np.arange(count)
    starts = numbers * size // count
    following = numbers + 1
    ends = -(-following * size // count)
    lengths = ends - starts
    offsets = np.arange(lengths.max())
    positions = starts[:, None] + offsets
    is_within = positions < ends[:, None]
    return np.minimum(positions, size - 1), is_within


def linspace(start: Any, end: Any, steps: int, *, dtype: Any = None, **_: Any) -> Any:
    """Compute torch.linspace between numbers or scalars."""
    numbers = jnp.linspace(start, end, steps)
    return _spaced(numbers, dtype)


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
    exponents = jnp.linspace(start, end, steps)
    return _spaced(base**exponents, dtype)


def _spaced(x: Any, dtype: Any) -> Any:
    if dtype is not None:
        if not dtype.is_floating_point and not dtype.is_complex:
            # torch truncates numbers in float64; one eps less would be another integer.
            raise CallerError(
                f"the torch code spaces numbers between traced ends in {dtype}; expected a"
                " floating dtype: round the result with .round() and cast it, or run the"
                " code by RemoteTorchFunction"
            )
        return x.astype(jax_dtype(dtype))
    if jnp.iscomplexobj(x):
        return x
    default = torch.get_default_dtype()
    return x.astype(jax_dtype(default))


def _take_along_dim(x: Any, indices: Any, dim: int | None = None) -> Any:
    if dim is not None:
        return _along(x, indices, dim)
    x = x.reshape(-1)
    indices = indices.reshape(-1)
    return jnp.take_along_axis(x, indices, 0)


def _along(x: Any, indices: Any, dim: int) -> Any:
    dim %= x.ndim
    own = _resized(x.shape, dim, 1)
    other = _resized(indices.shape, dim, 1)
    shape = np.broadcast_shapes(own, other)
    x_shape = _resized(shape, dim, x.shape[dim])
    indices_shape = _resized(shape, dim, indices.shape[dim])
    x = jnp.broadcast_to(x, x_shape)
    indices = jnp.broadcast_to(indices, indices_shape)
    return jnp.take_along_axis(x, indices, dim)


def _resized(shape: Shape, dim: int, size: int) -> Shape:
    before = shape[:dim]
    after = shape[dim + 1 :]
    return (*before, size, *after)


def _searchsorted(
    ordered: Any,
    values: Any,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Any:
    if not side:
        side = "right" if right else "left"
    if sorter is not None:
        ordered = jnp.take_along_axis(ordered, sorter, -1)
    search: Function = functools.partial(jnp.searchsorted, side=side)
    if ordered.ndim > 1:
        search = jnp.vectorize(search, signature="(n),(m)->(m)")
    positions = search(ordered, jnp.asarray(values))
    if out_int32:
        return positions.astype(jnp.int32)
    return positions.astype(_index_dtype())


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
) -> Arrays:
    if scale_grad_by_freq:
        raise NotImplementedError("scale_grad_by_freq=True")
    if include_last_offset:
        offsets = offsets[:-1]
    count = offsets.shape[0]
    positions = jnp.arange(indices.shape[0])
    bags = jnp.searchsorted(offsets, positions, side="right") - 1
    if padding_idx < -1:
        padding_idx += weight.shape[0]
    is_used = indices != padding_idx
    uses = is_used.astype(jnp.int32)
    sizes = jax.ops.segment_sum(uses, bags, count)
    rows = weight[indices]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    pooled = _pooled(rows, is_used, bags, sizes, mode)
    return pooled, bags, sizes, jnp.zeros_like(sizes)


def _pooled(rows: Any, is_used: Any, bags: Any, sizes: Any, mode: int) -> Any:
    """Return the sum, mean or maximum of each bag's used rows."""
    count = sizes.shape[0]
    sizes = sizes[:, None]
    is_used = is_used[:, None]
    if mode == _MAX:
        rows = jnp.where(is_used, rows, -jnp.inf)
        largest = jax.ops.segment_max(rows, bags, count)
        return jnp.where(sizes > 0, largest, 0)
    rows = jnp.where(is_used, rows, 0)
    total = jax.ops.segment_sum(rows, bags, count)
    if mode == _MEAN:
        return total / jnp.maximum(sizes, 1)
    return total


OPERATORS: Mapping[Any, Function] = {
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
    aten.digamma: _digamma,
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


def _like(draw: Function) -> Function:
    """Return a draw with the shape and type of a tensor."""

    def drawn(key: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        kind = jnp.float32
        if _is_floating(x):
            kind = x.dtype
        sample = draw(key, x.shape, kind, *args, **kwargs)
        return sample.astype(x.dtype)

    return drawn


def _exponential(key: Any, shape: Any, kind: Any, lambd: float = 1) -> Any:
    sample = jax.random.exponential(key, shape, kind)
    return sample / lambd


def _cauchy(
    key: Any, shape: Any, kind: Any, median: float = 0, sigma: float = 1
) -> Any:
    sample = jax.random.cauchy(key, shape, kind)
    return sample * sigma + median


def _geometric(key: Any, shape: Any, kind: Any, p: float) -> Any:
    return jax.random.geometric(key, p, shape)


def _normal(key: Any, shape: Any, kind: Any, mean: Any = 0, std: Any = 1) -> Any:
    sample = jax.random.normal(key, shape, kind)
    return sample * std + mean


def _log_normal(
    key: Any, shape: Any, kind: Any, mean: float = 1, std: float = 2
) -> Any:
    logarithm = _normal(key, shape, kind, mean, std)
    return jnp.exp(logarithm)


def _uniform(key: Any, x: Any, *bounds: float, **named: float) -> Any:
    low, high = 0.0, 1.0
    passed = (*bounds, *named.values())
    if len(passed) == 1:
        (low,) = passed
    elif passed:
        low, high = passed
    return jax.random.uniform(key, x.shape, x.dtype, low, high)


def _integers(key: Any, x: Any, low: int = 0, high: int | None = None) -> Any:
    if high is None:
        high = _integer_limit(x)
    sample = jax.random.randint(key, x.shape, low, high)
    return sample.astype(x.dtype)


def _integer_limit(x: Any) -> int:
    """Return the end of the integers that a tensor's type represents, at most 2^31 - 1."""
    limit = 2**31 - 1
    if not _is_floating(x):
        return limit
    digits = jnp.finfo(x.dtype).nmant + 1
    end: int = 2 ** int(digits)
    return min(end, limit)


def _integers_to(key: Any, x: Any, to: int) -> Any:
    return _integers(key, x, 0, to)


def _normal_of(
    key: Any, mean: Any, std: Any = 1.0, size: Any = None, dtype: Any = None, **_: Any
) -> Any:
    """Compute torch.normal, of tensors or of numbers with a size."""
    if size is None:
        shapes = jnp.shape(mean), jnp.shape(std)
        shape = jnp.broadcast_shapes(*shapes)
        kind = jnp.result_type(mean, std)
    else:
        shape = tuple(size)
        kind = jax_dtype(dtype or torch.get_default_dtype())
    return _normal(key, shape, kind, mean, std)


RANDOM: Mapping[Any, Function] = {
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
    aten.random.to: _integers_to,
    aten.uniform.default: _uniform,
}
