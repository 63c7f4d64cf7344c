"""Static values as messages: None, bools, numbers and texts.

A static value is part of a call's signature, not data.
"""

from typing import Any

from bridge_wire.errors import ProtocolError, StructureError
from bridge_wire.pb import bridge_pb2 as pb

_SUBCLASSED: tuple[Any, ...] = (str, int, float, complex)


def encode_value(value: Any) -> pb.Value | None:
    if value is None:
        return pb.Value(none=True)
    # Exact types: a subclass (an enum, a NumPy scalar) would come back as something else.
    kind = type(value)
    if kind is bool:
        return pb.Value(boolean=value)
    if kind is str:
        try:
            return pb.Value(text=value)
        except UnicodeEncodeError:
            raise StructureError(
                f"the text {value[:80]!r} has lone surrogates, which UTF-8 cannot carry"
            ) from None
    if kind is float:
        return pb.Value(real=value)
    if kind is complex:
        return pb.Value(complex=pb.Value.Complex(real=value.real, imag=value.imag))
    if kind is int:
        if not -(2**63) <= value < 2**63:
            raise StructureError(
                f"the static integer {value} does not fit in 64 bits; pass it as a string"
            )
        return pb.Value(integer=value)
    return None


def encode_key(key: Any) -> pb.Value | None:
    """Return a dict's key: a static value, or a tuple of these."""
    key = plain(key)
    if type(key) is not tuple:
        return encode_value(key)
    items = [encode_value(plain(item)) for item in key]
    known = [item for item in items if item is not None]
    if len(known) < len(items):
        return None
    return pb.Value(tuple=pb.Value.Tuple(items=known))


def plain(value: Any) -> Any:
    """Return a number or text of a subclass, such as np.float64 or StrEnum, as Python's own."""
    if type(value) is bool:
        return value
    for kind in _SUBCLASSED:
        if isinstance(value, kind) and type(value) is not kind:
            return str.__str__(value) if kind is str else kind(value)
    return value


def decode_value(value: pb.Value) -> Any:
    """Return the static value that a message carries."""
    kind = value.WhichOneof("kind")
    if kind is None:
        raise ProtocolError("a static value has no kind")
    if kind == "none":
        return None
    if kind == "tuple":
        return tuple(map(decode_value, value.tuple.items))
    if kind == "complex":
        return complex(value.complex.real, value.complex.imag)
    return getattr(value, kind)
