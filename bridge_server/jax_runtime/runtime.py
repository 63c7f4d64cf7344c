"""JaxRuntime: models traced and compiled once per signature, run by XLA."""

import inspect
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge_server import runtime
from bridge_server.jax_runtime.models import label, parts_of, positional_names
from bridge_server.jax_runtime.programs import KeepingProgram, Program
from bridge_server.jax_runtime.transforms import Flat, check_differentiable, compose, replaced
from bridge_server.jax_runtime.types import (
    as_output,
    aval_of,
    avals_of,
    check_sizes,
    dtype_name,
    expand,
    is_array_like,
    is_inexact,
    number_to_array,
    register_dataclass,
)
from bridge_server.model_errors import model_errors
from bridge_server.runtime import Description, Model, Options, Parameter, Preparation, Runtime
from bridge_wire import trees
from bridge_wire.copying import copy
from bridge_wire.dlpack import Exporter
from bridge_wire.dtypes import BY_NAME, NEEDS_X64
from bridge_wire.errors import DTypeError, InternalError, ProtocolError, RemoteModelError, SpecError, TargetError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec, decode_all

_MOST_NAMED = 20


class JaxRuntime(Runtime):
    """Serves JAX models: traced and compiled once per signature, run by XLA."""

    def __init__(self, options: Options) -> None:
        jax.config.update("jax_enable_x64", options.x64)
        # Every call waits for its outputs at once; handing the work to another thread would only cost wake-ups.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        self._x64 = options.x64
        self._jit = options.jit
        self._classes = trees.Classes(adopt=register_dataclass)

    def describe(self) -> Description:
        devices = tuple(f"{device.platform}:{device.id}" for device in jax.local_devices())
        return Description("jax", jax.__version__, self._x64, devices)

    def adapt(self, name: str, target: Any) -> Model:
        parts = parts_of(target)
        if parts is None:
            raise TargetError(
                f"{name!r} is a {type(target).__module__}.{type(target).__qualname__}; expected a function, a pair "
                "(apply, params), a flax.linen module with its variables, a flax.nnx module or an equinox module"
            )
        leaves, structure = jax.tree_util.tree_flatten_with_path(parts.state)
        state = [leaf if hasattr(leaf, "dtype") else number_to_array(leaf) for _, leaf in leaves]
        # What is no array of a type we know, such as a PRNG key, stays with the worker.
        sent = [i for i, leaf in enumerate(state) if dtype_name(leaf) in BY_NAME]
        labels = [label(leaves[i][0]) for i in sent]
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
            arguments=positional_names(parts),
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
            result, leaves = trees.encode(value, is_array_like, self._classes, expand=expand, root="the result")
            return [as_output(leaf, i) for i, leaf in enumerate(leaves)]

        bound = () if call.parameters else tuple(model.values)
        composed: Flat = f
        for transform in call.transforms:
            composed, inputs = compose(composed, bound, inputs, transform, where)
        if call.HasField("keep"):
            wrt = tuple(call.keep.inputs)
            check_differentiable("keep", wrt, inputs)
            program: Program = yield from self._prepare_kept(composed, bound, inputs, wrt, where)
        else:
            run, outputs = yield from self._compile(composed, (bound, *avals_of(inputs)), where)
            program = Program(inputs, outputs, lambda arrays, _: (run(bound, *arrays), None), where)
        if not call.transforms:
            program.result = result
        return program

    def prepare_parameters(self, model: Model) -> runtime.Program:
        outputs = [aval_of(parameter.spec) for parameter in model.parameters]
        return Program((), outputs, lambda _, __: (model.values, None), f"the parameters of {model.name!r}")

    def prepare_pullback(self, program: runtime.Program, wrt: Sequence[int], outputs: Sequence[int]) -> Preparation:
        assert isinstance(program, KeepingProgram), "only such a program keeps residuals"
        if not set(wrt) <= set(program.wrt) or not set(outputs) <= set(program.differentiable):
            raise ProtocolError(
                f"a pullback from the outputs {outputs} to the inputs {wrt}, of a program that keeps what is needed "
                f"from {program.differentiable} to {program.wrt}"
            )
        inputs = tuple(program.outputs[i] for i in outputs)
        arguments = (program.residual_avals, *avals_of(inputs))
        where = f"the VJP of {program.where}"
        try:
            # Leaves out the work for outputs that did not matter, in ways that not every release of jax has.
            run, made = yield from self._compile(program.pullback(wrt, outputs, is_pruned=True), arguments, where)
        except RemoteModelError:
            run, made = yield from self._compile(program.pullback(wrt, outputs, is_pruned=False), arguments, where)
        pullback = Program(inputs, made, lambda arrays, residual: (run(residual, *arrays), None), where)
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
        dtype = BY_NAME[dtype_name(leaf)]
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
        more = f", and {len(shown) - _MOST_NAMED} more" if len(shown) > _MOST_NAMED else ""
        return f"({', '.join(shown[-_MOST_NAMED:])}{more})"

    def _prepare_kept(
        self, f: Flat, bound: Sequence[Any], inputs: tuple[Spec, ...], wrt: tuple[int, ...], where: str
    ) -> Generator[str, None, KeepingProgram]:
        structure: Any = None
        differentiable: tuple[int, ...] = ()

        def forward(bound: Sequence[Any], *arrays: Any) -> tuple[list[Any], list[Any]]:
            nonlocal structure, differentiable

            def restricted(*primals: Any) -> tuple[list[Any], list[Any]]:
                nonlocal differentiable
                outputs = f(bound, *replaced(arrays, wrt, primals))
                differentiable = tuple(i for i, y in enumerate(outputs) if is_inexact(y))
                return [outputs[i] for i in differentiable], outputs

            _, pullback, outputs = jax.vjp(restricted, *(arrays[i] for i in wrt), has_aux=True)
            residual, structure = jax.tree_util.tree_flatten(pullback)
            return outputs, residual

        run, (outputs, residual) = yield from self._compile(forward, (bound, *avals_of(inputs)), where)
        return KeepingProgram(
            inputs, outputs, lambda arrays, _: run(bound, *arrays), where, wrt, differentiable, residual, structure
        )

    def _compile(self, f: Callable[..., Any], arguments: Sequence[Any], where: str) -> Generator[str, None, Any]:
        """Return the function compiled for these arguments' types, and the types of what it returns."""
        yield "tracing"
        with model_errors(where):
            traced = jax.jit(f).trace(*arguments)
            check_sizes(traced.jaxpr.jaxpr)
            if not self._jit:
                return f, traced.out_info
            lowered = traced.lower()
        yield "compiling"
        with model_errors(where):
            compiled = lowered.compile()
        return compiled, compiled.out_info
