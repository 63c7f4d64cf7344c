"""Autograd's graphs: backward passes, nodes, saved tensors."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

# The module of torch.cond, while_loop, scan and others.
_OF_OPERATORS = "torch._higher_order_ops."


def _backward_by_engine() -> Callable[..., tuple[Tensor | None, ...]] | None:
    """Return the engine's entry, twice as fast as torch.autograd.grad; None if torch lacks it."""
    try:
        run = torch.autograd.Variable._execution_engine.run_backward
        x = torch.ones(2).requires_grad_()
        (gradient,) = run(
            (x * 3,), (torch.ones(2),), False, False, (x,), True, accumulate_grad=False
        )
        return run if gradient.tolist() == [3.0, 3.0] and x.grad is None else None
    except Exception:  # private: any release may lack it, or change its arguments
        return None


_engine = _backward_by_engine()


def backward(
    outputs: Sequence[Any],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """Return torch's gradients of weighted outputs: tensors or edges, all with a graph."""
    keep = retain_graph or create_graph
    if _engine is None:
        return torch.autograd.grad(
            outputs,
            inputs,
            weights,
            retain_graph=keep,
            create_graph=create_graph,
            allow_unused=True,
        )
    return _engine(
        tuple(outputs),
        tuple(weights),
        keep,
        create_graph,
        tuple(inputs),
        True,
        accumulate_grad=False,
    )


@contextlib.contextmanager
def refusing_dead_ends(outputs: Sequence[Any]) -> Iterator[None]:
    """Raise NotImplementedError where a backward pass cannot be differentiated.

    If the backward of an autograd.Function runs under torch.no_grad, or detaches, its gradients
    depend on the cotangents without a graph: autograd would return zero for the next derivative.
    """
    reachable = nodes_of([_edge(y) for y in outputs])
    nodes = [node for node in reachable if isinstance(node, BackwardCFunction)]
    handles = [
        node.register_hook(functools.partial(_refuse_lost, node)) for node in nodes
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def refuse_loops(outputs: Sequence[Any]) -> None:
    """Raise NotImplementedError if a graph has a backward that torch differentiates wrongly.

    In torch 2.13, second derivatives of `scan` and `while_loop` lack terms, without an error.
    """
    for node in nodes_of([_edge(y) for y in outputs]):
        function = getattr(type(node), "_forward_cls", None)
        if getattr(function, "__module__", "").startswith(_OF_OPERATORS):
            raise NotImplementedError(
                f"a second derivative of an operator that takes functions ({node.name()}), such as"
                " torch.cond or scan, of which torch computes first ones only; write it as plain"
                " Python, or take first derivatives"
            )


def _edge(output: Tensor | GradientEdge | None) -> GradientEdge | None:
    if not isinstance(output, Tensor):
        return output
    return get_gradient_edge(output) if output.requires_grad else None


def _refuse_lost(
    node: Any, gradients: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> None:
    if not any(ct is not None and ct.requires_grad for ct in cotangents):
        return
    lost = [i for i, g in enumerate(gradients) if g is not None and not g.requires_grad]
    if not lost:
        return
    if all(_is_zero(gradients[i]) for i in lost):  # perhaps due to a zero cotangent
        with torch.no_grad():
            ones = [ct if ct is None else torch.ones_like(ct) for ct in cotangents]
            probed = node.apply(*ones)
        gradients = probed if isinstance(probed, tuple) else (probed,)
        if all(_is_zero(gradients[i]) for i in lost):
            return
    raise NotImplementedError(
        "a second derivative, or a forward-mode one, of an autograd.Function whose backward"
        f" ({node.name()}) is not differentiable, as under torch.no_grad; write that backward in"
        " differentiable operators, or take first derivatives in reverse mode only"
    )


def _is_zero(gradient: Tensor | None) -> bool:
    return gradient is None or not gradient.any()


def nbytes_saved(edges: Sequence[Any], inputs: Sequence[Tensor]) -> int:
    """Return the bytes of a graph's saved tensors, without its inputs, which the client owns."""
    theirs = {x.untyped_storage().data_ptr() for x in inputs}
    sizes: dict[int, int] = {}
    for node in nodes_of(edges):
        for tensor in _saved_by(node):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in theirs:
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def nodes_of(edges: Sequence[Any]) -> set[Any]:
    """Return the nodes reachable from the ends of a graph; None is an end without a graph."""
    nodes: set[Any] = set()
    waiting = [edge.node for edge in edges if edge is not None]
    while waiting:
        node = waiting.pop()
        if node not in nodes:
            nodes.add(node)
            waiting += [
                following
                for following, _ in node.next_functions
                if following is not None
            ]
    return nodes


def _saved_by(node: Any) -> list[Tensor]:
    saved: list[Any] = []
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            # A freed or overwritten tensor raises; the graph does not use it.
            with contextlib.suppress(RuntimeError):
                value = getattr(node, name)
                saved += value if isinstance(value, list | tuple) else [value]
    return [each for each in saved if isinstance(each, Tensor) and _has_memory(each)]


def _has_memory(tensor: Tensor) -> bool:
    # The zeros of forward mode have a storage without an address.
    return tensor.layout is torch.strided and not tensor._is_zerotensor()
