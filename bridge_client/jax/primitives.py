"""The JAX primitives that stand for runs of programs, and what every transformation makes of them.

The derivative of a program is another program, and so is its batched version: each rule below names
a program and binds a primitive to it, and all compositions follow.

  run       inputs -> outputs
  keep      inputs -> outputs and the handle of a residual
  linear    inputs, [handle,] tangents -> tangents of outputs; linear in the tangents
  pull_back handle, inputs, cotangents -> cotangents of inputs

`keep` and `pull_back` take the place of a run and of the vjp program in first-order reverse mode.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, Var
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe
from jax.sharding import NamedSharding, PartitionSpec

from bridge_client.jax.callbacks import call_back_on_arrays, call_back_on_buffers, call_back_on_gpu
from bridge_client.jax.effects import MAY_FAIL
from bridge_client.jax.gpu import HAS_BUFFERS
from bridge_client.jax.memory import dtype_of
from bridge_client.jax.residuals import HANDLE
from bridge_client.jax.runs import Action, PullBack, Run, RunKeeping
from bridge_client.programs import Program
from bridge_wire.specs import Spec

Positions = tuple[int, ...]


def _primitive(name: str) -> Any:
    primitive = Primitive(f"bridge_{name}")
    primitive.multiple_results = True
    return primitive


run_p = _primitive("run")
keep_p = _primitive("keep")
linear_p = _primitive("linear")
pull_back_p = _primitive("pull_back")


def run(program: Program, values: Sequence[Any]) -> list[Any]:
    """Run a program on arrays, traced or not, and Python numbers."""
    return run_p.bind(*values, program=program)


# Types and execution ------------------------------------------------------------------------------


def varying_axes(aval: Any) -> frozenset[str]:
    """Return the manual mesh axes over which a value differs, within a shard_map."""
    kind = getattr(aval, "mat", None)  # "vma" before jax 0.10
    return getattr(aval, "vma", frozenset()) if kind is None else kind.varying


def _avals(specs: Sequence[Spec], inputs: Sequence[Any], program: Program) -> list[Any]:
    """Return the types of a run's outputs, on the mesh and varying over the axes of the inputs'."""
    template = max(
        inputs, key=lambda aval: (len(varying_axes(aval)), not _mesh_of(aval).empty), default=None
    )
    made = []
    for i, spec in enumerate(specs):
        dtype = dtype_of(spec, f"output {i} of {program!r}")
        if template is None or _mesh_of(template).empty:
            made.append(jax.core.ShapedArray(spec.shape, dtype))
            continue
        sharding = NamedSharding(_mesh_of(template), PartitionSpec(*[None] * len(spec.shape)))
        made.append(
            template.update(shape=spec.shape, dtype=dtype, weak_type=False, sharding=sharding)
        )
    return made


def _mesh_of(aval: Any) -> Any:
    return aval.sharding.mesh


def _outputs_of(program: Program) -> Positions:
    """Return the outputs that have derivatives."""
    return tuple(i for i, spec in enumerate(program.outputs) if spec.dtype.is_inexact)


@run_p.def_effectful_abstract_eval
def _(*avals: Any, program: Program) -> tuple[list[Any], frozenset[Any]]:
    return _avals(program.outputs, avals, program), MAY_FAIL


@keep_p.def_effectful_abstract_eval
def _(*avals: Any, program: Program, wrt: Positions) -> tuple[list[Any], frozenset[Any]]:
    return _avals((*program.outputs, HANDLE), avals, program), MAY_FAIL


@linear_p.def_effectful_abstract_eval
def _(
    *avals: Any, program: Program, wrt: Positions, outputs: Positions, kept: Positions
) -> tuple[list[Any], frozenset[Any]]:
    return _avals([program.outputs[i] for i in outputs], avals, program), MAY_FAIL


@pull_back_p.def_effectful_abstract_eval
def _(
    *avals: Any, program: Program, kept: Positions, wrt: Positions, given: Positions
) -> tuple[list[Any], frozenset[Any]]:
    return _avals([program.inputs[i] for i in wrt], avals, program), MAY_FAIL


_actions: dict[Any, Callable[..., Action]] = {
    run_p: Run,
    keep_p: lambda program, wrt: RunKeeping(program.keeping(wrt)),
    pull_back_p: PullBack,
}


def _run_at_once(primitive: Any, action_of: Callable[..., Action]) -> None:
    primitive.def_impl(lambda *values, **params: action_of(**params).at_once(values))


def lower_as(call_back: Callable[..., Sequence[Any]], platform: str | None = None) -> None:
    """Have runs in compiled code be callbacks of this kind, on a platform or on all that have no
    kind of their own."""
    for primitive, action_of in _actions.items():
        mlir.register_lowering(primitive, _lowering(call_back, action_of), platform=platform)


def _lowering(call_back: Callable[..., Sequence[Any]], action_of: Callable[..., Action]) -> Any:
    traced = lambda *values, **params: call_back(action_of(**params), *values)  # noqa: E731
    return mlir.lower_fun(traced, multiple_results=True)


for primitive, action_of in _actions.items():
    _run_at_once(primitive, action_of)
lower_as(call_back_on_arrays)
if HAS_BUFFERS:
    lower_as(call_back_on_buffers, "cpu")
    lower_as(call_back_on_gpu, "cuda")
else:
    lower_as(functools.partial(call_back_on_arrays, is_staged=True), "cuda")


def _push_forward(
    *values: Any, program: Program, wrt: Positions, outputs: Positions, kept: Positions
) -> Sequence[Any]:
    """Evaluate the linear map: a run of the jvp program."""
    inputs, tangents = _parts(values, program, kept)
    return run_p.bind(*inputs, *tangents, program=program.jvp(wrt, outputs))


linear_p.def_impl(_push_forward)
mlir.register_lowering(linear_p, mlir.lower_fun(_push_forward, multiple_results=True))


def _parts(
    values: Sequence[Any], program: Program, kept: Positions
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the inputs and the tangents among the operands of a linear map, without the handle."""
    count = len(program.inputs)
    return values[:count], values[count + bool(kept) :]


# Forward mode -------------------------------------------------------------------------------------


def _differentiable(program: Program, is_wanted: Callable[[int], bool]) -> Positions:
    specs = enumerate(program.inputs)
    return tuple(i for i, spec in specs if spec.dtype.is_inexact and not spec.weak and is_wanted(i))


def _zero(value: Any) -> Any:
    return ad.Zero(jax.typeof(value).to_tangent_aval())


def _tangents(
    program: Program,
    values: Sequence[Any],
    tangents: Sequence[Any],
    made: Sequence[Any],
    handle: Any = None,
    kept: Positions = (),
) -> list[Any]:
    """Return the tangents of what a program made, as the linear map of those of its inputs."""
    wrt = _differentiable(program, lambda i: type(tangents[i]) is not ad.Zero)
    outputs = _outputs_of(program)
    full = [_zero(y) for y in made]
    if wrt and outputs:
        operands = [*values, *([handle] if kept else []), *(tangents[i] for i in wrt)]
        moved = linear_p.bind(*operands, program=program, wrt=wrt, outputs=outputs, kept=kept)
        for i, tangent in zip(outputs, moved, strict=True):
            full[i] = tangent
    return full


def _run_jvp(
    values: Sequence[Any], tangents: Sequence[Any], *, program: Program
) -> tuple[list[Any], list[Any]]:
    made = run_p.bind(*values, program=program)
    return made, _tangents(program, values, tangents, made)


def _keep_jvp(
    values: Sequence[Any], tangents: Sequence[Any], *, program: Program, wrt: Positions
) -> tuple[list[Any], list[Any]]:
    *made, handle = keep_p.bind(*values, program=program, wrt=wrt)
    return [*made, handle], [*_tangents(program, values, tangents, made), _zero(handle)]


def _linear_jvp(
    values: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[list[Any], list[Any]]:
    program, kept = params["program"], params["kept"]
    made = linear_p.bind(*values, **params)
    derived = program.jvp(params["wrt"], params["outputs"])
    inputs, moved = (
        [*first, *rest] for first, rest in (_parts(v, program, kept) for v in (values, tangents))
    )
    return made, _tangents(derived, inputs, moved, made)


def _pull_back_jvp(
    values: Sequence[Any],
    tangents: Sequence[Any],
    *,
    program: Program,
    kept: Positions,
    wrt: Positions,
    given: Positions,
) -> tuple[list[Any], list[Any]]:
    made = pull_back_p.bind(*values, program=program, kept=kept, wrt=wrt, given=given)
    return made, _tangents(program.vjp(wrt, given), values[1:], tangents[1:], made)


ad.primitive_jvps[run_p] = _run_jvp
ad.primitive_jvps[keep_p] = _keep_jvp
ad.primitive_jvps[linear_p] = _linear_jvp
ad.primitive_jvps[pull_back_p] = _pull_back_jvp


# Reverse mode -------------------------------------------------------------------------------------


def _run_linearize(*arguments: Any, program: Program) -> tuple[Any, ...]:
    """Run a program that is going to be differentiated: in reverse mode, keep what its pullback
    needs."""
    # Older releases do not say for which mode.
    is_reverse, nonzero, *values = (
        arguments if isinstance(arguments[0], bool) else (True, *arguments)
    )
    wrt, outputs = _differentiable(program, lambda i: nonzero[i]), _outputs_of(program)
    handle = None
    kept: Positions = ()
    if is_reverse and wrt and outputs:
        *made, handle = keep_p.bind(*values, program=program, wrt=wrt)
        kept = wrt
    else:
        made = run_p.bind(*values, program=program)

    def linearized(residuals: Any, *tangents: Any) -> list[Any]:
        values, made, handle = residuals
        return _tangents(program, values, tangents[-len(values) :], made, handle, kept)

    # After the residuals, jax 0.12 has place for those of another kind, of which there are none.
    others = [None] * _has_structured_residuals
    nonzero_made = [bool(wrt) and i in outputs for i in range(len(made))]
    return made, nonzero_made, (values, made, handle), *others, linearized


try:
    # Which of the two derivatives is being made, only this table is told; elsewhere the vjp program
    # recomputes.
    from jax._src.interpreters.ad import LinearizeTrace, primitive_linearizations
except ImportError:
    pass
else:
    _has_structured_residuals = (
        "structured_res" in LinearizeTrace.process_primitive.__code__.co_varnames
    )
    primitive_linearizations[run_p] = _run_linearize


def _nonzero(cotangents: Sequence[Any]) -> Positions:
    return tuple(i for i, cotangent in enumerate(cotangents) if type(cotangent) is not ad.Zero)


def _linear_transpose(
    cotangents: Sequence[Any],
    *values: Any,
    program: Program,
    wrt: Positions,
    outputs: Positions,
    kept: Positions,
) -> list[Any]:
    inputs, tangents = _parts(values, program, kept)
    wanted = tuple(
        i for i, tangent in zip(wrt, tangents, strict=True) if ad.is_undefined_primal(tangent)
    )
    nonzero = _nonzero(cotangents)
    given = tuple(outputs[i] for i in nonzero)
    made: dict[int, Any] = {}
    if wanted and given:
        selected = [cotangents[i] for i in nonzero]
        if kept:
            operands = [values[len(inputs)], *inputs, *selected]
            pulled = pull_back_p.bind(
                *operands, program=program, kept=kept, wrt=wanted, given=given
            )
        else:
            pulled = run_p.bind(*inputs, *selected, program=program.vjp(wanted, given))
        made = dict(zip(wanted, pulled, strict=True))
    return [*[None] * (len(values) - len(tangents)), *_placed(made, wrt, tangents)]


def _placed(made: Mapping[int, Any], positions: Positions, values: Sequence[Any]) -> list[Any]:
    """Return the cotangent of each value: none of a known one, and zero where nothing depends on
    an unknown one."""
    return [
        (_spread_as(value.aval, made[i]) if i in made else ad.Zero(value.aval))
        if ad.is_undefined_primal(value)
        else None
        for i, value in zip(positions, values, strict=True)
    ]


def _spread_as(aval: Any, value: Any) -> Any:
    """Return a cotangent as spread over an explicit mesh as what it belongs to; a run's outputs
    are on all devices."""
    sharding = aval.sharding
    if jax.typeof(value).sharding.spec == sharding.spec:
        return value
    return jax.sharding.reshard(value, sharding)


def _run_transpose(cotangents: Sequence[Any], *values: Any, program: Program) -> list[Any]:
    """Transpose a run of what is linear in its undefined inputs: its derivative by them, which
    is the same anywhere."""
    wrt = tuple(i for i, value in enumerate(values) if ad.is_undefined_primal(value))
    given = _nonzero(cotangents)
    made: dict[int, Any] = {}
    if given:
        point = [
            jnp.zeros(v.aval.shape, v.aval.dtype) if i in wrt else v for i, v in enumerate(values)
        ]
        pulled = run_p.bind(
            *point, *(cotangents[i] for i in given), program=program.vjp(wrt, given)
        )
        made = dict(zip(wrt, pulled, strict=True))
    return _placed(made, tuple(range(len(values))), values)


def _pull_back_transpose(
    cotangents: Sequence[Any],
    handle: Any,
    *values: Any,
    program: Program,
    kept: Positions,
    wrt: Positions,
    given: Positions,
) -> list[Any]:
    inputs, pulled = values[: len(program.inputs)], values[len(program.inputs) :]
    wanted = tuple(
        i for i, value in zip(given, pulled, strict=True) if ad.is_undefined_primal(value)
    )
    nonzero = _nonzero(cotangents)
    moved: dict[int, Any] = {}
    if wanted and nonzero:
        derived = program.jvp(tuple(wrt[i] for i in nonzero), wanted)
        made = run_p.bind(*inputs, *(cotangents[i] for i in nonzero), program=derived)
        moved = dict(zip(wanted, made, strict=True))
    return [None, *[None] * len(inputs), *_placed(moved, given, pulled)]


ad.primitive_transposes[linear_p] = _linear_transpose
ad.primitive_transposes[run_p] = _run_transpose
ad.primitive_transposes[pull_back_p] = _pull_back_transpose


def _drop_unused_handle(used: Sequence[bool], *arguments: Any) -> tuple[list[bool], Any]:
    """Make a plain run of one whose residual nobody is going to pull back."""
    equation = arguments[-1]  # after which inputs are alive, from jax 0.12 on
    if not any(used):
        return [False] * len(equation.invars), None
    if not used[-1]:
        params = {"program": equation.params["program"]}
        equation = equation.replace(primitive=run_p, outvars=equation.outvars[:-1], params=params)
    return [True] * len(equation.invars), equation


pe.dce_rules[keep_p] = _drop_unused_handle


def _recompute_or_save(
    saveable: Callable[..., Any],
    unknown: Sequence[bool],
    instantiated: Sequence[bool],
    equation: Any,
) -> tuple[Any, Any, list[bool], list[bool], list[Any]]:
    """Split a checkpointed equation as jax does those without effects: what an effect has is
    never recomputed."""
    count = len(equation.outvars)
    needed = [
        x
        for x, is_there in zip(equation.invars, instantiated, strict=True)
        if not is_there and type(x) is Var
    ]
    if any(unknown):
        return None, equation, [True] * count, [True] * count, needed
    policy = saveable(equation.primitive, *(x.aval for x in equation.invars), **equation.params)
    if (
        policy is True or type(policy).__name__ == "SaveableType"
    ):  # of a type that jax does not export
        return equation, None, [False] * count, [False] * count, []
    return equation, equation, [False] * count, [True] * count, needed


for primitive in (run_p, keep_p, linear_p, pull_back_p):
    pe.partial_eval_jaxpr_custom_rules[primitive] = _recompute_or_save


# Batches ------------------------------------------------------------------------------------------

_Dims = Sequence[int | None]


def _batched(program: Program, values: Sequence[Any], dims: _Dims) -> tuple[Program, list[Any]]:
    """Return the program over batches, and its inputs."""
    size = next(
        value.shape[dim] for value, dim in zip(values, dims, strict=True) if dim is not None
    )
    values, dims = list(values), list(dims)
    for i, spec in enumerate(program.inputs):
        # A Python number is the same for the whole batch, even where jax has made one of it.
        if spec.weak and (dim := dims[i]) is not None:
            values[i], dims[i] = jnp.take(values[i], 0, dim), None
    return program.vmap(tuple(-1 if dim is None else dim for dim in dims), size), values


def _run_batch(
    values: Sequence[Any], dims: _Dims, *, program: Program
) -> tuple[list[Any], list[int]]:
    derived, values = _batched(program, values, dims)
    made = run_p.bind(*values, program=derived)
    return made, [0] * len(made)


def _keep_batch(
    values: Sequence[Any], dims: _Dims, *, program: Program, wrt: Positions
) -> tuple[list[Any], list[int | None]]:
    derived, values = _batched(program, values, dims)
    if all(dims[i] is not None for i in wrt):
        made = keep_p.bind(*values, program=derived, wrt=wrt)
    else:
        # The residual of a batch yields the sum of the gradients by what is not batched, not each
        # one.
        made = [*run_p.bind(*values, program=derived), jnp.zeros(HANDLE.shape, HANDLE.dtype.name)]
    return made, [*[0] * (len(made) - 1), None]


def _linear_batch(values: Sequence[Any], dims: _Dims, **params: Any) -> tuple[list[Any], list[int]]:
    program, kept = params["program"], params["kept"]
    flat, flat_dims = (
        [*inputs, *moved] for inputs, moved in (_parts(v, program, kept) for v in (values, dims))
    )
    return _run_batch(flat, flat_dims, program=program.jvp(params["wrt"], params["outputs"]))


def _pull_back_batch(
    values: Sequence[Any],
    dims: _Dims,
    *,
    program: Program,
    kept: Positions,
    wrt: Positions,
    given: Positions,
) -> tuple[list[Any], list[int]]:
    count = 1 + len(program.inputs)
    is_of_the_batch = dims[0] is None and all(dims[1 + i] is not None for i in kept)
    if not is_of_the_batch:
        return _run_batch(values[1:], dims[1:], program=program.vjp(wrt, given))
    derived, inputs = _batched(program, values[1:count], dims[1:count])
    size = values[1 + kept[0]].shape[dims[1 + kept[0]]]
    cotangents = [
        jnp.broadcast_to(value, (size, *value.shape))
        if dim is None
        else jnp.moveaxis(value, dim, 0)
        for value, dim in zip(values[count:], dims[count:], strict=True)
    ]
    made = pull_back_p.bind(
        values[0], *inputs, *cotangents, program=derived, kept=kept, wrt=wrt, given=given
    )
    return made, [dims[1 + i] for i in wrt]  # type: ignore[misc]


batching.primitive_batchers[run_p] = _run_batch
batching.primitive_batchers[keep_p] = _keep_batch
batching.primitive_batchers[linear_p] = _linear_batch
batching.primitive_batchers[pull_back_p] = _pull_back_batch
