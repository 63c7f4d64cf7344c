"""Runs of programs with their derivatives: autograd, forward mode, and torch.func's transforms."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from bridge_client.arguments import Values
from bridge_client.programs import Positions, Program, model_tag, tag_of
from bridge_client.torch import modes
from bridge_client.torch.families import AnyProgram, member_for
from bridge_client.torch.graphs import pinned
from bridge_client.torch.runs import (
    LIBRARY,
    as_values,
    pull_back,
    run,
    run_keeping,
    run_operator,
)

# A pullback of torch.func returns tensors of its level after that level has ended.
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead
_level_of = torch._C._functorch.maybe_get_level
_unwrap = torch._C._functorch.get_unwrapped
_unwrap_at = torch._C._functorch._unwrap_for_grad
_wrap_at = torch._C._functorch._wrap_for_grad
_will_execute = torch._C._will_engine_execute_node

Tensors = Sequence[Tensor]
TensorTuple = tuple[Tensor, ...]
Optionals = tuple[Tensor | None, ...]
Cotangents = Sequence[Tensor | None]
Gradients = list[Tensor | None]


def apply(program: AnyProgram, inputs: Values) -> Tensors:
    """Run a program. Autograd records the run if a gradient can be asked for, and torch.func's
    transforms see it."""
    if modes.is_transforming():
        at = modes.sole_grad_level()
        if at is not None and _are_recordable(at, inputs := _alive(inputs)):
            return _apply_at(at, program, inputs)
        level = modes.unrecorded_level()
        if level is not None:
            inputs = [_as_in_no_grad(x, level) for x in inputs]
        transformed: Tensors = _Transformable.apply(program, *inputs)
        return transformed
    # torch.jit.trace would take the result for a constant.
    if modes.jit_trace() is not None:
        return run_operator(program, inputs)
    inputs = _alive(inputs)
    if not torch.is_grad_enabled():
        return run(program, inputs)
    wrt = _requiring_grad(inputs)
    if not wrt:
        return run(program, inputs)
    recorded: Tensors = _Recorded.apply(0, program, wrt, *inputs)  # type: ignore[attr-defined]
    return recorded


def _apply_at(level: int, program: AnyProgram, inputs: Values) -> Tensors:
    """Run a program, and have the only level of torch.func record the run as autograd does.

    As a _Transformable, each derivative would run the forward again, and torch makes classes for it
    at each call (0.5 ms, torch 2.13).
    """
    wrt = _requiring_grad(inputs)
    with enable_single_level_autograd_function():
        recorded: Tensors = _Recorded.apply(  # type: ignore[attr-defined]
            level, program, wrt, *inputs
        )
    return recorded


def _are_recordable(level: int, values: Values) -> bool:
    """Whether this level of torch.func records a run, and no level or mode below would."""
    inner = _unwrapped(level, values)
    if modes.is_traced(inner) or _requiring_grad(inner):
        return False
    return bool(_requiring_grad(values))


def _alive(values: Values) -> list[Any]:
    """Return values of transforms that are over, such as those of a pullback, without their
    level: another transform may have its number."""
    return [_unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in values]


def _unwrapped(level: int, values: Values) -> list[Any]:
    return [_unwrap_at(x, level) if isinstance(x, Tensor) else x for x in values]


def prepare(program: Program, inputs: Values) -> Program:
    """Prepare a program, as far as a run on these inputs needs it."""
    is_watched = modes.is_transforming() or modes.jit_trace() is not None
    if torch.is_grad_enabled() and not is_watched:
        wrt = _requiring_grad(inputs)
        if wrt:
            return program.prepare_keeping(wrt)
    prepared: Program = program.session.prepare(program)
    return prepared


def _requiring_grad(inputs: Values) -> Positions:
    wrt = []
    for i, x in enumerate(inputs):
        if isinstance(x, Tensor) and x.requires_grad:
            wrt.append(i)
    return tuple(wrt)


def _as_in_no_grad(value: Any, level: int) -> Any:
    """Return a value without history from this level downwards: the value itself, or a copy.

    All levels but the first would record a Function (torch 2.13). A copy is an operator, which
    torch records correctly.
    """
    inner = value
    while isinstance(inner, Tensor):
        depth = _level_of(inner)
        if depth <= level and inner.requires_grad:
            return value.clone()
        if depth <= 0:
            return value
        inner = _unwrap(inner)
    return value


def _apply_derivative(program: AnyProgram, inputs: Values) -> Tensors:
    """Run a derivative as `apply` does, also on the batched tensors of `is_grads_batched` and
    `vectorize=True`.

    They come from the vmap before torch.func, which autograd.Function does not support. They too
    are one call, of the batched program.
    """
    is_batched = [isinstance(x, Tensor) and modes.is_legacy_batched(x) for x in inputs]
    if not any(is_batched):
        return apply(program, inputs)
    level = modes.legacy_vmap_level()
    physical = []
    for x, batched in zip(inputs, is_batched, strict=True):
        if batched:
            x = torch._remove_batch_dim(x, level, 1, 0)
        physical.append(x)
    first = is_batched.index(True)
    size = physical[first].shape[0]
    axes = tuple(0 if batched else -1 for batched in is_batched)
    batched_program = program.vmap(axes, size)
    outputs = apply(batched_program, physical)
    return [torch._add_batch_dim(y, 0, level) for y in outputs]


class _Recorded(_SingleLevelFunction):
    """A run that keeps a residual, and its VJP.

    For calls outside of torch.func's transforms, and by `_apply_at` for its grad and vjp where no
    other transform is around them: `level` is theirs, or 0. Other calls use _Transformable.
    """

    _compiled_autograd_key = staticmethod(
        torch.autograd.Function._compiled_autograd_key
    )

    @staticmethod
    def forward(
        ctx: Any, level: int, program: AnyProgram, wrt: Positions, *inputs: Any
    ) -> TensorTuple:
        keeping = program.keeping(wrt)
        if level:
            with temporarily_pop_interpreter_stack():
                outputs, handle = run_keeping(keeping, _unwrapped(level, inputs))
            outputs = [_wrap_at(y, level) for y in outputs]
        else:
            outputs, handle = run_keeping(keeping, inputs)
        numbers = None
        if program.takes_numbers:
            numbers = [None if isinstance(x, Tensor) else x for x in inputs]
            inputs = tuple(x for x in inputs if isinstance(x, Tensor))
        ctx.call = (level, program, wrt, numbers)
        # So the residual is dropped when torch drops the saved tensors: after a backward without
        # retain_graph, with the node, or with the values that a saved-tensor hook makes of them.
        ctx.save_for_backward(handle, *inputs)
        _mark_nondifferentiable(ctx, program, outputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Optionals:
        level, program, kept, numbers = ctx.call
        handle, *inputs = ctx.saved_tensors
        if numbers is not None:
            inputs = _merged(numbers, inputs)
        # Only the gradients that this backward pass uses are worth computing.
        wrt = kept
        if len(kept) > 1:
            wrt = _wanted(ctx, kept, numbers)

        def pull(outputs: Positions, selected: list[Tensor]) -> Tensors:
            residual = _Residual(program, (kept, wrt, outputs), handle)
            return _pull_at(level, residual, inputs, selected)

        return (None, None, None, *_gradients(inputs, wrt, cotangents, pull))


class _Residual(NamedTuple):
    """The residual of a run, and what is asked of it; see `pull_back`."""

    program: AnyProgram
    positions: tuple[Positions, Positions, Positions]
    handle: Tensor

    def vjp(self) -> AnyProgram:
        """Return the program that needs no residual, but computes the forward once more."""
        _, wrt, outputs = self.positions
        origin = self.program
        if isinstance(origin, Program) and not modes.is_traced([self.handle]):
            origin = _on_model_of(origin, self.handle)
        return origin.vjp(wrt, outputs)


def _pull_at(
    level: int, residual: _Residual, inputs: list[Any], selected: list[Tensor]
) -> Tensors:
    """Return the cotangents of a run's inputs, such that they can be derived again if create_graph
    asks for it."""
    if level:  # its transform may be over: a pullback of torch.func.vjp
        inputs, selected = _alive(inputs), _alive(selected)
    if any(map(modes.is_legacy_batched, selected)):
        return _apply_derivative(residual.vjp(), [*inputs, *selected])
    if not modes.is_transforming():
        if not torch.is_grad_enabled():
            return pull_back(*residual, inputs, selected)
        is_watched = modes.is_traced([residual.handle, *selected])
        if not is_watched and modes.jit_trace() is None:
            pulled: Tensors = _PulledBack.apply(  # type: ignore[attr-defined]
                0, residual, *inputs, *selected
            )
            return pulled
    elif level and modes.sole_grad_level() == level:
        inner = _unwrapped(level, [*inputs, *selected])
        if not modes.is_traced(inner) and not _requiring_grad(inner):
            with enable_single_level_autograd_function():
                pulled = _PulledBack.apply(  # type: ignore[attr-defined]
                    level, residual, *inputs, *selected
                )
            return pulled
    # Under other transforms, such as torch.vmap around torch.autograd.grad, the derivative must be
    # a program that can be transformed.
    return _apply_derivative(residual.vjp(), [*inputs, *selected])


class _PulledBack(_SingleLevelFunction):
    """The cotangents of a run's inputs, from its residual; their derivative is the VJP's, which
    computes the forward once more."""

    _compiled_autograd_key = staticmethod(
        torch.autograd.Function._compiled_autograd_key
    )

    @staticmethod
    def forward(ctx: Any, level: int, residual: _Residual, *values: Any) -> TensorTuple:
        numbers = [None if isinstance(x, Tensor) else x for x in values]
        tensors = [x for x in values if isinstance(x, Tensor)]
        ctx.call = (residual.program, residual.positions, numbers)
        ctx.save_for_backward(residual.handle, *tensors)
        ctx.set_materialize_grads(False)
        count = len(values) - len(residual.positions[-1])
        if not level:
            return tuple(pull_back(*residual, values[:count], values[count:]))
        values = tuple(_unwrapped(level, values))
        with temporarily_pop_interpreter_stack():
            pulled = pull_back(*residual, values[:count], values[count:])
        return tuple([_wrap_at(y, level) for y in pulled])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Optionals:
        program, positions, numbers = ctx.call
        handle, *tensors = ctx.saved_tensors
        values = _merged(numbers, tensors)
        vjp = _Residual(program, positions, handle).vjp()
        _, _, *needed = ctx.needs_input_grad
        return (None, None, *_gradients_by_vjp(vjp, values, needed, cotangents))


class _Transformable(torch.autograd.Function):
    """A run whose derivatives and batched version are all runs of other programs: for torch.func,
    forward-mode derivatives and their compositions, to any depth. It keeps no residual, since each
    derivative must be a function that can be transformed again."""

    @staticmethod
    def forward(program: Program, *inputs: Any) -> TensorTuple:
        return tuple(run(program, inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: TensorTuple) -> None:
        program, *values = inputs
        ctx.tag = model_tag(program.fingerprint)
        numbers = [None if isinstance(x, Tensor) else x for x in values]
        tensors = [x for x in values if isinstance(x, Tensor)]
        ctx.call = (program, numbers)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        _mark_nondifferentiable(ctx, program, output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Optionals:
        program, numbers = ctx.call
        inputs = _merged(numbers, ctx.saved_tensors)
        origin = program
        if not modes.is_traced(inputs):
            origin = program.on_model(ctx.tag)
        _, *needed = ctx.needs_input_grad
        gradients = _gradients_by_vjp(origin, inputs, needed, cotangents)
        return (None, *gradients)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> Optionals:
        program, numbers = ctx.call
        inputs = _merged(numbers, ctx.saved_tensors)
        wrt = []
        selected = []
        for i, tangent in enumerate(tangents):
            if not isinstance(tangent, Tensor):
                continue
            if program.inputs[i].dtype.is_inexact:
                wrt.append(i)
                selected.append(tangent)
        count = len(program.outputs)
        discrete = program.prepared.nondifferentiable_outputs
        outputs = tuple(i for i in range(count) if i not in discrete)
        moved: Gradients = [None] * count
        if wrt and outputs:
            jvp = program.jvp(tuple(wrt), outputs)
            derived = _apply_derivative(jvp, [*inputs, *selected])
            for i, tangent in zip(outputs, derived, strict=True):
                moved[i] = tangent
        return tuple(moved)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], program: Program, *inputs: Any
    ) -> tuple[Any, Any]:
        _, *dims = in_dims
        axes = tuple(-1 if dim is None else dim for dim in dims)
        size = int(info.batch_size)  # has torch.compile guard it, if it is symbolic
        batched = program.vmap(axes, size)
        outputs = apply(batched, inputs)
        out_dims = (0,) * len(outputs)
        return tuple(outputs), out_dims


# torch asks for it at each call, and to make it takes 40 us (torch 2.13).
_signature = inspect.signature(_Transformable.forward)
_Transformable.forward.__signature__ = _signature  # type: ignore[attr-defined]


def _gradients(
    inputs: Values,
    wrt: Positions,
    cotangents: Cotangents,
    pull: Callable[[Positions, list[Tensor]], Tensors],
) -> Gradients:
    """Return the gradient of each input, None for inputs not in `wrt`.

    `pull(outputs, cotangents)` returns JAX's cotangents of the inputs `wrt`, from JAX's cotangents
    of these outputs.
    """
    outputs = tuple([i for i, ct in enumerate(cotangents) if ct is not None])
    gradients: Gradients = [None] * len(inputs)
    if wrt and outputs:
        selected = [_as_jaxs(ct) for ct in cotangents if ct is not None]
        pulled = pull(outputs, selected)
        for i, cotangent in zip(wrt, pulled, strict=True):
            gradients[i] = _as_gradient_of(inputs[i], cotangent)
    return gradients


def _gradients_by_vjp(
    program: AnyProgram,
    inputs: Values,
    needed: Sequence[bool],
    cotangents: Cotangents,
) -> Gradients:
    """Return the gradient of each input that needs one, by the VJP program."""
    wanted = []
    for i, spec in enumerate(program.inputs):
        is_float = spec.dtype.is_inexact and not spec.weak
        if is_float and needed[i]:
            wanted.append(i)
    wrt = tuple(wanted)

    def pull(outputs: Positions, selected: list[Tensor]) -> Tensors:
        vjp = program.vjp(wrt, outputs)
        return _apply_derivative(vjp, [*inputs, *selected])

    return _gradients(inputs, wrt, cotangents, pull)


def _on_model_of(program: Program, handle: Tensor) -> Program:
    """Return the program on the model that made a residual only."""
    number = int(handle)
    return program.on_model(tag_of(number))


def _mark_nondifferentiable(ctx: Any, program: AnyProgram, outputs: Tensors) -> None:
    """Mark the outputs without a derivative, and have autograd pass None for unused cotangents."""
    discrete = program.prepared.nondifferentiable_outputs
    if discrete:
        marked = [outputs[i] for i in discrete]
        ctx.mark_non_differentiable(*marked)
    ctx.set_materialize_grads(False)


def _merged(numbers: Values, tensors: Tensors) -> list[Any]:
    """Return the inputs of a call: its tensors, with the Python numbers in their places."""
    restored = iter(tensors)
    return [next(restored) if number is None else number for number in numbers]


def _wanted(ctx: Any, kept: Positions, numbers: Values | None) -> Positions:
    """Return those of the inputs whose gradients the backward pass under way uses."""
    # Only tensors have edges. Each look at `next_functions` makes all of them.
    edges: Sequence[Any] = ctx.next_functions
    if numbers is not None:
        following = iter(edges)
        edges = [next(following) if number is None else None for number in numbers]
    return tuple([i for i in kept if _is_wanted(*edges[i])])


def _is_wanted(node: Any, _: int) -> bool:
    if node is None:
        return False
    try:
        return _will_execute(node)
    except RuntimeError:  # of a leaf that is an input of torch.autograd.grad
        return True


def _as_jaxs(cotangent: Tensor) -> Tensor:
    """Return a cotangent for jax.vjp: linear, where torch's gradient is conjugate-linear."""
    # Such as a cotangent of an embedding's table.
    if cotangent.layout is not torch.strided:
        cotangent = cotangent.to_dense()
    if cotangent.is_complex():
        return cotangent.conj()
    return cotangent


def _as_gradient_of(value: Tensor, cotangent: Tensor) -> Tensor:
    """Return the cotangent of an input as torch's gradient of it."""
    if not (value.is_cpu and cotangent.is_cpu) and value.device != cotangent.device:
        cotangent = cotangent.to(value.device)  # a run's outputs are all in one place
    if cotangent.is_complex():
        return cotangent.conj()
    return cotangent


def _save_run(ctx: Any, inputs: tuple[Tensors, int], output: Tensors) -> None:
    arrays, ctx.program = inputs
    ctx.save_for_backward(*arrays)
    ctx.set_materialize_grads(False)


def _differentiate_run(ctx: Any, cotangents: Cotangents) -> tuple[Gradients, None]:
    arrays = ctx.saved_tensors
    member = member_for(pinned(ctx.program), arrays)
    program = member.plain
    inputs = as_values(program, arrays)
    needed = [x.requires_grad for x in arrays]
    count = len(program.outputs)
    selected = cotangents[:count]
    gradients = _gradients_by_vjp(program, inputs, needed, selected)
    return gradients, None


torch.library.register_autograd(
    "torch_jax_bridge::run", _differentiate_run, setup_context=_save_run, lib=LIBRARY
)


def _save_pull_back(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    _, arrays, program, _, wrt, given = inputs
    ctx.call = (program, tuple(wrt), tuple(given))
    ctx.save_for_backward(*arrays)
    ctx.set_materialize_grads(False)


def _differentiate_pull_back(ctx: Any, cotangents: Cotangents) -> tuple[Any, ...]:
    number, wrt, outputs = ctx.call
    arrays = ctx.saved_tensors
    # The VJP has the same outputs for the same arrays, and can be derived from.
    member = member_for(pinned(number), arrays)
    program = member.vjp(wrt, outputs)
    inputs = as_values(program, arrays)
    needed = [x.requires_grad for x in arrays]
    gradients = _gradients_by_vjp(program, inputs, needed, cotangents)
    return None, gradients, None, None, None, None


torch.library.register_autograd(
    "torch_jax_bridge::pull_back",
    _differentiate_pull_back,
    setup_context=_save_pull_back,
    lib=LIBRARY,
)
