"""Programs on the client's side: a request, the worker's answer to it, and derived programs.

Imports neither sessions, which make programs, nor a framework.
"""

import itertools
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from bridge_wire import specs, trees
from bridge_wire.classes import peers, recipes
from bridge_wire.errors import CallerError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

Positions = tuple[int, ...]
_T = TypeVar("_T")

MOST_CALLS = 1024  # whose programs a function remembers, as many as a worker does
_keys = itertools.count(1)
_FIRST = operator.itemgetter(0)
_TAG_BITS = 23  # an id has 63 bits, so that it is also an int64; 40 of them count
_COUNT_BITS = 40


def residual_id(count: int, fingerprint: bytes) -> int:
    """Return the id of a residual. It contains the tag of the model that made the residual, so that
    every copy of the id does."""
    return model_tag(fingerprint) << _COUNT_BITS | count


def model_tag(fingerprint: bytes) -> int:
    """Return a model's tag, a short form of its fingerprint; 0 if the worker sent none."""
    return (
        1 + int.from_bytes(fingerprint, "little") % (2**_TAG_BITS - 1)
        if fingerprint
        else 0
    )


def tag_of(residual: int) -> int:
    """Return the tag of the model that made a residual; 0 if the worker sent no fingerprint."""
    return residual >> _COUNT_BITS


@dataclass(slots=True)
class _Identity:
    """The model that a call and its derivatives were last prepared with."""

    link: object = None
    fingerprint: bytes = b""


class Recent(dict[Hashable, _T | None]):
    """A table of the entries used last: at most `limit`, and always the last half of it.

    Thread-safe: at worst an entry is forgotten too early.
    """

    def __init__(self, limit: int = MOST_CALLS) -> None:
        super().__init__()
        self._half = max(1, limit // 2)
        self._older: dict[Hashable, _T | None] = {}

    def __missing__(self, key: Hashable) -> _T | None:
        value = self._older.get(key)
        return None if value is None else self.remember(key, value)

    def remember(self, key: Hashable, value: _T) -> _T:
        """Add an entry; return the one that another thread has added before, if there is one."""
        if len(self) >= self._half:
            self._older = dict(self)
            super().clear()
        added = self.setdefault(key, value)
        return value if added is None else added

    def clear(self) -> None:
        """Forget all entries."""
        self._older = {}
        super().clear()


class Result:
    """The structure of a call's result, with the classes of the worker that prepared it last."""

    def __init__(self) -> None:
        self.tree = pb.Tree()
        self._rebuild: Callable[[Sequence[Any]], Any] | None = None

    def adopt(self, tree: pb.Tree) -> None:
        """Take the structure that a worker, or a runtime in this process, has sent."""
        if tree != self.tree:
            self.tree.CopyFrom(tree)
            self._rebuild = None

    def rebuild(self, leaves: Sequence[Any]) -> Any:
        """Return the result with these leaves."""
        if self._rebuild is None:
            is_leaf = self.tree.WhichOneof("kind") == "leaf"
            self._rebuild = _FIRST if is_leaf else trees.builder(self.tree, peers)
        return self._rebuild(leaves)


@dataclass(frozen=True, slots=True)
class Prepared:
    """The answer to a request: the model's fingerprint, and the outputs."""

    fingerprint: bytes = b""  # the model's, when the program was last prepared
    outputs: tuple[Spec, ...] = ()
    output_nbytes: tuple[int, ...] = ()
    outputs_nbytes: int = 0  # the sum of output_nbytes
    buffer_outputs: int = 0  # so many outputs at the end are the new values of buffers
    nondifferentiable_outputs: Positions = ()  # integers, bools, and new values of buffers

    def with_outputs(
        self, outputs: tuple[Spec, ...], buffer_outputs: int
    ) -> "Prepared":
        """Return this answer with other outputs."""
        nbytes = tuple(spec.nbytes for spec in outputs)
        first_buffer = len(outputs) - buffer_outputs
        nondifferentiable = tuple(
            i
            for i, spec in enumerate(outputs)
            if i >= first_buffer or not spec.dtype.is_inexact
        )
        return replace(
            self,
            outputs=outputs,
            output_nbytes=nbytes,
            outputs_nbytes=sum(nbytes),
            buffer_outputs=buffer_outputs,
            nondifferentiable_outputs=nondifferentiable,
        )


@dataclass(slots=True, eq=False, repr=False, weakref_slot=True)
class Program:
    """A prepared program. It survives its link: the next run on a new link prepares it again.

    Derived programs are prepared once and cached.
    """

    session: Any  # the Session; its module imports this one
    request: pb.PrepareRequest
    inputs: tuple[Spec, ...]
    labels: tuple[str, ...]  # the inputs' names, for errors
    timeout_s: float | None = None
    origin: "Program | None" = None  # plain -> keeping -> pullback: the one to the left
    tag: int = 0  # of the only model that this program may run on; 0: any
    # Shared with derived programs.
    identity: _Identity = field(default_factory=_Identity)
    result: Result = field(default_factory=Result)  # of the call without transforms
    prepared: Prepared = field(default_factory=Prepared)
    # (link, id): the worker's id for this program, valid on that link only
    name: tuple[object, int] = (None, 0)
    key: int = field(default_factory=_keys.__next__)  # unique in this process
    is_pullback: bool = field(init=False)
    keeps_residual: bool = field(init=False)
    # Whether an input is a Python number, not an array.
    takes_numbers: bool = field(init=False)
    _derived: "Recent[Program]" = field(default_factory=lambda: Recent())

    def __post_init__(self) -> None:
        self.is_pullback = self.request.HasField("pullback")
        self.keeps_residual = self.request.call.HasField("keep")
        self.takes_numbers = any(spec.weak for spec in self.inputs)

    def __repr__(self) -> str:
        call = self.request.call
        steps = [transform.WhichOneof("kind") for transform in call.transforms]
        return "/".join(
            [call.model or str(self.request.WhichOneof("what")), *map(str, steps)]
        )

    @property
    def title(self) -> str:
        """The model and the derivative, such as "f.forward" or "f.vjp", for spans."""
        named: Program | None = self
        while named is not None and not named.request.call.model:
            named = named.origin
        model = "parameters" if named is None else named.request.call.model
        kinds = [str(each.WhichOneof("kind")) for each in self.request.call.transforms]
        derivative = "vjp" if self.is_pullback else ".".join(kinds)
        return f"{model}.{derivative or 'forward'}"

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """The types of the outputs."""
        return self.prepared.outputs

    @property
    def output_nbytes(self) -> tuple[int, ...]:
        """The size of each output."""
        return self.prepared.output_nbytes

    @property
    def outputs_nbytes(self) -> int:
        """The size of all outputs together."""
        return self.prepared.outputs_nbytes

    @property
    def fingerprint(self) -> bytes:
        """The model's fingerprint, when this program was last prepared."""
        return self.prepared.fingerprint

    @property
    def plain(self) -> "Program":
        """The program with the same outputs that keeps no residual and can be derived from."""
        return self.origin if self.keeps_residual and self.origin is not None else self

    def adopt(self, link: object, prepared: pb.Prepared) -> None:
        """Store the answer of a worker, or of a runtime in this process."""
        outputs = specs.decode_all(prepared.outputs)
        recipes.learn(prepared.recipes)
        self.result.adopt(prepared.result)
        buffer_outputs = self.prepared.buffer_outputs
        if self.request.call.mutable and not self.request.call.transforms:
            buffer_outputs = len(outputs) - len(trees.leaf_paths(self.result.tree, ""))
        if prepared.fingerprint:
            self.identity.link, self.identity.fingerprint = link, prepared.fingerprint
        answer = Prepared(prepared.fingerprint or self.fingerprint)
        self.prepared = answer.with_outputs(outputs, buffer_outputs)
        self.name = (link, prepared.program)

    def forget(self) -> None:
        """Have the next run prepare this program again, since the worker has evicted it, or the
        program that a pullback belongs to."""
        self.name = (None, 0)
        if self.is_pullback and self.origin is not None:
            self.origin.forget()

    def prepare_keeping(self, wrt: Positions) -> "Program":
        """Prepare only the program whose runs also keep a residual, and take its outputs over; the
        first run of this program, if there is one, prepares and compiles it. Return this program.
        """
        return self._with_outputs_of(self.keeping(wrt))

    def on_model(self, tag: int) -> "Program":
        """Return this program, unprepared, restricted to the model with this tag, as are its
        derivatives.

        They raise ModelChanged when they are prepared with another model.
        """
        if tag in (0, self.tag):
            return self
        key = ("on model", tag)
        if (cached := self._derived[key]) is not None:
            return cached
        restricted = self._child(self.request, self.inputs, self.labels)
        restricted.tag, restricted.result = tag, self.result
        return self._derived.remember(key, restricted._with_outputs_of(self))

    def keeping(self, wrt: Positions) -> "Program":
        """Return the program whose runs also keep a residual for the pullback to inputs `wrt`."""
        key = ("keep", wrt)
        if (cached := self._derived[key]) is not None:
            return cached
        request = self._copied_request()
        request.call.keep.inputs.extend(wrt)
        keeping = self._child(request, self.inputs, self.labels, self)
        keeping.result = self.result
        keeping.prepared = Prepared(buffer_outputs=self.prepared.buffer_outputs)
        return self._cache(key, keeping)

    def pullback(self, wrt: Positions, outputs: Positions) -> "Program":
        """Return the program from cotangents of `outputs` to those of `wrt`; this program must keep
        residuals."""
        key = ("pullback", wrt, outputs)
        if (cached := self._derived[key]) is not None:
            return cached
        request = pb.PrepareRequest(pullback=pb.Pullback(wrt=wrt, outputs=outputs))
        inputs = tuple(self.outputs[i] for i in outputs)
        return self._cache(
            key, self._child(request, inputs, _cotangents_of(outputs), self)
        )

    def vjp(self, wrt: Positions, outputs: Positions) -> "Program":
        """Return the program from the inputs and cotangents of `outputs` to cotangents of `wrt`."""
        key = ("vjp", wrt, outputs)
        if (cached := self._derived[key]) is not None:
            return cached
        request = self._copied_request()
        request.call.transforms.add(vjp=pb.Transform.Vjp(wrt=wrt, outputs=outputs))
        inputs = self.inputs + tuple(self.outputs[i] for i in outputs)
        labels = self.labels + _cotangents_of(outputs)
        return self._cache(key, self._child(request, inputs, labels))

    def jvp(self, wrt: Positions, outputs: Positions) -> "Program":
        """Return the program from the inputs and tangents of `wrt` to tangents of `outputs`."""
        key = ("jvp", wrt, outputs)
        if (cached := self._derived[key]) is not None:
            return cached
        request = self._copied_request()
        request.call.transforms.add(jvp=pb.Transform.Jvp(wrt=wrt, outputs=outputs))
        inputs = self.inputs + tuple(self.inputs[i] for i in wrt)
        labels = self.labels + tuple(f"the tangent of {self.labels[i]}" for i in wrt)
        return self._cache(key, self._child(request, inputs, labels))

    def vmap(self, axes: Positions, size: int) -> "Program":
        """Return the program over batches of `size`, along the given axis of each input (-1: the
        input has no batch axis)."""
        key = ("vmap", axes, size)
        if (cached := self._derived[key]) is not None:
            return cached
        request = self._copied_request()
        request.call.transforms.add(vmap=pb.Transform.Vmap(axes=axes, size=size))
        inputs = tuple(
            _batched(spec, axis, size)
            for spec, axis in zip(self.inputs, axes, strict=True)
        )
        batched = self._child(request, inputs, self.labels)
        batched.prepared = Prepared(buffer_outputs=self.prepared.buffer_outputs)
        return self._cache(key, batched)

    def _copied_request(self) -> pb.PrepareRequest:
        if self.request.WhichOneof("what") != "call" or self.keeps_residual:
            raise CallerError("only a plain call can be derived from")
        request = pb.PrepareRequest()
        request.CopyFrom(self.request)
        return request

    def _child(
        self,
        request: pb.PrepareRequest,
        inputs: tuple[Spec, ...],
        labels: tuple[str, ...],
        origin: "Program | None" = None,
    ) -> "Program":
        """Return an unprepared program of the same model."""
        return Program(
            self.session,
            request,
            inputs,
            labels,
            self.timeout_s,
            origin,
            self.tag,
            self.identity,
        )

    def _cache(self, key: Hashable, derived: "Program") -> "Program":
        """Prepare a derived program and remember it."""
        return self._derived.remember(key, self.session.prepare(derived))

    def _with_outputs_of(self, other: "Program") -> "Program":
        answer = other.prepared
        self.prepared = self.prepared.with_outputs(
            answer.outputs, answer.buffer_outputs
        )
        return self


def shapes_of(call: pb.Call, inputs: Sequence[Sequence[str]]) -> pb.Shapes:
    """Return the request for the shapes of a call's outputs, given those of its inputs."""
    return pb.Shapes(call=call, inputs=[pb.Shape(sizes=sizes) for sizes in inputs])


def _batched(spec: Spec, axis: int, size: int) -> Spec:
    if axis < 0:
        return spec
    return spec._replace(shape=(*spec.shape[:axis], size, *spec.shape[axis:]))


def _cotangents_of(outputs: Positions) -> tuple[str, ...]:
    return tuple(f"the cotangent of output {i}" for i in outputs)
