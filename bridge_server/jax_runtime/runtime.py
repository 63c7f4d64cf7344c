"""JaxRuntime: traces and compiles models once per signature; XLA runs them."""

import functools
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from bridge_server import runtime
from bridge_server.fingerprints import Fingerprint, Values, add_call
from bridge_server.jax_runtime.advice import (
    for_call,
    for_values,
    in_callers_words,
)
from bridge_server.jax_runtime.meshes import Layout
from bridge_server.jax_runtime.models import adapt
from bridge_server.jax_runtime.parts import Invocation
from bridge_server.jax_runtime.programs import KeepingProgram, Linearization, Program
from bridge_server.jax_runtime.randomness import rng_streams_of
from bridge_server.jax_runtime.transforms import Flat, compose, replaced
from bridge_server.jax_runtime.types import (
    as_output,
    aval_of,
    avals_of,
    check_sizes,
    dtype_name,
    expand,
    has_x64,
    host_array,
    importer,
    importer_on,
    is_array_like,
    is_inexact,
    key_of,
    register_dataclass,
)
from bridge_server.model_errors import LEAKED, is_full, is_refused, model_errors
from bridge_server.runtime import (
    Description,
    Model,
    Options,
    Preparation,
    Runtime,
    Turn,
)
from bridge_server.signatures import (
    arguments_of,
    check_differentiable,
    check_pullback,
    check_signature,
    input_names,
)
from bridge_wire import trees
from bridge_wire.classes import Classes
from bridge_wire.errors import (
    BridgeError,
    CallerError,
    CudaError,
    InternalError,
    RemoteModelError,
    SpecError,
)
from bridge_wire.memory.copying import copy
from bridge_wire.memory.cuda import Gpu, gpu_at
from bridge_wire.memory.dlpack import DeviceExporter, Exporter
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec, decode_all

_log = logging.getLogger(__name__)

_OUTPUT = "the run of a model, noticed when its output was copied"
_TRAINING = {
    pb.MODE_UNSPECIFIED: None,
    pb.MODE_TRAINING: True,
    pb.MODE_INFERENCE: False,
}


class JaxRuntime(Runtime):
    """Serves JAX models, traced and compiled once per signature."""

    def __init__(self, options: Options) -> None:
        if not options.embedded:
            jax.config.update("jax_enable_x64", options.x64)
            # Every call waits for its outputs, so another thread for the work only costs wake-ups.
            jax.config.update("jax_cpu_enable_async_dispatch", False)
            if is_full():
                jax.config.update("jax_traceback_filtering", "off")
        self._jit = options.jit
        self._layout = Layout(options.mesh)
        if options.mesh and not options.jit:
            raise CallerError(
                "--mesh shards compiled programs over devices, but --no-jit compiles none; leave"
                " out one of them"
            )
        self._classes = Classes(register_dataclass, key=key_of)
        self._values = Values(_bytes_of)

    def describe(self) -> Description:
        devices = tuple(map(_name_of, jax.local_devices()))
        return Description("jax", jax.__version__, has_x64(), devices)

    def has_x64(self) -> bool:
        return has_x64()

    def adapt(self, name: str, target: Any) -> Model:
        return self._layout.holding(adapt(name, target, x64=has_x64()))

    def shard(self, model: Model, shardings: Mapping[str, Any]) -> Model:
        return self._layout.shard(model, shardings)

    def prepare_call(self, model: Model, call: pb.Call) -> Preparation:
        inputs = decode_all(call.inputs)
        kinds = [str(each.WhichOneof("kind")) for each in reversed(call.transforms)]
        where = " of ".join([*kinds, _where(model, call, inputs)])
        bound = _bound(model, call)
        trees_found: list[pb.Tree] = []
        try:
            composed = self._flat(model, call, trees_found)
            for transform in call.transforms:
                with self._layout.context():
                    composed, inputs = compose(
                        composed, bound, inputs, transform, where
                    )
            if call.HasField("keep"):
                wrt = tuple(call.keep.inputs)
                check_differentiable("keep", wrt, inputs)
                prepared = self._prepare_keeping(composed, bound, inputs, wrt, where)
                program: Program = yield from prepared
            else:
                run, outputs = yield from self._compile(
                    composed, (bound, *avals_of(inputs)), where
                )
                code = lambda arrays, _: (run(bound, *arrays), None)  # noqa: E731
                program = Program(inputs, outputs, code, where, is_async=self._is_async)
        except (RemoteModelError, CallerError) as error:
            if error.__cause__ is None:  # not an exception of the model
                raise
            raise self._advised(error, model, call) from error.__cause__
        program.request = model, call
        if not call.transforms:
            program.result = trees_found[-1]
        return program

    def shapes(
        self, model: Model, call: pb.Call, inputs: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[str]]:
        specs = decode_all(call.inputs)
        where = _where(model, call, specs)
        scope = export.SymbolicScope()
        avals = avals_of(specs)
        for i, sizes in enumerate(inputs):
            if sizes:
                shape = export.symbolic_shape(",".join(sizes), scope=scope)
                avals[i] = jax.ShapeDtypeStruct(shape, avals[i].dtype)
        f = functools.partial(self._flat(model, call, []), _bound(model, call))
        with model_errors(where), self._layout.context():
            outputs = jax.eval_shape(f, *avals)
        return [[str(size) for size in aval.shape] for aval in outputs]

    def fingerprint(self, model: Model, call: pb.Call) -> bytes:
        fingerprint = Fingerprint()
        fingerprint.add("jax", jax.__version__, has_x64())
        add_call(fingerprint, model, call, self._values)
        arguments = (_bound(model, call), *avals_of(decode_all(call.inputs)))
        try:
            with self._layout.context():
                traced = self._layout.jit(self._flat(model, call, [])).trace(*arguments)
                # The text contains all constants, and no debug information, which has file names.
                fingerprint.add(traced.lower().as_text())
        except Exception as error:  # such as of operations that run only with --no-jit
            _log.debug(
                "model %r has no lowered program for its fingerprint: %s",
                model.name,
                error,
            )
        return fingerprint.digest()

    def result(self, model: Model, call: pb.Call) -> pb.Tree:
        inputs = decode_all(call.inputs)
        found: list[pb.Tree] = []
        f = functools.partial(self._flat(model, call, found), _bound(model, call))
        with model_errors(_where(model, call, inputs)), self._layout.context():
            jax.eval_shape(f, *avals_of(inputs))
        return found[-1]

    def prepare_parameters(self, model: Model) -> runtime.Program:
        outputs = [aval_of(parameter.spec) for parameter in model.parameters]
        where = f"the parameters of {model.name!r}"
        return Program((), outputs, lambda _, __: (model.values, None), where)

    def prepare_pullback(
        self, program: runtime.Program, wrt: Sequence[int], outputs: Sequence[int]
    ) -> Preparation:
        assert isinstance(program, KeepingProgram), (
            "a pullback needs a program with residuals"
        )
        check_pullback(program, wrt, outputs)
        inputs = tuple(program.outputs[i] for i in outputs)
        arguments = (program.residual_avals, *avals_of(inputs))
        where = f"the VJP of {program.where}"
        try:
            pull = program.pullback(wrt, outputs, is_pruned=True)
            run, gradients = yield from self._compile(pull, arguments, where)
        except RemoteModelError:
            try:
                pull = program.pullback(wrt, outputs, is_pruned=False)
                run, gradients = yield from self._compile(pull, arguments, where)
            except RemoteModelError as error:
                raise self._advised(error, *program.request) from error.__cause__
        code = lambda cotangents, residual: (run(residual, *cotangents), None)  # noqa: E731
        pullback = Program(inputs, gradients, code, where, is_async=self._is_async)
        pullback.pullback_of = program
        return pullback

    def gpu(self) -> Gpu | None:
        return gpu_at(self._layout.ordinal)

    def memory_bytes(self) -> int | None:
        # None for the host, and under some allocators.
        stats = self._layout.device.memory_stats()
        return stats.get("bytes_limit") if stats else None

    def has_failed(self) -> bool:
        if self._layout.is_on_host:
            return False
        probe = np.zeros(1, np.float32)
        return is_refused(
            lambda: jax.device_put(probe, self._layout.device).block_until_ready()
        )

    def view(
        self, pointer: int, spec: Spec, owner: Any, turn: Turn | None = None
    ) -> Any:
        if 0 in spec.shape:
            return jnp.zeros(spec.shape, spec.dtype.name)
        if spec.weak:
            return np.from_dlpack(Exporter(pointer, spec)).item()
        if turn is not None:
            device = turn.device.dlpack_device
            array = self._imported(
                DeviceExporter(pointer, spec, owner, device, turn.wait)
            )
        elif self._layout.is_on_host:
            array = importer()(Exporter(pointer, spec, owner))
        else:
            return host_array(pointer, spec, owner)  # each run copies it to the device
        if array.unsafe_buffer_pointer() != pointer:
            raise InternalError(
                f"jax {jax.__version__} copied an imported {spec} instead of viewing it"
            )
        return array

    def is_usable(self, view: Any) -> bool:
        return isinstance(view, np.ndarray) or not view.is_deleted()

    def write(
        self, array: Any, pointer: int, nbytes: int, turn: Turn | None = None
    ) -> None:
        if turn is not None:
            self._write_in_turn(array, pointer, nbytes, turn)
            return
        try:
            source = array.unsafe_buffer_pointer() if self._layout.is_on_host else None
        except Exception:
            # Sharded over several devices: the shards have to be gathered.
            source = None
        if source is None:
            with model_errors(_OUTPUT):
                array = np.ascontiguousarray(array)
            source = array.ctypes.data
        copy(pointer, source, nbytes, array)

    def exclusive(
        self, outputs: Sequence[Any], inputs: Sequence[Any], residual: Any
    ) -> Sequence[int | None]:
        if not self._layout.is_on_host:
            return super().exclusive(outputs, inputs, residual)
        taken = {_pointer(array) for array in (*inputs, *(residual or ()))}
        pointers: list[int | None] = []
        for output in outputs:  # programs are compiled for row-major outputs
            pointer = _pointer(output)
            pointers.append(None if pointer in taken else pointer)
            taken.add(pointer)
        return pointers

    def _advised(self, error: BridgeError, model: Model, call: pb.Call) -> BridgeError:
        """Add advice to an error that a static argument or a derivative of the call has caused."""
        keep = call.keep if call.HasField("keep") else None
        f = self._flat(model, call, [])
        bound = _bound(model, call)
        inputs = decode_all(call.inputs)
        is_models = isinstance(error, RemoteModelError)
        # The CallerError of torch code has advice of its own, about arrays.
        cause = error.__cause__ if is_models else None
        with self._layout.context():
            advice = for_values(f, bound, inputs, arguments_of(model, call), cause)
            if not advice and is_models and (call.transforms or keep is not None):
                advice = for_call(f, bound, inputs, call.transforms, keep)
        names = input_names(model, call)
        text = in_callers_words(error.args[0], names)
        advised = error.reworded(f"{text}\n{advice}" if advice else text)
        if isinstance(advised, RemoteModelError):
            traceback = in_callers_words(advised.remote_traceback, names)
            advised.remote_traceback = traceback
        return advised

    def _flat(self, model: Model, call: pb.Call, trees_found: list[pb.Tree]) -> Flat:
        """Return a call as a function of its values and flat arrays.

        Each trace of the function appends its result's structure to `trees_found`.
        """
        own = len(model.parameters) if call.parameters else 0
        first_leaf = own + bool(call.rngs)
        own_paths = [parameter.path for parameter in model.parameters]
        leaf_paths = trees.argument_paths(call.arguments)

        def f(bound: Sequence[Any], *arrays: Any) -> list[Any]:
            leaves = self._layout.constrained(arrays[first_leaf:], leaf_paths, model)
            args, kwargs = trees.build(call.arguments, leaves, self._classes)
            values = arrays[:own] if call.parameters else bound
            values = self._layout.constrained(values, own_paths, model)
            rng_streams = rng_streams_of(arrays[own], call.rngs) if call.rngs else {}
            invocation = Invocation(
                args,
                kwargs,
                rng_streams,
                call.mutable,
                _TRAINING[call.mode],
                model.method(call.method).attribute,
            )
            value, buffers = model.apply(values, invocation)
            tree, outputs = trees.encode(
                value, is_array_like, self._classes, expand=expand, root="the result"
            )
            trees_found.append(tree)
            return [*(as_output(leaf, i) for i, leaf in enumerate(outputs)), *buffers]

        return f

    def _prepare_keeping(
        self,
        f: Flat,
        bound: Sequence[Any],
        inputs: tuple[Spec, ...],
        wrt: tuple[int, ...],
        where: str,
    ) -> Generator[str, None, KeepingProgram]:
        structure: Any = None
        differentiable: tuple[int, ...] = ()

        def forward(bound: Sequence[Any], *arrays: Any) -> tuple[list[Any], list[Any]]:
            nonlocal structure, differentiable

            def restricted(*primals: Any) -> tuple[list[Any], list[Any]]:
                nonlocal differentiable
                outputs = f(bound, *replaced(arrays, wrt, primals))
                differentiable = tuple(
                    i for i, y in enumerate(outputs) if is_inexact(y)
                )
                return [outputs[i] for i in differentiable], outputs

            _, pullback, outputs = jax.vjp(
                restricted, *(arrays[i] for i in wrt), has_aux=True
            )
            residual, structure = jax.tree_util.tree_flatten(pullback)
            return outputs, residual

        arguments = (bound, *avals_of(inputs))
        run, (outputs, residual) = yield from self._compile(forward, arguments, where)
        code = lambda arrays, _: run(bound, *arrays)  # noqa: E731
        linearization = Linearization(wrt, differentiable, residual, structure)
        return KeepingProgram(
            inputs, outputs, code, where, linearization, is_async=self._is_async
        )

    @property
    def _is_async(self) -> bool:
        # With --no-jit, an output may be ready before the last operation has run.
        return self._jit and self._layout.ordinal is not None

    def _imported(self, exporter: DeviceExporter) -> jax.Array:
        try:
            return importer_on(self._layout.device)(exporter)
        except BridgeError:
            raise
        except Exception as error:
            reason = f"jax {jax.__version__} cannot read memory of the GPU: {error}"
            raise CudaError(reason) from error

    def _write_in_turn(self, array: Any, pointer: int, nbytes: int, turn: Turn) -> None:
        # XLA has streams of its own: the copy waits for them on the turn's stream, and the turn
        # holds the copy's source until it is done.
        stream = {} if self._layout.ordinal is None else {"stream": turn.stream}
        with model_errors(_OUTPUT):
            capsule = array.__dlpack__(**stream)
            source = array.unsafe_buffer_pointer()
        turn.copy(pointer, source, nbytes, array, capsule)

    def _compile(
        self, f: Callable[..., Any], arguments: Sequence[Any], where: str
    ) -> Generator[str, None, Any]:
        """Return the function compiled for these arguments' types, and its outputs' types."""
        yield "tracing"
        with model_errors(where), self._layout.context():
            traced = self._layout.jit(f).trace(*arguments)
            jaxpr = traced.jaxpr.jaxpr
            if len(jaxpr.invars) != len(jax.tree.leaves(arguments)):
                raise RemoteModelError(
                    f"UnexpectedTracerError: {LEAKED}\n(in {where})",
                    remote_type="jax.errors.UnexpectedTracerError",
                )
            check_sizes(jaxpr)
            if not self._jit:
                return self._layout.placing(
                    _eager(f, traced.out_info, where)
                ), traced.out_info
            lowered = traced.lower()
        yield "compiling"
        with model_errors(where):
            compiled = lowered.compile()
        return self._layout.placing(compiled), compiled.out_info


def _name_of(device: jax.Device) -> str:
    """Return a device's name, such as cuda:0 or cpu:0."""
    return str(device) if device.platform == "gpu" else f"{device.platform}:{device.id}"


def _bound(model: Model, call: pb.Call) -> tuple[Any, ...]:
    """Return the worker's own parameters, or none if the call passes them."""
    return () if call.parameters else tuple(model.values)


def _where(model: Model, call: pb.Call, inputs: Sequence[Spec]) -> str:
    return check_signature(model, call, inputs, x64=has_x64())


def _bytes_of(value: Any) -> memoryview:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _pointer(array: Any) -> int | None:
    """Return the address of an array that is in host memory in one piece, else None."""
    try:
        return int(array.unsafe_buffer_pointer())
    except Exception:  # a Python number, or an array sharded over several devices
        return None


def _eager(f: Callable[..., Any], types: Any, where: str) -> Callable[..., Any]:
    """Return a function that runs operation by operation, even if the model uses jax.jit itself.

    A program that the model compiled with donate_argnums would take its arguments' memory: the
    client's, or the worker's own parameters. Inside a compiled program, donation has no effect.

    A compiled program returns the types it was compiled for. Python code may not, so this function
    checks its outputs.
    """
    expected = list(map(_type_of, jax.tree_util.tree_leaves(types)))

    def run(*arguments: Any) -> Any:
        with jax.disable_jit():
            outputs = f(*arguments)
        seen = list(map(_type_of, jax.tree_util.tree_leaves(outputs)))
        if seen != expected:
            raise SpecError(
                f"{where} returned arrays of types {seen[:9]}, but {expected[:9]} when the call was"
                " prepared; return the same types for the same types of inputs"
            )
        return outputs

    return run


def _type_of(array: Any) -> str:
    return f"{dtype_name(array)}{list(jnp.shape(array))}"
