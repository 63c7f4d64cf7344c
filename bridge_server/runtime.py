"""What a framework must offer to be served.

One implementation per framework; this file imports none of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from bridge_server.serving.turns import Turn
from bridge_wire.errors import CallerError, SpecError
from bridge_wire.memory.cuda import Gpu
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec, encode

# Yields the phases "tracing" and "compiling" as they begin, and returns the program.
Preparation = Generator[str, None, "Program"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One array of a model's state. Buffers (statistics, counters) are not trainable."""

    path: str
    spec: Spec
    trainable: bool


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """What a target names, seen as a function of its parameters and its arguments.

    `apply(values, args, kwargs)` takes one array per parameter. `values` are the worker's own. Of
    what type it is otherwise is its runtime's business.
    """

    name: str
    doc: str
    arguments: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    values: Sequence[Any]
    apply: Any
    # What to look through for the code that decides the results: see fingerprints.py.
    source: Any = None
    # How the arrays of these paths lie on the devices, in the framework's terms; in a path, `*`
    # stands for anything.
    shardings: Mapping[str, Any] = field(default_factory=dict)
    has_modes: bool = False  # whether a call can put it into training or inference mode

    @property
    def description(self) -> pb.Model:
        """What a client is told of it."""
        parameters = [
            pb.Parameter(path=p.path, spec=encode(p.spec), trainable=p.trainable)
            for p in self.parameters
        ]
        return pb.Model(
            name=self.name,
            doc=self.doc,
            arguments=self.arguments,
            parameters=parameters,
            modes=self.has_modes,
        )


class Program(ABC):
    """A function of a flat list of arrays, ready to run.

    Immutable; shared by every session that prepared it.
    """

    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    output_nbytes: tuple[int, ...]
    result: pb.Tree
    # Bytes of the residual that each run keeps; None for a program that keeps none.
    residual_nbytes: int | None = None
    # Whether a run reads a residual, which a run of this program kept.
    pullback_of: "Program | None" = None

    @abstractmethod
    def run(self, inputs: Sequence[Any], residual: Any) -> tuple[Sequence[Any], Any]:
        """Return the outputs, and the new residual if one is kept. On the host they are computed
        and not just enqueued; on a GPU, what reads them waits for them.

        `residual` is what an earlier run of `pullback_of` kept, and otherwise None. Neither the
        inputs nor anything that aliases them is kept beyond the call, except in the residual.
        """


@dataclass(frozen=True, slots=True)
class Options:
    """How a runtime should behave, from the command line.

    A guest is a runtime in a process of its user's: it leaves all settings there as they are, and
    follows them.
    """

    x64: bool = False
    jit: bool = True
    is_guest: bool = False
    device: str = "cpu"  # where a guest's torch models are; all else is told by the environment
    mesh: Mapping[str, int] = field(
        default_factory=dict
    )  # the sizes of its axes; without any, one device
    gpu_memory_fraction: float | None = (
        None  # of the GPU, that the framework may take; None leaves it to the framework
    )


@dataclass(slots=True)
class Description:
    """What Describe tells about the framework."""

    framework: str
    version: str
    x64: bool
    devices: tuple[str, ...] = field(default=())


_NOTHING: AbstractContextManager[None] = nullcontext()


class Runtime(ABC):
    """Adapts one framework. Methods are called from many threads at once."""

    @abstractmethod
    def describe(self) -> Description: ...

    def has_x64(self) -> bool:
        """Whether there are 64-bit floats and integers at this moment, in this thread."""
        return self.describe().x64

    @abstractmethod
    def adapt(self, name: str, target: Any) -> Model:
        """Return the model that a loaded target stands for.

        Raises:
          TargetError: it is nothing that this framework can serve.
        """

    def spread(self, model: Model, shardings: Mapping[str, Any]) -> Model:
        """Return the model as one whose arrays lie on several devices so.

        Raises:
          CallerError: this runtime has no mesh.
          TargetError: the shardings are no such, or not for this model.
        """
        raise CallerError(f"the model {model.name!r} has shardings, which only JAX models can have")

    @abstractmethod
    def prepare_call(self, model: Model, call: pb.Call) -> Preparation:
        """Prepare a transformed call.

        Raises:
          CallerError: the signature cannot be served.
          RemoteModelError: the model raised while it was traced.
        """

    def shapes(
        self, model: Model, call: pb.Call, inputs: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[str]]:
        """Return the shape of each output of a call whose inputs have these, of numbers and names
        of unknown sizes.

        Raises:
          SpecError: they cannot be told for all sizes.
        """
        raise SpecError("models of this framework are traced for known sizes only")

    def fingerprint(self, model: Model, call: pb.Call) -> bytes:
        """Return a digest of what decides the results of an untransformed call that can be
        prepared: see fingerprints.py. Empty where nothing is known; the same in each process that
        serves the same model.
        """
        return b""

    @abstractmethod
    def prepare_parameters(self, model: Model) -> Program:
        """Return the program whose outputs are the model's parameters."""

    @abstractmethod
    def prepare_pullback(
        self, program: Program, wrt: Sequence[int], outputs: Sequence[int]
    ) -> Preparation:
        """Prepare the pullback of a program that keeps residuals."""

    def apart(self) -> AbstractContextManager[object]:
        """Return the context for what this runtime does in a thread of its user's, whose
        settings it must not see."""
        return _NOTHING

    def gpu(self) -> Gpu | None:
        """Return the GPU that models run on; None: they run on the host, or on several devices."""
        return None

    def stream(self) -> int | None:
        """Return the CUDA stream that models run on in this thread; None where each has streams
        of its own."""
        return None

    def memory_bytes(self) -> int | None:
        """Return the most of its device's memory that the framework takes; None on the host, or
        if it does not say."""
        return None

    def has_failed(self) -> bool:
        """Whether the GPU takes no more work of this process, as after an illegal access: then none
        but another can use it. To be asked after an error.
        """
        return False

    @abstractmethod
    def view(self, pointer: int, spec: Spec, owner: Any, turn: Turn | None = None) -> Any:
        """Return an array over existing memory, which `owner` keeps alive; for a weak spec, the
        Python number there.

        Never a copy: the array shows what the memory holds at the time of each run. Of the host's
        memory, or, in a run that takes its turn on the GPU, of the GPU's; then it is for that run,
        which reads it when its turn has come.
        """

    def is_usable(self, view: Any) -> bool:
        """Whether a view can still be read: in a process of the user's, anybody may have deleted
        it."""
        return True

    @abstractmethod
    def write(self, array: Any, pointer: int, nbytes: int, turn: Turn | None = None) -> None:
        """Copy an output's elements, row-major and `nbytes` > 0 in all, to the given memory.

        At once, to the host's; with a turn, to the GPU's, when the turn's stream comes to it.
        """

    def exclusive(
        self, outputs: Sequence[Any], inputs: Sequence[Any], residual: Any
    ) -> Sequence[int | None]:
        """Return where each output of a run lies in host memory; None where it is not row-major
        there, or where its memory is also that of an input, of the residual, of the model or of
        another output.
        """
        return [None] * len(outputs)
