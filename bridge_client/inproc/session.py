"""InprocSession: a session with models of this process, which calls the runtime directly.

Never imports a framework at the top level.
"""

import itertools
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from bridge_client.inproc.gpu import NearTurn, ProcessGpuMemory, Turns
from bridge_client.inproc.memory import ProcessMemory, Views, pointer_of
from bridge_client.programs import Program, shapes_of
from bridge_client.progress import shown_when_slow
from bridge_client.session import Placed, Run, Session, closed, lanes_by_way
from bridge_server import runtime
from bridge_server.runtime import Model, Options, Runtime
from bridge_server.serving.programs import Programs
from bridge_wire import specs
from bridge_wire.errors import BridgeError, CallerError, ProtocolError, ResidualGone
from bridge_wire.memory.cuda import device_of
from bridge_wire.memory.cuda_memory import GpuPool, is_on_gpu
from bridge_wire.memory.pool import Block
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec


def host(*, jax_model: Any = None, torch_model: Any = None) -> "InprocSession":
    """Return a session with models of this process: no worker, no thread, and no copy of shareable
    memory.

    JAX models run on JAX's default device, torch models on their tensors' device.

    Args:
      jax_model: a target of `bridge_server --jax-model`: a function, a pair (apply, params), a flax
        or equinox module; or a dict of these by name.
      torch_model: a target of `bridge_server --torch-model`, or a dict of these by name.
    Raises:
      TargetError: a model is no such target, or torch models are on several devices.
      CallerError: both or neither of the arguments were given.
    """
    if (jax_model is None) == (torch_model is None):
        raise CallerError(
            "host takes exactly one of jax_model= and torch_model=; use one session per framework"
        )
    model = torch_model if jax_model is None else jax_model
    targets = model if isinstance(model, dict) else {_name_of(model): model}
    serving = _torch_runtime(targets.values()) if jax_model is None else _jax_runtime()
    return InprocSession(
        serving, {name: serving.adapt(name, target) for name, target in targets.items()}
    )


@dataclass(slots=True, eq=False)
class _Era:
    """The programs of one x64 setting: programs traced with 64-bit types do not work without
    them."""

    programs: Programs
    # By id. An evicted program lives on while a residual needs it.
    prepared: weakref.WeakValueDictionary[int, runtime.Program] = field(
        default_factory=weakref.WeakValueDictionary
    )
    ids: Iterator[int] = field(default_factory=itertools.count)

    def add(self, program: runtime.Program) -> int:
        """Add a program and return its id."""
        id = next(self.ids)
        self.prepared[id] = program
        return id


@dataclass(frozen=True, slots=True)
class _Residual:
    program: runtime.Program
    value: Any
    inputs: Sequence[Placed]  # kept alive, since the value may alias them
    stream: int | None  # CUDA stream of the inputs' memory


class InprocSession(Session):
    """Session with models of this process. JAX's x64 setting applies at each call.

    A residual lives exactly as long as its graph: there is no budget and no eviction.
    """

    def __init__(self, serving: Runtime, models: Mapping[str, Model]) -> None:
        super().__init__()
        self.pool: ProcessMemory = ProcessMemory()
        self.timeout_s = None
        self._runtime = serving
        self._views = Views(serving)
        self._models = models
        self._eras = {x64: _Era(Programs(serving, models)) for x64 in (False, True)}
        self._residuals: dict[int, _Residual] = {}
        self._lock = threading.Lock()
        self._calls = self._bytes_copied = 0
        self._gpu: ProcessGpuMemory | None = None
        self._turns: Turns | None = None

    @property
    def framework(self) -> str:
        self._refuse_if_closed()
        return self._runtime.describe().framework

    @property
    def x64(self) -> bool:
        self._refuse_if_closed()
        return self._runtime.has_x64()

    @property
    def lane(self) -> str:
        self._refuse_if_closed()
        return "inproc"

    @property
    def memory(self) -> str:
        self._refuse_if_closed()
        return "dlpack"

    def prepare(self, program: Program, timeout_s: float | None = None) -> Program:
        self._refuse_time_limit(program, timeout_s)
        with self._runtime.isolated():
            self._prepared(program)
        return program

    def gpu_pool(self) -> GpuPool | None:
        if self._gpu is None and not self._no_gpu:
            with self._closing:
                if self._gpu is None and not self._no_gpu and not self._is_closed:
                    self._look_for_gpu()
        return self._gpu

    def _look_for_gpu(self) -> None:
        gpu = self._runtime.gpu()
        if gpu is None:
            self._no_gpu = (
                "the models run on no GPU; move them to a GPU, or make a GPU jax's default"
                " device"
            )
            return
        try:
            device = device_of(gpu.uuid)
            self._turns, self._gpu = Turns(device), ProcessGpuMemory(device)
        except BridgeError as error:
            self._no_gpu = str(error)

    def shapes(
        self, call: pb.Call, inputs: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[str]]:
        self._refuse_if_closed()
        with self._runtime.isolated():
            era = self._eras[self._runtime.has_x64()]
            return [
                tuple(shape.sizes)
                for shape in era.programs.shapes(shapes_of(call, inputs))
            ]

    def drop_residual(self, id: int) -> None:
        self._residuals.pop(id, None)

    def stats(self) -> Mapping[str, int]:
        residuals = list(self._residuals.values())
        pools = [self.pool] if self._gpu is None else [self.pool, self._gpu]
        return {
            "calls": self._calls,
            "bytes_copied": self._bytes_copied,
            "bytes_through_host": self._bytes_through_host,
            "blocks": sum(pool.live_blocks() for pool in pools),
            "slab_bytes": sum(pool.slab_bytes for pool in pools),
            "residuals": len(residuals),
            "residual_bytes": sum(
                kept.program.residual_nbytes or 0 for kept in residuals
            ),
            "fallbacks": 0,
            "restarts": 0,
        } | lanes_by_way({})

    def __reduce__(self) -> NoReturn:
        raise CallerError(
            "a model of this process cannot be pickled; save its state_dict, or use a worker"
        )

    def _described(self) -> Sequence[pb.Model]:
        self._refuse_if_closed()
        return [model.description for model in self._models.values()]

    def _release(self) -> None:
        self._residuals.clear()
        (turns, self._turns), (gpu, self._gpu) = (self._turns, None), (self._gpu, None)
        if turns is not None:
            turns.close()
        if gpu is not None:
            gpu.close()

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise closed()

    def _refuse_time_limit(self, program: Program, timeout_s: float | None) -> None:
        if timeout_s or program.timeout_s or self.timeout_s:
            raise CallerError(
                "a call in this process cannot be abandoned: timeout_s needs a worker"
            )

    def _prepared(self, program: Program) -> runtime.Program:
        """Return the runtime's program, prepared for the present x64 setting if needed."""
        self._refuse_if_closed()
        era = self._eras[self._runtime.has_x64()]
        known, name = program.name
        found = era.prepared.get(name) if known is era else None
        if found is not None:
            found.used = time.perf_counter()
            return found
        made = self._prepare(era, program)
        program.adopt(
            era,
            pb.Prepared(
                program=era.add(made),
                result=made.result,
                outputs=[specs.encode(s) for s in made.outputs],
                recipes=era.programs.recipes(made),
            ),
        )
        return made

    def _prepare(self, era: _Era, program: Program) -> runtime.Program:
        request = program.request
        kind = request.WhichOneof("what")
        if kind == "call":
            preparation, what = (
                era.programs.call(request.call),
                f"model {request.call.model!r}",
            )
        elif kind == "parameters":
            preparation, what = (
                era.programs.parameters(request.parameters),
                f"model {request.parameters.model!r}",
            )
        elif kind == "pullback" and program.origin is not None:
            preparation, what = (
                era.programs.pullback(self._prepared(program.origin), request.pullback),
                "a pullback",
            )
        else:
            raise ProtocolError("a Prepare request names nothing to prepare")
        with shown_when_slow(what) as progress:
            return runtime.finish(preparation, progress.enter)

    def _run(self, run: Run) -> Any:
        self._refuse_time_limit(run.program, run.timeout_s)
        with self._runtime.isolated():
            if run.stream is None:
                blocks = self._run_on_host(run)
            else:
                blocks = self._run_on_gpu(run, run.stream)
        return run.make(blocks)

    def _run_on_gpu(self, run: Run, stream: int) -> list[Block]:
        """Run a program on inputs in GPU or host memory, with the outputs in GPU slabs."""
        gpu, turns = self._gpu, self._turns
        if gpu is None or turns is None:
            if self._is_closed:
                raise closed()
            raise ProtocolError(
                "the run has a stream, but no GPU pool; call gpu_pool() first"
            )
        program = self._prepared(run.program)
        forward = self._forward_of(run, program)
        with turns.taken(self._runtime.stream(), stream) as turn:
            described = zip(run.inputs, program.inputs, strict=True)
            arrays = [self._view(placed, spec, turn) for placed, spec in described]
            outputs, value = program.run(
                arrays, None if forward is None else forward.value
            )
            blocks = [gpu.lease(nbytes, stream) for nbytes in program.output_nbytes]
            for output, block in zip(outputs, blocks, strict=True):
                if block.nbytes:
                    self._runtime.write(output, block.pointer, block.nbytes, turn)
        if forward is not None and forward.stream not in (None, stream):
            # The pullback may have read the forward's inputs.
            turn.precede(forward.stream)
        self._finish(run, program, value, sum(program.output_nbytes))
        return blocks

    def _view(self, placed: Placed, spec: Spec, turn: NearTurn) -> Any:
        if is_on_gpu(placed.address):
            return self._runtime.view(pointer_of(placed), spec, placed, turn)
        return self._views.of(placed, spec)

    def _run_on_host(self, run: Run) -> list[Block]:
        program = self._prepared(run.program)
        forward = self._forward_of(run, program)
        arrays = list(map(self._views.of, run.inputs, program.inputs))
        outputs, value = program.run(arrays, None if forward is None else forward.value)
        if run.program.request.HasField("parameters"):
            # Copies of the parameters: a client that trains them must not change the model.
            pointers: Sequence[int | None] = [None] * len(outputs)
        else:
            pointers = self._runtime.exclusive(outputs, arrays, value)
        written, blocks = 0, []
        for output, pointer, nbytes in zip(
            outputs, pointers, program.output_nbytes, strict=True
        ):
            if pointer is not None and nbytes:
                blocks.append(self.pool.adopt(pointer, nbytes, output))
                continue
            block = self.pool.lease(nbytes)
            if nbytes:
                self._runtime.write(output, block.pointer, nbytes)
                written += nbytes
            blocks.append(block)
        self._finish(run, program, value, written)
        return blocks

    def _forward_of(self, run: Run, program: runtime.Program) -> _Residual | None:
        """Return a pullback's residual; None for other programs."""
        if not run.program.is_pullback:
            return None
        residual = self._residuals.get(run.residual)
        if residual is None or residual.program is not program.pullback_of:
            raise ResidualGone(
                "the residual was dropped, or kept under another x64 setting"
            )
        return residual

    def _finish(
        self,
        run: Run,
        program: runtime.Program,
        value: Any,
        written: int,
    ) -> None:
        """Keep the run's residual, if any, and count the run."""
        if run.residual and not run.program.is_pullback:
            self._residuals[run.residual] = _Residual(
                program, value, run.inputs, run.stream
            )
        with self._lock:
            self._calls += 1
            self._bytes_copied += run.copied + written


def _name_of(target: Any) -> str:
    described = target[0] if isinstance(target, tuple) and target else target
    return str(getattr(described, "__name__", type(described).__name__))


def _jax_runtime() -> Runtime:
    from bridge_server.jax_runtime import JaxRuntime

    return JaxRuntime(Options(embedded=True))


def _torch_runtime(targets: Iterable[Any]) -> Runtime:
    from bridge_client.inproc.devices import torch_device_of
    from bridge_server.torch_runtime import TorchRuntime

    return TorchRuntime(Options(embedded=True, device=torch_device_of(targets)))
