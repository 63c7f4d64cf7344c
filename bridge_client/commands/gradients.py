"""Gradient check: compares a model's VJP, JVP and finite differences. Imports no framework.

For a random cotangent of one output and a random direction of one input, all three must give the
same number.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bridge_client.commands.numbers import (
    dot,
    drawn,
    epsilon_of,
    norm,
    pack,
    place,
    read,
    size_of,
    unpack,
    zeros,
)
from bridge_client.programs import Program
from bridge_client.session import ModelInfo, Session
from bridge_wire import specs, trees
from bridge_wire.errors import RemoteModelError, SpecError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

_Arrays = list[list[float]]
# Range of random arguments: away from zero, where many functions have kinks and poles.
LOW, HIGH = 0.25, 1.75
_MOST_NUMBERS = 2**24  # per call: as Python floats, they take some gigabytes


@dataclass(frozen=True, slots=True)
class Check:
    """Derivative of one output along a direction of one input, computed in three ways."""

    output: str
    input: str
    vjp: float
    jvp: float | None  # None: the model has no forward mode
    difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether all values are the same number. NaN agrees with nothing."""
        others = [self.vjp] if self.jvp is None else [self.vjp, self.jvp]
        return all(abs(value - self.difference) <= self.tolerance for value in others)


def check_gradients(
    session: Session,
    model: ModelInfo,
    arrays: Sequence[Spec],
    *,
    seed: int = 0,
    low: float = LOW,
    high: float = HIGH,
) -> list[Check]:
    """Return a check for each pair of a float output and a float input (or parameter) of a call.

    The arrays' numbers are random, from `low` to `high`; integers and booleans are zeros and ones.

    Raises:
      SpecError: no input or no output has a derivative, a type has too few digits, or the arrays
        are too large.
      RemoteModelError: the model raised, or has no VJP.
    """
    return list(_Point(session, model, arrays, random.Random(seed), low, high).checks())


class _Point:
    """A model at some arguments, and its derivatives there."""

    def __init__(
        self,
        session: Session,
        model: ModelInfo,
        arrays: Sequence[Spec],
        chance: random.Random,
        low: float,
        high: float,
    ) -> None:
        self._session = session
        self._chance = chance
        self._program = program = _prepared(session, model, arrays)
        if (
            count := sum(map(size_of, (*program.inputs, *program.outputs)))
        ) > _MOST_NUMBERS:
            raise SpecError(
                f"a call of model {model.name!r} takes and returns {count} numbers; the limit is"
                f" {_MOST_NUMBERS}; use smaller arrays"
            )
        self._values = _parameters(session, model) + [
            drawn(spec, chance, low, high) for spec in arrays
        ]
        self._wrt = tuple(
            i for i, spec in enumerate(program.inputs) if spec.dtype.is_inexact
        )
        self._outputs = tuple(
            i for i, spec in enumerate(program.outputs) if spec.dtype.is_inexact
        )
        if not self._wrt or not self._outputs:
            raise SpecError(
                f"model {model.name!r} takes or returns no floats, so it has no derivative"
            )
        chosen = [program.inputs[i] for i in self._wrt] + [
            program.outputs[i] for i in self._outputs
        ]
        self._epsilon = max(epsilon_of(spec) for spec in chosen)
        # Balances rounding and truncation of central differences.
        self._step = self._epsilon ** (1 / 3)
        # Tolerance between the three ways, relative to the derivative.
        self._share = min(10 * self._epsilon**0.5, 0.1)

    def checks(self) -> Iterator[Check]:
        program = self._program
        values = self._run(program, self._values)
        names = trees.leaf_paths(program.result.tree, "result")
        directions = {i: self._direction(i) for i in self._wrt}
        differences = {i: self._difference(i, directions[i]) for i in self._wrt}
        tangents = {i: self._pushed(i, directions[i]) for i in self._wrt}
        for o in self._outputs:
            spec = program.outputs[o]
            # Rounding error of a difference, from the values.
            noise = self._epsilon / self._step * norm(values[o])
            for i in self._wrt:
                difference, pushed = differences[i][o], tangents[i]
                cotangent = self._cotangent(spec, difference)
                yield Check(
                    output=names[o],
                    input=program.labels[i],
                    vjp=dot(
                        program.inputs[i], self._pulled(o, cotangent)[i], directions[i]
                    ),
                    jvp=None if pushed is None else dot(spec, cotangent, pushed[o]),
                    difference=dot(spec, cotangent, difference),
                    tolerance=norm(cotangent)
                    * (self._share * norm(difference) + 4 * noise),
                )

    def _cotangent(self, spec: Spec, difference: Sequence[float]) -> list[float]:
        """Return the sum of a random cotangent and the scaled difference, since their pairing is
        seldom small."""
        chosen = drawn(spec, self._chance, -1, 1)
        scale = norm(chosen) / (norm(difference) or 1.0)
        aligned = [scale * value for value in difference]
        if spec.dtype.is_complex:  # `dot` pairs without conjugation
            aligned[1::2] = [-value for value in aligned[1::2]]
        return unpack(
            spec, pack(spec, [a + b for a, b in zip(chosen, aligned, strict=True)])
        )

    def _direction(self, i: int) -> list[float]:
        """Return a random direction of an input, scaled to the input's numbers."""
        values = self._values[i]
        scale = norm(values) / max(len(values), 1) ** 0.5 or 1.0
        return [
            scale * value
            for value in drawn(self._program.inputs[i], self._chance, -1, 1)
        ]

    def _difference(self, i: int, direction: Sequence[float]) -> _Arrays:
        """Return the central difference of each output along a direction of one input."""
        ends = []
        for step in (self._step, -self._step):
            moved = [
                value + step * d
                for value, d in zip(self._values[i], direction, strict=True)
            ]
            ends.append(
                self._run(
                    self._program, [*self._values[:i], moved, *self._values[i + 1 :]]
                )
            )
        return [
            [
                (above - below) / (2 * self._step)
                for above, below in zip(*output, strict=True)
            ]
            for output in zip(*ends, strict=True)
        ]

    def _pushed(
        self, i: int, direction: Sequence[float]
    ) -> dict[int, list[float]] | None:
        """Return the outputs' tangents along a direction of one input; None without a forward
        mode."""
        inputs = self._program.inputs
        tangents = [list(direction) if j == i else zeros(inputs[j]) for j in self._wrt]
        try:
            made = self._run(
                self._program.jvp(self._wrt, self._outputs), [*self._values, *tangents]
            )
        except RemoteModelError:
            return None
        return dict(zip(self._outputs, made, strict=True))

    def _pulled(self, o: int, cotangent: Sequence[float]) -> dict[int, list[float]]:
        """Return each input's cotangent for one output's cotangent."""
        outputs = self._program.outputs
        cotangents = [
            list(cotangent) if p == o else zeros(outputs[p]) for p in self._outputs
        ]
        made = self._run(
            self._program.vjp(self._wrt, self._outputs), [*self._values, *cotangents]
        )
        return dict(zip(self._wrt, made, strict=True))

    def _run(self, program: Program, values: Sequence[Sequence[float]]) -> _Arrays:
        placed = [
            place(self._session, spec, value)
            for spec, value in zip(program.inputs, values, strict=True)
        ]
        blocks = self._session.run(program, placed)
        return [
            read(spec, block)
            for spec, block in zip(program.outputs, blocks, strict=True)
        ]


def _prepared(session: Session, model: ModelInfo, arrays: Sequence[Spec]) -> Program:
    """Prepare the call of a model with these arrays as positional arguments, and with its
    parameters passed."""
    own = [parameter.spec for parameter in model.parameters]
    call = pb.Call(
        model=model.name,
        arguments=trees.positional(len(arrays)),
        inputs=[specs.encode(spec) for spec in (*own, *arrays)],
        parameters=bool(own),
    )
    paths = [parameter.path for parameter in model.parameters]
    names = [
        *model.arguments,
        *(f"args[{i}]" for i in range(len(model.arguments), len(arrays))),
    ]
    return session.prepare_call(call, labels=paths + names[: len(arrays)])


def _parameters(session: Session, model: ModelInfo) -> _Arrays:
    if not model.parameters:
        return []
    program = session.prepare_parameters(model.name)
    blocks = session.run(program, ())
    return [
        read(spec, block) for spec, block in zip(program.outputs, blocks, strict=True)
    ]
