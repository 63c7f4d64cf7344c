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
    return getattr(aval, "vma", frozenset()) if kind is None else kind.varying


def _avals(specs: Sequence[Spec], inputs: Values, program: Program) -> Arrays:
    """Return the types of a run's outputs, on the mesh and varying over the axes of the inputs'."""
    template = max(inputs, key=_spreading, default=None)
    avals: Arrays = []
    for i, spec in enumerate(specs):
        dtype = dtype_of(spec, f"output {i} of {program!r}")
        if template is None or _mesh_of(template).empty:
            avals.append(jax.core.ShapedArray(spec.shape, dtype))
            continue
        replicated = PartitionSpec(*[None] * len(spec.shape))
        sharding = NamedSharding(_mesh_of(template), replicated)
        kind = {"dtype": dtype, "weak_type": False}
        avals.append(template.update(shape=spec.shape, sharding=sharding, **kind))
    return avals


def _spreading(aval: Any) -> tuple[int, bool]:
    """Return an order of types, by the number of axes they vary over."""
    return len(varying_axes(aval)), not _mesh_of(aval).empty


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
    return _avals((*program.outputs, HANDLE), avals, program), MAY_FAIL


@linear_p.def_effectful_abstract_eval
def _(
    *avals: Any, program: Program, wrt: Positions, outputs: Positions, kept: Positions
) -> Typed:
    return _avals(_pick(program.outputs, outputs), avals, program), MAY_FAIL


@pull_back_p.def_effectful_abstract_eval
def _(
    *avals: Any, program: Program, kept: Positions, wrt: Positions, given: Positions
) -> Typed:
    return _avals(_pick(program.inputs, wrt), avals, program), MAY_FAIL


_actions: dict[Any, MakeAction] = {
    run_p: Run,
    keep_p: lambda program, wrt: RunKeeping(program.keeping(wrt)),
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
        return call_back(make(**params), *values)

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
    return run(program.jvp(wrt, outputs), [*inputs, *tangents])


linear_p.def_impl(_push_forward)
mlir.register_lowering(linear_p, mlir.lower_fun(_push_forward, multiple_results=True))


def _split(values: Values, program: Program, kept: Positions) -> tuple[Values, Values]:
    """Return the inputs and the tangents among the operands of a linear map, without the handle."""
    count = len(program.inputs)
    return values[:count], values[count + bool(kept) :]


# Forward mode -------------------------------------------------------------------------------------


def _differentiable(program: Program, is_wanted: Iterable[bool]) -> Positions:
    """Return the wanted inputs that have derivatives."""
    is_float = [spec.dtype.is_inexact and not spec.weak for spec in program.inputs]
    pairs = enumerate(zip(is_float, is_wanted, strict=False))
    return tuple(i for i, pair in pairs if all(pair))


def _zero(value: Any) -> Any:
    return ad.Zero(jax.typeof(value).to_tangent_aval())


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
    full = list(map(_zero, primals))
    if wrt and outputs:
        handles = [handle] if kept else []
        operands = [*values, *handles, *_pick(tangents, wrt)]
        moved = linear_p.bind(
            *operands, program=program, wrt=wrt, outputs=outputs, kept=kept
        )
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
    program, kept = params["program"], params["kept"]
    primals = linear_p.bind(*values, **params)
    derived = program.jvp(params["wrt"], params["outputs"])
    inputs, moved = _split(values, program, kept)
    input_tangents, moved_tangents = _split(tangents, program, kept)
    every_tangent = [*input_tangents, *moved_tangents]
    return primals, _tangents(derived, [*inputs, *moved], every_tangent, primals)


def _pull_back_jvp(values: Values, tangents: Values, **params: Any) -> Primals:
    primals = pull_back_p.bind(*values, **params)
    vjp = params["program"].vjp(params["wrt"], params["given"])
    return primals, _tangents(vjp, values[1:], tangents[1:], primals)


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
        is_reverse, (nonzero, *values) = True, arguments
    wrt, outputs = _differentiable(program, nonzero), _outputs_of(program)
    handle = None
    kept: Positions = ()
    if is_reverse and wrt and outputs:
        *primals, handle = keep_p.bind(*values, program=program, wrt=wrt)
        kept = wrt
    else:
        primals = run(program, values)

    def linearized(residuals: Any, *tangents: Any) -> Arrays:
        values, primals, handle = residuals
        own = tangents[-len(values) :]
        return _tangents(program, values, own, primals, handle, kept)

    # After the residuals, jax 0.12 has a place for structured ones, of which there are none.
    structured = [None] * _has_structured_residuals
    is_nonzero = [bool(wrt) and i in outputs for i in range(len(primals))]
    return primals, is_nonzero, (values, primals, handle), *structured, linearized


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
    wanted = tuple(_pick(wrt, _where(ad.is_undefined_primal, tangents)))
    nonzero = _where(_is_nonzero, cotangents)
    given = tuple(_pick(outputs, nonzero))
    pulled: Arrays = []
    if wanted and given:
        operands = [*inputs, *_pick(cotangents, nonzero)]
        if kept:
            params = {"kept": kept, "wrt": wanted, "given": given}
            handle = values[len(inputs)]
            pulled = pull_back_p.bind(handle, *operands, program=program, **params)
        else:
            pulled = run(program.vjp(wanted, given), operands)
    constant = [None] * (len(values) - len(tangents))
    by_position = dict(zip(wanted, pulled, strict=False))
    return [*constant, *_placed(by_position, wrt, tangents)]


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
            placed.append(_spread_as(value.aval, cotangents[i]))
        else:
            placed.append(ad.Zero(value.aval))
    return placed


def _spread_as(aval: Any, cotangent: Any) -> Any:
    """Return a cotangent with the sharding of its value over an explicit mesh; a run's outputs are
    on all devices."""
    sharding = aval.sharding
    if jax.typeof(cotangent).sharding.spec == sharding.spec:
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
        pulled = run(program.vjp(wrt, given), [*point, *_pick(cotangents, given)])
    by_position = dict(zip(wrt, pulled, strict=False))
    return _placed(by_position, tuple(range(len(values))), values)


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
    inputs, pulled = values[:count], values[count:]
    wanted = tuple(_pick(given, _where(ad.is_undefined_primal, pulled)))
    nonzero = _where(_is_nonzero, cotangents)
    moved: Arrays = []
    if wanted and nonzero:
        jvp = program.jvp(tuple(_pick(wrt, nonzero)), wanted)
        moved = run(jvp, [*inputs, *_pick(cotangents, nonzero)])
    constant = [None] * (1 + count)
    by_position = dict(zip(wanted, moved, strict=False))
    return [*constant, *_placed(by_position, given, pulled)]


ad.primitive_transposes[linear_p] = _linear_transpose
ad.primitive_transposes[run_p] = _run_transpose
ad.primitive_transposes[pull_back_p] = _pull_back_transpose


def _drop_unused_handle(
    used: Sequence[bool], *arguments: Any
) -> tuple[list[bool], Any]:
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
    unknown: Sequence[bool],
    instantiated: Sequence[bool],
    equation: Any,
) -> tuple[Any, Any, list[bool], list[bool], Arrays]:
    """Split a checkpointed equation as jax splits equations without effects: jax never recomputes
    an equation that has an effect."""
    count = len(equation.outvars)
    none, every = [False] * count, [True] * count
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
    size = next(value.shape[dim] for value, dim in pairs if dim is not None)
    values, dims = list(values), list(dims)
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
    return outputs, [0] * len(outputs)


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
    return [*outputs, handle], [*[0] * len(outputs), None]


def _linear_batch(values: Values, dims: _Dims, **params: Any) -> _Batch:
    program, kept = params["program"], params["kept"]
    inputs, moved = _split(values, program, kept)
    input_dims, moved_dims = _split(dims, program, kept)
    jvp = program.jvp(params["wrt"], params["outputs"])
    return _run_batch([*inputs, *moved], [*input_dims, *moved_dims], program=jvp)


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
        return _run_batch(values, dims, program=program.vjp(wrt, given))
    count = len(program.inputs)
    batched, inputs = _batched(program, values[:count], dims[:count])
    first = kept[0]
    size = values[first].shape[dims[first]]
    cotangents = []
    for value, dim in zip(values[count:], dims[count:], strict=True):
        if dim is None:
            cotangents.append(jnp.broadcast_to(value, (size, *value.shape)))
        else:
            cotangents.append(jnp.moveaxis(value, dim, 0))
    params = {"kept": kept, "wrt": wrt, "given": given}
    pulled = pull_back_p.bind(handle, *inputs, *cotangents, program=batched, **params)
    return pulled, _pick(dims, wrt)


batching.primitive_batchers[run_p] = _run_batch
batching.primitive_batchers[keep_p] = _keep_batch
batching.primitive_batchers[linear_p] = _linear_batch
batching.primitive_batchers[pull_back_p] = _pull_back_batch
