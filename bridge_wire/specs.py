"""Specs: the dtype and shape of one array, validated once where a spec enters the process."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from bridge_wire.commands import did_you_mean, near_matches
from bridge_wire.dtypes import BY_NAME, BY_WIRE, DType
from bridge_wire.errors import CallerError, DTypeError, ProtocolError, SpecError
from bridge_wire.pb import bridge_pb2 as pb

_MAX_NBYTES = 2**63 - 1
_MAX_RANK = 64
_NUMBERS = ("int64", "float64", "complex128")
_KINDS = {
    "f": "float",
    "i": "int",
    "u": "uint",
    "s": "int",
    "c": "complex",
    "bf": "bfloat",
}
_ARRAY = re.compile(r"\s*(\w+)\[([\d,\s]*)\]\s*(?:,|$)")


class Spec(NamedTuple):
    """Dtype and shape of a dense row-major array. A NamedTuple, for fast hashes on the hot path.

    `weak` marks a Python number: a 0-d value whose dtype yields to the other operands' dtypes.
    """

    dtype: DType
    shape: tuple[int, ...]
    weak: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}[{','.join(map(str, self.shape))}]"


def of(dtype: object, shape: int | Sequence[int]) -> Spec:
    """Return the spec of an array; `dtype` is a name or a framework's dtype.

    Raises:
      DTypeError, SpecError: the dtype or the shape is invalid.
    """
    name = (
        getattr(dtype, "name", None)
        or getattr(dtype, "__name__", None)
        or str(dtype).rpartition(".")[2]
    )
    known = BY_NAME.get(name)
    if known is None:
        raise DTypeError(
            f"unknown dtype {dtype!r}; expected one of {', '.join(BY_NAME)}"
        )
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if len(sizes) > _MAX_RANK or not all(
        isinstance(size, int) and size >= 0 for size in sizes
    ):
        raise SpecError(
            f"{shape!r} is no shape; expected at most {_MAX_RANK} non-negative sizes"
        )
    if math.prod(size or 1 for size in sizes) * known.itemsize > _MAX_NBYTES:
        raise SpecError(
            f"an array of shape {shape!r} and dtype {name} does not fit in memory"
        )
    return Spec(known, sizes)


def encode(spec: Spec) -> pb.Spec:
    """Return the spec as a message."""
    return pb.Spec(dtype=spec.dtype.wire, shape=spec.shape, weak=spec.weak)  # type: ignore[arg-type]


def decode(message: pb.Spec) -> Spec:
    """Return the spec of a message.

    Raises:
      ProtocolError: the dtype is unknown, a size is negative, or the size in bytes exceeds 63 bits.
    """
    dtype = BY_WIRE.get(message.dtype)
    if dtype is None:
        raise ProtocolError(
            f"a spec has the unknown dtype number {message.dtype}; install one version of"
            " torch-jax-bridge on both sides"
        )
    shape = tuple(message.shape)
    if len(shape) > _MAX_RANK:
        raise ProtocolError(
            f"a spec has {len(shape)} dimensions; at most {_MAX_RANK} are allowed"
        )
    if any(size < 0 for size in shape):
        raise ProtocolError(f"a spec has the negative shape {shape}")
    # `size or 1`: a zero would hide an overflow of the other sizes, which frameworks reject.
    if math.prod(size or 1 for size in shape) * dtype.itemsize > _MAX_NBYTES:
        raise ProtocolError(
            f"a spec of shape {shape} and dtype {dtype.name} does not fit in memory"
        )
    if message.weak and (shape or dtype.name not in _NUMBERS):
        raise ProtocolError(
            f"a Python number has the spec {dtype.name}{list(shape)}; expected one of"
            f" {_NUMBERS} without dimensions"
        )
    return Spec(dtype, shape, message.weak)


def decode_all(messages: Sequence[pb.Spec]) -> tuple[Spec, ...]:
    """Return the specs of the messages."""
    return tuple(decode(message) for message in messages)


def _hint(name: str) -> str:
    """Return the proposal of a dtype for the short name that JAX prints, such as f32."""
    kind = name.rstrip("0123456789")
    long = f"{_KINDS.get(kind, kind)}{name[len(kind) :]}"
    near = [long] if long in BY_NAME else near_matches(name, BY_NAME)
    return did_you_mean(near[:1])


def parse(text: str) -> tuple[Spec, ...]:
    """Return the specs of a text such as "float32[8,64],int32[8]".

    Raises:
      CallerError: the text has another form.
    """
    parsed: list[Spec] = []
    position = 0
    while position < len(text):
        match = _ARRAY.match(text, position)
        if match is None or match[1] not in BY_NAME:
            raise CallerError(
                f"{text!r} is no list of specs; write it like float32[8,64],int32[8]"
                f"{_hint(match[1] if match else '')}"
            )
        sizes = [size for size in match[2].replace(" ", "").split(",") if size]
        if any(int(size) >= 1 << 63 for size in sizes):
            raise CallerError(
                f"{text!r} has a size beyond the address space; expected less than 2**63"
            )
        parsed.append(Spec(BY_NAME[match[1]], tuple(map(int, sizes))))
        position = match.end()
    return tuple(parsed)
