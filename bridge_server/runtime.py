"""The contract of a runtime: the operations that a worker needs of a framework.

One implementation per framework; this module imports none of them.
"""

import functools
import site
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from bridge_server.turns import Turn as Turn  # part of the contract
from bridge_wire.errors import CallerError, SpecError
from bridge_wire.memory.cuda import Gpu
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec, encode

# The name of a model itself among its methods.
CALL = "__call__"

_PATH_NAMES = ("stdlib", "platstdlib", "purelib", "platlib")
_INSTALLED = (
    *map(sysconfig.get_path, _PATH_NAMES),
    *site.getsitepackages(),
    site.getusersitepackages(),
)

# Yields the phases "tracing" and "compiling" when they begin, and returns the program.
Preparation = Generator[str, None, "Program"]


def finish(
    preparation: Preparation, on_phase: Callable[[str], None] = lambda _: None
) -> "Program":
    """Run a preparation to its end, reporting each phase; return its program."""
    while True:
        try:
            on_phase(next(preparation))
        except StopIteration as end:
            program: Program = end.value
            return program


@dataclass(frozen=True, slots=True)
class Parameter:
    """One array of a model's state. Buffers (statistics, counters) are not trainable."""

    path: str
    spec: Spec
    trainable: bool


@functools.lru_cache(maxsize=4096)
def is_users(module: str | None) -> bool:
    """Return whether a module is the user's, and not Python's or an installed package's."""
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is not None and not file.startswith(_INSTALLED)


@dataclass(frozen=True, slots=True)
class Method:
    """A function of a model that a call can name.

    `attribute` is its name in the model's object; it is empty for the object itself.
    """

    attribute: str
    arguments: tuple[str, ...]  # known names of positional parameters, in order
    signature: str = ""  # the parameters that a caller passes, as source


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A target as functions of its parameters and their arguments.

    `apply` takes one array per parameter; each runtime defines its full type. `values` are the
    worker's own parameters.
    """

    name: str
    doc: str
    methods: Mapping[str, Method]
    parameters: tuple[Parameter, ...]
    values: Sequence[Any]
    apply: Any
    # The objects from which fingerprints.py reaches the code that determines the results.
    source: Any = None
    # Shardings in the framework's terms, by path; in a path, `*` matches any text.
    shardings: Mapping[str, Any] = field(default_factory=dict)
    has_modes: bool = False  # whether a call can select training or inference mode

    @property
    def description(self) -> pb.Model:
        """The model as Describe reports it to a client."""
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
            methods=[
                pb.Method(name=name, arguments=each.arguments, signature=each.signature)
                for name, each in self.methods.items()
            ],
        )

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of the positional parameters of the model itself."""
        return self.methods[CALL].arguments if CALL in self.methods else ()

    def method(self, name: str) -> Method:
        """Return the method that a call names.

        Raises:
          CallerError: the model has no public method of this name.
        """
        method = self.methods.get(name or CALL)
        if method is not None:
            return method
        if name in ("", CALL):
            raise CallerError(
                f"the model {self.name!r} itself cannot be called; name one of its methods"
                f" {sorted(self.methods)}"
            )
        raise CallerError(
            f"the model {self.name!r} has no public method {name[:100]!r}; it has"
            f" {sorted(self.methods)}"
        )


class Program(ABC):
    """A function of a flat list of arrays, ready to run.

    Immutable; shared by every session that prepared it.
    """

    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    output_nbytes: tuple[int, ...]
    result: pb.Tree
    outputs_nbytes: int = 0  # the sum of output_nbytes
    # When it was last used, on the clock of time.perf_counter.
    used: float = 0.0
    # Bytes of the residual that each run keeps; None for a program without residuals.
    residual_nbytes: int | None = None
    # The model and the derivative, for the statistics.
    label: tuple[str, str] = ("", "")
    # The program whose residuals this program reads; None for a program that reads none.
    pullback_of: "Program | None" = None

    @abstractmethod
    def run(self, inputs: Sequence[Any], residual: Any) -> tuple[Sequence[Any], Any]:
        """Return the outputs, and the new residual of a program that keeps residuals.

        On the host, the outputs are computed, not just enqueued; on a GPU, their readers wait for
        them. `residual` is that of an earlier run of `pullback_of`, else None. Only the residual
        keeps the inputs or their aliases beyond the call.
        """


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of a runtime, from the command line.

    An embedded runtime runs inside the user's process: it leaves all global settings alone, and
    follows them.
    """

    x64: bool = False
    jit: bool = True
    embedded: bool = False
    # Of an embedded runtime's torch models; a worker follows its environment.
    device: str = "cpu"
    # Axis names and sizes; empty means one device.
    mesh: Mapping[str, int] = field(default_factory=dict)
    # Share of the GPU's memory that the framework may take; None leaves the choice to it.
    gpu_memory_fraction: float | None = None


@dataclass(slots=True)
class Description:
    """The framework as Describe reports it."""

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
        """Return whether 64-bit floats and integers exist at this moment, in this thread."""
        return self.describe().x64

    @abstractmethod
    def adapt(self, name: str, target: Any) -> Model:
        """Return the model of a loaded target.

        Raises:
          TargetError: this framework cannot serve the target.
        """

    def shard(self, model: Model, shardings: Mapping[str, Any]) -> Model:
        """Return the model with its arrays sharded over several devices.

        Raises:
          CallerError: this runtime has no mesh.
          TargetError: a sharding has the wrong type, or names no parameter of this model.
        """
        raise CallerError(
            f"the model {model.name!r} has shardings, which only JAX models can have"
        )

    @abstractmethod
    def prepare_call(self, model: Model, call: pb.Call) -> Preparation:
        """Prepare a transformed call.

        Raises:
          CallerError: the signature cannot be served.
          RemoteModelError: the model raised during tracing.
        """

    def shapes(
        self, model: Model, call: pb.Call, inputs: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[str]]:
        """Return the output shapes of a call whose input shapes contain names of unknown sizes.

        Raises:
          SpecError: no formula holds for all sizes.
        """
        raise SpecError("models of this framework are traced for known sizes only")

    def fingerprint(self, model: Model, call: pb.Call) -> bytes:
        """Return a digest of everything that determines an untransformed call's results.

        Equal in each process that serves the same model; empty if unknown: see fingerprints.py.
        """
        return b""

    def result(self, model: Model, call: pb.Call) -> pb.Tree:
        """Return the structure of an untransformed call's result."""
        return finish(self.prepare_call(model, call)).result

    @abstractmethod
    def prepare_parameters(self, model: Model) -> Program:
        """Return the program whose outputs are the model's parameters."""

    @abstractmethod
    def prepare_pullback(
        self, program: Program, wrt: Sequence[int], outputs: Sequence[int]
    ) -> Preparation:
        """Prepare the pullback of a program that keeps residuals."""

    def isolated(self) -> AbstractContextManager[object]:
        """Return the context that hides the settings of the user's thread from models."""
        return _NOTHING

    def gpu(self) -> Gpu | None:
        """Return the GPU that models run on; None for the host or for several devices."""
        return None

    def stream(self) -> int | None:
        """Return this thread's CUDA stream for models; None if the framework has its own."""
        return None

    def memory_bytes(self) -> int | None:
        """Return the framework's limit of device memory; None on the host, or if unknown."""
        return None

    def has_failed(self) -> bool:
        """Return whether this process's CUDA context is unusable, as after an illegal access.

        To be called after an error; only a new process can use the GPU then.
        """
        return False

    @abstractmethod
    def view(
        self, pointer: int, spec: Spec, owner: Any, turn: Turn | None = None
    ) -> Any:
        """Return an array over existing memory, or the Python number there for a weak spec.

        Never a copy: each run reads the memory's current contents. `owner` keeps the memory alive.
        Without a turn, the memory is the host's. With a turn, it is the GPU's, and the array is
        valid for that run, which reads it when its turn comes.
        """

    def is_usable(self, view: Any) -> bool:
        """Return whether a view can still be read: embedded, user code may have deleted it."""
        return True

    @abstractmethod
    def write(
        self, array: Any, pointer: int, nbytes: int, turn: Turn | None = None
    ) -> None:
        """Copy an output's elements, row-major and `nbytes` > 0 in all, to the given memory.

        Without a turn, copy to host memory at once. With a turn, copy to GPU memory, in the order
        of the turn's stream.
        """

    def exclusive(
        self, outputs: Sequence[Any], inputs: Sequence[Any], residual: Any
    ) -> Sequence[int | None]:
        """Return the address of each output that is row-major in host memory of its own, else None.

        Memory of an input, the residual, the model or another output is not an output's own.
        """
        return [None] * len(outputs)
