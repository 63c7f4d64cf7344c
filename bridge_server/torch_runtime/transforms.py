"""Derivatives and batches of a call, each again a function of a flat list of arrays.

There are two implementations of each. torch.func's transforms compose, but fail on opaque code,
such as an autograd.Function without setup_context. Plain autograd handles any torch code: a
derivative is a backward pass, a forward-mode derivative two of them, a batch a loop over its rows.
A reverse-mode derivative outside of batches and forward-mode derivatives is always plain, which is
also the fastest.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from bridge_server.signatures import batched, check_differentiable, check_size
from bridge_server.torch_runtime.attention import simple_attention
from bridge_server.torch_runtime.border import dense
from bridge_server.torch_runtime.calls import Call
from bridge_server.torch_runtime.forward_mode import pushed_again, pushed_forward
from bridge_server.torch_runtime.graphs import (
    backward,
    nodes_of,
    refuse_loops,
    refusing_dead_ends,
)
from bridge_server.torch_runtime.types import HOST, TORCH_DTYPES, replaced, zeros
from bridge_wire.errors import BridgeError, ProtocolError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)

Flat = Callable[[Sequence[Any]], list[Tensor]]


class Composed(NamedTuple):
    """A function with its type."""

    f: Flat
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]


def compose(
    call: Call, transforms: Sequence[pb.Transform], *, is_kept: bool
) -> Composed:
    """Return the call with transforms applied in order; `is_kept`: a pullback will follow."""
    plain = functional = Composed(call, call.inputs, call.outputs)
    kinds = [transform.WhichOneof("kind") for transform in transforms]
    last = max((i for i, kind in enumerate(kinds) if kind != "vjp"), default=-1)
    is_keyed_by_row = False
    for i, (kind, transform) in enumerate(zip(kinds, transforms, strict=True)):
        if kind == "vmap":
            inputs = batched(plain.inputs, transform.vmap)
            is_keyed_by_row |= (
                call.key is not None and transform.vmap.axes[call.key] >= 0
            )
            randomness = "different" if call.key is None else "same"
            batch = functools.partial(_batched, randomness=randomness)
            functional = _vmap(functional, transform.vmap, inputs, batch)
            plain = _vmap(plain, transform.vmap, inputs, _row_by_row)
        elif kind == "jvp":
            _check(kind, transform.jvp, plain)
            push = pushed_again if "jvp" in kinds[:i] else pushed_forward
            functional = _jvp(functional, transform.jvp, push)
            plain = _jvp(plain, transform.jvp, _pushed_by_two_pullbacks)
        elif kind == "vjp":
            _check(kind, transform.vjp, plain)
            pull = _pulled_back_within if i < last else _pulled_back
            functional = _vjp(functional, transform.vjp, pull)
            plain = _vjp(plain, transform.vjp, _pulled_back)
        else:
            raise ProtocolError("a transform has no kind")
    order = len(kinds) - kinds.count("vmap") + is_kept
    # torch.func has no generator for each row, returns zero for the derivative of an
    # undifferentiable backward, and wrong values for that of TorchScript's optimized backward.
    is_hard = order > 1 and (call.runs_torchscript or call.has_custom_functions)
    is_plain = last < 0 or is_keyed_by_row or is_hard
    f = plain.f if is_plain else _Either(functional.f, plain.f, call)
    is_higher = "jvp" in kinds or order > 1
    return plain._replace(f=_with_simple_attention(f) if is_higher else f)


def pull_back(
    outputs: Sequence[Any],
    primals: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    **how: bool,
) -> list[Tensor]:
    """Return the cotangents of the primals, linear as in jax.vjp; torch's gradient is conjugate.

    An output is a tensor or its GradientEdge; None if it depends on no input.
    """
    gradients = _gradients(outputs, primals, list(map(_conjugated, cotangents)), **how)
    return [
        torch.zeros_like(x) if gradient is None else _conjugated(dense(gradient))
        for x, gradient in zip(primals, gradients, strict=True)
    ]


# Inputs and outputs of the transforms -------------------------------------------------------------

_Selected = Callable[[Sequence[Tensor]], list[Tensor]]


def _vjp(
    of: Composed, transform: pb.Transform.Vjp, pull: Callable[..., list[Tensor]]
) -> Composed:
    wrt = tuple(transform.wrt)
    selected = tuple(transform.outputs)
    count = len(of.inputs)

    def transformed(arrays: Sequence[Any]) -> list[Tensor]:
        xs = arrays[:count]
        cotangents = arrays[count:]
        return pull(
            _restricted(of.f, xs, wrt, selected), [xs[i] for i in wrt], cotangents
        )

    cotangents = tuple(of.outputs[i] for i in selected)
    return Composed(
        transformed, of.inputs + cotangents, tuple(of.inputs[i] for i in wrt)
    )


def _jvp(
    of: Composed, transform: pb.Transform.Jvp, push: Callable[..., list[Tensor]]
) -> Composed:
    wrt = tuple(transform.wrt)
    selected = tuple(transform.outputs)
    count = len(of.inputs)

    outputs = tuple(of.outputs[i] for i in selected)
    dtypes = [TORCH_DTYPES[spec.dtype] for spec in outputs]

    def transformed(arrays: Sequence[Any]) -> list[Tensor]:
        xs = arrays[:count]
        tangents = arrays[count:]
        pushed = push(
            _restricted(of.f, xs, wrt, selected), [xs[i] for i in wrt], tangents
        )
        # torch.func.jvp of a float32 scalar and a Python number returns a float64 tangent.
        return [
            tangent.to(dtype) for tangent, dtype in zip(pushed, dtypes, strict=True)
        ]

    tangents = tuple(of.inputs[i] for i in wrt)
    return Composed(transformed, of.inputs + tangents, outputs)


def _vmap(
    of: Composed,
    transform: pb.Transform.Vmap,
    inputs: tuple[Spec, ...],
    batch: Callable[..., list[Tensor]],
) -> Composed:
    axes = tuple(transform.axes)
    size = transform.size
    mapped = tuple(i for i, axis in enumerate(axes) if axis >= 0)
    outputs = tuple(spec._replace(shape=(size, *spec.shape)) for spec in of.outputs)
    for spec in outputs:
        check_size(spec, f"vmap over {size} elements")

    def transformed(arrays: Sequence[Any]) -> list[Tensor]:
        if size and not mapped:
            return [y.expand(size, *y.shape) for y in of.f(arrays)]
        return batch(of, arrays, mapped, axes, size)

    return Composed(transformed, inputs, outputs)


def _restricted(
    f: Flat, xs: Sequence[Any], wrt: Sequence[int], selected: Sequence[int]
) -> _Selected:
    """Return `f` from the inputs `wrt` alone to the selected outputs alone."""

    def restricted(primals: Sequence[Tensor]) -> list[Tensor]:
        outputs = f(replaced(xs, wrt, primals))
        return [outputs[i] for i in selected]

    return restricted


# By torch.func ------------------------------------------------------------------------------------


def _pulled_back_within(
    f: _Selected, primals: list[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    if not primals or not cotangents:
        return [torch.zeros_like(x) for x in primals]
    pull = torch.func.vjp(lambda *xs: tuple(f(xs)), *primals)[1]
    return [
        _conjugated(gradient) for gradient in pull(tuple(map(_conjugated, cotangents)))
    ]


def _batched(
    of: Composed,
    arrays: Sequence[Any],
    mapped: Sequence[int],
    axes: Sequence[int],
    size: int,
    *,
    randomness: str,
) -> list[Tensor]:
    def row(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(of.f(replaced(arrays, mapped, values)))

    dims = tuple(axes[i] for i in mapped)
    batch = torch.func.vmap(row, in_dims=dims, randomness=randomness)
    # Hooks such as those of torch.utils.checkpoint would compute again outside of the batch.
    with torch.autograd.graph.disable_saved_tensors_hooks(
        "a batch cannot be computed again"
    ):
        return list(batch(*(arrays[i] for i in mapped)))


# By autograd alone --------------------------------------------------------------------------------


def _pulled_back(
    f: _Selected, primals: list[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    is_differentiated = torch.is_grad_enabled()  # by an outer derivative
    with torch.enable_grad():
        xs = [_as_variable(x) for x in primals]
        if not is_differentiated:
            return pull_back(f(xs), xs, cotangents)
        # Cotangents are variables too: otherwise a backward that can be differentiated only once
        # does not notice the second time.
        variables = [_as_variable(ct) for ct in cotangents]
        ys = f(xs)
        refuse_loops(ys)
        with refusing_dead_ends(ys):
            gradients = pull_back(ys, xs, variables, create_graph=True)
        _refuse_dead_ends(gradients)
        return gradients


def _pushed_by_two_pullbacks(
    f: _Selected, primals: list[Tensor], tangents: Sequence[Tensor]
) -> list[Tensor]:
    """Return the tangents of the outputs: the derivative is the pullback of the linear pullback.

    torch conjugates both times, so no conjugation is left to do.
    """
    is_differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        xs = [_as_variable(x) for x in primals]
        ys = f(xs)
        probes = [torch.zeros_like(y).requires_grad_() for y in ys]
        with refusing_dead_ends(ys):
            pulled = _gradients(ys, xs, probes, create_graph=True)
        _refuse_dead_ends(pulled)
        pushed = _gradients(pulled, probes, tangents, create_graph=is_differentiated)
    return [
        torch.zeros_like(y) if tangent is None else tangent
        for y, tangent in zip(ys, pushed, strict=True)
    ]


def _row_by_row(
    of: Composed,
    arrays: Sequence[Any],
    mapped: Sequence[int],
    axes: Sequence[int],
    size: int,
) -> list[Tensor]:
    # A row is copied to memory of its own: as_strided counts from the start of the memory.
    rows = [
        of.f(
            replaced(
                arrays, mapped, [arrays[i].select(axes[i], n).clone() for i in mapped]
            )
        )
        for n in range(size)
    ]
    if not rows:
        device = next((x.device for x in arrays if isinstance(x, Tensor)), HOST)
        return [
            zeros(spec._replace(shape=(0, *spec.shape)), device) for spec in of.outputs
        ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


class _Either:
    """Calls the function that works: the first choice is torch.func, the second plain autograd."""

    def __init__(self, functional: Flat, plain: Flat, call: Call) -> None:
        self._functional = functional
        self._plain = plain
        self._call = call
        self._chosen: Flat | None = None

    def __call__(self, arrays: Sequence[Any]) -> list[Tensor]:
        if self._chosen is not None:
            return self._chosen(arrays)
        try:
            outputs = self._functional(arrays)
            self._chosen = self._functional
        except (BridgeError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            outputs = self._plain(arrays)
            self._chosen = self._plain
            self._warn(error)
        return outputs

    def _warn(self, error: Exception) -> None:
        if not self._call.is_opaque:  # once per call, for all its programs
            self._call.is_opaque = True
            _log.warning(
                "torch.func cannot transform %s, so batches of it run row by row and forward-mode"
                " derivatives as two backward passes: %s",
                self._call.where,
                str(error).partition("\n")[0],
            )


def _gradients(
    outputs: Sequence[Any],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    **how: bool,
) -> Sequence[Tensor | None]:
    """Return torch's gradients of weighted outputs; None if no output depends on an input."""
    pairs = zip(outputs, weights, strict=True)
    live = [(y, weight) for y, weight in pairs if _has_graph(y)]
    if not live or not inputs:
        return [None] * len(inputs)
    live_outputs, live_weights = zip(*live, strict=True)
    return backward(live_outputs, inputs, live_weights, **how)


def _has_graph(output: Any) -> bool:
    return output.requires_grad if isinstance(output, Tensor) else output is not None


def _refuse_dead_ends(gradients: Sequence[Tensor | None]) -> None:
    """Raise an error if a further derivative does not exist: autograd would return zeros."""
    edges = [
        get_gradient_edge(g) for g in gradients if g is not None and g.requires_grad
    ]
    for node in nodes_of(edges):
        if node.name() == "torch::autograd::Error":
            raise NotImplementedError(
                "a second derivative, or a forward-mode one, of an autograd.Function whose backward"
                " is marked with @once_differentiable; write that backward in differentiable"
                " operators"
            )


def _as_variable(x: Tensor) -> Tensor:
    """Return a tensor that requires gradients; if the tensor has a graph, a link in that graph."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _conjugated(tensor: Tensor) -> Tensor:
    return tensor.conj() if tensor.is_complex() else tensor


def _with_simple_attention(f: Flat) -> Flat:
    def simple(arrays: Sequence[Any]) -> list[Tensor]:
        with simple_attention:
            return f(arrays)

    return simple


# Checks of requests -------------------------------------------------------------------------------


def _check(
    kind: str, transform: pb.Transform.Vjp | pb.Transform.Jvp, of: Composed
) -> None:
    check_differentiable(kind, transform.wrt, of.inputs)
    check_differentiable(kind, transform.outputs, of.outputs)
