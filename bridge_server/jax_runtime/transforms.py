"""Transforms of a call: each turns a flat function into another flat function.

A flat function is `f(bound, *arrays) -> [array, ...]`, where `bound` are the worker's own
parameters if the caller passes none. So the derivative of a program is again a program, and
transforms compose to any depth.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from bridge_server.jax_runtime.types import avals_of, specs_of
from bridge_server.model_errors import model_errors
from bridge_server.signatures import batched, check_differentiable
from bridge_wire.errors import ProtocolError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

Flat = Callable[..., list[Any]]


def compose(
    f: Flat,
    bound: Sequence[Any],
    inputs: tuple[Spec, ...],
    transform: pb.Transform,
    where: str,
) -> tuple[Flat, tuple[Spec, ...]]:
    """Return the transformed function and its inputs."""
    kind = transform.WhichOneof("kind")
    if kind == "vmap":
        return _vmap(f, inputs, transform.vmap)
    if kind == "jvp":
        check_differentiable("jvp", transform.jvp.wrt, inputs)
        check_differentiable(
            "jvp", transform.jvp.outputs, _outputs(f, bound, inputs, where)
        )
        tangents = tuple(inputs[i] for i in transform.jvp.wrt)
        return _jvp(f, len(inputs), transform.jvp), inputs + tangents
    if kind == "vjp":
        check_differentiable("vjp", transform.vjp.wrt, inputs)
        outputs = _outputs(f, bound, inputs, where)
        check_differentiable("vjp", transform.vjp.outputs, outputs)
        cotangents = tuple(outputs[i] for i in transform.vjp.outputs)
        return _vjp(f, len(inputs), transform.vjp), inputs + cotangents
    raise ProtocolError("a transform has no kind")


def _outputs(
    f: Flat, bound: Sequence[Any], inputs: Sequence[Spec], where: str
) -> tuple[Spec, ...]:
    with model_errors(where):
        return specs_of(jax.eval_shape(f, bound, *avals_of(inputs)))


def _vjp(f: Flat, count: int, transform: pb.Transform.Vjp) -> Flat:
    def transformed(bound: Sequence[Any], *arrays: Any) -> list[Any]:
        restricted, primals = _restricted(f, bound, arrays[:count], transform)
        cotangents = list(arrays[count:])
        _, pull = jax.vjp(restricted, *primals)
        return list(pull(cotangents))

    return transformed


def _jvp(f: Flat, count: int, transform: pb.Transform.Jvp) -> Flat:
    def transformed(bound: Sequence[Any], *arrays: Any) -> list[Any]:
        restricted, primals = _restricted(f, bound, arrays[:count], transform)
        tangents = list(arrays[count:])
        _, pushed = jax.jvp(restricted, primals, tangents)
        return list(pushed)

    return transformed


def _vmap(
    f: Flat, inputs: tuple[Spec, ...], transform: pb.Transform.Vmap
) -> tuple[Flat, tuple[Spec, ...]]:
    mapped = batched(inputs, transform)
    size = transform.size
    in_axes = tuple(None if axis < 0 else axis for axis in transform.axes)

    def transformed(bound: Sequence[Any], *arrays: Any) -> list[Any]:
        return jax.vmap(lambda *xs: f(bound, *xs), in_axes=in_axes, axis_size=size)(
            *arrays
        )

    return transformed, mapped


def _restricted(
    f: Flat,
    bound: Sequence[Any],
    xs: Sequence[Any],
    transform: pb.Transform.Vjp | pb.Transform.Jvp,
) -> tuple[Callable[..., list[Any]], list[Any]]:
    """Return `f` from the inputs `wrt` alone to the selected outputs alone, and these inputs."""
    wrt = tuple(transform.wrt)
    selected = tuple(transform.outputs)

    def restricted(*primals: Any) -> list[Any]:
        outputs = f(bound, *replaced(xs, wrt, primals))
        return [outputs[i] for i in selected]

    return restricted, [xs[i] for i in wrt]


def replaced(
    xs: Sequence[Any], positions: Sequence[int], values: Sequence[Any]
) -> list[Any]:
    """Return a copy of a list with other values at some positions."""
    copy = list(xs)
    for i, value in zip(positions, values, strict=True):
        copy[i] = value
    return copy
