"""The commands `bridge_client call` and `bench`: calls of a model with JSON, or with zeros."""

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from bridge_client.commands.numbers import place, read, zeros
from bridge_client.programs import Program
from bridge_client.session import Session
from bridge_wire import specs, trees
from bridge_wire.errors import CallerError
from bridge_wire.memory.pool import Block
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

_WARM_S, _MEASURED_S = 0.5, 2.0
_LEAST = 10


def call(
    session: Session,
    model: str | None,
    arguments: Sequence[Any],
    types: Sequence[Spec] | None,
) -> list[dict[str, Any]]:
    """Call a model with numbers or nested lists of them; return its outputs' types and values.

    Without `types`, arrays have the worker's widest float.

    Raises:
      CallerError: an argument is no array of numbers, or is not of its type.
    """
    widest = "float64" if session.x64 else "float32"
    arrays = [specs.of(widest, _shape(each)) for each in arguments]
    if types is not None:
        _compare(types, arrays)
        arrays = list(types)
    program = _prepared(session, model, arrays)
    placed = [
        place(session, spec, _flat(value))
        for spec, value in zip(arrays, arguments, strict=True)
    ]
    blocks = session.run(program, placed)
    return [
        {"spec": str(spec), "value": _value(spec, block)}
        for spec, block in zip(program.outputs, blocks, strict=True)
    ]


def bench(session: Session, model: str | None, types: Sequence[Spec]) -> dict[str, Any]:
    """Call a model on zeros for two seconds; return milliseconds a call, and calls a second."""
    program = _prepared(session, model, types)
    placed = [place(session, spec, zeros(spec)) for spec in types]
    list(_durations(session, program, placed, _WARM_S))
    begun = time.perf_counter()
    durations = list(_durations(session, program, placed, _MEASURED_S))
    elapsed_s = time.perf_counter() - begun
    return {
        "model": session.model(model).name,
        "types": [str(spec) for spec in types],
        "calls": len(durations),
        "calls_per_second": len(durations) / elapsed_s,
        "median_ms": statistics.median(durations) * 1e3,
        "p99_ms": statistics.quantiles(durations, n=100)[98] * 1e3,
    }


def _durations(
    session: Session,
    program: Program,
    placed: Sequence[Block],
    limit_s: float,
) -> Iterator[float]:
    """Yield the seconds of calls until a limit, and of ten calls at least."""
    end = time.perf_counter() + limit_s
    count = 0
    while count < _LEAST or time.perf_counter() < end:
        begun = time.perf_counter()
        session.run(program, placed)
        yield time.perf_counter() - begun
        count += 1


def _prepared(session: Session, model: str | None, arrays: Sequence[Spec]) -> Program:
    """Prepare the call of a model with its own parameters on the worker."""
    message = pb.Call(
        model=session.model(model).name,
        arguments=trees.positional(len(arrays)),
        inputs=[specs.encode(spec) for spec in arrays],
    )
    return session.prepare_call(message)


def _compare(types: Sequence[Spec], arrays: Sequence[Spec]) -> None:
    """Raise CallerError unless the types are those of arrays of these shapes."""
    shapes, seen = ([list(spec.shape) for spec in each] for each in (types, arrays))
    if shapes != seen:
        raise CallerError(
            f"the arguments have the shapes {seen}, and --input gives {shapes}; expected the same"
        )


def _shape(value: Any) -> tuple[int, ...]:
    """Return the shape of a number or of nested lists.

    Raises:
      CallerError: an element is no number, or lists beside each other differ in their lengths.
    """
    if isinstance(value, int | float):
        return ()
    if not isinstance(value, list):
        raise CallerError(
            f"{json.dumps(value)} is no array; expected a number or nested lists of numbers"
        )
    shapes = {_shape(each) for each in value}
    if len(shapes) > 1:
        raise CallerError(
            f"{json.dumps(value)} is no array: its rows have the shapes {sorted(shapes)}"
        )
    return (len(value), *next(iter(shapes), ()))


def _flat(value: Any) -> list[float]:
    if not isinstance(value, list):
        return [value]
    return [number for each in value for number in _flat(each)]


def _value(spec: Spec, block: Block) -> Any:
    """Return an array's numbers as nested lists; complex ones are pairs."""
    numbers: list[Any] = read(spec, block)
    shape = (*spec.shape, 2) if spec.dtype.is_complex else spec.shape
    if not spec.dtype.is_inexact:
        is_bool = spec.dtype.name == "bool"
        numbers = [bool(each) if is_bool else int(each) for each in numbers]
    for length in reversed(shape):
        step = length or 1
        numbers = [numbers[i : i + step] for i in range(0, len(numbers), step)]
    return numbers[0] if numbers else []
