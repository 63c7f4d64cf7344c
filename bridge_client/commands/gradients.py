"""Gradient check: compares a model's VJP, JVP and finite differences. Imports NumPy only.

For a random cotangent of one output and a random direction of one input, all three must give the
same number.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bridge_client.numpy.memory import Array, dtype_of
from bridge_client.numpy.runs import run
from bridge_client.programs import Program
from bridge_client.session import ModelInfo, Session
from bridge_wire import specs, trees
from bridge_wire.errors import RemoteModelError, SpecError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

_Arrays = list[Array]
_MOST_NUMBERS = 2**24  # per call: in 64 bits, with copies, they take some gigabytes
# The machine epsilon of differentiable types.
_EPSILONS = {
    **{"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23, "float64": 2**-52},
    **{"complex64": 2**-23, "complex128": 2**-52},
}


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
    seed: int,
    low: float,
    high: float,
) -> list[Check]:
    """Return a check for each pair of a float output and a float input (or parameter) of a call.

    The arrays' numbers are random, from `low` to `high`; integers and booleans are zeros and ones.

    Raises:
      SpecError: no input or no output has a derivative, a type has too few digits, or the arrays
        are too large.
      RemoteModelError: the model raised, or has no VJP.
    """
    chance = np.random.default_rng(seed)
    return list(_Point(session, model, arrays, chance, low, high).checks())


def epsilon_of(spec: Spec) -> float:
    """Return the distance from 1 to the next number of an array's type.

    Raises:
      SpecError: the type has no numbers, or too few, between 1 and 2.
    """
    if spec.dtype.name not in _EPSILONS:
        raise SpecError(
            f"{spec} has too few digits for finite differences; use a wider type"
        )
    return _EPSILONS[spec.dtype.name]


class _Point:
    """A model at some arguments, and its derivatives there."""

    def __init__(
        self,
        session: Session,
        model: ModelInfo,
        arrays: Sequence[Spec],
        chance: np.random.Generator,
        low: float,
        high: float,
    ) -> None:
        self._session = session
        self._chance = chance
        self._program = program = _prepared(session, model, arrays)
        arrays_of_call = (*program.inputs, *program.outputs)
        count = sum(math.prod(spec.shape) for spec in arrays_of_call)
        if count > _MOST_NUMBERS:
            raise SpecError(
                f"a call of model {model.name!r} takes and returns {count} numbers; the limit is"
                f" {_MOST_NUMBERS}; use smaller arrays"
            )
        self._values = _parameters(session, model) + [
            _drawn(spec, chance, low, high) for spec in arrays
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
            noise = self._epsilon / self._step * np.linalg.norm(values[o])
            for i in self._wrt:
                difference, pushed = differences[i][o], tangents[i]
                cotangent = self._cotangent(spec, difference)
                pulled = self._pulled(o, cotangent)[i]
                share = self._share * np.linalg.norm(difference) + 4 * noise
                yield Check(
                    output=names[o],
                    input=program.labels[i],
                    vjp=_dot(pulled, directions[i]),
                    jvp=None if pushed is None else _dot(cotangent, pushed[o]),
                    difference=_dot(cotangent, difference),
                    tolerance=float(np.linalg.norm(cotangent) * share),
                )

    def _cotangent(self, spec: Spec, difference: Array) -> Array:
        """Return the sum of a random cotangent and the scaled difference, since their pairing is
        seldom small."""
        chosen = _drawn(spec, self._chance, -1, 1)
        scale = np.linalg.norm(chosen) / (np.linalg.norm(difference) or 1.0)
        # Conjugate, since `_dot` pairs without conjugation.
        return _wide(_rounded(spec, chosen + scale * difference.conj()))

    def _direction(self, i: int) -> Array:
        """Return a random direction of an input, scaled to the input's numbers."""
        values = self._values[i]
        scale = np.linalg.norm(values) / max(values.size, 1) ** 0.5 or 1.0
        drawn = _drawn(self._program.inputs[i], self._chance, -1, 1)
        return np.asarray(scale * drawn)

    def _difference(self, i: int, direction: Array) -> _Arrays:
        """Return the central difference of each output along a direction of one input."""
        ends = []
        for step in (self._step, -self._step):
            values = list(self._values)
            values[i] = values[i] + step * direction
            ends.append(self._run(self._program, values))
        return [
            (above - below) / (2 * self._step)
            for above, below in zip(*ends, strict=True)
        ]

    def _pushed(self, i: int, direction: Array) -> Mapping[int, Array] | None:
        """Return the outputs' tangents along a direction of one input; None without a forward
        mode."""
        tangents = [
            direction if j == i else np.zeros_like(self._values[j]) for j in self._wrt
        ]
        try:
            jvp = self._program.jvp(self._wrt, self._outputs)
            pushed = self._run(jvp, [*self._values, *tangents])
        except RemoteModelError:
            return None
        return dict(zip(self._outputs, pushed, strict=True))

    def _pulled(self, o: int, cotangent: Array) -> Mapping[int, Array]:
        """Return each input's cotangent for one output's cotangent."""
        outputs = self._program.outputs
        cotangents = [
            cotangent if p == o else np.zeros(outputs[p].shape) for p in self._outputs
        ]
        vjp = self._program.vjp(self._wrt, self._outputs)
        pulled = self._run(vjp, [*self._values, *cotangents])
        return dict(zip(self._wrt, pulled, strict=True))

    def _run(self, program: Program, values: Sequence[Array]) -> _Arrays:
        rounded = map(_rounded, program.inputs, values)
        return list(map(_wide, run(program, list(rounded))))


def _drawn(spec: Spec, chance: np.random.Generator, low: float, high: float) -> Array:
    """Return random numbers from `low` to `high`; for integers and booleans, zeros and ones."""
    if not spec.dtype.is_inexact:
        return chance.integers(0, 2, spec.shape)
    numbers = np.asarray(chance.uniform(low, high, spec.shape))
    if not spec.dtype.is_complex:
        return numbers
    return numbers + 1j * chance.uniform(low, high, spec.shape)


def _rounded(spec: Spec, values: Array) -> Array:
    """Return numbers as an array of a type.

    Raises:
      SpecError: a number is too large for the type.
    """
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype_of(spec.dtype))
    if spec.dtype.is_inexact and not np.isfinite(rounded[np.isfinite(values)]).all():
        raise SpecError(
            f"a number does not fit in {spec}; use a wider type or smaller numbers"
        )
    return rounded


def _wide(array: Array) -> Array:
    """Return an array's numbers in 64 bits."""
    return array.astype("complex128" if array.dtype.kind == "c" else "float64")


def _dot(left: Array, right: Array) -> float:
    """Return the pairing of a cotangent with a tangent, as in JAX: the real part of the sum of
    products."""
    return float(np.sum(left * right).real)


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
    return list(map(_wide, run(session.prepare_parameters(model.name), ())))
