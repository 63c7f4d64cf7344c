"""Table of array element types; every reverse map is derived from the table."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bridge_wire.pb import bridge_pb2 as pb

# DLDataTypeCode of dlpack.h 1.1.
_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _BOOL = 0, 1, 2, 4, 5, 6


# eq=False: there is one object per type, so identity serves as equality and hash.
@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """An element type: NumPy-style name, wire number, DLPack code, size in bytes."""

    name: str
    wire: int
    dlpack_code: int
    itemsize: int

    @property
    def is_inexact(self) -> bool:
        """Whether the type can carry a derivative: a float or a complex number."""
        return self.dlpack_code not in (_INT, _UINT, _BOOL)

    @property
    def is_complex(self) -> bool:
        return self.dlpack_code == _COMPLEX

    @property
    def dlpack_bits(self) -> int:
        return 8 * self.itemsize


_TABLE = (
    DType("bool", pb.DTYPE_BOOL, _BOOL, 1),
    DType("int8", pb.DTYPE_INT8, _INT, 1),
    DType("int16", pb.DTYPE_INT16, _INT, 2),
    DType("int32", pb.DTYPE_INT32, _INT, 4),
    DType("int64", pb.DTYPE_INT64, _INT, 8),
    DType("uint8", pb.DTYPE_UINT8, _UINT, 1),
    DType("uint16", pb.DTYPE_UINT16, _UINT, 2),
    DType("uint32", pb.DTYPE_UINT32, _UINT, 4),
    DType("uint64", pb.DTYPE_UINT64, _UINT, 8),
    DType("float16", pb.DTYPE_FLOAT16, _FLOAT, 2),
    DType("bfloat16", pb.DTYPE_BFLOAT16, _BFLOAT, 2),
    DType("float32", pb.DTYPE_FLOAT32, _FLOAT, 4),
    DType("float64", pb.DTYPE_FLOAT64, _FLOAT, 8),
    DType("complex64", pb.DTYPE_COMPLEX64, _COMPLEX, 8),
    DType("complex128", pb.DTYPE_COMPLEX128, _COMPLEX, 16),
    DType("float8_e4m3fn", pb.DTYPE_FLOAT8_E4M3FN, 10, 1),
    DType("float8_e4m3fnuz", pb.DTYPE_FLOAT8_E4M3FNUZ, 11, 1),
    DType("float8_e5m2", pb.DTYPE_FLOAT8_E5M2, 12, 1),
    DType("float8_e5m2fnuz", pb.DTYPE_FLOAT8_E5M2FNUZ, 13, 1),
    DType("float8_e8m0fnu", pb.DTYPE_FLOAT8_E8M0FNU, 14, 1),
)

BY_NAME: Mapping[str, DType] = MappingProxyType({dtype.name: dtype for dtype in _TABLE})
BY_WIRE: Mapping[int, DType] = MappingProxyType({dtype.wire: dtype for dtype in _TABLE})

# Replacements of 64-bit types in a worker without x64. Floats have no entry: they are never
# narrowed.
NARROWED: Mapping[str, DType] = MappingProxyType(
    {"int64": BY_NAME["int32"], "uint64": BY_NAME["uint32"]}
)
NEEDS_X64 = frozenset({"int64", "uint64", "float64", "complex128"})
# Remedy for a JAX without 64-bit types, for error texts.
TURN_ON_X64 = (
    "start the worker with --x64"
    ' (in one process: jax.config.update("jax_enable_x64", True))'
)

_missing = set(pb.DType.values()) - set(BY_WIRE) - {pb.DTYPE_UNSPECIFIED}
if _missing or len(BY_NAME) != len(_TABLE):
    raise ImportError(
        f"bridge_wire.dtypes and bridge.proto disagree about the types {sorted(_missing)}"
    )
