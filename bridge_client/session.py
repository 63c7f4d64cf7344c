"""Session: the interface between framework modules and models. Imports no framework.

`bridge_client.remote.session` implements the interface with a worker process,
`bridge_client.inproc` with a runtime in this process.
"""

import contextlib
import itertools
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from threading import TIMEOUT_MAX
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from bridge_client.programs import Program, residual_id
from bridge_wire import specs
from bridge_wire.commands import did_you_mean, near_matches
from bridge_wire.errors import (
    BridgeError,
    CallerError,
    ProtocolError,
    SessionClosed,
    SpecError,
    UnknownModel,
)
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
    """Memory of the session: a Block, or another object that keeps the memory at `address`
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
    """Description of a model: docstring, positional arguments' names, parameters by path.

    `signatures` are the arguments given to the worker by --warmup. `has_modes` tells whether the
    model has a training and an inference mode. `methods` can be called by their names; the model
    itself is "__call__".
    """

    name: str
    doc: str
    arguments: tuple[str, ...]
    parameters: tuple[ParameterInfo, ...]
    signatures: tuple[tuple[Spec, ...], ...] = ()
    has_modes: bool = False
    methods: tuple[str, ...] = ()
    method_arguments: tuple[tuple[str, ...], ...] = ()  # one per method
    method_signatures: tuple[
        str, ...
    ] = ()  # one per method, such as `(x, n=1)`; empty if unknown

    @property
    def signature(self) -> str:
        """The source of the model's own parameters, such as `(x, n=1)`; empty if unknown."""
        return self.signature_of("")

    def signature_of(self, method: str) -> str:
        """Return the source of a method's parameters; empty if unknown."""
        known = dict(zip(self.methods, self.method_signatures, strict=True))
        return known.get(method or "__call__", "")

    def arguments_of(self, method: str) -> tuple[str, ...]:
        """Return the names of a method's positional arguments; empty text is the model itself.

        Raises:
          CallerError: the model has no public method of this name.
        """
        if method in ("", "__call__"):
            return self.arguments
        if method not in self.methods:
            raise CallerError(
                f"the model {self.name!r} has no public method {method!r}; it has"
                f" {sorted(self.methods)}"
            )
        return self.method_arguments[self.methods.index(method)]


def _unchanged(blocks: list[Block]) -> list[Block]:
    """Return the outputs of a run unchanged."""
    return blocks


class Run(NamedTuple):
    """One run of a program on its session's memory: see `Session.run`."""

    program: Program
    inputs: Sequence[Placed]
    residual: int = 0  # id of the residual that the run keeps, or that a pullback reads
    copied: int = 0
    timeout_s: float | None = None
    make: Callable[[list[Block]], Any] = _unchanged
    stream: int | None = None


def _paired(blocks: list[Block], residual: int) -> tuple[list[Block], int]:
    """Return the outputs of a run with its residual's id."""
    return blocks, residual


class Session(ABC):
    """Access to a set of models. Owns this process's memory, programs and residuals for them.

    Thread-safe: calls of several threads run concurrently. Also a context manager.
    """

    pool: Pool
    timeout_s: float | None

    def __init__(self) -> None:
        self._is_closed = False
        self._ids = itertools.count(1)
        self._bytes_through_host = 0
        self._at_close: list[Callable[[], None]] = []
        # Reason for the missing gpu_pool; empty before the first search.
        self._no_gpu = ""
        self._forget_threads()

    def _forget_threads(self) -> None:
        self._closing = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """The hosted models by name."""
        return MappingProxyType(
            {model.name: _model_info(model) for model in self._described()}
        )

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    @property
    @abstractmethod
    def framework(self) -> str:
        """The models' framework: "jax" or "torch"."""

    @property
    @abstractmethod
    def x64(self) -> bool:
        """Whether the models have 64-bit floats and integers."""

    @property
    @abstractmethod
    def lane(self) -> str:
        """The lane of the calls: "local", "grpc" or "inproc"."""

    @property
    @abstractmethod
    def memory(self) -> str:
        """The memory kind of tensors: "memfd" (shared), "cuda_ipc" (shared, and tensors on the
        worker's GPU stay there), "inline" (by value) or "dlpack" (within this process).
        """

    def gpu_pool(self) -> GpuPool | None:
        """Return the pool shared with the worker on its GPU, or None.

        Without a pool, tensors on a GPU travel through the host.
        """
        return None

    def empty(
        self,
        shape: int | Sequence[int],
        dtype: Any = "float32",
        *,
        device: str = "cpu",
    ) -> Exporter:
        """Return an array with undefined contents in memory shared with the worker.

        The array is for any framework's from_dlpack. Calls pass arrays in its memory without a
        copy. `dtype` is a name, or a dtype of a framework. `device` is "cpu", or "cuda" for the
        worker's GPU, for use on the default stream. The memory lives as long as its last array.

        Raises:
          SpecError, DTypeError: the shape or the dtype is invalid.
          CallerError: the session shares no memory on this device.
          OutOfMemory: there is no memory for the array.
        """
        spec = specs.of(dtype, shape)
        if device == "cpu":
            block = self.pool.lease(spec.nbytes)
            return Exporter(block.pointer, spec, block)
        pool = self.gpu_pool() if device == "cuda" else None
        if pool is None:
            raise CallerError(
                f"device={device!r}; expected 'cpu' or, if GPU memory is shared, 'cuda'"
            )
        block = pool.lease(spec.nbytes)
        return DeviceExporter(
            block.pointer, spec, block, pool.device.dlpack_device, lambda _: None
        )

    def note_staged(self, nbytes: int) -> None:
        """Count GPU bytes copied through the host; log the reason the first time."""
        with self._closing:
            is_first = not self._bytes_through_host
            self._bytes_through_host += nbytes
        if is_first:
            why = (
                self._no_gpu or "they are not on the models' GPU, or need another dtype"
            )
            _log.warning("tensors on a GPU travel through the host, since %s", why)

    def model(self, name: str | None) -> ModelInfo:
        """Return a hosted model; None picks the only one.

        Raises:
          UnknownModel: there is no such model, or `name` is None and there are several models.
        """
        models = self.models
        if name is None and len(models) == 1:
            return next(iter(models.values()))
        if name is None:
            raise UnknownModel(
                f"the worker hosts {sorted(models)}; pick one with name="
            )
        if name not in models:
            raise UnknownModel(
                f"the worker hosts no model {name!r}; it hosts {sorted(models)}"
                f"{did_you_mean(near_matches(name, models)[:1])}"
            )
        return models[name]

    @abstractmethod
    def prepare(self, program: Program, timeout_s: float | None = None) -> Program:
        """Trace and compile a program, and set its output specs.

        Raises:
          CallerError: the signature cannot be served.
          RemoteModelError: the model raised during the trace.
          WorkerUnavailable: no worker answers.
        """

    def described_call(
        self,
        call: pb.Call,
        labels: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> Program:
        """Return the program of an untransformed model call, without preparing it.

        `labels` name the inputs in errors. `timeout_s` applies to each run of the program and of
        programs derived from it.
        """
        named = tuple(labels) or tuple(f"input {i}" for i in range(len(call.inputs)))
        inputs = tuple(
            _decoded(spec, label)
            for spec, label in zip(call.inputs, named, strict=True)
        )
        return Program(self, pb.PrepareRequest(call=call), inputs, named, timeout_s)

    def prepare_call(
        self,
        call: pb.Call,
        labels: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> Program:
        """Prepare an untransformed model call; takes the arguments of `described_call`."""
        return self.prepare(self.described_call(call, labels, timeout_s))

    @abstractmethod
    def shapes(
        self, call: pb.Call, inputs: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[str]]:
        """Return the output shapes of a call as formulas of the named sizes in the input shapes.

        Sizes have the form of the protocol's `Shape`; `sizes.formula` parses output sizes.

        Raises:
          BridgeError: the shapes depend on more than the named sizes, or the framework cannot
            derive formulas.
        """

    def prepare_parameters(self, model: str) -> Program:
        """Prepare a program without inputs that returns a model's parameters."""
        return self.prepare(
            Program(
                self, pb.PrepareRequest(parameters=pb.Parameters(model=model)), (), ()
            )
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
        """Run a program on memory of this session; return `make(outputs)`, by default the blocks.

        The outputs are row-major, in blocks leased to the caller. `make` runs while the model
        computes, before the outputs have their values. `copied` is the number of bytes copied for
        the inputs, for the statistics.

        With a CUDA stream, inputs may lie in `gpu_pool`. The outputs lie there too, and later work
        on the stream sees their values.

        Raises:
          RemoteModelError: the model raised.
          WorkerDied: the worker died during the call; the next call reconnects.
          CallTimeout: no answer within `timeout_s` seconds, by default the session's; None waits.
          OutOfMemory: no memory for the outputs; nothing was sent.
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
        """Run a program that keeps a residual; return `make(outputs, residual id)`, by default
        this pair.

        The inputs stay leased until `drop_residual`, since the residual may alias them. Otherwise
        like `run`.
        """
        id = residual_id(next(self._ids), program.fingerprint)

        def make_both(outputs: list[Block]) -> Any:
            return make(outputs, id)

        try:
            return self._run(
                Run(program, inputs, id, copied, timeout_s, make_both, stream)
            )
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
        """Run the pullback of a run that kept a residual. Keeps the residual. Otherwise like `run`.

        Raises:
          ResidualGone: the residual was evicted, or the worker restarted; run the vjp program on
            the inputs instead.
        """
        return self._run(Run(program, cotangents, residual, copied, None, make, stream))

    @abstractmethod
    def _run(self, run: Run) -> Any:
        """Run a program."""

    @abstractmethod
    def drop_residual(self, id: int) -> None:
        """Release a residual. For finalizers: sends nothing until the next call, takes no lock.

        The residual's inputs may be reused at once: a caller of its pullback would still hold the
        residual.
        """

    def submit(self, action: Callable[[], _T]) -> Future[_T]:
        """Submit an action to this session's threads, and return its future."""
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
        """Return counts.

        Totals: `calls`, `bytes_copied` (by either side), `bytes_through_host` (of tensors on a
        GPU), `fallbacks` to a slower path, `restarts` of a spawned worker. Present values: leased
        `blocks`, `slab_bytes`, `residuals`, `residual_bytes`. Lanes by their way of ordering calls
        with the GPU: `gpu_lanes_by_words`, `gpu_lanes_by_events`, `gpu_lanes_by_host`.
        """

    def close(self) -> None:
        """Close the session, and its worker if spawned. Idempotent. The session's tensors stay
        valid.

        A submitted call that has not begun ends with SessionClosed.
        """
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            threads, self._threads = self._threads, None
        if threads is not None:
            # Not cancel_futures: waiters for a cancelled future are not notified (Python 3.11 to
            # 3.13), and actions that have not begun fail at once anyway.
            threads.shutdown(wait=False)
        try:
            self._release()
        finally:
            for action in self._at_close:
                action()
            self.pool.close()

    def at_close(self, action: Callable[[], None]) -> None:
        """Have `close` call an action."""
        self._at_close.append(action)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _repr_html_(self) -> str:
        """Return a table of the models, for notebooks."""
        models: list[ModelInfo] = []
        with contextlib.suppress(BridgeError):  # showing a session must not raise
            models += self.models.values()
        return as_html(repr(self), models)

    def __deepcopy__(self, memo: object) -> "Session":
        return self  # a copied module calls the same models

    @abstractmethod
    def _described(self) -> Sequence[pb.Model]:
        """Return the descriptions of the models."""

    @abstractmethod
    def _release(self) -> None:
        """Release all resources of the session except its pool; called once, by `close`."""


def _decoded(spec: pb.Spec, label: str) -> Spec:
    try:
        return specs.decode(spec)
    except ProtocolError as error:  # the caller passed this spec, not the peer
        raise SpecError(f"`{label}`: {error}") from error


def checked_limit(timeout_s: float | None) -> float | None:
    """Return a user's time limit for calls.

    Raises:
      CallerError: the limit is neither None nor a positive number of seconds.
    """
    if timeout_s is not None and not (
        isinstance(timeout_s, int | float) and 0 < timeout_s <= TIMEOUT_MAX
    ):
        raise CallerError(
            f"timeout_s={timeout_s!r}; expected a positive number of seconds, or None to wait"
        )
    return timeout_s


def as_html(title: str, models: Sequence[ModelInfo], method: str = "") -> str:
    """Return a table of models for notebooks: names, parameters' names and the first lines of
    docstrings. All texts are escaped."""
    rows = []
    for model in models:
        doc = model.doc.strip().partition("\n")[0]
        call = f"{model.name}{model.signature_of(method)}"
        cells = (f"<code>{escape(call)}</code>", escape(doc))
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<p>{escape(title)}</p><table>{body}</table>"


def lanes_by_way(ways: Mapping[str, int]) -> dict[str, int]:
    """Return the number of GPU lanes by way of ordering, for the statistics."""
    return {f"gpu_lanes_by_{way}": ways.get(way, 0) for way in WAYS}


def closed() -> SessionClosed:
    """Return the error for calls of a closed session."""
    return SessionClosed("the session is closed; open a new session")


def _model_info(model: pb.Model) -> ModelInfo:
    parameters = tuple(
        ParameterInfo(p.path, specs.decode(p.spec), p.trainable)
        for p in model.parameters
    )
    signatures = tuple(
        specs.decode_all(signature.inputs) for signature in model.signatures
    )
    return ModelInfo(
        model.name,
        model.doc,
        tuple(model.arguments),
        parameters,
        signatures,
        model.modes,
        tuple(each.name for each in model.methods),
        tuple(tuple(each.arguments) for each in model.methods),
        tuple(each.signature for each in model.methods),
    )
