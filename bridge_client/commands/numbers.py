"""Arrays as lists of Python floats, for commands that import no framework.

A complex array is the list of its alternating real and imaginary parts.
"""

import math
import struct
from collections.abc import Sequence

from bridge_client.session import Session
from bridge_wire.errors import SpecError
from bridge_wire.memory.pool import Block
from bridge_wire.specs import Spec

# struct's letters. bfloat16 is the upper half of a float32.
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


def zeros(spec: Spec) -> list[float]:
    """Return an array of zeros."""
    return [0.0] * size_of(spec)
