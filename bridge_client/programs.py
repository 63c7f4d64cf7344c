"""Programs as the client sees them: what was asked for, what it returns, and the programs
derived from it."""

import hashlib
import itertools
import threading
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bridge_wire import specs, trees
from bridge_wire.errors import CallerError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

if TYPE_CHECKING:
    from bridge_client.session import Session


_keys = itertools.count(1)
_TAG_BITS = 23  # an id has 63 bits, so that it is also an int64; 40 of them count
_COUNT_BITS = 40


def residual_id(count: int, fingerprint: bytes) -> int:
    """Return the id of a residual, from which `tag_of` tells which model has made it: wherever
    the id is copied to."""
    return model_tag(fingerprint) << _COUNT_BITS | count


def model_tag(fingerprint: bytes) -> int:
    """Return a model's tag, a short form of its fingerprint; 0 where the worker told none."""
    return 1 + int.from_bytes(fingerprint, "little") % (2**_TAG_BITS - 1) if fingerprint else 0


def tag_of(residual: int) -> int:
    """Return the tag of the model that has made a residual; 0 where the worker told no
    fingerprint."""
    return residual >> _COUNT_BITS


@dataclass(slots=True)
class _Identity:
    """The model that a call and its derivatives were last prepared with."""

    link: object = None
    fingerprint: bytes = b""


@dataclass(slots=True, eq=False, repr=False, weakref_slot=True)
class Program:
    """A prepared program. It survives its link: on a new one it is prepared again when it is next
    run.

    Derived programs are prepared once and remembered.
    """

    session: "Session"
    request: pb.PrepareRequest
    inputs: tuple[Spec, ...]
    labels: tuple[str, ...]  # the inputs' names, for errors
    timeout_s: float | None = None
    origin: "Program | None" = (
        None  # of a keeping program the plain one, of a pullback the keeping one
    )
    outputs: tuple[Spec, ...] = ()
    output_nbytes: tuple[int, ...] = ()
    outputs_nbytes: int = 0  # of all together
    discrete_outputs: tuple[
        int, ...
    ] = ()  # those without a derivative: integers, bools, and new buffers
    changed: int = 0  # how many of the outputs, at their end, are the new values of buffers
    # Of the call without transforms. Changed in place when another worker prepares: it names that
    # worker's classes.
    result: pb.Tree = field(default_factory=pb.Tree)
    name: tuple[object, int] = (None, 0)  # what runs it calls it so: a worker, good for that link
    is_pullback: bool = field(init=False)
    keeps_residual: bool = field(init=False)
    takes_numbers: bool = field(init=False)  # whether an input is a Python number, and not an array
    key: int = field(default_factory=_keys.__next__)  # names it in this process
    number: int = 0  # names it in graphs; 0: it is in none
    fingerprint: bytes = b""  # of the model, as it was when this program was last prepared
    identity: _Identity = field(default_factory=_Identity)  # shared with what is derived from it
    tag: int = 0  # of the only model that this program may run on; 0: any
    _derived: dict[Hashable, "Program"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.is_pullback = self.request.HasField("pullback")
        self.keeps_residual = self.request.call.HasField("keep")
        self.takes_numbers = any(spec.weak for spec in self.inputs)

    def __repr__(self) -> str:
        call = self.request.call
        steps = [transform.WhichOneof("kind") for transform in call.transforms]
        return "/".join([call.model or str(self.request.WhichOneof("what")), *map(str, steps)])

    @staticmethod
    def of(number: int) -> "Program":
        """Return the program that a graph names so."""
        return _pinned.get(number) or _numbered[number]

    def pin(self) -> int:
        """Keep this program, which a graph is going to name, until its session is closed; return
        the number for that.

        It follows from what the program takes and returns: torch keeps compiled code on disk, and
        finds it again, in another process, by what the graph looks like. No two programs of one
        process ever have the same.
        """
        with _pinning:
            if not self.number:
                number = int.from_bytes(hashlib.sha256(self.described()).digest()[:7], "little") + 1
                while number in _given:
                    number += 1
                _given.add(number)
                self.number = number
                _numbered[number] = self
            _pinned[self.number] = self
        return self.number

    def described(self) -> bytes:
        """Return the call, and the types of its outputs."""
        outputs = ", ".join(map(str, self.outputs))
        return self.request.SerializeToString(deterministic=True) + outputs.encode()

    def at(self, arrays: Sequence[Any]) -> "Program":
        """Return the program that runs on these inputs: this one, save where it stands for those
        of all sizes."""
        return self

    def output_shapes(self, arrays: Sequence[Any]) -> Sequence[tuple[Any, ...]]:
        """Return the shapes of the outputs for these inputs."""
        return [spec.shape for spec in self.outputs]

    @property
    def plain(self) -> "Program":
        """The program that makes the same outputs, keeps nothing, and can be derived from."""
        return self.origin if self.keeps_residual and self.origin is not None else self

    def adopt(self, link: object, prepared: pb.Prepared) -> None:
        """Take over what the worker, or this process, has prepared."""
        self.outputs = specs.decode_all(prepared.outputs)
        self.output_nbytes = tuple(spec.nbytes for spec in self.outputs)
        self.outputs_nbytes = sum(self.output_nbytes)
        if self.result != prepared.result:
            self.result.CopyFrom(prepared.result)
        if self.request.call.mutable and not self.request.call.transforms:
            self.changed = len(self.outputs) - len(trees.leaf_paths(self.result, ""))
        results = len(self.outputs) - self.changed
        self.discrete_outputs = tuple(
            i for i, spec in enumerate(self.outputs) if i >= results or not spec.dtype.is_inexact
        )
        if prepared.fingerprint:
            self.fingerprint = prepared.fingerprint
            self.identity.link, self.identity.fingerprint = link, prepared.fingerprint
        self.name = (link, prepared.program)

    def prepare_keeping(self, wrt: tuple[int, ...]) -> "Program":
        """Prepare the program whose runs also keep a residual, before this one, whose outputs it
        has: this one is prepared, and compiled, when it is first run, if it ever is. Return this
        one.
        """
        return self._with_outputs_of(self.keeping(wrt))

    def on_model(self, tag: int) -> "Program":
        """Return this program, not prepared, as one that runs on the model of this tag only, and so
        do its derivatives.

        These raise ModelChanged when they are prepared with another model.
        """
        if tag in (0, self.tag):
            return self
        key = ("on model", tag)
        if known := self._derived.get(key):
            return known
        held = Program(
            self.session,
            self.request,
            self.inputs,
            self.labels,
            self.timeout_s,
            identity=self.identity,
        )
        held.tag, held.result = tag, self.result
        return self._derived.setdefault(key, held._with_outputs_of(self))

    def _with_outputs_of(self, other: "Program") -> "Program":
        self.outputs, self.output_nbytes, self.outputs_nbytes = (
            other.outputs,
            other.output_nbytes,
            other.outputs_nbytes,
        )
        self.discrete_outputs, self.changed = other.discrete_outputs, other.changed
        return self

    def keeping(self, wrt: tuple[int, ...]) -> "Program":
        """Return the program whose runs also keep a residual for the pullback to the inputs
        `wrt`."""
        key = ("keep", wrt)
        if known := self._derived.get(key):
            return known
        request = self._copied_request()
        request.call.keep.inputs.extend(wrt)
        return self._derive(
            key, request, self.inputs, self.labels, self, changed=self.changed, result=self.result
        )

    def pullback(self, wrt: tuple[int, ...], outputs: tuple[int, ...]) -> "Program":
        """Return the program from cotangents of `outputs` to those of `wrt`; this one must keep
        residuals."""
        key = ("pullback", wrt, outputs)
        if known := self._derived.get(key):
            return known
        request = pb.PrepareRequest(pullback=pb.Pullback(wrt=wrt, outputs=outputs))
        inputs = tuple(self.outputs[i] for i in outputs)
        return self._derive(key, request, inputs, _cotangents_of(outputs), origin=self)

    def vjp(self, wrt: tuple[int, ...], outputs: tuple[int, ...]) -> "Program":
        """Return the program from the inputs and cotangents of `outputs` to the cotangents of
        `wrt`."""
        key = ("vjp", wrt, outputs)
        if known := self._derived.get(key):
            return known
        transform = pb.Transform(vjp=pb.Transform.Vjp(wrt=wrt, outputs=outputs))
        inputs = self.inputs + tuple(self.outputs[i] for i in outputs)
        return self._derive(
            key, self._transformed_request(transform), inputs, self.labels + _cotangents_of(outputs)
        )

    def jvp(self, wrt: tuple[int, ...], outputs: tuple[int, ...]) -> "Program":
        """Return the program from the inputs and tangents of `wrt` to the tangents of `outputs`."""
        key = ("jvp", wrt, outputs)
        if known := self._derived.get(key):
            return known
        transform = pb.Transform(jvp=pb.Transform.Jvp(wrt=wrt, outputs=outputs))
        inputs = self.inputs + tuple(self.inputs[i] for i in wrt)
        labels = self.labels + tuple(f"the tangent of {self.labels[i]}" for i in wrt)
        return self._derive(key, self._transformed_request(transform), inputs, labels)

    def vmap(self, axes: tuple[int, ...], size: int) -> "Program":
        """Return the program over batches of `size`, found at the given axis of each input (-1:
        not batched)."""
        key = ("vmap", axes, size)
        if known := self._derived.get(key):
            return known
        transform = pb.Transform(vmap=pb.Transform.Vmap(axes=axes, size=size))
        inputs = tuple(
            spec
            if axis < 0
            else spec._replace(shape=(*spec.shape[:axis], size, *spec.shape[axis:]))
            for spec, axis in zip(self.inputs, axes, strict=True)
        )
        return self._derive(
            key, self._transformed_request(transform), inputs, self.labels, changed=self.changed
        )

    def _transformed_request(self, transform: pb.Transform) -> pb.PrepareRequest:
        request = self._copied_request()
        request.call.transforms.append(transform)
        return request

    def _copied_request(self) -> pb.PrepareRequest:
        if self.request.WhichOneof("what") != "call" or self.request.call.HasField("keep"):
            raise CallerError("only a plain call can be derived from")
        request = pb.PrepareRequest()
        request.CopyFrom(self.request)
        return request

    def _derive(
        self,
        key: Hashable,
        request: pb.PrepareRequest,
        inputs: tuple[Spec, ...],
        labels: tuple[str, ...],
        origin: "Program | None" = None,
        changed: int = 0,
        result: pb.Tree | None = None,
    ) -> "Program":
        derived = Program(
            self.session,
            request,
            inputs,
            labels,
            self.timeout_s,
            origin,
            changed=changed,
            identity=self.identity,
            tag=self.tag,
        )
        derived.result = result or derived.result
        return self._derived.setdefault(key, self.session.prepare(derived))


# What graphs name, which hold a number only: kept, and all that are alive; and every number ever
# given.
_pinned: dict[int, Program] = {}
_numbered: "weakref.WeakValueDictionary[int, Program]" = weakref.WeakValueDictionary()
_given: set[int] = set()
_pinning = threading.Lock()


def unpin(session: "Session") -> None:
    """Let go of the programs of a session that is being closed."""
    for number, program in list(_pinned.items()):
        if program.session is session:
            _pinned.pop(number, None)


def shapes_of(call: pb.Call, inputs: Sequence[Sequence[str]]) -> pb.Shapes:
    """Return the question for the shapes of a call's outputs, whose inputs have these."""
    return pb.Shapes(call=call, inputs=[pb.Shape(sizes=sizes) for sizes in inputs])


def _cotangents_of(outputs: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(f"the cotangent of output {i}" for i in outputs)
