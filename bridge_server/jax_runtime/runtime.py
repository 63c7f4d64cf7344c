"""JaxRuntime: models traced and compiled once per signature, run by XLA."""

import functools
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from bridge_server import runtime
from bridge_server.fingerprints import Fingerprint, Values, code_of
from bridge_server.jax_runtime.advice import for_call
from bridge_server.jax_runtime.meshes import Layout
from bridge_server.jax_runtime.models import adapt
from bridge_server.jax_runtime.programs import KeepingProgram, Program
from bridge_server.jax_runtime.randomness import streams_of
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
    register_dataclass,
)
from bridge_server.model_errors import is_refused, model_errors
from bridge_server.process import devices
from bridge_server.runtime import Description, Model, Options, Preparation, Runtime
from bridge_server.serving.turns import Turn
from bridge_server.signatures import check_differentiable, check_pullback, check_signature
from bridge_wire import trees
from bridge_wire.errors import (
    BridgeError,
    CallerError,
    CudaError,
    InternalError,
    RemoteModelError,
    SpecError,
)
from bridge_wire.memory.copying import copy
from bridge_wire.memory.cuda import Gpu
from bridge_wire.memory.dlpack import DeviceExporter, Exporter
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec, decode_all

_log = logging.getLogger(__name__)

_OUTPUT = "the run of a model, seen when its output was copied"
_TRAINING = {pb.MODE_UNSPECIFIED: None, pb.MODE_TRAINING: True, pb.MODE_INFERENCE: False}


class JaxRuntime(Runtime):
    """Serves JAX models: traced and compiled once per signature, run by XLA."""

    def __init__(self, options: Options) -> None:
        if not options.is_guest:
            jax.config.update("jax_enable_x64", options.x64)
            # Every call waits for its outputs at once; handing the work to another thread would
            # only cost wake-ups.
            jax.config.update("jax_cpu_enable_async_dispatch", False)
        self._jit = options.jit
        self._layout = Layout(options.mesh)
        if options.mesh and not options.jit:
            raise CallerError(
                "--mesh spreads compiled programs over devices, and --no-jit compiles none; leave"
                " out one"
            )
        self._classes = trees.Classes(adopt=register_dataclass)
        self._values = Values(_bytes_of)

    def describe(self) -> Description:
        return Description(
            "jax", jax.__version__, has_x64(), tuple(map(_name_of, jax.local_devices()))
        )

    def has_x64(self) -> bool:
        return has_x64()

    def adapt(self, name: str, target: Any) -> Model:
        return self._layout.holding(adapt(name, target, x64=has_x64()))

    def spread(self, model: Model, shardings: Mapping[str, Any]) -> Model:
        return self._layout.spread(model, shardings)

    def prepare_call(self, model: Model, call: pb.Call) -> Preparation:
        inputs = decode_all(call.inputs)
        called = (
            f"model {model.name!r} called with"
            f" {check_signature(model, call, inputs, x64=has_x64())}"
        )
        where = " of ".join(
            [*(str(t.WhichOneof("kind")) for t in reversed(call.transforms)), called]
        )
        bound = () if call.parameters else tuple(model.values)
        found: list[pb.Tree] = []
        try:
            composed = self._flat(model, call, found)
            for transform in call.transforms:
                with self._layout.context():
                    composed, inputs = compose(composed, bound, inputs, transform, where)
            if call.HasField("keep"):
                wrt = tuple(call.keep.inputs)
                check_differentiable("keep", wrt, inputs)
                program: Program = yield from self._prepare_kept(
                    composed, bound, inputs, wrt, where
                )
            else:
                run, outputs = yield from self._compile(composed, (bound, *avals_of(inputs)), where)
                program = Program(
                    inputs,
                    outputs,
                    lambda arrays, _: (run(bound, *arrays), None),
                    where,
                    is_enqueued=self._is_enqueued,
                )
        except RemoteModelError as error:
            raise self._advised(error, model, call) from error.__cause__
        program.called = model, call
        if not call.transforms:
            program.result = found[-1]
        return program

    def shapes(
        self, model: Model, call: pb.Call, inputs: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[str]]:
        specs = decode_all(call.inputs)
        where = (
            f"model {model.name!r} called with {check_signature(model, call, specs, x64=has_x64())}"
        )
        scope = export.SymbolicScope()
        named = [
            (
                jax.ShapeDtypeStruct(
                    export.symbolic_shape(",".join(sizes), scope=scope), aval.dtype
                )
                if sizes
                else aval
            )
            for aval, sizes in zip(avals_of(specs), inputs, strict=True)
        ]
        bound = () if call.parameters else tuple(model.values)
        with model_errors(where), self._layout.context():
            made = jax.eval_shape(functools.partial(self._flat(model, call, []), bound), *named)
        return [[str(size) for size in aval.shape] for aval in made]

    def fingerprint(self, model: Model, call: pb.Call) -> bytes:
        made = Fingerprint()
        made.add(
            "jax",
            jax.__version__,
            has_x64(),
            code_of(model),
            call.SerializeToString(deterministic=True),
        )
        made.add(*((parameter.path, parameter.spec) for parameter in model.parameters))
        if not call.parameters:
            made.add(self._values.of(model))
        bound = () if call.parameters else tuple(model.values)
        arguments = (bound, *avals_of(decode_all(call.inputs)))
        try:
            with self._layout.context():
                # Without debug information, which has names of files. Constants are part of the
                # text, in full.
                made.add(
                    self._layout.jit(self._flat(model, call, []))
                    .trace(*arguments)
                    .lower()
                    .as_text()
                )
        except Exception as error:  # as of operations that --no-jit has for one at a time
            _log.debug("model %r has no lowered program for its fingerprint: %s", model.name, error)
        return made.digest()

    def prepare_parameters(self, model: Model) -> runtime.Program:
        outputs = [aval_of(parameter.spec) for parameter in model.parameters]
        return Program(
            (), outputs, lambda _, __: (model.values, None), f"the parameters of {model.name!r}"
        )

    def prepare_pullback(
        self, program: runtime.Program, wrt: Sequence[int], outputs: Sequence[int]
    ) -> Preparation:
        assert isinstance(program, KeepingProgram), "only such a program keeps residuals"
        check_pullback(program, wrt, outputs)
        inputs = tuple(program.outputs[i] for i in outputs)
        arguments = (program.residual_avals, *avals_of(inputs))
        where = f"the VJP of {program.where}"
        try:
            # Leaves out the work for outputs that did not matter, in ways that not every release of
            # jax has.
            run, made = yield from self._compile(
                program.pullback(wrt, outputs, is_pruned=True), arguments, where
            )
        except RemoteModelError:
            try:
                run, made = yield from self._compile(
                    program.pullback(wrt, outputs, is_pruned=False), arguments, where
                )
            except RemoteModelError as error:
                raise self._advised(error, *program.called) from error.__cause__
        pullback = Program(
            inputs,
            made,
            lambda arrays, kept: (run(kept, *arrays), None),
            where,
            is_enqueued=self._is_enqueued,
        )
        pullback.pullback_of = program
        return pullback

    def gpu(self) -> Gpu | None:
        return devices.gpu_at(self._layout.ordinal)

    def memory_bytes(self) -> int | None:
        stats = self._layout.device.memory_stats()  # None for the host, and under some allocators
        return stats.get("bytes_limit") if stats else None

    def has_failed(self) -> bool:
        if self._layout.is_on_host:
            return False
        return is_refused(
            lambda: jax.device_put(np.zeros(1, np.float32), self._layout.device).block_until_ready()
        )

    def view(self, pointer: int, spec: Spec, owner: Any, turn: Turn | None = None) -> Any:
        if 0 in spec.shape:
            return jnp.zeros(spec.shape, spec.dtype.name)
        if spec.weak:
            return np.from_dlpack(Exporter(pointer, spec)).item()
        if turn is not None:
            array = self._imported(
                DeviceExporter(pointer, spec, owner, turn.device.dlpack_device, turn.wait)
            )
        elif self._layout.is_on_host:
            array = importer()(Exporter(pointer, spec, owner))
        else:
            return host_array(pointer, spec, owner)  # which each run brings to the device
        if array.unsafe_buffer_pointer() != pointer:
            raise InternalError(
                f"jax {jax.__version__} copied an imported {spec} instead of viewing it"
            )
        return array

    def is_usable(self, view: Any) -> bool:
        return isinstance(view, np.ndarray) or not view.is_deleted()

    def write(self, array: Any, pointer: int, nbytes: int, turn: Turn | None = None) -> None:
        if turn is not None:
            self._write_in_turn(array, pointer, nbytes, turn)
            return
        try:
            source = array.unsafe_buffer_pointer() if self._layout.is_on_host else None
        except Exception:  # spread over several devices, whose parts have to be gathered first
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
        found: list[int | None] = []
        for output in outputs:  # row-major: that is what was compiled for
            pointer = _pointer(output)
            found.append(None if pointer in taken else pointer)
            taken.add(pointer)
        return found

    def _advised(self, error: RemoteModelError, model: Model, call: pb.Call) -> RemoteModelError:
        """Return the error with what the caller can do, where a derivative of the call is at
        fault."""
        if not call.transforms and not call.HasField("keep"):
            return error
        keep = call.keep if call.HasField("keep") else None
        bound = () if call.parameters else tuple(model.values)
        with self._layout.context():
            advice = for_call(
                self._flat(model, call, []), bound, decode_all(call.inputs), call.transforms, keep
            )
        return error.with_advice(advice) if advice else error

    def _flat(self, model: Model, call: pb.Call, found: list[pb.Tree]) -> Flat:
        """Return a call as a function of its values and flat arrays; when it is traced, it adds its
        result's structure to those found.
        """
        own = len(model.parameters) if call.parameters else 0
        first_leaf = own + bool(call.rngs)
        own_paths = [parameter.path for parameter in model.parameters]
        leaf_paths = trees.argument_paths(call.arguments)

        def f(bound: Sequence[Any], *arrays: Any) -> list[Any]:
            leaves = self._layout.constrained(arrays[first_leaf:], leaf_paths, model)
            args, kwargs = trees.build(call.arguments, leaves, self._classes)
            values = self._layout.constrained(
                arrays[:own] if call.parameters else bound, own_paths, model
            )
            streams = streams_of(arrays[own], call.rngs) if call.rngs else {}
            value, changed = model.apply(
                values, args, kwargs, streams, call.mutable, _TRAINING[call.mode]
            )
            tree, made = trees.encode(
                value, is_array_like, self._classes, expand=expand, root="the result"
            )
            found.append(tree)
            return [as_output(leaf, i) for i, leaf in enumerate(made)] + changed

        return f

    def _prepare_kept(
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
                differentiable = tuple(i for i, y in enumerate(outputs) if is_inexact(y))
                return [outputs[i] for i in differentiable], outputs

            _, pullback, outputs = jax.vjp(restricted, *(arrays[i] for i in wrt), has_aux=True)
            residual, structure = jax.tree_util.tree_flatten(pullback)
            return outputs, residual

        run, (outputs, residual) = yield from self._compile(
            forward, (bound, *avals_of(inputs)), where
        )
        return KeepingProgram(
            inputs,
            outputs,
            lambda arrays, _: run(bound, *arrays),
            where,
            wrt,
            differentiable,
            residual,
            structure,
            is_enqueued=self._is_enqueued,
        )

    @property
    def _is_enqueued(self) -> bool:
        # Operation by operation, an output may be there before the last of them has run.
        return self._jit and self._layout.ordinal is not None

    def _imported(self, exporter: DeviceExporter) -> jax.Array:
        try:
            return importer_on(self._layout.device)(exporter)
        except BridgeError:
            raise
        except Exception as error:
            raise CudaError(
                f"jax {jax.__version__} cannot read memory of the GPU: {error}"
            ) from error

    def _write_in_turn(self, array: Any, pointer: int, nbytes: int, turn: Turn) -> None:
        # XLA's streams are its own: the copy waits for them on the turn's, and what it reads is
        # held until it is done.
        stream = {} if self._layout.ordinal is None else {"stream": turn.stream}
        with model_errors(_OUTPUT):
            capsule = array.__dlpack__(**stream)
            source = array.unsafe_buffer_pointer()
        turn.copy(pointer, source, nbytes, array, capsule)

    def _compile(
        self, f: Callable[..., Any], arguments: Sequence[Any], where: str
    ) -> Generator[str, None, Any]:
        """Return the function compiled for these arguments' types, and the types of what it
        returns."""
        yield "tracing"
        with model_errors(where), self._layout.context():
            traced = self._layout.jit(f).trace(*arguments)
            check_sizes(traced.jaxpr.jaxpr)
            if not self._jit:
                return self._layout.placing(_eager(f, traced.out_info, where)), traced.out_info
            lowered = traced.lower()
        yield "compiling"
        with model_errors(where):
            compiled = lowered.compile()
        return self._layout.placing(compiled), compiled.out_info


def _name_of(device: jax.Device) -> str:
    return (
        str(device) if device.platform == "gpu" else f"{device.platform}:{device.id}"
    )  # such as cuda:0, cpu:0


def _bytes_of(value: Any) -> memoryview:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _pointer(array: Any) -> int | None:
    """Return where an array lies in host memory, if it lies there, and in one piece."""
    try:
        return int(array.unsafe_buffer_pointer())
    except Exception:  # a Python number; an array that is spread over several devices
        return None


def _eager(f: Callable[..., Any], types: Any, where: str) -> Callable[..., Any]:
    """Return the function as one that runs operation by operation, also where the model itself has
    used jax.jit.

    Else what that compiled with donate_argnums would take the memory of its arguments: the
    client's, or the worker's own parameters. Inside a compiled program, donation means nothing.

    A compiled program returns arrays of the types it was compiled for. Python code may not, so its
    are checked here.
    """
    expected = list(map(_type_of, jax.tree_util.tree_leaves(types)))

    def run(*arguments: Any) -> Any:
        with jax.disable_jit():
            made = f(*arguments)
        seen = list(map(_type_of, jax.tree_util.tree_leaves(made)))
        if seen != expected:
            raise SpecError(
                f"{where} returned arrays of types {seen[:9]} and had {expected[:9]} when the call"
                " was prepared; a model's outputs must have the same types whenever its inputs"
                " have"
            )
        return made

    return run


def _type_of(array: Any) -> str:
    return f"{dtype_name(array)}{list(jnp.shape(array))}"
