"""Programs for all sizes of a call's inputs: what torch.compile traces with symbolic sizes names
such a family."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from bridge_client.programs import Program
from bridge_client.sizes import Formula, formula
from bridge_wire.errors import BridgeError, CallerError, InternalError, SpecError
from bridge_wire.pb import bridge_pb2 as pb

_log = logging.getLogger(__name__)

_FUNCTIONS = {"max": torch.sym_max, "min": torch.sym_min}
Shape = tuple[int, ...]
Formulas = tuple[tuple[Formula, ...], ...]
Named = tuple[tuple[Any, ...], ...]  # shapes of sizes, or of the names of unknown ones


@dataclass(slots=True, eq=False, repr=False)
class Family(Program):
    """A program for some sizes, which stands for those of all sizes: types and structures are the
    same.

    The graph of compiled code names the family; each run takes the member for the sizes that its
    inputs have.
    """

    named: Named = ()  # the inputs' shapes
    formulas: Formulas = ()  # of the sizes of each output
    told: Sequence[Sequence[str]] = ()  # the formulas of the call's outputs, as they came
    make: Callable[[tuple[Shape, ...]], Program] | None = None
    _members: dict[tuple[Shape, ...], Program] = field(default_factory=dict)

    def at(self, arrays: Sequence[Tensor]) -> Program:
        """Return the member for these inputs; where torch traces with symbolic sizes, the family
        itself."""
        if any(isinstance(size, torch.SymInt) for array in arrays for size in array.shape):
            return self
        member = self._member(tuple([tuple(array.shape) for array in arrays[: len(self.inputs)]]))
        seen = [spec.shape for spec in member.outputs]
        if seen != (told := self.output_shapes(arrays)):
            raise InternalError(
                f"{member!r} has outputs of shapes {seen}, where {told} were foretold; compile it"
                " with dynamic=False"
            )
        return member

    def output_shapes(self, arrays: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return the shapes of the outputs for these inputs, whose sizes may be symbolic."""
        sizes: dict[str, Any] = {}
        for names, array in zip(self.named, arrays, strict=False):
            for name, size in zip(names, array.shape, strict=True):
                # Where the sizes are symbolic, to compare them has torch.compile guard that they
                # stay equal.
                if size != (name if isinstance(name, int) else sizes.setdefault(name, size)):
                    raise InternalError(f"{self!r} is run on sizes that it was not compiled for")
        return [tuple([size(sizes) for size in output]) for output in self.formulas]

    def described(self) -> bytes:
        return Program.described(self) + repr((self.named, self.told)).encode()

    def keeping(self, wrt: tuple[int, ...]) -> Program:
        return self._family(
            ("keep", wrt), lambda program: Program.keeping(program, wrt), self.formulas
        )

    def vjp(self, wrt: tuple[int, ...], outputs: tuple[int, ...]) -> Program:
        shapes = tuple([tuple(map(_size_of, self.named[i])) for i in wrt])
        return self._family(
            ("vjp", wrt, outputs), lambda program: Program.vjp(program, wrt, outputs), shapes
        )

    def jvp(self, wrt: tuple[int, ...], outputs: tuple[int, ...]) -> Program:
        shapes = tuple([self.formulas[i] for i in outputs])
        return self._family(
            ("jvp", wrt, outputs), lambda program: Program.jvp(program, wrt, outputs), shapes
        )

    def vmap(self, axes: tuple[int, ...], size: int) -> Program:
        raise CallerError(
            "a call that was traced for all sizes has no batched version; compile with"
            " dynamic=False"
        )

    def _family(
        self, key: Hashable, derive: Callable[[Program], Program], formulas: Formulas
    ) -> Program:
        known = self._derived.get((key, "of all sizes"))
        if known is None:
            count = len(self.inputs)
            make = lambda shapes: derive(self._member(shapes[:count]))  # noqa: E731
            known = self._derived[key, "of all sizes"] = _family_of(
                derive(self), self.named, formulas, self.told, make
            )
        return known

    def _member(self, shapes: tuple[Shape, ...]) -> Program:
        known = self._members.get(shapes)
        if known is None:
            assert self.make is not None
            known = self._members.setdefault(shapes, self.make(shapes))
        return known


def _family_of(
    example: Program,
    named: Named,
    formulas: Formulas,
    told: Sequence[Sequence[str]],
    make: Callable[[tuple[Shape, ...]], Program],
) -> Family:
    """Return the family of which a program is an example; `make` makes those for other shapes of
    the inputs."""
    own = ("key", "number", "_derived")
    given = {
        each.name: getattr(example, each.name)
        for each in fields(Program)
        if each.init and each.name not in own
    }
    return Family(**given, named=named, formulas=formulas, told=told, make=make)


class Seen(str):
    """A symbolic size, as torch names it, and the one it has `now`, while torch traces."""

    __slots__ = ("now",)
    now: int


def seen(size: Any) -> int | Seen:
    """Return a size that torch traces: symbolic ones as such, where torch knows an example."""
    if isinstance(size, int) or size.node.maybe_as_int() is not None or not size.node.has_hint():
        return int(size)
    # With the example: what was taken for equal, or for fixed, was so of that one.
    named = Seen(f"{size.node.expr}={size.node.hint}")
    named.now = size.node.hint
    return named


def for_all_sizes(example: Program, shapes: Sequence[tuple[int | Seen, ...]]) -> Family:
    """Return the programs of a call for all sizes that are symbolic in the shapes of its inputs, or
    as many as can be.

    Raises:
      SpecError: the worker cannot tell the shapes of the outputs for any but the sizes of the
        example.
    """
    # Graphs hold the family until the session is closed: so it must not hold the function that was
    # called.
    session, call = example.session, example.request.call

    def ask(named: Named) -> Sequence[Sequence[str]] | None:
        try:
            return session.shapes(call, [tuple(map(str, shape)) for shape in named])
        except BridgeError as error:
            _log.debug("the shapes of %r cannot be told for %s: %s", example, named, error)
            return None

    found = _most_general(shapes, ask)
    if found is None:
        raise SpecError(f"the shapes of {example!r} cannot be told for other sizes than these")

    def make(shapes: tuple[Shape, ...]) -> Program:
        sized = pb.Call()
        sized.CopyFrom(call)
        for spec, shape in zip(sized.inputs, shapes, strict=True):
            spec.shape[:] = shape
        return session.prepare_call(sized, labels=example.labels, timeout_s=example.timeout_s)

    named, told = found
    return _family_of(
        example, named, tuple([tuple(map(_size_of, sizes)) for sizes in told]), told, make
    )


def _most_general(
    shapes: Sequence[tuple[int | Seen, ...]], ask: Callable[[Named], Sequence[Sequence[str]] | None]
) -> tuple[Named, Sequence[Sequence[str]]] | None:
    """Return the most general of these shapes that there are formulas for, in which unknown sizes
    have names.

    First each symbolic size is one of its own, then those are one that are equal now, then only
    those stay unknown that can alone.
    """
    symbolic = list(
        dict.fromkeys(size for shape in shapes for size in shape if isinstance(size, Seen))
    )
    different = list(dict.fromkeys(size.now for size in symbolic))

    def attempt(names: Mapping[Any, str]) -> tuple[Named, Sequence[Sequence[str]]] | None:
        named = tuple(
            [
                tuple([names.get(size, getattr(size, "now", size)) for size in shape])
                for shape in shapes
            ]
        )
        told = ask(named)
        return None if told is None else (named, told)

    def names_of(sizes: Sequence[int]) -> dict[Any, str]:
        return {size: f"d{sizes.index(size.now)}" for size in symbolic if size.now in sizes}

    found = attempt({size: f"d{i}" for i, size in enumerate(symbolic)})
    if found is None and len(different) < len(symbolic):
        found = attempt(names_of(different))
    if found is None and len(different) > 1:
        alone = [size for size in different if attempt(names_of([size]))]
        found = attempt(names_of(alone)) if alone else None
    return found


def _size_of(size: Any) -> Formula:
    return formula(str(size), _FUNCTIONS)
