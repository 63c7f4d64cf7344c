"""Runs of programs with their derivatives: autograd, forward mode, and torch.func's transforms."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import CGradInterpreterPtr, TransformType
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from bridge_client.programs import Program, model_tag, tag_of
from bridge_client.torch.runs import (
    LIBRARY,
    as_values,
    is_traced,
    pull_back,
    run,
    run_keeping,
    run_operator,
)

# What a pullback of torch.func has kept from its level, it hands over after that level has ended.
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead
_transforms = torch._C._functorch.get_interpreter_stack
_level_of, _unwrap = torch._C._functorch.maybe_get_level, torch._C._functorch.get_unwrapped
_is_legacy_batch = torch._C._functorch.is_legacy_batchedtensor


def apply(program: Program, inputs: Sequence[Any]) -> Sequence[Tensor]:
    """Run a program, recorded by autograd where a gradient can be asked for, and seen by
    torch.func's transforms."""
    if _are_transforms_active():
        if (level := _unrecorded_level()) is not None:
            inputs = [_as_in_no_grad(x, level) for x in inputs]
        return _Transformable.apply(program, *inputs)
    if (
        torch._C._get_tracing_state() is not None
    ):  # torch.jit.trace would take the result for a constant
        return run_operator(program, inputs)
    inputs = [_unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in inputs]
    if torch.is_grad_enabled() and (wrt := _requiring_grad(inputs)):
        return _Recorded.apply(program, wrt, *inputs)  # type: ignore[attr-defined]
    return run(program, inputs)


def prepared(program: Program, inputs: Sequence[Any]) -> Program:
    """Prepare a program, as far as its run on these inputs is going to need it."""
    is_recorded = (
        torch.is_grad_enabled()
        and not _are_transforms_active()
        and torch._C._get_tracing_state() is None
    )
    if is_recorded and (wrt := _requiring_grad(inputs)):
        return program.prepare_keeping(wrt)
    return program.session.prepare(program)


def _requiring_grad(inputs: Sequence[Any]) -> tuple[int, ...]:
    return tuple([i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad])


def _are_transforms_active() -> bool:
    """Whether tensors may be those of a torch.func transform, or dual ones: with more to them
    than their memory."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _unrecorded_level() -> int | None:
    """Return from which level of torch.func's transforms downwards torch.no_grad forbids to
    record; None: from none."""
    is_enabled = torch.is_grad_enabled()
    for transform in reversed(_transforms() or ()):
        if not is_enabled:
            return int(transform.level())
        if transform.key() == TransformType.Grad:
            is_enabled = CGradInterpreterPtr(
                transform
            ).prevGradMode()  # as it was around this transform
    return None if is_enabled else 0


def _as_in_no_grad(value: Any, level: int) -> Any:
    """Return a value that has no history from this level downwards, where a Function would be
    recorded by all levels but the first (torch 2.13): itself, or a copy, since to copy is an
    operator, which is recorded as it should be.
    """
    inner = value
    while isinstance(inner, Tensor):
        depth = _level_of(inner)
        if depth <= level and inner.requires_grad:
            return value.clone()
        inner = _unwrap(inner) if depth > 0 else None
    return value


def _apply_derivative(program: Program, inputs: Sequence[Any]) -> Sequence[Tensor]:
    """Run a derivative as `apply` does, also on the batched tensors of `is_grads_batched` and
    `vectorize=True`.

    These come from the vmap that torch had before torch.func, of which autograd.Function knows
    nothing. They too are one call, of the program's batched kind.
    """
    is_batched = [isinstance(x, Tensor) and _is_legacy_batch(x) for x in inputs]
    if not any(is_batched):
        return apply(program, inputs)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    physical = [
        torch._remove_batch_dim(x, level, 1, 0) if b else x
        for x, b in zip(inputs, is_batched, strict=True)
    ]
    size = next(x.shape[0] for x, b in zip(physical, is_batched, strict=True) if b)
    outputs = apply(program.vmap(tuple(0 if b else -1 for b in is_batched), size), physical)
    return [torch._add_batch_dim(y, 0, level) for y in outputs]


class _Recorded(_SingleLevelFunction):
    """A run that keeps a residual, and its VJP.

    Below torch.func's transforms, which see _Transformable instead.
    """

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    @staticmethod
    def forward(
        ctx: Any, program: Program, wrt: tuple[int, ...], *inputs: Any
    ) -> tuple[Tensor, ...]:
        outputs, handle = run_keeping(program.keeping(wrt), inputs)
        numbers = None
        if program.takes_numbers:
            numbers = [None if isinstance(x, Tensor) else x for x in inputs]
            inputs = tuple(x for x in inputs if isinstance(x, Tensor))
        ctx.call = (program, wrt, numbers)
        # So the residual goes when torch drops the saved tensors: after a backward without
        # retain_graph, with the node, or with whatever a saved-tensor hook makes of them.
        ctx.save_for_backward(handle, *inputs)
        _mark_integers(ctx, program, outputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        program, kept, numbers = ctx.call
        handle, *inputs = ctx.saved_tensors
        if numbers is not None:
            inputs = _merged(numbers, inputs)
        # Only what this backward pass is going to use is worth computing.
        wrt = kept if len(kept) == 1 else tuple([i for i in kept if _is_wanted(ctx, i, numbers)])
        given = tuple([i for i, ct in enumerate(cotangents) if ct is not None])
        gradients: list[Tensor | None] = [None] * (2 + len(inputs))
        if wrt and given:
            selected = [_as_jaxs(ct) for ct in cotangents if ct is not None]
            # With create_graph the derivative must be a program that can be derived again, and
            # under a transform, such as torch.vmap around torch.autograd.grad, one that can be
            # transformed.
            if (
                torch.is_grad_enabled()
                or _are_transforms_active()
                or any(map(_is_legacy_batch, selected))
            ):
                made_by = program if is_traced([handle]) else program.on_model(tag_of(int(handle)))
                made = _apply_derivative(made_by.vjp(wrt, given), [*inputs, *selected])
            else:
                made = pull_back(program, (kept, wrt, given), handle, inputs, selected)
            for i, gradient in zip(wrt, made, strict=True):
                gradients[2 + i] = _as_gradient_of(inputs[i], gradient)
        return tuple(gradients)


class _Transformable(torch.autograd.Function):
    """A run whose every derivative, and batched version, is the run of another program: for
    torch.func, forward-mode derivatives and their compositions, to any depth. It keeps no residual,
    since each derivative must be a function that can be transformed again.
    """

    @staticmethod
    def forward(program: Program, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(run(program, inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        program, *values = inputs
        ctx.tag = model_tag(program.fingerprint)
        numbers = [None if isinstance(x, Tensor) else x for x in values]
        tensors = [x for x in values if isinstance(x, Tensor)]
        ctx.call = (program, numbers)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        _mark_integers(ctx, program, output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        program, numbers = ctx.call
        needed = ctx.needs_input_grad[1:]
        inputs = _merged(numbers, ctx.saved_tensors)
        made_by = program if is_traced(inputs) else program.on_model(ctx.tag)
        return (None, *_gradients(made_by, inputs, needed, cotangents))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> tuple[Tensor | None, ...]:
        program, numbers = ctx.call
        inputs = _merged(numbers, ctx.saved_tensors)
        wrt = tuple(
            i
            for i, t in enumerate(tangents)
            if isinstance(t, Tensor) and program.inputs[i].dtype.is_inexact
        )
        outputs = tuple(i for i in range(len(program.outputs)) if i not in program.discrete_outputs)
        made: list[Tensor | None] = [None] * len(program.outputs)
        if wrt and outputs:
            derived = _apply_derivative(
                program.jvp(wrt, outputs), [*inputs, *(tangents[i] for i in wrt)]
            )
            for i, tangent in zip(outputs, derived, strict=True):
                made[i] = tangent
        return tuple(made)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], program: Program, *inputs: Any
    ) -> tuple[Any, Any]:
        axes = tuple(-1 if dim is None else dim for dim in in_dims[1:])
        outputs = apply(
            program.vmap(axes, int(info.batch_size)), inputs
        )  # guarded, if it is symbolic
        return tuple(outputs), (0,) * len(outputs)


def _gradients(
    program: Program,
    inputs: Sequence[Any],
    needed: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradient of each input that needs one, by the program that is this one's VJP."""
    wrt = tuple(
        i
        for i, spec in enumerate(program.inputs)
        if needed[i] and spec.dtype.is_inexact and not spec.weak
    )
    given = tuple(i for i, ct in enumerate(cotangents) if ct is not None)
    gradients: list[Tensor | None] = [None] * len(inputs)
    if wrt and given:
        selected = [_as_jaxs(ct) for ct in cotangents if ct is not None]
        made = _apply_derivative(program.vjp(wrt, given), [*inputs, *selected])
        for i, gradient in zip(wrt, made, strict=True):
            gradients[i] = _as_gradient_of(inputs[i], gradient)
    return gradients


def _mark_integers(ctx: Any, program: Program, outputs: Sequence[Tensor]) -> None:
    """Tell autograd which outputs have no derivative, and that absent cotangents should stay
    absent."""
    if program.discrete_outputs:
        ctx.mark_non_differentiable(*(outputs[i] for i in program.discrete_outputs))
    ctx.set_materialize_grads(False)


def _merged(numbers: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Return the inputs of a call: its tensors, with the Python numbers in their places."""
    restored = iter(tensors)
    return [next(restored) if number is None else number for number in numbers]


def _is_wanted(ctx: Any, position: int, numbers: Sequence[Any] | None) -> bool:
    """Whether the backward pass under way will use the gradient of this input."""
    edge = (
        position if numbers is None else numbers[:position].count(None)
    )  # tensors alone have edges
    node = ctx.next_functions[edge][0]
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of a leaf that torch.autograd.grad was asked for by name
        return True


def _as_jaxs(cotangent: Tensor) -> Tensor:
    """Return a cotangent as jax.vjp takes it, which is linear where torch's gradient is
    conjugate-linear."""
    if cotangent.layout is not torch.strided:  # as of an output that was an embedding's table
        cotangent = cotangent.to_dense()
    return cotangent.conj() if cotangent.is_complex() else cotangent


def _as_gradient_of(value: Tensor, cotangent: Tensor) -> Tensor:
    """Return the cotangent of an input as torch's gradient of it."""
    if not (value.is_cpu and cotangent.is_cpu) and value.device != cotangent.device:
        cotangent = cotangent.to(value.device)  # a run's outputs are all in one place
    return cotangent.conj() if cotangent.is_complex() else cotangent


def _save_run(ctx: Any, inputs: tuple[Sequence[Tensor], int], output: Sequence[Tensor]) -> None:
    arrays, ctx.program = inputs
    ctx.save_for_backward(*arrays)
    ctx.set_materialize_grads(False)


def _differentiate_run(
    ctx: Any, cotangents: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], None]:
    arrays = ctx.saved_tensors
    program = Program.of(ctx.program).at(arrays).plain
    inputs = as_values(program, arrays)
    needed = [x.requires_grad for x in arrays]
    return _gradients(program, inputs, needed, cotangents[: len(program.outputs)]), None


torch.library.register_autograd(
    "torch_jax_bridge::run", _differentiate_run, setup_context=_save_run, lib=LIBRARY
)


def _save_pull_back(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    _, arrays, program, _, wrt, given = inputs
    ctx.call = (program, tuple(wrt), tuple(given))
    ctx.save_for_backward(*arrays)
    ctx.set_materialize_grads(False)


def _differentiate_pull_back(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    key, wrt, given = ctx.call
    arrays = ctx.saved_tensors
    # Makes the same of the same arrays, and can be derived from.
    program = Program.of(key).at(arrays).vjp(wrt, given)
    needed = [x.requires_grad for x in arrays]
    return (
        None,
        _gradients(program, as_values(program, arrays), needed, cotangents),
        None,
        None,
        None,
        None,
    )


torch.library.register_autograd(
    "torch_jax_bridge::pull_back",
    _differentiate_pull_back,
    setup_context=_save_pull_back,
    lib=LIBRARY,
)
