"""Families of programs: a call for all sizes of its inputs, as torch.compile traces it with
symbolic sizes."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import attrgetter, methodcaller
from typing import Any, Union

import torch
from torch import Tensor

from bridge_client.arguments import Values
from bridge_client.programs import Positions, Program, Recent
from bridge_client.sizes import Formula, formula
from bridge_wire.errors import BridgeError, CallerError, InternalError, SpecError
from bridge_wire.pb import bridge_pb2 as pb

_log = logging.getLogger(__name__)

_FUNCTIONS = {"max": torch.sym_max, "min": torch.sym_min}
Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]
Formulas = tuple[tuple[Formula, ...], ...]
Named = tuple[tuple[Any, ...], ...]  # shapes of sizes, or of the names of unknown ones
# The formulas of each output's sizes, as the worker sent them.
Told = Sequence[Sequence[str]]


class Family:
    """The programs of one call for all sizes, with the same types and structures.

    The graph of compiled code names the family; each run takes the member for its inputs' sizes.
    Everything that does not depend on sizes is the example's.

    Args:
      example: the member for the sizes at the time of tracing.
      named: the shapes of the call's inputs, in which unknown sizes have names.
      formulas: the sizes of each output.
      told: the formulas of the call's own outputs, as the worker sent them.
      make: returns the member for other shapes of the inputs.
      plain: the family with the same outputs that keeps no residual; None: this one.
    """

    session = property(attrgetter("example.session"))
    request = property(attrgetter("example.request"))
    inputs = property(attrgetter("example.inputs"))
    labels = property(attrgetter("example.labels"))
    outputs = property(attrgetter("example.outputs"))
    prepared = property(attrgetter("example.prepared"))
    result = property(attrgetter("example.result"))
    fingerprint = property(attrgetter("example.fingerprint"))
    keeps_residual = property(attrgetter("example.keeps_residual"))
    takes_numbers = property(attrgetter("example.takes_numbers"))

    def __init__(
        self,
        example: Program,
        named: Named,
        formulas: Formulas,
        told: Told,
        make: Callable[[Shapes], Program],
    ) -> None:
        self.example = example
        self.named = named
        self.formulas = formulas
        self.told = told
        self.plain = self
        self._make = make
        self._members: Recent[Program] = Recent()
        self._derived: dict[Hashable, Family] = {}

    def __repr__(self) -> str:
        return repr(self.example)

    def at(self, arrays: Sequence[Tensor]) -> "AnyProgram":
        """Return the member for these inputs; where torch traces with symbolic sizes, the family
        itself."""
        arrays_shapes = [tuple(array.shape) for array in arrays]
        if any(
            isinstance(size, torch.SymInt) for shape in arrays_shapes for size in shape
        ):
            return self
        inputs = arrays_shapes[: len(self.inputs)]
        member = self._member(tuple(inputs))
        shapes = [spec.shape for spec in member.outputs]
        expected = self.output_shapes(arrays)
        if shapes != expected:
            raise InternalError(
                f"{member!r} has outputs of shapes {shapes}; the symbolic formulas gave {expected}:"
                " compile it with dynamic=False"
            )
        return member

    def output_shapes(self, arrays: Values) -> list[tuple[Any, ...]]:
        """Return the shapes of the outputs for these inputs, whose sizes may be symbolic."""
        sizes: dict[str, Any] = {}
        for names, array in zip(self.named, arrays, strict=False):
            for name, size in zip(names, array.shape, strict=True):
                # To compare symbolic sizes has torch.compile guard that they stay equal.
                expected = (
                    name if isinstance(name, int) else sizes.setdefault(name, size)
                )
                if size != expected:
                    raise InternalError(
                        f"{self!r} is run on sizes that it was not compiled for"
                    )
        return [tuple([size(sizes) for size in output]) for output in self.formulas]

    def keeping(self, wrt: Positions) -> "Family":
        """Return the family of the members' programs that keep a residual."""
        family = self._derive(self.formulas, "keeping", wrt)
        family.plain = self
        return family

    def vjp(self, wrt: Positions, outputs: Positions) -> "Family":
        """Return the family of the members' VJPs."""
        formulas = _formulas_of([self.named[i] for i in wrt])
        return self._derive(formulas, "vjp", wrt, outputs)

    def jvp(self, wrt: Positions, outputs: Positions) -> "Family":
        """Return the family of the members' JVPs."""
        formulas = tuple([self.formulas[i] for i in outputs])
        return self._derive(formulas, "jvp", wrt, outputs)

    def vmap(self, axes: Positions, size: int) -> Program:
        """Raise CallerError: the worker has formulas for single calls only."""
        raise CallerError(
            "a call that was traced for all sizes has no batched version; compile with"
            " dynamic=False"
        )

    def _derive(
        self,
        formulas: Formulas,
        method: str,
        *arguments: Positions,
    ) -> "Family":
        key = (method, *arguments)
        cached = self._derived.get(key)
        if cached is not None:
            return cached
        derive = methodcaller(method, *arguments)
        count = len(self.inputs)

        def make(shapes: Shapes) -> Program:
            member: Program = derive(self._member(shapes[:count]))
            return member

        example = derive(self.example)
        family = Family(example, self.named, formulas, self.told, make)
        return self._derived.setdefault(key, family)

    def _member(self, shapes: Shapes) -> Program:
        cached = self._members[shapes]
        return cached or self._members.remember(shapes, self._make(shapes))


AnyProgram = Union[Program, Family]  # noqa: UP007


def member_for(program: AnyProgram, arrays: Sequence[Tensor]) -> AnyProgram:
    """Return the program that runs on these inputs: of a family, its member for their sizes."""
    return program.at(arrays) if isinstance(program, Family) else program


def output_shapes(program: AnyProgram, arrays: Values) -> Sequence[tuple[Any, ...]]:
    """Return the shapes of a program's outputs for these inputs."""
    if isinstance(program, Family):
        return program.output_shapes(arrays)
    return [spec.shape for spec in program.outputs]


class Seen(str):
    """A symbolic size by torch's name for it, with its value `now`, while torch traces."""

    __slots__ = ("now",)
    now: int


SeenShapes = Sequence[tuple[int | Seen, ...]]


def seen(size: Any) -> int | Seen:
    """Return a size that torch traces: a Seen if it is symbolic and torch knows an example."""
    if isinstance(size, int):
        return size
    node = size.node
    if node.maybe_as_int() is not None or not node.has_hint():
        return int(size)
    # With the example, since sizes were found equal, or fixed, for that one.
    named = Seen(f"{node.expr}={node.hint}")
    named.now = node.hint
    return named


def now(shape: Sequence[int | Seen]) -> Shape:
    """Return a shape with its sizes at present."""
    return tuple(map(_size_now, shape))


def _size_now(size: int | Seen) -> int:
    return size.now if isinstance(size, Seen) else size


def for_all_sizes(example: Program, shapes: SeenShapes) -> Family:
    """Return the programs of a call for all sizes that are symbolic in the shapes of its inputs, or
    for as many as possible.

    Raises:
      SpecError: the worker has formulas for the outputs' shapes for the example's sizes only.
    """
    # Graphs hold the family until the session is closed: so it must not hold the called function.
    session, call = example.session, example.request.call
    labels, timeout_s = example.labels, example.timeout_s

    def ask(named: Named) -> Told | None:
        try:
            inputs = [tuple(map(str, shape)) for shape in named]
            told: Told = session.shapes(call, inputs)
        except BridgeError as error:
            _log.debug(
                "no formulas for the outputs of %r for %s: %s", example, named, error
            )
            return None
        return told

    def make(shapes: Shapes) -> Program:
        sized = pb.Call()
        sized.CopyFrom(call)
        for spec, shape in zip(sized.inputs, shapes, strict=True):
            spec.shape[:] = shape
        member: Program = session.prepare_call(
            sized, labels=labels, timeout_s=timeout_s
        )
        return member

    answer = _most_general(shapes, ask)
    if answer is None:
        raise SpecError(
            f"{example!r} has no formulas for its outputs' shapes for other sizes"
        )
    named, told = answer
    return Family(example, named, _formulas_of(told), told, make)


def _most_general(
    shapes: SeenShapes, ask: Callable[[Named], Told | None]
) -> tuple[Named, Told] | None:
    """Return the most general of these shapes that there are formulas for, in which unknown sizes
    have names.

    First each symbolic size has a name of its own, then sizes that are equal now share a name, then
    only the sizes have one that can be unknown alone.
    """
    every_size = [size for shape in shapes for size in shape]
    symbolic = list(
        dict.fromkeys(size for size in every_size if isinstance(size, Seen))
    )
    different = list(dict.fromkeys(size.now for size in symbolic))

    def attempt(names: Mapping[Any, str]) -> tuple[Named, Told] | None:
        def name(size: int | Seen) -> int | str:
            return names.get(size, _size_now(size))

        named = tuple([tuple(map(name, shape)) for shape in shapes])
        told = ask(named)
        return None if told is None else (named, told)

    def names_of(sizes: Sequence[int]) -> dict[Any, str]:
        return {
            size: f"d{sizes.index(size.now)}" for size in symbolic if size.now in sizes
        }

    answer = attempt({size: f"d{i}" for i, size in enumerate(symbolic)})
    if answer is None and len(different) < len(symbolic):
        answer = attempt(names_of(different))
    if answer is None and len(different) > 1:
        alone = [size for size in different if attempt(names_of([size]))]
        answer = attempt(names_of(alone)) if alone else None
    return answer


def _formulas_of(shapes: Sequence[Values]) -> Formulas:
    """Return the functions for shapes that are written as formulas."""
    return tuple([tuple(map(_formula_of, shape)) for shape in shapes])


def _formula_of(size: Any) -> Formula:
    return formula(str(size), _FUNCTIONS)
