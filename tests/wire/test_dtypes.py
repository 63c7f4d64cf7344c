"""The table of element types is complete, and agrees with the contract, NumPy and itself."""

import importlib.util
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from bridge_wire import dtypes
from bridge_wire.pb import bridge_pb2 as pb

EVERY = list(dtypes.BY_NAME.values())
FLOATS = {"float16", "bfloat16", "float32", "float64"} | {
    name for name in dtypes.BY_NAME if name.startswith("float8")
}
COMPLEX = {"complex64", "complex128"}


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def test_every_wire_number_has_a_dtype() -> None:
    """Each dtype of the contract but UNSPECIFIED is in the table, under the contract's name in
    lower case."""
    named = {
        name.removeprefix("DTYPE_").lower(): number for name, number in pb.DType.items()
    }
    del named["unspecified"]
    assert {dtype.name: dtype.wire for dtype in EVERY} == named


def test_reverse_maps_are_derived_from_one_table() -> None:
    """A dtype found by its number is the very one found by its name."""
    assert all(dtypes.BY_WIRE[dtype.wire] is dtype for dtype in EVERY)
    assert len(dtypes.BY_WIRE) == len(dtypes.BY_NAME)


def test_dlpack_types_are_unambiguous() -> None:
    """No two dtypes have the same DLPack code and width."""
    assert len({(dtype.dlpack_code, dtype.dlpack_bits) for dtype in EVERY}) == len(
        EVERY
    )


@pytest.mark.parametrize("dtype", EVERY, ids=lambda dtype: dtype.name)
def test_item_size_is_numpy_s(dtype: dtypes.DType) -> None:
    """A dtype's size in bytes is that of NumPy's, or ml_dtypes', type of the same name."""
    assert dtype.itemsize == numpy_dtype(dtype.name).itemsize
    assert dtype.dlpack_bits == 8 * dtype.itemsize


@pytest.mark.parametrize("dtype", EVERY, ids=lambda dtype: dtype.name)
def test_floats_and_complex_numbers_are_inexact(dtype: dtypes.DType) -> None:
    """Exactly the floats and the complex numbers can carry a derivative."""
    assert dtype.is_inexact == (dtype.name in FLOATS | COMPLEX)
    assert dtype.is_complex == (dtype.name in COMPLEX)


def test_types_that_need_x64_are_those_of_64_bit_parts() -> None:
    """The dtypes that a worker without x64 lacks are the 64-bit ones, and complex128 of two
    64-bit floats."""
    wide = {
        dtype.name
        for dtype in EVERY
        if dtype.itemsize == (16 if dtype.is_complex else 8)
    }
    assert wide == dtypes.NEEDS_X64


def test_only_integers_are_narrowed_and_each_to_half_its_size() -> None:
    """A 64-bit integer may become the 32-bit one of its kind; floats are never narrowed."""
    assert set(dtypes.NARROWED) == {"int64", "uint64"}
    for name, narrow in dtypes.NARROWED.items():
        wide = dtypes.BY_NAME[name]
        assert (wide.dlpack_code, wide.itemsize) == (
            narrow.dlpack_code,
            2 * narrow.itemsize,
        )


def test_table_that_lacks_a_type_of_the_contract_fails_at_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dtype that the contract gains and the table does not makes the import fail."""
    monkeypatch.setattr(
        pb, "DType", SimpleNamespace(values=lambda: [*dtypes.BY_WIRE, 0, 99])
    )
    spec = importlib.util.spec_from_file_location("incomplete_dtypes", dtypes.__file__)
    assert spec and spec.loader
    with pytest.raises(ImportError, match="99"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
