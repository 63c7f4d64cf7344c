"""TorchRuntime: torch runs models eagerly; a trace per signature finds their outputs' types."""

import functools
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from bridge_server import runtime
from bridge_server.fingerprints import Fingerprint, Values, add_call
from bridge_server.model_errors import is_refused, model_errors
from bridge_server.runtime import (
    Description,
    Model,
    Options,
    Parameter,
    Preparation,
    Runtime,
    Turn,
)
from bridge_server.signatures import (
    check_differentiable,
    check_pullback,
    check_signature,
)
from bridge_server.torch_runtime import types
from bridge_server.torch_runtime.calls import Call
from bridge_server.torch_runtime.models import parts_of
from bridge_server.torch_runtime.modes import without_callers_modes
from bridge_server.torch_runtime.programs import (
    KeepingProgram,
    Program,
    RunCode,
    RunOptions,
    ToDevice,
)
from bridge_server.torch_runtime.transforms import Composed, compose
from bridge_wire.classes import Classes
from bridge_wire.errors import TargetError
from bridge_wire.memory.cuda import Gpu, gpu_at
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec, decode_all

_OUTPUT = "the run of a model, noticed when its output was copied"

_MAX_CALLS = 16384


class TorchRuntime(Runtime):
    """Serves torch models: eager code, differentiated by autograd and torch.func."""

    def __init__(self, options: Options) -> None:
        self._device = _device(options)
        self._is_on_host = self._device == types.HOST
        self._classes = Classes()
        self._values = Values(types.bytes_of)
        self._calls: dict[tuple[Model, bytes], Call] = {}

    def describe(self) -> Description:
        device = f"{self._device.type}:{self._device.index or 0}"
        return Description("torch", torch.__version__, x64=True, devices=(device,))

    def adapt(self, name: str, target: Any) -> Model:
        parts = parts_of(name, target, self._device)
        if parts is None:
            raise TargetError(
                f"{name!r} is a {type(target).__module__}.{type(target).__qualname__}; expected a"
                " function, an object with public methods, an nn.Module, or a pair (function or"
                " module, parameters)"
            )
        parameters = [
            Parameter(label, types.spec_of(tensor), label in parts.trainable)
            for label, tensor in parts.state.items()
        ]
        return Model(
            name=name,
            doc=_doc_of(parts.documented),
            methods=parts.methods,
            parameters=tuple(parameters),
            values=[tensor.detach() for tensor in parts.state.values()],
            apply=parts.code,
            source=(target, parts.documented),
        )

    def prepare_call(self, model: Model, call: pb.Call) -> Preparation:
        yield "tracing"
        base = self._call(model, call)
        composed = compose(base, call.transforms, is_kept=call.HasField("keep"))
        kinds = {transform.WhichOneof("kind") for transform in call.transforms}
        options = RunOptions(
            draws=base.draws,
            is_seeded=base.key is not None,
            # A forward-mode derivative or a batch may use other layouts than the call; a vjp runs
            # the call itself.
            draws_in_row_major_order=base.draws_by_layout or bool(kinds - {"vjp"}),
            has_fast_path=base.has_fast_path,
            to_device=self._to_device(base.key),
            protect=base.protect_inputs,
        )
        if kinds - {"vmap"}:
            base.warn_if_unkeyed()
        program: Program
        if call.HasField("keep"):
            wrt = tuple(call.keep.inputs)
            check_differentiable("keep", wrt, composed.inputs)
            program = KeepingProgram(composed, wrt, base.where, options)
        else:
            code = _without_graph(composed, base)
            program = Program(
                composed.inputs, composed.outputs, base.where, code, options
            )
        if not call.transforms:
            program.result = base.result
        return program

    def fingerprint(self, model: Model, call: pb.Call) -> bytes:
        fingerprint = Fingerprint()
        fingerprint.add("torch", torch.__version__)
        add_call(fingerprint, model, call, self._values)
        fingerprint.add(self._call(model, call).operators)
        return fingerprint.digest()

    def prepare_parameters(self, model: Model) -> runtime.Program:
        outputs = tuple(parameter.spec for parameter in model.parameters)
        where = f"the parameters of {model.name!r}"
        return Program((), outputs, where, lambda _, __: (model.values, None))

    def prepare_pullback(
        self, program: runtime.Program, wrt: Sequence[int], outputs: Sequence[int]
    ) -> Preparation:
        assert isinstance(program, KeepingProgram), (
            "a pullback needs a program with residuals"
        )
        check_pullback(program, wrt, outputs)
        yield "tracing"
        return program.pullback(wrt, outputs, self._to_device())

    def isolated(self) -> AbstractContextManager[object]:
        return without_callers_modes()

    def gpu(self) -> Gpu | None:
        return gpu_at(self._device.index)

    def memory_bytes(self) -> int | None:
        if self._is_on_host:
            return None
        total = torch.cuda.get_device_properties(self._device).total_memory
        return int(total * torch.cuda.get_per_process_memory_fraction(self._device))

    def has_failed(self) -> bool:
        return not self._is_on_host and is_refused(
            lambda: torch.zeros(1).to(self._device).cpu()
        )

    def stream(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.current_stream(self._device).cuda_stream

    def view(
        self, pointer: int, spec: Spec, owner: Any, turn: Turn | None = None
    ) -> Any:
        if turn is not None:
            return types.tensor_in_turn(pointer, spec, owner, turn)
        if spec.weak:
            return types.number_at(pointer, spec)
        return types.tensor_at(pointer, spec, owner)

    def write(
        self, array: Any, pointer: int, nbytes: int, turn: Turn | None = None
    ) -> None:
        if turn is not None:
            with model_errors(_OUTPUT):
                types.write_in_turn(array, pointer, nbytes, turn)
        elif self._is_on_host:
            types.write(array, pointer, nbytes)
        else:
            with model_errors(_OUTPUT):
                types.write(array, pointer, nbytes)

    def exclusive(
        self, outputs: Sequence[Any], inputs: Sequence[Any], residual: Any
    ) -> Sequence[int | None]:
        return [types.exclusive_pointer(output) for output in outputs]

    def _to_device(self, key: int | None = None) -> ToDevice | None:
        """Return a function that moves inputs to the GPU, except for the key at this position."""
        if self._is_on_host:
            return None
        return functools.partial(types.brought_to, self._device, kept=key)

    def _call(self, model: Model, call: pb.Call) -> Call:
        """Return the call without transforms: one trace serves all programs derived from it."""
        plain = pb.Call()
        plain.CopyFrom(call)
        plain.ClearField("transforms")
        plain.ClearField("keep")
        key = (model, plain.SerializeToString(deterministic=True))
        cached = self._calls.get(key)
        if cached is not None:
            return cached
        inputs = decode_all(call.inputs)
        where = check_signature(model, call, inputs, x64=True)
        traced = Call(model, plain, inputs, self._classes, self._device, where)
        self._calls[key] = traced
        if len(self._calls) > _MAX_CALLS:  # eviction costs no more than another trace
            self._calls.pop(next(iter(self._calls)), None)
        return traced


def _device(options: Options) -> torch.device:
    """Return the device to run on: a worker's GPU if it has one; embedded, the models' device."""
    if options.embedded:
        device = torch.device(options.device)
        if device != types.HOST:
            torch.cuda.init()
        return device
    if not torch.cuda.is_available():
        return types.HOST
    torch.cuda.init()
    device = torch.device("cuda", torch.cuda.current_device())
    if options.gpu_memory_fraction is not None:
        torch.cuda.set_per_process_memory_fraction(options.gpu_memory_fraction, device)
    return device


def _without_graph(composed: Composed, call: Call) -> RunCode:
    def run(arrays: Sequence[Any], _: None) -> tuple[Sequence[Any], Any]:
        # The model gets new tensors over the same memory: all calls of a session share its views.
        leaves = arrays[call.leaves :]
        own = [x.detach() if isinstance(x, torch.Tensor) else x for x in leaves]
        outputs = composed.f([*arrays[: call.leaves], *own])
        return [y.detach() for y in outputs], None

    return run


def _doc_of(function: Any) -> str:
    """Return a docstring; of a forward without one, its module's, and not that of nn.Module."""
    own = getattr(function, "__doc__", None)
    owner = type(getattr(function, "__self__", None))
    if not own and issubclass(owner, torch.nn.Module):
        own = owner.__doc__
    return inspect.cleandoc(own or "")
