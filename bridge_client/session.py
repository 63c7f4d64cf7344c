"""Sessions, as everything above them sees them: the one interface between frameworks and models,
wherever these run.

`bridge_client.remote.session` serves it by a worker process, `bridge_client.inproc` by a runtime in
this process.
"""

import itertools
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import TIMEOUT_MAX
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

from bridge_client.programs import Program, residual_id, unpin
from bridge_wire import specs
from bridge_wire.errors import CallerError, ProtocolError, SessionClosed, SpecError, UnknownModel
from bridge_wire.memory.cuda_memory import GpuPool
from bridge_wire.memory.cuda_words import WAYS
from bridge_wire.memory.dlpack import DeviceExporter, Exporter
from bridge_wire.memory.pool import Block, Pool
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_SUBMITTED_AT_ONCE = 32


class Placed(Protocol):
    """Memory of the session: a Block, or something else that keeps what lies at the address
    alive."""

    @property
    def address(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One array of a model's state; buffers are not trainable."""

    path: str
    spec: Spec
    trainable: bool


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model: its docstring, positional arguments' names, parameters by path, and
    the arguments that a worker was told of by --warmup, and whether it has a training and an
    inference mode.
    """

    name: str
    doc: str
    arguments: tuple[str, ...]
    parameters: tuple[ParameterInfo, ...]
    signatures: tuple[tuple[Spec, ...], ...] = ()
    has_modes: bool = False


def _unchanged(blocks: list[Block]) -> list[Block]:
    """Return the outputs of a run as they are."""
    return blocks


class Run(NamedTuple):
    """One run of a program on memory of its session: see `Session.run`."""

    program: Program
    inputs: Sequence[Placed]
    residual: int = 0  # the id of what the run keeps or, of a pullback, reads
    copied: int = 0
    timeout_s: float | None = None
    make: Callable[[list[Block]], Any] = _unchanged
    stream: int | None = None


def _paired(blocks: list[Block], residual: int) -> tuple[list[Block], int]:
    """Return the outputs of a run with the residual it has kept."""
    return blocks, residual


class Session(ABC):
    """Models, and everything this process owns in their use: memory, programs, residuals.

    Thread-safe: calls of several threads run side by side. Also a context manager.
    """

    pool: Pool
    timeout_s: float | None

    def __init__(self) -> None:
        self._is_closed = False
        self._ids = itertools.count(1)
        self._bytes_through_host = 0
        self._no_gpu = ""  # why there is no gpu_pool; empty until it was looked for
        self._forget_threads()

    def _forget_threads(self) -> None:
        self._closing = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """The hosted models by name."""
        return MappingProxyType({model.name: _model_info(model) for model in self._described()})

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    @property
    @abstractmethod
    def framework(self) -> str:
        """What the models are written in: "jax" or "torch"."""

    @property
    @abstractmethod
    def x64(self) -> bool:
        """Whether the models have 64-bit floats and integers."""

    @property
    @abstractmethod
    def lane(self) -> str:
        """How calls are signalled: "local", "grpc" or "inproc"."""

    @property
    @abstractmethod
    def memory(self) -> str:
        """How tensors travel: "memfd" (shared), "cuda_ipc" (shared, and those on the worker's GPU
        stay there), "inline" (by value) or "dlpack" (within this process).
        """

    def gpu_pool(self) -> GpuPool | None:
        """Return the memory that is shared with the worker on its GPU; None: there is none, and
        tensors on a GPU must travel through the host.
        """
        return None

    def empty(
        self, shape: int | Sequence[int], dtype: Any = "float32", *, device: str = "cpu"
    ) -> Exporter:
        """Return an array with undefined contents in memory that is shared with the worker, for
        from_dlpack of any framework: what lies in its memory is passed without a copy.

        `dtype` is a name, or a dtype of a framework. `device` is "cpu", or "cuda" for the worker's
        GPU: to be used on the default stream. The memory lives as long as what was made of it.

        Raises:
          SpecError, DTypeError: there is no such array.
          CallerError: no memory on such a device is shared.
          OutOfMemory: there is no room for it.
        """
        spec = specs.of(dtype, shape)
        if device == "cpu":
            block = self.pool.lease(spec.nbytes)
            return Exporter(block.pointer, spec, block)
        pool = self.gpu_pool() if device == "cuda" else None
        if pool is None:
            raise CallerError(
                f"device={device!r}; expected 'cpu' or, where memory on a GPU is shared, 'cuda'"
            )
        block = pool.lease(spec.nbytes)
        return DeviceExporter(block.pointer, spec, block, pool.device.dlpack_device, lambda _: None)

    def note_staged(self, nbytes: int) -> None:
        """Count bytes on a GPU that had to be brought through the host; the first time, log why."""
        with self._closing:
            is_first = not self._bytes_through_host
            self._bytes_through_host += nbytes
        if is_first:
            why = self._no_gpu or "they are not on the models' GPU, or change their type on the way"
            _log.warning("tensors on a GPU travel through the host, since %s", why)

    def model(self, name: str | None) -> ModelInfo:
        """Return a hosted model; None picks the only one.

        Raises:
          UnknownModel: there is no such model, or None was given and there are several.
        """
        models = self.models
        if name is None and len(models) == 1:
            return next(iter(models.values()))
        if name is None:
            raise UnknownModel(f"the worker hosts {sorted(models)}; pick one with name=")
        if name not in models:
            raise UnknownModel(f"the worker hosts no model {name!r}; it hosts {sorted(models)}")
        return models[name]

    @abstractmethod
    def prepare(self, program: Program, timeout_s: float | None = None) -> Program:
        """Have a program traced and compiled, and fill in its outputs.

        Raises:
          CallerError: the signature cannot be served.
          RemoteModelError: the model raised while it was traced.
          WorkerUnavailable: no worker answers.
        """

    def described_call(
        self, call: pb.Call, labels: Sequence[str] = (), timeout_s: float | None = None
    ) -> Program:
        """Return the program of an untransformed call of a model, which is not prepared yet.

        `labels` name the inputs in errors; `timeout_s` holds for each run of it, and of what is
        derived from it.
        """
        named = tuple(labels) or tuple(f"input {i}" for i in range(len(call.inputs)))
        inputs = tuple(
            _decoded(spec, label) for spec, label in zip(call.inputs, named, strict=True)
        )
        return Program(self, pb.PrepareRequest(call=call), inputs, named, timeout_s)

    def prepare_call(
        self, call: pb.Call, labels: Sequence[str] = (), timeout_s: float | None = None
    ) -> Program:
        """Prepare an untransformed call of a model; the arguments are those of `described_call`."""
        return self.prepare(self.described_call(call, labels, timeout_s))

    @abstractmethod
    def shapes(self, call: pb.Call, inputs: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
        """Return the shape of each output of a call, for all sizes that have names in these shapes
        of its inputs.

        Sizes are as in the protocol's `Shape`; of the outputs, `sizes.formula` reads them.

        Raises:
          BridgeError: the shapes depend on more, or the framework cannot tell.
        """

    def prepare_parameters(self, model: str) -> Program:
        """Prepare the program without inputs whose outputs are a model's parameters."""
        return self.prepare(
            Program(self, pb.PrepareRequest(parameters=pb.Parameters(model=model)), (), ())
        )

    def run(
        self,
        program: Program,
        inputs: Sequence[Placed],
        *,
        copied: int = 0,
        timeout_s: float | None = None,
        make: Callable[[list[Block]], Any] = _unchanged,
        stream: int | None = None,
    ) -> Any:
        """Run a program on memory of this session; return what `make` makes of its outputs, by
        default the blocks.

        The outputs are row-major, in blocks leased to the caller; `make` is called while the model
        computes, before they have their values. `copied` bytes were copied to make the inputs, for
        the statistics.

        With a CUDA stream, inputs may lie in `gpu_pool`, and the outputs do: whatever comes on the
        stream from now on finds their values there.

        Raises:
          RemoteModelError: the model raised.
          WorkerDied: the worker died during the call; the next call reconnects.
          CallTimeout: no answer within `timeout_s` seconds, or else the session's; None waits.
          OutOfMemory: no room for the outputs; nothing was sent.
        """
        return self._run(Run(program, inputs, 0, copied, timeout_s, make, stream))

    def run_keeping(
        self,
        program: Program,
        inputs: Sequence[Placed],
        *,
        copied: int = 0,
        timeout_s: float | None = None,
        make: Callable[[list[Block], int], Any] = _paired,
        stream: int | None = None,
    ) -> Any:
        """Run a program that keeps a residual; return what `make` makes of its outputs and the
        residual's id, by default a pair of these.

        The inputs stay leased until `drop_residual`, since the residual may alias them. Otherwise
        as `run`.
        """
        id = residual_id(next(self._ids), program.fingerprint)

        def make_both(outputs: list[Block]) -> Any:
            return make(outputs, id)

        try:
            return self._run(Run(program, inputs, id, copied, timeout_s, make_both, stream))
        except BaseException:
            self.drop_residual(id)
            raise

    def run_pullback(
        self,
        program: Program,
        residual: int,
        cotangents: Sequence[Placed],
        *,
        copied: int = 0,
        make: Callable[[list[Block]], Any] = _unchanged,
        stream: int | None = None,
    ) -> Any:
        """Run the pullback of a run that kept a residual, which stays. Otherwise as `run`.

        Raises:
          ResidualGone: it was evicted, or the worker restarted; run the vjp program on the inputs
            instead.
        """
        return self._run(Run(program, cotangents, residual, copied, None, make, stream))

    @abstractmethod
    def _run(self, run: Run) -> Any:
        """Run a program."""

    @abstractmethod
    def drop_residual(self, id: int) -> None:
        """Let go of a residual. For finalizers: nothing is sent until the next call, and no lock is
        taken.

        Its inputs may be reused at once: whoever could still run its pullback would hold it.
        """

    def submit(self, action: Callable[[], _T]) -> Future[_T]:
        """Begin an action in a thread of this session, and return its future."""
        with self._closing:
            if self._is_closed:
                raise closed()
            if self._threads is None:
                self._threads = ThreadPoolExecutor(
                    _SUBMITTED_AT_ONCE, thread_name_prefix="ThreadPool-bridge"
                )
            return self._threads.submit(action)

    @abstractmethod
    def stats(self) -> Mapping[str, int]:
        """Return counts: `calls`, `bytes_copied` (by either side), `bytes_through_host` (of tensors
        on a GPU), `fallbacks` to a slower path, and what is held now: leased `blocks`,
        `slab_bytes`, `residuals` and `residual_bytes`. `gpu_lanes_by_words`, `gpu_lanes_by_events`
        and `gpu_lanes_by_host` say how many lanes to the worker are in order with its GPU, and how.
        """

    def close(self) -> None:
        """End the session, and a worker that it spawned. Idempotent. Tensors made by it stay valid.

        A submitted call that has not begun ends with SessionClosed.
        """
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            threads, self._threads = self._threads, None
        if threads is not None:
            # Not cancel_futures: nobody who waits for a future is told of that (Python 3.11 to
            # 3.13), and what has not begun fails at once anyway.
            threads.shutdown(wait=False)
        try:
            self._release()
        finally:
            unpin(self)
            self.pool.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: object) -> "Session":
        return self  # a copied module calls the same models

    @abstractmethod
    def _described(self) -> Sequence[pb.Model]:
        """Return the descriptions of the models."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of whatever the session holds besides its pool; called once, by `close`."""


def _decoded(spec: pb.Spec, label: str) -> Spec:
    try:
        return specs.decode(spec)
    except ProtocolError as error:  # of this side's making: what the caller passed
        raise SpecError(f"`{label}`: {error}") from error


def checked_limit(timeout_s: float | None) -> float | None:
    """Return a user's time limit for calls.

    Raises:
      CallerError: it is neither None nor a positive number of seconds.
    """
    if timeout_s is not None and not (
        isinstance(timeout_s, int | float) and 0 < timeout_s <= TIMEOUT_MAX
    ):
        raise CallerError(
            f"timeout_s={timeout_s!r}; expected a positive number of seconds, or None to wait"
        )
    return timeout_s


def lanes_by_way(ways: Mapping[str, int]) -> dict[str, int]:
    """Return, for the statistics, how many lanes are in order with a GPU in each way."""
    return {f"gpu_lanes_by_{way}": ways.get(way, 0) for way in WAYS}


def closed() -> SessionClosed:
    """Return the error of a session that its owner has closed."""
    return SessionClosed("the session is closed; make a new one")


def _model_info(model: pb.Model) -> ModelInfo:
    parameters = tuple(
        ParameterInfo(p.path, specs.decode(p.spec), p.trainable) for p in model.parameters
    )
    signatures = tuple(specs.decode_all(signature.inputs) for signature in model.signatures)
    return ModelInfo(
        model.name, model.doc, tuple(model.arguments), parameters, signatures, model.modes
    )
