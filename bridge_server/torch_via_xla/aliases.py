"""Views and in-place writes of traced tensors; JAX's arrays have neither. Imports both frameworks.

A traced tensor is a base, which holds an array, or a view, which computes its array from its
parent's, and its parent's array after a write into the view. `_elem`, torchax's attribute for a
tensor's array, becomes a property: a view reads its parent again after a write to the memory, and a
write into a view passes up to the base.

As in torch, a write under no_grad, or through a detached tensor, changes the value but not the
derivative.
"""

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
Read = Callable[[Array], Array]
Write = Callable[[Array, Array], Array]
Pair = tuple[Array, Array]


class View(NamedTuple):
    """How a view reads its parent's array, and the parent's array after a write into the view."""

    read: Read
    written: Write


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
        if self.view is None or self.parent is None:
            return self._value
        if self._seen != self.base._version:
            whole = self.parent.read()
            value = self.view.read(whole)
            if self.is_detached:
                value = _overwritten(self._value, value)
            self._value = value
            self._seen = self.base._version
        return self._value

    def end(self) -> None:
        """Drop the array, since its trace has ended."""
        self.parent = Place(None)
        self.view = _ENDED
        self.is_detached = False
        self._value = None
        self._seen = -1  # makes a read call the view, which raises

    def write(self, value: Array, *, has_derivative: bool) -> None:
        """Replace the array, for this tensor and all views of its memory."""
        own = value
        if not has_derivative:
            own = _overwritten(self.read(), value)
        if self.view is None or self.parent is None:
            self._version += 1
        else:
            before = self.parent.read()
            after = self.view.written(before, value)
            passes_up = has_derivative and not self.is_detached
            self.parent.write(after, has_derivative=passes_up)
        self._value = own
        self._seen = self.base._version


def follow_writes(kind: type[Tensor], note: Callable[[Any], None]) -> None:
    """Make `_elem` of torchax's tensors a property that follows views and writes.

    Call `note` with each new tensor.
    """

    def read(tensor: Any) -> Array:
        return tensor.place.read()

    def write(tensor: Any, value: Array) -> None:
        if "place" in tensor.__dict__:
            has_derivative = torch.is_grad_enabled()
            tensor.place.write(value, has_derivative=has_derivative)
        else:
            tensor.place = Place(value)
            note(tensor)

    kind._elem = property(read, write)  # type: ignore[attr-defined]


def _overwritten(old: Array, new: Array) -> Array:
    """Return the new value with the old one's derivative."""
    if old.shape != new.shape:
        return jax.lax.stop_gradient(new)
    if old.dtype != new.dtype:
        return jax.lax.stop_gradient(new)
    if jnp.issubdtype(old.dtype, jnp.inexact):
        return with_value(old, new)
    return new


def with_value(old: Array, new: Array) -> Array:
    """Return a value with another array's derivative."""
    value = jax.lax.stop_gradient(new)
    return _with_value(old, value)


@jax.custom_jvp
def _with_value(old: Array, new: Array) -> Array:
    return new


@_with_value.defjvp
def _with_value_jvp(primals: Pair, tangents: Pair) -> Pair:
    old, new = primals
    tangent, _ = tangents
    return _with_value(old, new), tangent


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
    if isinstance(made, list):
        return made
    return [made]


def makes_views(operator: Any) -> bool:
    """Return whether an operator's result shares memory with an argument, without a write."""
    schema = getattr(operator, "_schema", None)
    if schema is None:
        return False
    for output in schema.returns:
        alias = output.alias_info
        if alias is not None and not alias.is_write:
            return True
    return False


def indexed(index: Any) -> View:
    """Return the view of the elements at an index, which contains each element once."""

    def read(x: Array) -> Array:
        return x[index]

    def written(x: Array, value: Array) -> Array:
        return x.at[index].set(value)

    return View(read, written)


def strided(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None
) -> View:
    """Return the view of `torch.as_strided` for a contiguous tensor at the start of its memory."""
    positions = np.full(tuple(size), offset or 0)
    for axis, (length, step) in enumerate(zip(size, stride, strict=True)):
        shape = [1] * len(size)
        shape[axis] = length
        offsets = np.arange(length) * step
        positions = positions + offsets.reshape(shape)
    distinct = np.unique(positions)

    def read(x: Array) -> Array:
        memory = x.reshape(-1)
        return memory[positions]

    def written(x: Array, value: Array) -> Array:
        memory = x.reshape(-1)
        after = memory.at[positions].set(value)
        return after.reshape(x.shape)

    if distinct.size < positions.size:
        return View(read, _refuse_overlap)
    return View(read, written)


def _whole(read: Read) -> View:
    """Return a view of all its parent's elements, in another order or shape."""

    def written(x: Array, value: Array) -> Array:
        return _transposed(read, x, value)

    return View(read, written)


def _part(read: Read) -> View:
    """Return a view of some of its parent's elements, each once."""

    def written(x: Array, value: Array) -> Array:
        ones = jnp.ones(value.shape, jnp.int32)
        counts = _transposed(read, x, ones)
        after = _transposed(read, x, value)
        return jnp.where(counts > 0, after, x)

    return View(read, written)


def _transposed(read: Read, x: Array, value: Array) -> Array:
    """Return the array for which `read` returns this value; unread elements are zero."""
    if value.dtype == jnp.bool_:
        numbers = x.astype(jnp.int8)
        bits = value.astype(jnp.int8)
        after = _transposed(read, numbers, bits)
        return after.astype(jnp.bool_)
    parent = jax.ShapeDtypeStruct(x.shape, value.dtype)
    transpose = jax.linear_transpose(read, parent)
    (array,) = transpose(value)
    return array


def _refuse_overlap(x: Array, value: Array) -> Array:
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
        return _reshape(x, shape)

    def read(x: Array) -> Array:
        return jnp.broadcast_to(x, shape)

    return View(read, _refuse_overlap)


def _reshape(x: Tensor, size: Sequence[int], stride: Sequence[int] = ()) -> View:
    def read(x: Array) -> Array:
        return jnp.reshape(x, size)

    return _whole(read)


def _permute(x: Tensor, dims: Sequence[int]) -> View:
    def read(x: Array) -> Array:
        return jnp.transpose(x, dims)

    return _whole(read)


def _t(x: Tensor) -> View:
    return _whole(jnp.transpose)


def _transpose(x: Tensor, dim0: int, dim1: int) -> View:
    if not x.ndim:
        return _SAME

    def read(x: Array) -> Array:
        return jnp.swapaxes(x, dim0, dim1)

    return _whole(read)


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
    pieces = []
    start = 0
    for each in sizes:
        end = start + each
        piece = _slice(x, dim, start, end)
        pieces.append(piece)
        start = end
    return pieces


def _unbind(x: Tensor, dim: int = 0) -> list[View]:
    length = x.shape[dim]
    return [_select(x, dim, i) for i in range(length)]


def _select(x: Tensor, dim: int, index: int) -> View:
    return _along(x, dim, int(index))


def _along(x: Tensor, dim: int, index: int | slice) -> View:
    axis = dim % x.ndim
    before = [slice(None)] * axis
    return indexed((*before, index))


def _squeeze(x: Tensor, dim: int | Sequence[int] | None = None) -> View:
    if not x.ndim:
        return _SAME
    dims: Sequence[int]
    if dim is None:
        dims = range(x.ndim)
    elif isinstance(dim, int):
        dims = [dim]
    else:
        dims = dim
    axes = {d % x.ndim for d in dims if x.shape[d] == 1}

    def read(x: Array) -> Array:
        return jnp.squeeze(x, tuple(axes))

    return _whole(read)


def _unsqueeze(x: Tensor, dim: int) -> View:
    def read(x: Array) -> Array:
        return jnp.expand_dims(x, dim)

    return _whole(read)


def _unfold(x: Tensor, dimension: int, size: int, step: int) -> View:
    if not x.ndim:
        return _unfold_number(size)
    dim = dimension % x.ndim
    count = (x.shape[dim] - size) // step + 1
    starts = np.arange(count) * step
    windows = starts[:, None] + np.arange(size)

    def read(x: Array) -> Array:
        elements = jnp.take(x, windows, dim)
        return jnp.moveaxis(elements, dim + 1, -1)

    if step < size:
        return View(read, _refuse_overlap)
    return _part(read)


def _unfold_number(size: int) -> View:
    def read(x: Array) -> Array:
        row = jnp.reshape(x, (1,))
        return row[:size]

    return _whole(read)


def _diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> View:
    def read(x: Array) -> Array:
        return jnp.diagonal(x, offset, dim1, dim2)

    return _part(read)


def _as_strided(
    x: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> View:
    return strided(x, size, stride, storage_offset)


def _view_as_real(x: Tensor) -> View:
    return View(_parts, _written_parts)


def _view_as_complex(x: Tensor) -> View:
    return View(_complex, _written_complex)


def _parts(x: Array) -> Array:
    parts = [x.real, x.imag]
    return jnp.stack(parts, -1)


def _complex(x: Array) -> Array:
    real = x[..., 0]
    imaginary = x[..., 1]
    return jax.lax.complex(real, imaginary)


def _written_parts(x: Array, value: Array) -> Array:
    return _complex(value)


def _written_complex(x: Array, value: Array) -> Array:
    return _parts(value)


def _conj(x: Tensor) -> View:
    def written(x: Array, value: Array) -> Array:
        return jnp.conj(value)

    return View(jnp.conj, written)


def _neg(x: Tensor) -> View:
    def written(x: Array, value: Array) -> Array:
        return -value

    return View(jnp.negative, written)


def _view_as_dtype(x: Tensor, dtype: torch.dtype) -> View:
    new = jax_dtype(dtype)
    old = jax_dtype(x.dtype)

    def read(x: Array) -> Array:
        return x.view(new)

    def written(x: Array, value: Array) -> Array:
        return value.view(old)

    return View(read, written)


def _same(x: Tensor) -> View:
    return _SAME


def _unchanged(x: Array) -> Array:
    return x


def _replaced(x: Array, value: Array) -> Array:
    return value


def jax_dtype(dtype: torch.dtype) -> Any:
    """Return JAX's dtype of torch's name."""
    name = str(dtype).removeprefix("torch.")
    return jnp.dtype(name)


def _refuse_ended(*arrays: Array) -> Array:
    raise CallerError(
        "the torch code uses a tensor that an earlier call of traced code has kept in a closure, a"
        " class, a global or a cache: make it again in each call, or keep it in an attribute of the"
        " traced module"
    )


_ENDED = View(_refuse_ended, _refuse_ended)
_SAME = View(_unchanged, _replaced)

_VIEWS: Mapping[Any, Callable[..., View | list[View]]] = {
    aten._conj.default: _conj,
    aten._neg_view.default: _neg,
    aten._reshape_alias.default: _reshape,
    aten.alias.default: _same,
    aten.as_strided.default: _as_strided,
    aten.detach.default: _same,
    aten.diagonal.default: _diagonal,
    aten.expand.default: _expand,
    aten.lift_fresh.default: _same,
    aten.permute.default: _permute,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.t.default: _t,
    aten.transpose.int: _transpose,
    aten.unbind.int: _unbind,
    aten.unfold.default: _unfold,
    aten.unsqueeze.default: _unsqueeze,
    aten.view.default: _reshape,
    aten.view.dtype: _view_as_dtype,
    aten.view_as_complex.default: _view_as_complex,
    aten.view_as_real.default: _view_as_real,
}
