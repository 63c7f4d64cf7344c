"""The JAX runtime: the only file of the worker that imports jax. Never imports torch.

A call is a flat function `f(bound, *arrays) -> [array, ...]`, where `bound` are the worker's own parameters if the
caller passes none. Each transform wraps such a function into another one, so the derivative of a program is again a
program, and transforms compose to any depth. What has been composed is compiled ahead of time for its signature.
"""

import contextlib
import functools
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters import ad
from jax.interpreters.partial_eval import dce_jaxpr

from bridge_server.runtime import Description, Model, Options, Parameter, Preparation, Program, Runtime
from bridge_wire import trees
from bridge_wire.copying import copy
from bridge_wire.dlpack import Exporter
from bridge_wire.dtypes import BY_NAME, NEEDS_X64
from bridge_wire.errors import (
    BridgeError,
    DTypeError,
    InternalError,
    ProtocolError,
    RemoteModelError,
    SpecError,
    TargetError,
)
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec, decode_all

_Flat = Callable[..., list[Any]]
_MAX_NAMED_LEAVES = 20
_MOST_ELEMENTS = 2**47


class JaxRuntime(Runtime):
    """Serves JAX models: traced and compiled once per signature, run by XLA."""

    def __init__(self, options: Options) -> None:
        jax.config.update("jax_enable_x64", options.x64)
        # Every call waits for its outputs at once; handing the work to another thread would only cost wake-ups.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        self._x64 = options.x64
        self._jit = options.jit
        self._classes = trees.Classes(adopt=_register_dataclass)

    def describe(self) -> Description:
        devices = tuple(f"{device.platform}:{device.id}" for device in jax.local_devices())
        return Description("jax", jax.__version__, self._x64, devices)

    def adapt(self, name: str, target: Any) -> Model:
        parts = _parts_of(target)
        if parts is None:
            raise TargetError(
                f"{name!r} is a {type(target).__module__}.{type(target).__qualname__}; expected a function, a pair "
                "(apply, params), a flax.linen module with its variables, a flax.nnx module or an equinox module"
            )
        leaves, structure = jax.tree_util.tree_flatten_with_path(parts.state)
        state = [leaf if hasattr(leaf, "dtype") else _number_to_array(leaf) for _, leaf in leaves]
        # What is no array of a type we know, such as a PRNG key, stays with the worker.
        sent = [i for i, leaf in enumerate(state) if _dtype_name(leaf) in BY_NAME]
        labels = [_label(leaves[i][0]) for i in sent]
        if len(set(labels)) != len(labels):
            raise TargetError(f"two parameters of {name!r} have the same path among {sorted(labels)}")
        specs = [self._parameter_spec(name, label, state[i]) for label, i in zip(labels, sent, strict=True)]
        parameters = tuple(
            Parameter(label, spec, spec.dtype.is_inexact and parts.is_trainable(label))
            for label, spec in zip(labels, specs, strict=True)
        )

        def apply(values: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
            full = list(state)
            for i, value in zip(sent, values, strict=True):
                full[i] = value
            return parts.apply(jax.tree_util.tree_unflatten(structure, full), *args, **kwargs)

        return Model(
            name=name,
            doc=inspect.getdoc(parts.documented) or "",
            arguments=_positional_names(parts),
            parameters=parameters,
            values=[jnp.asarray(state[i]) for i in sent],
            apply=apply,
        )

    def prepare_call(self, model: Model, call: pb.Call) -> Preparation:
        inputs = decode_all(call.inputs)
        where = f"model {model.name!r} called with {self._check_signature(model, call, inputs)}"
        own = 0 if not call.parameters else len(model.parameters)
        result = trees.flat(0)

        def f(bound: Sequence[Any], *arrays: Any) -> list[Any]:
            nonlocal result
            args, kwargs = trees.build(call.arguments, arrays[own:], self._classes)
            value = model.apply(arrays[:own] if call.parameters else bound, args, kwargs)
            result, leaves = trees.encode(value, _is_array_like, self._classes, expand=_expand, root="the result")
            return [_as_output(leaf, i) for i, leaf in enumerate(leaves)]

        bound = () if call.parameters else tuple(model.values)
        composed: _Flat = f
        for transform in call.transforms:
            composed, inputs = self._transform(composed, bound, inputs, transform, where)
        if call.HasField("keep"):
            wrt = tuple(call.keep.inputs)
            _check_differentiable("keep", wrt, inputs)
            program: _Program = yield from self._prepare_kept(composed, bound, inputs, wrt, where)
        else:
            run, outputs = yield from self._compile(composed, (bound, *_avals(inputs)), where)
            program = _Program(inputs, outputs, lambda arrays, _: (run(bound, *arrays), None), where)
        if not call.transforms:
            program.result = result
        return program

    def prepare_parameters(self, model: Model) -> Program:
        outputs = [_aval(parameter.spec) for parameter in model.parameters]
        return _Program((), outputs, lambda _, __: (model.values, None), f"the parameters of {model.name!r}")

    def prepare_pullback(self, program: Program, wrt: Sequence[int], outputs: Sequence[int]) -> Preparation:
        assert isinstance(program, _KeepingProgram), "only such a program keeps residuals"
        if not set(wrt) <= set(program.wrt) or not set(outputs) <= set(program.differentiable):
            raise ProtocolError(
                f"a pullback from the outputs {outputs} to the inputs {wrt}, of a program that keeps what is needed "
                f"from {program.differentiable} to {program.wrt}"
            )
        inputs = tuple(program.outputs[i] for i in outputs)
        arguments = (program.residual_avals, *_avals(inputs))
        where = f"the VJP of {program.where}"
        try:
            # Leaves out the work for outputs that did not matter, in ways that not every release of jax has.
            run, made = yield from self._compile(program.pullback(wrt, outputs, is_pruned=True), arguments, where)
        except RemoteModelError:
            run, made = yield from self._compile(program.pullback(wrt, outputs, is_pruned=False), arguments, where)
        pullback = _Program(inputs, made, lambda arrays, residual: (run(residual, *arrays), None), where)
        pullback.pullback_of = program
        return pullback

    def view(self, pointer: int, spec: Spec, owner: Any) -> Any:
        if 0 in spec.shape:
            return jnp.zeros(spec.shape, spec.dtype.name)
        if spec.weak:
            return np.from_dlpack(Exporter(pointer, spec)).item()
        array = jax.dlpack.from_dlpack(Exporter(pointer, spec, owner))
        if array.unsafe_buffer_pointer() != pointer:
            raise InternalError(f"jax {jax.__version__} copied an imported {spec} instead of viewing it")
        return array

    def write(self, array: Any, pointer: int, nbytes: int) -> None:
        try:
            source = array.unsafe_buffer_pointer()
        except Exception:  # spread over several devices, whose parts have to be gathered first
            array = np.ascontiguousarray(array)
            source = array.ctypes.data
        copy(pointer, source, nbytes)

    def _parameter_spec(self, model: str, label: str, leaf: Any) -> Spec:
        dtype = BY_NAME[_dtype_name(leaf)]
        if dtype.name in NEEDS_X64 and not self._x64:
            raise TargetError(
                f"the parameter {label!r} of {model!r} has dtype {dtype.name}, but the worker runs without x64; "
                "cast it, or start the worker with --x64"
            )
        return Spec(dtype, tuple(leaf.shape))

    def _check_signature(self, model: Model, call: pb.Call, inputs: Sequence[Spec]) -> str:
        """Check the inputs of a call before anything is traced, and return them as text for later errors."""
        own = [parameter.path for parameter in model.parameters] if call.parameters else []
        names = own + trees.argument_paths(call.arguments)
        if len(names) != len(inputs):
            raise ProtocolError(f"a call with {len(names)} array leaves came with {len(inputs)} specs")
        for name, spec in zip(names, inputs, strict=True):
            if spec.dtype.name in NEEDS_X64 and not spec.weak and not self._x64:
                raise DTypeError(
                    f"input `{name}` has dtype {spec.dtype.name}, but the worker runs without x64; cast it or start "
                    "the worker with --x64"
                )
        if call.parameters:
            for parameter, spec in zip(model.parameters, inputs, strict=False):
                if spec.shape != parameter.spec.shape:
                    raise SpecError(
                        f"parameter `{parameter.path}` has shape {list(spec.shape)}; "
                        f"the model's has {list(parameter.spec.shape)}"
                    )
        shown = [f"{name}: {spec}" for name, spec in zip(names, inputs, strict=True)]
        more = f", and {len(shown) - _MAX_NAMED_LEAVES} more" if len(shown) > _MAX_NAMED_LEAVES else ""
        return f"({', '.join(shown[-_MAX_NAMED_LEAVES:])}{more})"

    def _prepare_kept(
        self, f: _Flat, bound: Sequence[Any], inputs: tuple[Spec, ...], wrt: tuple[int, ...], where: str
    ) -> Generator[str, None, "_KeepingProgram"]:
        structure: Any = None
        differentiable: tuple[int, ...] = ()

        def forward(bound: Sequence[Any], *arrays: Any) -> tuple[list[Any], list[Any]]:
            nonlocal structure, differentiable

            def restricted(*primals: Any) -> tuple[list[Any], list[Any]]:
                nonlocal differentiable
                outputs = f(bound, *_replaced(arrays, wrt, primals))
                differentiable = tuple(i for i, y in enumerate(outputs) if _is_inexact(y))
                return [outputs[i] for i in differentiable], outputs

            _, pullback, outputs = jax.vjp(restricted, *(arrays[i] for i in wrt), has_aux=True)
            residual, structure = jax.tree_util.tree_flatten(pullback)
            return outputs, residual

        run, (outputs, residual) = yield from self._compile(forward, (bound, *_avals(inputs)), where)
        return _KeepingProgram(
            inputs, outputs, lambda arrays, _: run(bound, *arrays), where, wrt, differentiable, residual, structure
        )

    def _transform(
        self, f: _Flat, bound: Sequence[Any], inputs: tuple[Spec, ...], transform: pb.Transform, where: str
    ) -> tuple[_Flat, tuple[Spec, ...]]:
        """Return the transformed function and its inputs."""
        kind = transform.WhichOneof("kind")
        if kind == "vmap":
            return _vmap(f, inputs, transform.vmap)
        if kind == "jvp":
            _check_differentiable("jvp", transform.jvp.wrt, inputs)
            _check_differentiable("jvp", transform.jvp.outputs, self._outputs(f, bound, inputs, where))
            tangents = tuple(inputs[i] for i in transform.jvp.wrt)
            return _jvp(f, len(inputs), transform.jvp), inputs + tangents
        if kind == "vjp":
            _check_differentiable("vjp", transform.vjp.wrt, inputs)
            made = self._outputs(f, bound, inputs, where)
            _check_differentiable("vjp", transform.vjp.outputs, made)
            cotangents = tuple(made[i] for i in transform.vjp.outputs)
            return _vjp(f, len(inputs), transform.vjp), inputs + cotangents
        raise ProtocolError("a transform has no kind")

    def _outputs(self, f: _Flat, bound: Sequence[Any], inputs: Sequence[Spec], where: str) -> tuple[Spec, ...]:
        with _model_errors(where):
            return _specs(jax.eval_shape(f, bound, *_avals(inputs)))

    def _compile(self, f: Callable[..., Any], arguments: Sequence[Any], where: str) -> Generator[str, None, Any]:
        """Return the function compiled for these arguments' types, and the types of what it returns."""
        yield "tracing"
        with _model_errors(where):
            traced = jax.jit(f).trace(*arguments)
            _check_sizes(traced.jaxpr.jaxpr)
            if not self._jit:
                return f, traced.out_info
            lowered = traced.lower()
        yield "compiling"
        with _model_errors(where):
            compiled = lowered.compile()
        return compiled, compiled.out_info


class _Program(Program):
    """Compiled code with the signature it was compiled for."""

    def __init__(
        self, inputs: tuple[Spec, ...], outputs: Sequence[Any], run: Callable[[Sequence[Any], Any], Any], where: str
    ) -> None:
        self.inputs = inputs
        self.outputs = _specs(outputs)
        self.output_nbytes = tuple(spec.nbytes for spec in self.outputs)
        self.result = trees.flat(len(outputs))
        self.where = where
        self._run = run

    def run(self, inputs: Sequence[Any], residual: Any) -> tuple[Sequence[Any], Any]:
        try:
            outputs, residual = self._run(inputs, residual)
            for output in outputs:
                output.block_until_ready()
        except Exception as error:
            raise _remote(error, self.where) from error
        return outputs, residual


class _KeepingProgram(_Program):
    """A program whose runs keep what the pullback to the inputs `wrt` needs, as a flat list of arrays."""

    def __init__(
        self,
        inputs: tuple[Spec, ...],
        outputs: Sequence[Any],
        run: Callable[[Sequence[Any], Any], Any],
        where: str,
        wrt: tuple[int, ...],
        differentiable: tuple[int, ...],
        residual_avals: Sequence[Any],
        structure: Any,
    ) -> None:
        super().__init__(inputs, outputs, run, where)
        self.wrt = wrt
        self.differentiable = differentiable
        self.residual_avals = residual_avals
        self.residual_nbytes = sum(aval.size * aval.dtype.itemsize for aval in residual_avals)
        self._structure = structure

    def pullback(self, wrt: Sequence[int], outputs: Sequence[int], *, is_pruned: bool) -> _Flat:
        """Return the function of the residual, and of the cotangents of `outputs`, to the cotangents of `wrt`."""
        positions = [self.wrt.index(i) for i in wrt]
        used = [i in outputs for i in self.differentiable]
        zero = _symbolic_zero if is_pruned else _zeros

        def pull(residual: Sequence[Any], *cotangents: Any) -> list[Any]:
            given = dict(zip(outputs, cotangents, strict=True))
            full = [given[i] if i in given else zero(self.outputs[i]) for i in self.differentiable]
            linear = jax.tree_util.tree_unflatten(self._structure, residual)
            gradients = (_pruned(linear, used) if is_pruned and not all(used) else linear)(full)
            return [gradients[i] for i in positions]

        return pull


def _vjp(f: _Flat, count: int, transform: pb.Transform.Vjp) -> _Flat:
    wrt, selected = tuple(transform.wrt), tuple(transform.outputs)

    def transformed(bound: Sequence[Any], *arrays: Any) -> list[Any]:
        xs, cotangents = arrays[:count], arrays[count:]
        _, pull = jax.vjp(_restricted(f, bound, xs, wrt, selected), *(xs[i] for i in wrt))
        return list(pull(list(cotangents)))

    return transformed


def _jvp(f: _Flat, count: int, transform: pb.Transform.Jvp) -> _Flat:
    wrt, selected = tuple(transform.wrt), tuple(transform.outputs)

    def transformed(bound: Sequence[Any], *arrays: Any) -> list[Any]:
        xs, tangents = arrays[:count], arrays[count:]
        return jax.jvp(_restricted(f, bound, xs, wrt, selected), [xs[i] for i in wrt], list(tangents))[1]

    return transformed


def _vmap(f: _Flat, inputs: tuple[Spec, ...], transform: pb.Transform.Vmap) -> tuple[_Flat, tuple[Spec, ...]]:
    axes, size = tuple(transform.axes), transform.size
    if len(axes) != len(inputs):
        raise ProtocolError(f"vmap names {len(axes)} axes for {len(inputs)} inputs")
    for axis, spec in zip(axes, inputs, strict=True):
        if not -1 <= axis <= len(spec.shape) or size < 0 or (spec.weak and axis >= 0):
            raise ProtocolError(f"vmap over axis {axis} of an input that has {len(spec.shape)} axes without it")
    in_axes = tuple(None if axis < 0 else axis for axis in axes)

    def transformed(bound: Sequence[Any], *arrays: Any) -> list[Any]:
        return jax.vmap(lambda *xs: f(bound, *xs), in_axes=in_axes, axis_size=size)(*arrays)

    mapped = tuple(
        spec if axis < 0 else spec._replace(shape=(*spec.shape[:axis], size, *spec.shape[axis:]))
        for axis, spec in zip(axes, inputs, strict=True)
    )
    for spec in mapped:
        if math.prod(spec.shape) > _MOST_ELEMENTS:
            raise SpecError(f"vmap over {size} elements makes an input of type {spec}, which no memory can hold")
    return transformed, mapped


def _restricted(
    f: _Flat, bound: Sequence[Any], xs: Sequence[Any], wrt: Sequence[int], selected: Sequence[int]
) -> Callable[..., list[Any]]:
    """Return `f` as a function of the inputs `wrt` alone, to the selected outputs alone."""

    def restricted(*primals: Any) -> list[Any]:
        outputs = f(bound, *_replaced(xs, wrt, primals))
        return [outputs[i] for i in selected]

    return restricted


def _replaced(xs: Sequence[Any], positions: Sequence[int], values: Sequence[Any]) -> list[Any]:
    replaced = list(xs)
    for i, value in zip(positions, values, strict=True):
        replaced[i] = value
    return replaced


def _check_sizes(jaxpr: Any) -> None:
    """Refuse a program with an array too large for any machine: XLA would end the process over it."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            if all(isinstance(size, int) for size in shape) and math.prod(shape) > _MOST_ELEMENTS:
                raise SpecError(f"the model makes an array of shape {list(shape)}, which no memory can hold")
        for inner in jax.tree_util.tree_leaves(list(equation.params.values())):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                _check_sizes(getattr(inner, "jaxpr", inner))


def _check_differentiable(transform: str, positions: Sequence[int], specs: Sequence[Spec]) -> None:
    for i in positions:
        if i >= len(specs):
            raise ProtocolError(f"{transform} names the array {i} of {len(specs)}")
        if not specs[i].dtype.is_inexact or specs[i].weak:
            raise SpecError(f"{transform} with respect to an array of type {specs[i]}; only floats have derivatives")
    if len(set(positions)) != len(positions):
        raise ProtocolError(f"{transform} names an array twice: {list(positions)}")


def _pruned(linear: Any, used: Sequence[bool]) -> Any:
    """Return a VJP without what it does for outputs that are not used: scans and custom_vjps there would run on zeros.

    Reaches into jax 0.10's VJP; where it fails, the caller does without.
    """
    spec, known, jaxpr, avals = linear.fun.args
    unknown = [u for u, k in zip(used, known, strict=True) if not k]
    pruned, _ = dce_jaxpr(jaxpr, unknown, True)
    kept = iter(pruned.outvars)
    outvars = [next(kept) if u else Literal(0.0, v.aval) for u, v in zip(unknown, jaxpr.outvars, strict=True)]
    jaxpr = pruned.replace(outvars=outvars, debug_info=jaxpr.debug_info)
    function = functools.partial(linear.fun.func, spec, known, jaxpr, avals)
    return type(linear)(function, linear.in_tree, linear.out_tree, linear.args_res, linear.opaque_residuals)


def _symbolic_zero(spec: Spec) -> Any:
    return ad.Zero(jax.core.ShapedArray(spec.shape, jnp.dtype(spec.dtype.name)))


def _zeros(spec: Spec) -> Any:
    return jnp.zeros(spec.shape, spec.dtype.name)


# Types ---------------------------------------------------------------------------------------------------------


def _aval(spec: Spec) -> jax.ShapeDtypeStruct:
    # A Python number comes in the widest type of its kind and takes the worker's default one.
    dtype = jax.dtypes.canonicalize_dtype(spec.dtype.name) if spec.weak else jnp.dtype(spec.dtype.name)
    return jax.ShapeDtypeStruct(spec.shape, dtype, weak_type=spec.weak)


def _avals(specs: Sequence[Spec]) -> list[jax.ShapeDtypeStruct]:
    return [_aval(spec) for spec in specs]


def _specs(avals: Sequence[Any]) -> tuple[Spec, ...]:
    return tuple(Spec(BY_NAME[_dtype_name(aval)], tuple(aval.shape)) for aval in avals)


def _dtype_name(value: Any) -> str:
    return str(getattr(value, "dtype", None))


def _is_inexact(value: Any) -> bool:
    return BY_NAME[_dtype_name(value)].is_inexact


def _is_array_like(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _as_output(leaf: Any, position: int) -> Any:
    array = jnp.asarray(leaf)
    if _dtype_name(array) not in BY_NAME:
        raise SpecError(f"the model returned an array of dtype {array.dtype} as its leaf {position}, which torch lacks")
    return array


def _number_to_array(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, bool | int | float | complex) else leaf


def _expand(value: Any) -> tuple[str, tuple[str, ...], list[Any]] | None:
    """Return what any pytree node that jax knows consists of."""
    children = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda x: x is not value)[0]
    if len(children) == 1 and children[0][1] is value:
        return None
    names = [_path_step(path[0]) for path, _ in children]
    if not all(name.isidentifier() for name in names):
        names = [f"item{i}" for i in range(len(children))]
    return type(value).__name__, tuple(names), [child for _, child in children]


def _register_dataclass(cls: type, fields: tuple[str, ...]) -> None:
    jax.tree_util.register_dataclass(cls, data_fields=list(fields), meta_fields=[])


# Errors --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _model_errors(where: str) -> Iterator[None]:
    try:
        yield
    except BridgeError:
        raise
    except Exception as error:
        raise _remote(error, where) from error


def _remote(error: Exception, where: str) -> RemoteModelError:
    kind = type(error)
    # The frames before the model's first one are the bridge's and jax's own and tell its author nothing.
    frames = traceback.extract_tb(error.__traceback__)
    first = next((i for i, frame in enumerate(frames) if not _is_machinery(frame.filename)), 0)
    text = "".join(["Traceback (most recent call last):\n", *traceback.format_list(frames[first:])])
    return RemoteModelError(
        f"{kind.__name__}: {error}\n(in {where})",
        remote_type=f"{kind.__module__}.{kind.__qualname__}",
        remote_traceback=text + "".join(traceback.format_exception_only(error)),
    )


def _is_machinery(filename: str) -> bool:
    return filename in (__file__, trees.__file__, contextlib.__file__) or "/jax/" in filename


# Models --------------------------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """A target taken apart: `apply(state, *args, **kwargs)`, where only `state` holds arrays."""

    apply: Callable[..., Any]
    state: Any
    documented: Any  # the callable whose docstring and signature describe the model
    skips_first: bool = False  # whether that signature begins with the parameters
    is_trainable: Callable[[str], bool] = lambda label: True


def _parts_of(target: Any) -> _Parts | None:
    # A framework that was not imported cannot have made the target.
    linen, nnx, equinox = (sys.modules.get(name) for name in ("flax.linen", "flax.nnx", "equinox"))
    state: Any = None
    if isinstance(target, tuple) and len(target) == 2:
        target, state = target
        if linen is None or not isinstance(target, linen.Module):
            return _Parts(target, state, target, skips_first=True) if callable(target) else None
    if linen is not None and isinstance(target, linen.Module):
        if state is None and target.scope is None:
            raise TargetError("a flax.linen module needs its variables: serve the pair (module, variables)")
        module, variables = target.unbind() if state is None else (target, state)
        is_trainable = lambda label: label.partition(".")[0] == "params"  # noqa: E731
        return _Parts(module.apply, variables, module.__call__, is_trainable=is_trainable)
    if nnx is not None and isinstance(target, nnx.Module):
        graph, state = nnx.split(target)
        trainable = {
            ".".join(map(str, path)) for path, variable in nnx.to_flat_state(state) if isinstance(variable, nnx.Param)
        }

        def apply_nnx(state: Any, *args: Any, **kwargs: Any) -> Any:
            return nnx.merge(graph, state)(*args, **kwargs)

        return _Parts(apply_nnx, state, target.__call__, is_trainable=trainable.__contains__)
    if equinox is not None and isinstance(target, equinox.Module):
        arrays, rest = equinox.partition(target, equinox.is_array)

        def apply_equinox(state: Any, *args: Any, **kwargs: Any) -> Any:
            return equinox.combine(state, rest)(*args, **kwargs)

        return _Parts(apply_equinox, arrays, target.__call__)
    if callable(target) and not isinstance(target, type):
        return _Parts(lambda _, *args, **kwargs: target(*args, **kwargs), (), target)
    return None


def _positional_names(parts: _Parts) -> tuple[str, ...]:
    try:
        signature = inspect.signature(parts.documented)
    except (TypeError, ValueError):
        return ()
    names = tuple(
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    )
    return names[1:] if parts.skips_first else names


def _label(path: Sequence[Any]) -> str:
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):  # what an nnx.Variable holds
        path = path[:-1]
    steps = [_path_step(step) for step in path]
    return ".".join(step.replace(".", "_") for step in steps) or "value"


def _path_step(step: Any) -> str:
    for attribute in ("key", "name", "idx"):  # DictKey and FlattenedIndexKey, GetAttrKey, SequenceKey
        if hasattr(step, attribute):
            return str(getattr(step, attribute))
    return str(step)
