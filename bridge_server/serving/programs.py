"""Cache of the worker's programs: each is traced and compiled once for all clients.

Imports no framework.
"""

import hashlib
import heapq
import logging
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from bridge_server.runtime import Model, Preparation, Program, Runtime
from bridge_server.serving.identities import Identities, plain
from bridge_server.serving.meters import Meters, label_of
from bridge_wire import specs, trees
from bridge_wire.errors import ProtocolError, SpecError, UnknownModel
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

_log = logging.getLogger(__name__)

_MANY_SHAPES = 16  # from here on, each doubling is told
_MOST_NAMED = 5
MAX_PROGRAMS = 1024
_MOST_FINGERPRINTS = 4096
_SHARE_EVICTED = 1 / 16  # at once, as each eviction looks at all programs
_SIZE = re.compile(r"d\d{1,3}|\d{1,18}")
_MOST_TRANSFORMS = 32
_MOST_DERIVATIVES = 16  # each can double the tracing time
_MOST_INPUTS = 16384  # XLA takes a second per thousand inputs, and quadratic memory
_MOST_NODES = 1 << 17  # nodes in the tree of a call's arguments


@dataclass(slots=True, eq=False)
class _Slot:
    """Single-flight slot: the first caller compiles, the others wait for the lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    program: Program | None = None


class Programs:
    """Prepares programs of the hosted models and keeps the recently used ones by signature.

    An evicted program lives on while anyone has a reference, such as a residual for its pullback;
    until then a request for it finds it, so that two programs of one signature never coexist.
    Thread-safe.
    """

    def __init__(
        self,
        runtime: Runtime,
        models: Mapping[str, Model],
        revision: str = "",
        meters: Meters | None = None,
        max_programs: int = MAX_PROGRAMS,
    ) -> None:
        """Begin without programs. The revision is a part of all fingerprints.

        Past `max_programs`, the programs that were used longest ago are evicted.
        """
        self.models = models
        self.revision = revision
        # The argument types of --warmup, compiled before the first client connects.
        self.signatures: dict[str, list[tuple[Spec, ...]]] = {
            name: [] for name in models
        }
        self._runtime = runtime
        self._max_programs = max_programs
        self._slots: dict[object, _Slot] = {}
        self._alive: weakref.WeakValueDictionary[object, Program] = (
            weakref.WeakValueDictionary()
        )
        self._fingerprints: dict[bytes, bytes] = {}
        self._identities = Identities(self.fingerprint, self._result)
        self._lock = threading.Lock()
        self._meters = meters or Meters()
        self._shapes = _Shapes()
        self.evicted = 0  # programs so far

    def call(self, request: pb.Call) -> Preparation:
        """Prepare a transformed call of a model."""
        model = self._model(request.model)
        _check_extent(request)
        known = self._identities.recalled(request)
        key = known.SerializeToString(deterministic=True)

        def prepare() -> Preparation:
            program = yield from self._runtime.prepare_call(model, known)
            program.result = self._identities.named(known, program.result)
            self._shapes.note(known)
            return program

        return (yield from self._once(key, label_of(request), prepare))

    def recipes(self, program: Program) -> list[pb.Recipe]:
        """Return the recipes of the origins in a program's result."""
        return self._identities.recipes_of(program.result)

    def fingerprint(self, request: pb.Call) -> bytes:
        """Return the fingerprint of a prepared call, computed without its transforms."""
        call = plain(request)
        key = call.SerializeToString(deterministic=True)
        known = self._fingerprints.get(key)
        if known is None:
            _check_extent(call)
            of_model = self._runtime.fingerprint(self._model(request.model), call)
            known = self._fingerprints[key] = _of_revision(of_model, self.revision)
            if len(self._fingerprints) > _MOST_FINGERPRINTS:
                self._fingerprints.pop(next(iter(self._fingerprints)), None)
        return known

    def parameters(self, request: pb.Parameters) -> Preparation:
        """Prepare the program whose outputs are a model's parameters."""
        model = self._model(request.model)

        def prepare() -> Preparation:
            yield "tracing"
            return self._runtime.prepare_parameters(model)

        label = (request.model, "parameters")
        return (yield from self._once((model, "parameters"), label, prepare))

    def shapes(self, request: pb.Shapes) -> list[pb.Shape]:
        """Return a call's output shapes as formulas of the named sizes in its input shapes."""
        model = self._model(request.call.model)
        _check_extent(request.call)
        inputs = [tuple(shape.sizes) for shape in request.inputs]
        if [len(sizes) for sizes in inputs] != [
            len(spec.shape) for spec in request.call.inputs
        ]:
            raise ProtocolError(
                "a shapes request must have one shape per input of its call, of the same rank"
            )
        if not all(_SIZE.fullmatch(size) for sizes in inputs for size in sizes):
            raise ProtocolError(
                "a shapes request has a size that is neither a number nor a name d0, d1, ..."
            )
        if request.call.transforms or request.call.HasField("keep"):
            raise ProtocolError(
                "a shapes request needs a call without transforms and residuals"
            )
        call = self._identities.recalled(request.call)
        found = self._runtime.shapes(model, call, inputs)
        return [pb.Shape(sizes=sizes) for sizes in found]

    def pullback(self, program: Program, request: pb.Pullback) -> Preparation:
        """Prepare the pullback of a program that keeps residuals."""
        wrt, outputs = tuple(request.wrt), tuple(request.outputs)
        if program.residual_nbytes is None:
            raise ProtocolError(
                "a pullback was requested of a program that keeps no residual"
            )
        return (
            yield from self._once(
                (program, wrt, outputs),
                (program.label[0], f"vjp of {program.label[1]}"),
                lambda: self._runtime.prepare_pullback(program, wrt, outputs),
            )
        )

    def _result(self, call: pb.Call) -> pb.Tree:
        """Return the structure of an untransformed call's result."""
        return self._runtime.result(self._model(call.model), call)

    def _model(self, name: str) -> Model:
        model = self.models.get(name)
        if model is None:
            raise UnknownModel(
                f"no model is named {name[:100]!r} here; this worker hosts {sorted(self.models)}"
            )
        return model

    def _once(
        self,
        key: object,
        label: tuple[str, str],
        prepare: Callable[[], Preparation],
    ) -> Preparation:
        with self._lock:
            slot = self._slots.setdefault(key, _Slot())
            if slot.program is None:
                slot.program = self._alive.get(key)
            known = slot.program
        if known is not None:
            known.used = time.perf_counter()
            return known
        with slot.lock:
            made = slot.program
            if made is None:
                begun = time.monotonic()
                try:
                    made = yield from prepare()
                    made.label = label
                    made.outputs_nbytes = sum(made.output_nbytes)
                    made = self._add(key, slot, made)
                    self._note(label, time.monotonic() - begun)
                finally:
                    # After a failure each waiting caller retries; later callers get a new slot.
                    if slot.program is None:
                        self._slots.pop(key, None)
        return made

    def _add(self, key: object, slot: _Slot, program: Program) -> Program:
        """Keep a new program, and evict those that were used longest ago if there are too many.

        Returns the program, or the one of the same signature that is alive.
        """
        program.used = time.perf_counter()
        evicted: Sequence[_Slot] = ()
        with self._lock:
            kept = slot.program = self._alive.setdefault(key, program)
            self._slots[key] = slot
            excess = len(self._slots) - self._max_programs
            if excess > 0:
                count = excess + int(self._max_programs * _SHARE_EVICTED)
                evicted = self._evict(count, slot)
        del evicted  # without the lock, since to free a program takes time
        return kept

    def _evict(self, count: int, newest: _Slot) -> Sequence[_Slot]:
        """Take out the programs that were used longest ago, but not the newest."""
        found = [
            (slot.program.used, key)
            for key, slot in self._slots.items()
            if slot.program is not None and slot is not newest
        ]
        oldest = heapq.nsmallest(count, found, key=itemgetter(0))
        self.evicted += len(oldest)
        return [self._slots.pop(key) for _, key in oldest]

    def _note(self, label: tuple[str, str], seconds: float) -> None:
        self._meters.note_compile(label, seconds)
        _log.info("prepared %s of model %r in %.2g s", label[1], label[0], seconds)


class _Shapes:
    """Notices that a model is compiled again and again, and which of its arrays are the reason."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], tuple[int, Sequence[pb.Spec]]] = {}

    def note(self, call: pb.Call) -> None:
        """Note a call that was compiled; warn of many with different arrays."""
        label = label_of(call)
        count, before = self._last.get(label, (0, call.inputs))
        changed = [
            f"input {i} (now {specs.decode(new)})"
            for i, (old, new) in enumerate(zip(before, call.inputs, strict=False))
            if old != new
        ]
        if not changed and len(before) == len(call.inputs):
            self._last[label] = count, call.inputs
            return
        count += 1
        self._last[label] = count, call.inputs
        if count >= _MANY_SHAPES and count & (count - 1) == 0:
            _log.warning(
                "%s of model %r was compiled for %d shapes so far; pad to fewer, since each takes"
                " time and memory. Changed: %s",
                label[1],
                label[0],
                count,
                ", ".join(changed[:_MOST_NAMED]) or "the number of arrays",
            )


def _of_revision(fingerprint: bytes, revision: str) -> bytes:
    if not revision:
        return fingerprint
    return hashlib.sha256(fingerprint + revision.encode()).digest()[: len(fingerprint)]


def _check_extent(call: pb.Call) -> None:
    """Raise SpecError for a call so large that other clients would lack time or memory."""
    derivatives = sum(
        transform.WhichOneof("kind") != "vmap" for transform in call.transforms
    )
    for count, most, what in (
        (derivatives, _MOST_DERIVATIVES, f"a derivative of {derivatives} steps"),
        (
            len(call.transforms),
            _MOST_TRANSFORMS,
            f"a call with {len(call.transforms)} transforms",
        ),
        (len(call.inputs), _MOST_INPUTS, f"a call with {len(call.inputs)} arrays"),
    ):
        if count > most:
            raise SpecError(f"{what}; the worker's limit is {most}")
    if trees.count_nodes(call.arguments, _MOST_NODES + 1) > _MOST_NODES:
        raise SpecError(
            f"the arguments have more than {_MOST_NODES} containers and values, the worker's limit"
        )
