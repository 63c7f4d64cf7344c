"""Views and in-place writes of traced tensors; JAX's arrays have neither. Imports both frameworks.

A traced tensor is a base, which holds an array, or a view, which computes its array from its
parent's, and its parent's array after a write into the view. `_elem`, torchax's attribute for a
tensor's array, becomes a property: a view reads its parent again after a write to the memory, and a
write into a view passes up to the base.

As in torch, a write under no_grad, or through a detached tensor, changes the value but not the
derivative.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from bridge_wire.errors import CallerError

aten = torch.ops.aten

Array = Any


class View(NamedTuple):
    """How a view reads its parent's array, and the parent's array after a write into the view."""

    read: Callable[[Array], Array]
    written: Callable[[Array, Array], Array]


class Place:
    """The array of a tensor: a base, or a view of its parent's array."""

    def __init__(
        self,
        value: Array,
        parent: "Place | None" = None,
        view: View | None = None,
        is_detached: bool = False,
    ) -> None:
        self.parent = parent
        self.view = view
        # Whether it shares only the value with its parent, and has a derivative of its own.
        self.is_detached = is_detached
        self.base: Place = self if parent is None else parent.base
        self._value = value
        self._version = 0  # of a base: the number of writes to its memory
        self._seen = self.base._version

    @classmethod
    def of_view(cls, parent: "Place", view: View, *, is_detached: bool) -> "Place":
        """Return the place of a view."""
        value = view.read(parent.read())
        if is_detached:
            value = jax.lax.stop_gradient(value)
        return cls(value, parent, view, is_detached)

    def read(self) -> Array:
        """Return the array after all writes."""
        if (
            self.view is not None
            and self.parent is not None
            and self._seen != self.base._version
        ):
            value = self.view.read(self.parent.read())
            self._value = (
                _overwritten(self._value, value) if self.is_detached else value
            )
            self._seen = self.base._version
        return self._value

    def end(self) -> None:
        """Drop the array, since its trace has ended."""
        self.parent, self.view, self.is_detached = Place(None), _ENDED, False
        self._value, self._seen = None, -1  # makes a read call the view, which raises

    def write(self, value: Array, *, has_derivative: bool) -> None:
        """Replace the array, for this tensor and all views of its memory."""
        own = value if has_derivative else _overwritten(self.read(), value)
        if self.view is None or self.parent is None:
            self._version += 1
        else:
            after = self.view.written(self.parent.read(), value)
            self.parent.write(
                after, has_derivative=has_derivative and not self.is_detached
            )
        self._value, self._seen = own, self.base._version


def follow_writes(kind: type[Tensor], note: Callable[[Any], None]) -> None:
    """Make `_elem` of torchax's tensors a property that follows views and writes.

    Call `note` with each new tensor.
    """

    def read(tensor: Any) -> Array:
        return tensor.place.read()

    def write(tensor: Any, value: Array) -> None:
        if "place" in tensor.__dict__:
            tensor.place.write(value, has_derivative=torch.is_grad_enabled())
        else:
            tensor.place = Place(value)
            note(tensor)

    kind._elem = property(read, write)  # type: ignore[attr-defined]


def _overwritten(old: Array, new: Array) -> Array:
    """Return the new value with the old one's derivative."""
    if old.shape != new.shape or old.dtype != new.dtype:
        return jax.lax.stop_gradient(new)
    return with_value(old, new) if jnp.issubdtype(old.dtype, jnp.inexact) else new


def with_value(old: Array, new: Array) -> Array:
    """Return a value with another array's derivative."""
    return _with_value(old, jax.lax.stop_gradient(new))


@jax.custom_jvp
def _with_value(old: Array, new: Array) -> Array:
    return new


@_with_value.defjvp
def _with_value_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return _with_value(*primals), tangents[0]


# ATen's views -------------------------------------------------------------------------------------


def views(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[View] | None:
    """Return an operator's views of its first argument, or None if it is no view operator."""
    make = _VIEWS.get(operator)
    if make is None:
        return None
    arguments = {each.name: each.default_value for each in operator._schema.arguments}
    arguments.update(kwargs)
    arguments.update(zip(arguments, args, strict=False))
    made = make(*arguments.values())
    return made if isinstance(made, list) else [made]


def makes_views(operator: Any) -> bool:
    """Return whether an operator's result shares memory with an argument, without a write."""
    schema = getattr(operator, "_schema", None)
    aliases = [each.alias_info for each in schema.returns] if schema is not None else []
    return any(alias is not None and not alias.is_write for alias in aliases)


def indexed(index: Any) -> View:
    """Return the view of the elements at an index, which contains each element once."""
    return View(lambda x: x[index], lambda x, value: x.at[index].set(value))


def strided(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None
) -> View:
    """Return the view of `torch.as_strided` for a contiguous tensor at the start of its memory."""
    positions = np.full(tuple(size), offset or 0)
    for axis, (length, step) in enumerate(zip(size, stride, strict=True)):
        shape = [1] * len(size)
        shape[axis] = length
        positions = positions + (np.arange(length) * step).reshape(shape)
    is_distinct = np.unique(positions).size == positions.size

    def written(x: Array, value: Array) -> Array:
        if not is_distinct:
            _refuse_overlap()
        return x.reshape(-1).at[positions].set(value).reshape(x.shape)

    return View(lambda x: x.reshape(-1)[positions], written)


def _whole(read: Callable[[Array], Array]) -> View:
    """Return a view of all its parent's elements, in another order or shape."""
    return View(read, lambda x, value: _transposed(read, x, value))


def _part(read: Callable[[Array], Array]) -> View:
    """Return a view of some of its parent's elements, each once."""

    def written(x: Array, value: Array) -> Array:
        ones = jnp.ones(value.shape, jnp.int32)
        counts = _transposed(read, x, ones)
        return jnp.where(counts > 0, _transposed(read, x, value), x)

    return View(read, written)


def _transposed(read: Callable[[Array], Array], x: Array, value: Array) -> Array:
    """Return the array for which `read` returns this value; unread elements are zero."""
    if value.dtype == jnp.bool_:
        bits = _transposed(read, x.astype(jnp.int8), value.astype(jnp.int8))
        return bits.astype(jnp.bool_)
    transpose = jax.linear_transpose(read, jax.ShapeDtypeStruct(x.shape, value.dtype))
    (array,) = transpose(value)
    return array


def _refuse_overlap() -> None:
    raise CallerError(
        "the torch code writes into a tensor whose elements share memory, such as a result of"
        " expand; torch refuses this too: write into a .clone() of it"
    )


def _expand(x: Tensor, size: Sequence[int], implicit: bool = False) -> View:
    lead = len(size) - x.ndim
    shape = list(size)
    for axis, own in enumerate(x.shape, lead):
        if shape[axis] == -1:
            shape[axis] = own
    if math.prod(shape) == x.numel():
        return _whole(lambda x: jnp.reshape(x, shape))
    return View(
        lambda x: jnp.broadcast_to(x, shape), lambda x, value: _refuse_overlap()
    )


def _transpose(x: Tensor, dim0: int, dim1: int) -> View:
    return _whole(lambda x: jnp.swapaxes(x, dim0, dim1) if x.ndim else x)


def _slice(
    x: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> View:
    return _along(x, dim, slice(start, end, step))


def _split(x: Tensor, size: int | Sequence[int], dim: int = 0) -> list[View]:
    length = x.shape[dim]
    if isinstance(size, int):
        starts = range(0, length, size) if length else [0]
        sizes = [min(size, length - start) for start in starts]
    else:
        sizes = list(size)
    ends = itertools.accumulate(sizes)
    return [
        _slice(x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)
    ]


def _unbind(x: Tensor, dim: int = 0) -> list[View]:
    return [_select(x, dim, i) for i in range(x.shape[dim])]


def _select(x: Tensor, dim: int, index: int) -> View:
    return _along(x, dim, int(index))


def _along(x: Tensor, dim: int, index: int | slice) -> View:
    before = (slice(None),) * (dim % x.ndim)
    return indexed((*before, index))


def _squeeze(x: Tensor, dim: int | Sequence[int] | None = None) -> View:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    axes = tuple({d % x.ndim for d in dims if x.shape[d] == 1} if x.ndim else ())
    return _whole(lambda x: jnp.squeeze(x, axes))


def _unfold(x: Tensor, dimension: int, size: int, step: int) -> View:
    dim = dimension % max(x.ndim, 1)
    if not x.ndim:
        return _whole(lambda x: jnp.reshape(x, (1,))[:size])
    count = (x.shape[dim] - size) // step + 1
    windows = np.arange(count)[:, None] * step + np.arange(size)

    def read(x: Array) -> Array:
        return jnp.moveaxis(jnp.take(x, windows, dim), dim + 1, -1)

    return (
        _part(read) if step >= size else View(read, lambda x, value: _refuse_overlap())
    )


def _diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> View:
    return _part(lambda x: jnp.diagonal(x, offset, dim1, dim2))


def _as_strided(
    x: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> View:
    return strided(x, size, stride, storage_offset)


def _view_as_real(x: Tensor) -> View:
    return View(
        lambda x: jnp.stack([x.real, x.imag], -1),
        lambda x, value: jax.lax.complex(value[..., 0], value[..., 1]),
    )


def _view_as_complex(x: Tensor) -> View:
    return View(
        lambda x: jax.lax.complex(x[..., 0], x[..., 1]),
        lambda x, value: jnp.stack([value.real, value.imag], -1),
    )


def _view_as_dtype(x: Tensor, dtype: torch.dtype) -> View:
    new = jax_dtype(dtype)
    old = jax_dtype(x.dtype)
    return View(lambda x: x.view(new), lambda x, value: value.view(old))


def jax_dtype(dtype: torch.dtype) -> Any:
    """Return JAX's dtype of torch's name."""
    return jnp.dtype(str(dtype).removeprefix("torch."))


def _refuse_ended(*arrays: Array) -> Array:
    raise CallerError(
        "the torch code uses a tensor that an earlier call of traced code has kept in a closure, a"
        " class, a global or a cache: make it again in each call, or keep it in an attribute of the"
        " traced module"
    )


_ENDED = View(_refuse_ended, _refuse_ended)
_SAME = View(lambda x: x, lambda x, value: value)

_VIEWS: Mapping[Any, Callable[..., View | list[View]]] = {
    aten._conj.default: lambda x: View(jnp.conj, lambda x, value: jnp.conj(value)),
    aten._neg_view.default: lambda x: View(jnp.negative, lambda x, value: -value),
    aten._reshape_alias.default: lambda x, size, stride: _whole(
        lambda x: jnp.reshape(x, size)
    ),
    aten.alias.default: lambda x: _SAME,
    aten.as_strided.default: _as_strided,
    aten.detach.default: lambda x: _SAME,
    aten.diagonal.default: _diagonal,
    aten.expand.default: _expand,
    aten.lift_fresh.default: lambda x: _SAME,
    aten.permute.default: lambda x, dims: _whole(lambda x: jnp.transpose(x, dims)),
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.t.default: lambda x: _whole(jnp.transpose),
    aten.transpose.int: _transpose,
    aten.unbind.int: _unbind,
    aten.unfold.default: _unfold,
    aten.unsqueeze.default: lambda x, dim: _whole(lambda x: jnp.expand_dims(x, dim)),
    aten.view.default: lambda x, size: _whole(lambda x: jnp.reshape(x, size)),
    aten.view.dtype: _view_as_dtype,
    aten.view_as_complex.default: _view_as_complex,
    aten.view_as_real.default: _view_as_real,
}
