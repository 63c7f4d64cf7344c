"""Specs survive the wire unchanged, and those that no array can have are refused."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_wire import specs
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import ProtocolError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

MAX_NBYTES = 2**63 - 1
WEAK = ("int64", "float64", "complex128")

shapes = st.lists(st.integers(0, 2**40), max_size=6).map(tuple)
strong = st.builds(
    Spec, st.sampled_from(list(BY_NAME.values())), shapes, st.just(False)
)
weak = st.builds(
    Spec, st.sampled_from([BY_NAME[name] for name in WEAK]), st.just(()), st.just(True)
)


def fits(spec: Spec) -> bool:
    return (
        math.prod(size or 1 for size in spec.shape) * spec.dtype.itemsize <= MAX_NBYTES
    )


def message(
    dtype: int = pb.DTYPE_FLOAT32, shape: tuple[int, ...] = (), *, weak: bool = False
) -> pb.Spec:
    return pb.Spec(dtype=dtype, shape=shape, weak=weak)


@settings(deadline=None)
@given(strong.filter(fits) | weak)
def test_spec_survives_the_wire(spec: Spec) -> None:
    """A spec that is encoded, serialized, parsed and decoded equals the one sent."""
    assert (
        specs.decode(pb.Spec.FromString(specs.encode(spec).SerializeToString())) == spec
    )


@settings(deadline=None)
@given(
    st.integers(-(2**31), 2**31 - 1),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=70),
    st.booleans(),
)
def test_decoded_spec_always_fits_in_63_bits(
    dtype: int, shape: list[int], weak: bool
) -> None:
    """Whatever numbers come, a spec is refused as ProtocolError or has at most 2**63 - 1 bytes
    in 64 dimensions."""
    try:
        spec = specs.decode(message(dtype, tuple(shape), weak=weak))
    except ProtocolError:
        return
    assert 0 <= spec.nbytes <= MAX_NBYTES
    assert all(size >= 0 for size in spec.shape) and len(spec.shape) <= 64


@pytest.mark.parametrize("number", [0, 21, 99, -1, 2**31 - 1])
def test_unknown_dtype_is_refused(number: int) -> None:
    """A dtype number outside the table is a ProtocolError that names the number."""
    with pytest.raises(ProtocolError, match=str(number)):
        specs.decode(message(number))


@pytest.mark.parametrize("shape", [(-1,), (3, -2), (-(2**63),), (0, -1)])
def test_negative_size_is_refused(shape: tuple[int, ...]) -> None:
    """A negative size is a ProtocolError, beside a size of zero too."""
    with pytest.raises(ProtocolError, match="negative"):
        specs.decode(message(shape=shape))


def test_rank_is_limited_to_64() -> None:
    """64 dimensions are accepted and 65 are not."""
    assert specs.decode(message(shape=(1,) * 64)).shape == (1,) * 64
    with pytest.raises(ProtocolError, match="65 dimensions"):
        specs.decode(message(shape=(1,) * 65))


@pytest.mark.parametrize(
    "shape", [(2**62, 2), (2**32, 2**31), (2**63 - 1, 2**63 - 1), (2**63 - 1, 2)]
)
def test_overflowing_array_is_refused(shape: tuple[int, ...]) -> None:
    """An int8 array of 2**63 bytes or more is a ProtocolError; the product of its sizes does not
    wrap."""
    with pytest.raises(ProtocolError, match="does not fit"):
        specs.decode(message(pb.DTYPE_INT8, shape))


def test_largest_array_is_accepted() -> None:
    """An int8 array of 2**63 - 1 bytes still is a spec; a float64 array of as many elements is
    not."""
    assert specs.decode(message(pb.DTYPE_INT8, (MAX_NBYTES,))).nbytes == MAX_NBYTES
    with pytest.raises(ProtocolError, match="does not fit"):
        specs.decode(message(pb.DTYPE_FLOAT64, (MAX_NBYTES,)))


def test_zero_does_not_hide_an_overflow() -> None:
    """Sizes that overflow are refused although a size of zero makes the array empty."""
    with pytest.raises(ProtocolError, match="does not fit"):
        specs.decode(message(shape=(0, 2**62, 2**62)))


def test_weak_array_is_refused() -> None:
    """A Python number has no dimensions: a weak spec with a shape is a ProtocolError."""
    with pytest.raises(ProtocolError, match="Python number"):
        specs.decode(message(pb.DTYPE_FLOAT64, (1,), weak=True))


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - set(WEAK)))
def test_weak_spec_of_no_python_number_is_refused(name: str) -> None:
    """A Python number is an int64, a float64 or a complex128: a weak spec of another dtype is a
    ProtocolError."""
    with pytest.raises(ProtocolError):
        specs.decode(message(BY_NAME[name].wire, weak=True))


def test_scalar_and_empty_arrays_have_their_sizes() -> None:
    """A 0-d array has one element's bytes, and an array with a size of zero has none."""
    assert Spec(BY_NAME["complex128"], ()).nbytes == 16
    assert Spec(BY_NAME["float32"], (3, 0, 5)).nbytes == 0
    assert str(Spec(BY_NAME["float32"], (3, 0, 5))) == "float32[3,0,5]"


def test_several_specs_decode_in_order() -> None:
    """`decode_all` keeps the order, and one bad spec among good ones is refused."""
    good = [message(pb.DTYPE_INT8, (i,)) for i in range(3)]
    assert [spec.shape for spec in specs.decode_all(good)] == [(0,), (1,), (2,)]
    with pytest.raises(ProtocolError):
        specs.decode_all([*good, message(0)])
