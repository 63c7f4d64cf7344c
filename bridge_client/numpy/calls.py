"""Prepared calls: programs with the structure of their arguments, and how they map over batches."""

import cmath
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bridge_client.numpy.memory import Array, as_array, dtype_of
from bridge_client.numpy.pytrees import along, rebuilder
from bridge_client.numpy.runs import Arrays
from bridge_client.programs import Positions, Program
from bridge_wire.errors import CallerError, DTypeError, SpecError, StructureError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

Axes = int | None | Sequence[int | None]


class Batch(NamedTuple):
    """A batch: the axis of each input, -1 for those without one, and its size."""

    axes: Positions
    size: int


@dataclass(slots=True)
class Call:
    """A prepared signature: the program of one example, and the structure of its arguments."""

    program: Program
    items: Sequence[pb.Tree]  # one per positional argument
    sizes: Sequence[int]  # numbers of inputs, one per positional argument
    batch: Batch | None
    frozen: frozenset[int]  # inputs that are buffers
    _builders: dict[int, Any] = field(default_factory=dict)

    def batched(self, program: Program, axes: Iterable[int] = ()) -> Program:
        """Return a program derived from the call's over the batch, if there is one; `axes` are
        those of its further inputs."""
        if self.batch is None:
            return program
        return program.vmap((*self.batch.axes, *axes), self.batch.size)

    def axis(self, i: int) -> int:
        """Return the batch axis of an input, or -1."""
        return -1 if self.batch is None else self.batch.axes[i]

    def result(self, leaves: Sequence[Any]) -> Any:
        """Return the result with these leaves."""
        return self.program.result.rebuild(leaves)

    def differentiable(self, arguments: Sequence[int]) -> Positions:
        """Return the inputs of these positional arguments that have a derivative.

        Raises:
          CallerError: an argument has none.
        """
        found: list[int] = []
        for number in arguments:
            start = sum(self.sizes[:number])
            found += filter(self._is_moving, range(start, start + self.sizes[number]))
        if not found:
            raise CallerError(
                f"the positional arguments {list(arguments)} have no derivative; pass an array of"
                " floats among them, not Python numbers or integers"
            )
        return tuple(sorted(set(found)))

    def _is_moving(self, i: int) -> bool:
        spec = self.program.inputs[i]
        return spec.dtype.is_inexact and not spec.weak and i not in self.frozen

    def differentiable_outputs(self) -> Positions:
        """Return the outputs that have a derivative.

        Raises:
          CallerError: the result has none.
        """
        outputs = enumerate(self.program.outputs)
        found = tuple(i for i, spec in outputs if spec.dtype.is_inexact)
        if not found:
            raise CallerError(
                f"{self.program!r} returns no floats, so it has no derivative"
            )
        return found

    def unit_cotangent(self, name: str) -> Array:
        """Return the cotangent 1 of a scalar result.

        Raises:
          CallerError: the result is not one real number.
        """
        outputs = self.program.outputs
        is_scalar = len(outputs) == 1 and outputs[0].shape == ()
        dtype = outputs[0].dtype if is_scalar else None
        if dtype is None or not dtype.is_inexact or dtype.is_complex:
            raise CallerError(
                f"{name} returns {', '.join(map(str, outputs)) or 'no arrays'}; expected one real"
                " scalar: reduce the result in the model, or use vjp"
            )
        return np.ones((), dtype_of(dtype))

    def as_arguments(
        self, numbers: Sequence[int], by_input: Mapping[int, Array]
    ) -> tuple[Any, ...]:
        """Return arrays by input in the structure of these positional arguments."""
        parts = []
        for number in numbers:
            build = self._builders.get(number)
            if build is None:
                build = self._builders[number] = rebuilder(self.items[number])
            start = sum(self.sizes[:number])
            own = range(start, start + self.sizes[number])
            parts.append(build([by_input.get(i) for i in own]))
        return tuple(parts)

    def tangents(self, tangents: Sequence[Any]) -> tuple[Positions, list[Array]]:
        """Return the inputs that have a tangent, and the tangents."""
        if not isinstance(tangents, tuple | list) or len(tangents) != len(self.items):
            raise StructureError(
                f"expected a tuple of {len(self.items)} tangents, one per positional argument"
            )
        wrt: list[int] = []
        moved: list[Array] = []
        position = 0
        for number, (tree, tangent) in enumerate(
            zip(self.items, tangents, strict=True)
        ):
            for path, part in along(tree, tangent, f"tangents[{number}]"):
                if part is not None:
                    spec = self.program.inputs[position]
                    if not self._is_moving(position):
                        raise DTypeError(
                            f"`{path}` belongs to an input without a derivative; pass None"
                        )
                    wrt.append(position)
                    moved.append(_as(spec, part, path))
                position += 1
        if not wrt:
            raise CallerError("no argument has a tangent; pass one that is not None")
        return tuple(wrt), moved


class Pullback:
    """The function from a result's cotangent to those of the positional arguments."""

    def __init__(
        self,
        call: Call,
        wrt: Positions,
        pull: Callable[[Positions, Sequence[Array]], Arrays],
    ) -> None:
        self._call = call
        self._wrt = wrt
        self._pull = pull

    def __call__(self, cotangent: Any) -> tuple[Any, ...]:
        """Return the cotangents of the positional arguments, with None for parts without one."""
        call = self._call
        given: list[int] = []
        cotangents: list[Array] = []
        tree = call.program.result.tree
        for i, (path, part) in enumerate(along(tree, cotangent, "cotangent")):
            if part is None:
                continue
            spec = call.program.outputs[i]
            if not spec.dtype.is_inexact:
                raise DTypeError(
                    f"`{path}` belongs to a result without a derivative; pass None"
                )
            given.append(i)
            cotangents.append(_as(spec, part, path))
        if not given:
            raise CallerError("no result has a cotangent; pass one that is not None")
        pulled = self._pull(tuple(given), cotangents)
        by_input = dict(zip(self._wrt, pulled, strict=True))
        return call.as_arguments(range(len(call.items)), by_input)


def _as(spec: Spec, value: Any, path: str) -> Array:
    """Return a tangent or cotangent as an array; a Python number takes the dtype of its spec."""
    if type(value) not in (int, float, complex):
        return as_array(value, path)
    dtype = dtype_of(spec.dtype)
    is_real = type(value) is not complex
    with np.errstate(over="ignore"), contextlib.suppress(OverflowError):
        if is_real or dtype.kind == "c":
            array = np.asarray(value, dtype)
            if np.isfinite(array) or not cmath.isfinite(value):
                return array
    raise DTypeError(f"{path} is {value!r}; expected a number that {dtype} holds")


def checked_axes(axes: Any) -> Axes:
    """Return axes as Python integers; bools are none.

    Raises:
      CallerError: an axis is no integer.
    """
    each = list(axes) if isinstance(axes, tuple | list) else [axes]
    if not each or any(
        isinstance(x, bool) or not isinstance(x, int | np.integer | None) for x in each
    ):
        raise CallerError(
            f"in_axes={axes!r}; expected an integer or None, or a tuple of them with one for each"
            " positional argument"
        )
    plain = tuple(None if x is None else int(x) for x in each)
    return plain if isinstance(axes, tuple | list) else plain[0]


def batch_of(
    axes: Axes, sizes: Sequence[int], described: Sequence[Spec], paths: Sequence[str]
) -> Batch | None:
    """Return the batch of a call's inputs; None if the function maps over no axis.

    Raises:
      CallerError: the axes are not those of the positional arguments, or nothing is mapped.
      SpecError: an array lacks its axis, or differs in its size from the others.
    """
    if axes == ():
        return None
    each = (axes,) * len(sizes) if isinstance(axes, int | None) else axes
    if len(each) != len(sizes):
        raise CallerError(
            f"in_axes={axes!r}; expected one axis, or one for each of the {len(sizes)} positional"
            " arguments"
        )
    per_input = [axis for axis, n in zip(each, sizes, strict=True) for _ in range(n)]
    per_input += [None] * (len(described) - len(per_input))
    normal: list[int] = []
    batch: dict[int, str] = {}
    for axis, spec, path in zip(per_input, described, paths, strict=True):
        rank = len(spec.shape)
        if axis is None or spec.weak:
            normal.append(-1)
            continue
        if not -rank <= axis < rank:
            raise SpecError(
                f"input `{path}` has shape {list(spec.shape)}, and no batch axis {axis}"
            )
        normal.append(axis % rank)
        batch.setdefault(spec.shape[axis % rank], path)
    if len(batch) != 1:
        raise SpecError(
            f"batch axes of different sizes: {', '.join(f'{n} of `{p}`' for n, p in batch.items())}"
            if batch
            else f"in_axes={axes!r} maps over no array; give an axis of at least one argument"
        )
    return Batch(tuple(normal), next(iter(batch)))


def example(spec: Spec, axis: int) -> Spec:
    """Return the type of one example of an input."""
    if axis < 0:
        return spec
    return spec._replace(shape=spec.shape[:axis] + spec.shape[axis + 1 :])
