"""Arrays as lists of Python floats, for commands that import no framework.

A complex array is the list of its alternating real and imaginary parts.
"""

import math
import random
import struct
from collections.abc import Sequence

from bridge_client.session import Session
from bridge_wire.errors import SpecError
from bridge_wire.memory.pool import Block
from bridge_wire.specs import Spec

# struct's letters, and the machine epsilon of differentiable types. bfloat16 is the upper half of a
# float32.
_LETTERS = {
    **{"bool": "?", "int8": "b", "int16": "h", "int32": "i", "int64": "q"},
    **{"uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q"},
    **{
        "float16": "e",
        "bfloat16": "f",
        "float32": "f",
        "float64": "d",
        "complex64": "f",
        "complex128": "d",
    },
}
_EPSILONS = {
    **{"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23, "float64": 2**-52},
    **{"complex64": 2**-23, "complex128": 2**-52},
}


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


def size_of(spec: Spec) -> int:
    """Return the number of floats in an array."""
    size = 1
    for length in spec.shape:
        size *= length
    return 2 * size if spec.dtype.is_complex else size


def pack(spec: Spec, values: Sequence[float]) -> bytes:
    """Return the bytes of an array, rounded to its type.

    Raises:
      SpecError: a number is too large for the type, or Python's struct lacks the type.
    """
    letter = _LETTERS.get(spec.dtype.name)
    if letter is None:
        raise SpecError(
            f"{spec} has no Python equivalent; use a float type of 16 bits or more, or an integer"
        )
    try:
        if letter in "?bhiqBHIQ":
            values = [_as_integer(value, spec) for value in values]
        packed = struct.pack(f"<{len(values)}{letter}", *values)
    except (OverflowError, struct.error):
        raise SpecError(
            f"a number does not fit in {spec}; use a wider type or smaller numbers"
        ) from None
    return _to_bfloat16(packed) if spec.dtype.name == "bfloat16" else packed


def unpack(spec: Spec, packed: bytes) -> list[float]:
    """Return the numbers of an array from its bytes."""
    if spec.dtype.name == "bfloat16":
        packed = b"".join(b"\0\0" + packed[i : i + 2] for i in range(0, len(packed), 2))
    return list(struct.unpack(f"<{size_of(spec)}{_LETTERS[spec.dtype.name]}", packed))


def _as_integer(value: float, spec: Spec) -> int:
    if not math.isfinite(value) or value != int(value):
        raise SpecError(f"{value} is no integer, as {spec} has; use a float type")
    return int(value)


def _to_bfloat16(packed: bytes) -> bytes:
    """Return the upper halves of float32s, rounded to nearest, ties to even."""
    rounded = bytearray()
    for (word,) in struct.iter_unpack("<I", packed):
        rounded += struct.pack("<H", (word + 0x7FFF + (word >> 16 & 1)) >> 16 & 0xFFFF)
    return bytes(rounded)


def place(session: Session, spec: Spec, values: Sequence[float]) -> Block:
    """Return a block of the session with an array's bytes."""
    packed = pack(spec, values)
    block = session.pool.lease(len(packed))
    block.buffer[:] = packed
    return block


def read(spec: Spec, block: Block) -> list[float]:
    """Return the numbers of the array in a block."""
    return unpack(spec, bytes(block.buffer))


def drawn(spec: Spec, chance: random.Random, low: float, high: float) -> list[float]:
    """Return random numbers from `low` to `high`; for integers and booleans, zeros and ones."""
    if spec.dtype.is_inexact:
        return [chance.uniform(low, high) for _ in range(size_of(spec))]
    return [float(chance.randrange(2)) for _ in range(size_of(spec))]


def zeros(spec: Spec) -> list[float]:
    """Return an array of zeros."""
    return [0.0] * size_of(spec)


def dot(spec: Spec, left: Sequence[float], right: Sequence[float]) -> float:
    """Return the pairing of a cotangent with a tangent, as in JAX: the real part of the sum of
    products."""
    products = [a * b for a, b in zip(left, right, strict=True)]
    return (
        sum(products[::2]) - sum(products[1::2])
        if spec.dtype.is_complex
        else sum(products)
    )


def norm(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values))
