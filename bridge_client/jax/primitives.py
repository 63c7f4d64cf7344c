"""JAX primitives for runs of programs, and the rules for each of JAX's transformations.

The derivative of a program is another program, and so is its batched version: each rule below names
a program and binds a primitive to it, and all compositions follow.

  run       inputs -> outputs
  keep      inputs -> outputs and the handle of a residual
  linear    inputs, [handle,] tangents -> tangents of outputs; linear in the tangents
  pull_back handle, inputs, cotangents -> cotangents of inputs

`keep` and `pull_back` take the place of a run and of the vjp program in first-order reverse mode.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, Var
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe
from jax.sharding import NamedSharding, PartitionSpec

from bridge_client.arguments import Values
from bridge_client.jax.callbacks import (
    call_back_on_arrays,
    call_back_on_buffers,
    call_back_on_gpu,
)
from bridge_client.jax.effects import MAY_FAIL
from bridge_client.jax.gpu import HAS_BUFFERS
from bridge_client.jax.memory import dtype_of
from bridge_client.jax.residuals import HANDLE
from bridge_client.jax.runs import Action, PullBack, Run, RunKeeping
from bridge_client.programs import Positions, Program
from bridge_wire.specs import Spec

Arrays = list[Any]
Primals = tuple[Arrays, Arrays]  # values and their tangents
Typed = tuple[Arrays, frozenset[Any]]  # types and effects
Flags = Sequence[bool]
CallBack = Callable[..., Values]
MakeAction = Callable[..., Action]


def _primitive(name: str) -> Any:
    primitive = Primitive(f"bridge_{name}")
    primitive.multiple_results = True
    return primitive


run_p = _primitive("run")
keep_p = _primitive("keep")
linear_p = _primitive("linear")
pull_back_p = _primitive("pull_back")


def run(program: Program, values: Values) -> Arrays:
    """Run a program on arrays, traced or not, and Python numbers."""
    outputs: Arrays = run_p.bind(*values, program=program)
    return outputs


def _pick(values: Values, positions: Iterable[int]) -> Arrays:
    return [values[i] for i in positions]


# Types and execution ------------------------------------------------------------------------------


def varying_axes(aval: Any) -> frozenset[str]:
    """Return the manual mesh axes over which a value differs, within a shard_map."""
    kind = getattr(aval, "mat", None)  # "vma" before jax 0.10
    if kind is None:
        return getattr(aval, "vma", frozenset())
    axes: frozenset[str] = kind.varying
    return axes


def _avals(specs: Sequence[Spec], inputs: Values, program: Program) -> Arrays:
    """Return the types of a run's outputs, on the mesh and varying over the axes of the inputs'."""
    template = max(inputs, key=_spreading, default=None)
    avals: Arrays = []
    for i, spec in enumerate(specs):
        dtype = dtype_of(spec, f"output {i} of {program!r}")
        if template is None or _mesh_of(template).empty:
            aval = jax.core.ShapedArray(spec.shape, dtype)
        else:
            aval = _on_mesh_of(template, spec.shape, dtype)
        avals.append(aval)
    return avals


def _on_mesh_of(template: Any, shape: Sequence[int], dtype: Any) -> Any:
    """Return the type of an array that is on all devices of a type's mesh."""
    mesh = _mesh_of(template)
    axes = [None] * len(shape)
    replicated = PartitionSpec(*axes)
    sharding = NamedSharding(mesh, replicated)
    kind = {"dtype": dtype, "weak_type": False}
    return template.update(shape=shape, sharding=sharding, **kind)


def _spreading(aval: Any) -> tuple[int, bool]:
    """Return an order of types, by the number of axes they vary over."""
    axes = varying_axes(aval)
    mesh = _mesh_of(aval)
    return len(axes), not mesh.empty


def _mesh_of(aval: Any) -> Any:
    return aval.sharding.mesh


def _outputs_of(program: Program) -> Positions:
    """Return the outputs that have derivatives."""
    outputs = enumerate(program.outputs)
    return tuple(i for i, spec in outputs if spec.dtype.is_inexact)


@run_p.def_effectful_abstract_eval
def _(*avals: Any, program: Program) -> Typed:
    return _avals(program.outputs, avals, program), MAY_FAIL


@keep_p.def_effectful_abstract_eval
def _(*avals: Any, program: Program, wrt: Positions) -> Typed:
    specs = (*program.outputs, HANDLE)
    return _avals(specs, avals, program), MAY_FAIL


@linear_p.def_effectful_abstract_eval
def _(*avals: Any, program: Program, outputs: Positions, **_: Any) -> Typed:
    specs = _pick(program.outputs, outputs)
    return _avals(specs, avals, program), MAY_FAIL


@pull_back_p.def_effectful_abstract_eval
def _(*avals: Any, program: Program, wrt: Positions, **_: Any) -> Typed:
    specs = _pick(program.inputs, wrt)
    return _avals(specs, avals, program), MAY_FAIL


def _run_keeping(program: Program, wrt: Positions) -> RunKeeping:
    keeping = program.keeping(wrt)
    return RunKeeping(keeping)


_actions: dict[Any, MakeAction] = {
    run_p: Run,
    keep_p: _run_keeping,
    pull_back_p: PullBack,
}


def _run_at_once(primitive: Any, make: MakeAction) -> None:
    def execute(*values: Any, **params: Any) -> Arrays:
        return make(**params).at_once(values)

    primitive.def_impl(execute)


def lower_as(call_back: CallBack, platform: str | None = None) -> None:
    """Lower runs in compiled code to callbacks of this kind, on one platform or on all others."""
    for primitive, make in _actions.items():
        rule = _lowering(call_back, make)
        mlir.register_lowering(primitive, rule, platform=platform)


def _lowering(call_back: CallBack, make: MakeAction) -> Any:
    def traced(*values: Any, **params: Any) -> Values:
        action = make(**params)
        return call_back(action, *values)

    return mlir.lower_fun(traced, multiple_results=True)


for primitive, make in _actions.items():
    _run_at_once(primitive, make)
lower_as(call_back_on_arrays)
if HAS_BUFFERS:
    lower_as(call_back_on_buffers, "cpu")
    lower_as(call_back_on_gpu, "cuda")
else:
    lower_as(functools.partial(call_back_on_arrays, is_staged=True), "cuda")


def _push_forward(
    *values: Any, program: Program, wrt: Positions, outputs: Positions, kept: Positions
) -> Arrays:
    """Evaluate the linear map: a run of the jvp program."""
    inputs, tangents = _split(values, program, kept)
    jvp = program.jvp(wrt, outputs)
    return run(jvp, [*inputs, *tangents])


linear_p.def_impl(_push_forward)
_push_forward_rule = mlir.lower_fun(_push_forward, multiple_results=True)
mlir.register_lowering(linear_p, _push_forward_rule)


def _split(values: Values, program: Program, kept: Positions) -> tuple[Values, Values]:
    """Return the inputs and the tangents among the operands of a linear map, without the handle."""
    count = len(program.inputs)
    first = count + 1 if kept else count
    return values[:count], values[first:]


# Forward mode -------------------------------------------------------------------------------------


def _differentiable(program: Program, is_wanted: Iterable[bool]) -> Positions:
    """Return the wanted inputs that have derivatives."""
    wrt = []
    pairs = zip(program.inputs, is_wanted, strict=False)
    for i, (spec, wanted) in enumerate(pairs):
        is_float = spec.dtype.is_inexact and not spec.weak
        if is_float and wanted:
            wrt.append(i)
    return tuple(wrt)


def _zero(value: Any) -> Any:
    aval = jax.typeof(value)
    return ad.Zero(aval.to_tangent_aval())


def _is_nonzero(tangent: Any) -> bool:
    return type(tangent) is not ad.Zero


def _tangents(
    program: Program,
    values: Values,
    tangents: Values,
    primals: Values,
    handle: Any = None,
    kept: Positions = (),
) -> Arrays:
    """Return the tangents of a program's outputs, by the linear map of those of its inputs."""
    wrt = _differentiable(program, map(_is_nonzero, tangents))
    outputs = _outputs_of(program)
    full = [_zero(primal) for primal in primals]
    if wrt and outputs:
        operands = list(values)
        if kept:
            operands.append(handle)
        operands += _pick(tangents, wrt)
        params = {"wrt": wrt, "outputs": outputs, "kept": kept}
        moved = linear_p.bind(*operands, program=program, **params)
        for i, tangent in zip(outputs, moved, strict=True):
            full[i] = tangent
    return full


def _run_jvp(values: Values, tangents: Values, *, program: Program) -> Primals:
    primals = run(program, values)
    return primals, _tangents(program, values, tangents, primals)


def _keep_jvp(
    values: Values, tangents: Values, *, program: Program, wrt: Positions
) -> Primals:
    *primals, handle = keep_p.bind(*values, program=program, wrt=wrt)
    moved = _tangents(program, values, tangents, primals)
    return [*primals, handle], [*moved, _zero(handle)]


def _linear_jvp(values: Values, tangents: Values, **params: Any) -> Primals:
    program = params["program"]
    kept = params["kept"]
    primals = linear_p.bind(*values, **params)
    derived = program.jvp(params["wrt"], params["outputs"])
    inputs, moved = _split(values, program, kept)
    input_tangents, moved_tangents = _split(tangents, program, kept)
    operands = [*inputs, *moved]
    every_tangent = [*input_tangents, *moved_tangents]
    return primals, _tangents(derived, operands, every_tangent, primals)


def _pull_back_jvp(values: Values, tangents: Values, **params: Any) -> Primals:
    primals = pull_back_p.bind(*values, **params)
    program = params["program"]
    vjp = program.vjp(params["wrt"], params["given"])
    _, *operands = values
    _, *moved = tangents
    return primals, _tangents(vjp, operands, moved, primals)


ad.primitive_jvps[run_p] = _run_jvp
ad.primitive_jvps[keep_p] = _keep_jvp
ad.primitive_jvps[linear_p] = _linear_jvp
ad.primitive_jvps[pull_back_p] = _pull_back_jvp


# Reverse mode -------------------------------------------------------------------------------------


def _run_linearize(*arguments: Any, program: Program) -> tuple[Any, ...]:
    """Run a program that is going to be differentiated: in reverse mode, keep a residual for its
    pullback."""
    # Older releases do not pass the mode.
    if isinstance(arguments[0], bool):
        is_reverse, nonzero, *values = arguments
    else:
        is_reverse = True
        nonzero, *values = arguments
    wrt = _differentiable(program, nonzero)
    outputs = _outputs_of(program)
    handle = None
    kept: Positions = ()
    if is_reverse and wrt and outputs:
        *primals, handle = keep_p.bind(*values, program=program, wrt=wrt)
        kept = wrt
    else:
        primals = run(program, values)

    def linearized(residuals: Any, *tangents: Any) -> Arrays:
        values, primals, handle = residuals
        count = len(values)
        own = tangents[-count:]
        return _tangents(program, values, own, primals, handle, kept)

    # After the residuals, jax 0.12 has a place for structured ones, of which there are none.
    structured = [None] * _has_structured_residuals
    moving = outputs if wrt else ()
    is_nonzero = [i in moving for i in range(len(primals))]
    residuals = (values, primals, handle)
    return primals, is_nonzero, residuals, *structured, linearized


try:
    # Only this table is told which of the two derivatives is made; elsewhere the vjp program
    # recomputes.
    from jax._src.interpreters.ad import LinearizeTrace, primitive_linearizations
except ImportError:
    pass
else:
    _has_structured_residuals = (
        "structured_res" in LinearizeTrace.process_primitive.__code__.co_varnames
    )
    primitive_linearizations[run_p] = _run_linearize


def _where(predicate: Callable[[Any], bool], values: Values) -> Positions:
    return tuple(i for i, value in enumerate(values) if predicate(value))


def _linear_transpose(
    cotangents: Values,
    *values: Any,
    program: Program,
    wrt: Positions,
    outputs: Positions,
    kept: Positions,
) -> Arrays:
    inputs, tangents = _split(values, program, kept)
    unknown = _where(ad.is_undefined_primal, tangents)
    wanted = tuple(_pick(wrt, unknown))
    nonzero = _where(_is_nonzero, cotangents)
    given = tuple(_pick(outputs, nonzero))
    pulled: Arrays = []
    if wanted and given:
        own = _pick(cotangents, nonzero)
        operands = [*inputs, *own]
        if kept:
            params = {"kept": kept, "wrt": wanted, "given": given}
            handle = values[len(inputs)]
            pulled = pull_back_p.bind(handle, *operands, program=program, **params)
        else:
            vjp = program.vjp(wanted, given)
            pulled = run(vjp, operands)
    known = len(values) - len(tangents)
    constant = [None] * known
    by_position = dict(zip(wanted, pulled, strict=False))
    placed = _placed(by_position, wrt, tangents)
    return [*constant, *placed]


def _placed(
    cotangents: Mapping[int, Any], positions: Positions, values: Values
) -> Arrays:
    """Return the cotangent of each value: None of a known value, and zero of an unknown value that
    nothing depends on."""
    placed: Arrays = []
    for i, value in zip(positions, values, strict=True):
        if not ad.is_undefined_primal(value):
            placed.append(None)
        elif i in cotangents:
            cotangent = _spread_as(value.aval, cotangents[i])
            placed.append(cotangent)
        else:
            placed.append(ad.Zero(value.aval))
    return placed


def _spread_as(aval: Any, cotangent: Any) -> Any:
    """Return a cotangent with the sharding of its value over an explicit mesh; a run's outputs are
    on all devices."""
    sharding = aval.sharding
    own = jax.typeof(cotangent).sharding
    if own.spec == sharding.spec:
        return cotangent
    return jax.sharding.reshard(cotangent, sharding)


def _run_transpose(cotangents: Values, *values: Any, program: Program) -> Arrays:
    """Transpose a run that is linear in its undefined inputs: its derivative by them, which is the
    same at every point."""
    wrt = _where(ad.is_undefined_primal, values)
    given = _where(_is_nonzero, cotangents)
    pulled: Arrays = []
    if given:
        point = list(values)
        for i in wrt:
            aval = values[i].aval
            point[i] = jnp.zeros(aval.shape, aval.dtype)
        own = _pick(cotangents, given)
        vjp = program.vjp(wrt, given)
        pulled = run(vjp, [*point, *own])
    by_position = dict(zip(wrt, pulled, strict=False))
    count = len(values)
    every = tuple(range(count))
    return _placed(by_position, every, values)


def _pull_back_transpose(
    cotangents: Values,
    handle: Any,
    *values: Any,
    program: Program,
    kept: Positions,
    wrt: Positions,
    given: Positions,
) -> Arrays:
    count = len(program.inputs)
    inputs = values[:count]
    pulled = values[count:]
    unknown = _where(ad.is_undefined_primal, pulled)
    wanted = tuple(_pick(given, unknown))
    nonzero = _where(_is_nonzero, cotangents)
    moved: Arrays = []
    if wanted and nonzero:
        moving = tuple(_pick(wrt, nonzero))
        jvp = program.jvp(moving, wanted)
        own = _pick(cotangents, nonzero)
        moved = run(jvp, [*inputs, *own])
    constant = [None] * (1 + count)
    by_position = dict(zip(wanted, moved, strict=False))
    placed = _placed(by_position, given, pulled)
    return [*constant, *placed]


ad.primitive_transposes[linear_p] = _linear_transpose
ad.primitive_transposes[run_p] = _run_transpose
ad.primitive_transposes[pull_back_p] = _pull_back_transpose


def _drop_unused_handle(used: Flags, *arguments: Any) -> tuple[list[bool], Any]:
    """Replace a run that keeps a residual by a plain run if nobody uses the handle."""
    equation = arguments[-1]  # after the list of live inputs, from jax 0.12 on
    count = len(equation.invars)
    if not any(used):
        return [False] * count, None
    if not used[-1]:
        params = {"program": equation.params["program"]}
        outvars = equation.outvars[:-1]
        equation = equation.replace(primitive=run_p, outvars=outvars, params=params)
    return [True] * count, equation


pe.dce_rules[keep_p] = _drop_unused_handle


def _recompute_or_save(
    saveable: Callable[..., Any],
    unknown: Flags,
    instantiated: Flags,
    equation: Any,
) -> tuple[Any, Any, list[bool], list[bool], Arrays]:
    """Split a checkpointed equation as jax splits equations without effects: jax never recomputes
    an equation that has an effect."""
    count = len(equation.outvars)
    none = [False] * count
    every = [True] * count
    needed = []
    for variable, is_there in zip(equation.invars, instantiated, strict=True):
        if not is_there and type(variable) is Var:
            needed.append(variable)
    if any(unknown):
        return None, equation, every, every, needed
    avals = [variable.aval for variable in equation.invars]
    policy = saveable(equation.primitive, *avals, **equation.params)
    # Which jax does not export.
    if policy is True or type(policy).__name__ == "SaveableType":
        return equation, None, none, none, []
    return equation, equation, none, every, needed


for primitive in (run_p, keep_p, linear_p, pull_back_p):
    pe.partial_eval_jaxpr_custom_rules[primitive] = _recompute_or_save


# Batches ------------------------------------------------------------------------------------------

_Dims = Sequence[int | None]
_Batch = tuple[Arrays, list[Any]]  # values and their batch axes


def _batched(program: Program, values: Values, dims: _Dims) -> tuple[Program, Arrays]:
    """Return the program over batches, and its inputs."""
    pairs = zip(values, dims, strict=True)
    sizes = (value.shape[dim] for value, dim in pairs if dim is not None)
    size = next(sizes)
    values = list(values)
    dims = list(dims)
    for i, spec in enumerate(program.inputs):
        # A Python number is the same for the whole batch, even if jax has made a batch of it.
        if spec.weak and (dim := dims[i]) is not None:
            values[i] = jnp.take(values[i], 0, dim)
            dims[i] = None
    axes = tuple(-1 if dim is None else dim for dim in dims)
    return program.vmap(axes, size), values


def _run_batch(values: Values, dims: _Dims, *, program: Program) -> _Batch:
    batched, values = _batched(program, values, dims)
    outputs = run(batched, values)
    output_dims = [0] * len(outputs)
    return outputs, output_dims


def _keep_batch(
    values: Values, dims: _Dims, *, program: Program, wrt: Positions
) -> _Batch:
    batched, values = _batched(program, values, dims)
    if None not in _pick(dims, wrt):
        *outputs, handle = keep_p.bind(*values, program=batched, wrt=wrt)
    else:
        # The residual of a batch yields the sum of the gradients by an unbatched input, not each of
        # them.
        outputs = run(batched, values)
        handle = jnp.zeros(HANDLE.shape, HANDLE.dtype.name)
    output_dims = [0] * len(outputs)
    return [*outputs, handle], [*output_dims, None]


def _linear_batch(values: Values, dims: _Dims, **params: Any) -> _Batch:
    program = params["program"]
    kept = params["kept"]
    inputs, moved = _split(values, program, kept)
    input_dims, moved_dims = _split(dims, program, kept)
    operands = [*inputs, *moved]
    operand_dims = [*input_dims, *moved_dims]
    jvp = program.jvp(params["wrt"], params["outputs"])
    return _run_batch(operands, operand_dims, program=jvp)


def _pull_back_batch(
    values: Values,
    dims: _Dims,
    *,
    program: Program,
    kept: Positions,
    wrt: Positions,
    given: Positions,
) -> _Batch:
    handle, *values = values
    handle_dim, *dims = dims
    if handle_dim is not None or None in _pick(dims, kept):
        vjp = program.vjp(wrt, given)
        return _run_batch(values, dims, program=vjp)
    count = len(program.inputs)
    batched, inputs = _batched(program, values[:count], dims[:count])
    first = kept[0]
    shape = values[first].shape
    size = shape[dims[first]]
    cotangents = []
    for value, dim in zip(values[count:], dims[count:], strict=True):
        if dim is None:
            cotangent = jnp.broadcast_to(value, (size, *value.shape))
        else:
            cotangent = jnp.moveaxis(value, dim, 0)
        cotangents.append(cotangent)
    params = {"kept": kept, "wrt": wrt, "given": given}
    pulled = pull_back_p.bind(handle, *inputs, *cotangents, program=batched, **params)
    return pulled, _pick(dims, wrt)


batching.primitive_batchers[run_p] = _run_batch
batching.primitive_batchers[keep_p] = _keep_batch
batching.primitive_batchers[linear_p] = _linear_batch
batching.primitive_batchers[pull_back_p] = _pull_back_batch
