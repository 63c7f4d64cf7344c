"""The memory of arguments: layouts, views, sizes and arrays of other libraries."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bridge_client import Session
from bridge_wire.errors import DTypeError, SpecError
from tests.client.torch_client.conftest import Remote


def base() -> Tensor:
    return torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)


def a_complex() -> Tensor:
    return torch.complex(base(), base() + 0.5)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": base,
    "transposed": lambda: base().transpose(1, 3),
    "permuted": lambda: base().permute(3, 0, 2, 1),
    "sliced": lambda: base()[:, 1:, ::2, 1:4],
    "a row of a matrix": lambda: base()[1, 2],
    "not aligned": lambda: base().flatten()[1:],
    "expanded": lambda: torch.ones(3, 1).expand(2, 3, 4),
    "expanded from a scalar": lambda: torch.tensor(2.5).expand(4, 5),
    "channels last": lambda: base().to(memory_format=torch.channels_last),
    "flipped": lambda: base().flip(0),
    "overlapping windows": lambda: torch.arange(10.0).unfold(0, 4, 1),
    "diagonal": lambda: base()[0, 0].diagonal(),
    "conjugate": lambda: a_complex().conj(),
    "conjugate and transposed": lambda: a_complex()[0, 0].mH,
    "negative": lambda: a_complex().conj().imag,
    "real part": lambda: a_complex().real,
    "0-d": lambda: torch.tensor(2.5),
    "0-d of a larger storage": lambda: base()[1, 2, 3, 4],
    "one element": lambda: torch.ones(1, 1, 1),
    "empty": lambda: torch.ones(0),
    "empty in one dimension": lambda: torch.ones(3, 0, 2),
    "empty slice": lambda: base()[:, 3:],
    "bool": lambda: base() > 20,
    "bool, transposed": lambda: (base()[0, 0] > 7).T,
    "int": lambda: base().int().transpose(0, 2),
    "int64 narrowed, transposed": lambda: base().long().transpose(0, 2),
    "a parameter": lambda: torch.nn.Parameter(base()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_arrives_with_its_values(remote: Remote, layout: str) -> None:
    """A tensor of any strides, offset, conjugate or negative bit arrives with the values that
    torch shows."""
    value = LAYOUTS[layout]().detach()
    made = remote("identity")(value)
    # This worker has no 64-bit integers.
    expected = value.int() if value.dtype is torch.int64 else value
    assert made.is_contiguous() and not made.is_conj() and not made.is_neg()
    torch.testing.assert_close(
        made, expected.resolve_conj().resolve_neg().contiguous(), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "layout", [name for name in LAYOUTS if LAYOUTS[name]().is_floating_point()]
)
def test_a_gradient_fits_its_inputs_layout(remote: Remote, layout: str) -> None:
    """The gradient of an input of any layout has its values where torch's own would be."""
    value = LAYOUTS[layout]().detach().requires_grad_()
    scale = torch.rand(value.shape)
    (gradient,) = torch.autograd.grad((remote("sine")(value) * scale).sum(), value)
    torch.testing.assert_close(gradient, 2 * value.detach().cos() * scale)


def test_layouts_arrive_over_every_lane(any_lane: Remote) -> None:
    """Many layouts in one call, over both lanes."""
    values = {
        name: make().detach()
        for name, make in LAYOUTS.items()
        if make().dtype is not torch.int64
    }
    made = any_lane("identity")(values)
    for name, value in values.items():
        torch.testing.assert_close(
            made[name], value.resolve_conj().resolve_neg(), rtol=0, atol=0
        )


def test_a_thousand_leaves_arrive_in_order(any_lane: Remote) -> None:
    """A structure of very many leaves keeps them apart."""
    values = [torch.full((i % 3,), float(i)) for i in range(1000)]
    made = any_lane("identity")(values)
    assert all(torch.equal(one, other) for one, other in zip(made, values, strict=True))


def test_a_large_tensor_arrives_whole(any_lane: Remote) -> None:
    """A tensor larger than the first slab, and than gRPC's message limit, arrives whole, and so
    does its gradient."""
    value = torch.rand(5_000_003).requires_grad_()
    any_lane("identity")(value)[1:].sum().backward()
    assert value.grad is not None
    assert value.grad[0] == 0 and value.grad[1:].eq(1).all()


def test_the_same_tensor_twice_is_one_value_twice(remote: Remote) -> None:
    """A tensor passed as two arguments gets the sum of both gradients."""
    x = torch.rand(3, requires_grad=True)
    remote("product")(x, x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_an_output_is_passed_on_without_a_copy(
    remote: Remote, session: Session
) -> None:
    """An output lies in the session's memory, so the next call takes it as it is: only outputs
    are written."""
    sine = remote("sine")
    y = sine(torch.rand(1000))
    sine(y)
    before = session.stats()["bytes_copied"]
    sine(y)
    assert session.stats()["bytes_copied"] - before == y.nbytes


@pytest.mark.parametrize(
    "dtype", ["float32", torch.float32, np.float32, np.dtype("float32")]
)
def test_an_array_of_the_session_is_passed_without_a_copy(
    remote: Remote, session: Session, dtype: object
) -> None:
    """session.empty gives memory that the worker sees already; it is leased until the tensor
    dies."""
    x = torch.from_dlpack(session.empty((10, 100), dtype)).fill_(0.5)
    before = session.stats()["bytes_copied"]
    torch.testing.assert_close(remote("sine")(x), 2 * x.sin())
    assert session.stats()["bytes_copied"] - before == x.nbytes
    del x
    assert session.stats()["blocks"] == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        (-1, "float32", SpecError),
        ((2, 1.5), "float32", SpecError),
        (2**61, "float64", SpecError),
        (3, "f", DTypeError),
    ],
)
def test_an_array_that_cannot_be_is_refused(
    session: Session, shape: Any, dtype: str, kind: type[Exception]
) -> None:
    """Before any memory is asked for."""
    with pytest.raises(kind):
        session.empty(shape, dtype)


def test_a_view_of_an_output_is_passed_on(remote: Remote) -> None:
    """Parts and rearrangements of an output are values like any other."""
    sine = remote("sine")
    y = sine(base())
    for view in (y[1], y[0, 0, 0, 1:], y.mT, y.flatten()[16:], y[:, 0]):
        torch.testing.assert_close(sine(view), 2 * view.sin())


# NumPy --------------------------------------------------------------------------------------------

ARRAYS: dict[str, Callable[[], object]] = {
    "array": lambda: np.arange(6, dtype=np.float32).reshape(2, 3),
    "Fortran order": lambda: np.asfortranarray(
        np.arange(6, dtype=np.float32).reshape(2, 3)
    ),
    "reversed": lambda: np.arange(6, dtype=np.float32)[::-1],
    "broadcast": lambda: np.broadcast_to(np.float32(2), (2, 3)),
    "read-only": lambda: np.frombuffer(
        np.arange(3, dtype=np.float32).tobytes(), dtype=np.float32
    ),
    "integers": lambda: np.arange(6, dtype=np.int16),
    "bools": lambda: np.array([True, False]),
    "0-d": lambda: np.array(1.5, np.float32),
    "scalar": lambda: np.float32(1.5),
    "integer scalar": lambda: np.int32(3),
    "bool scalar": lambda: np.bool_(True),
    "empty": lambda: np.zeros((0, 3), np.float32),
    "half": lambda: np.ones(3, np.float16),
    "unsigned": lambda: np.array([2**32 - 1], np.uint32),
    "complex": lambda: np.array([1 + 2j], np.complex64),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ARRAYS)
def test_numpy_arrays_are_arguments(remote: Remote, kind: str) -> None:
    """A NumPy array or scalar is an argument as a tensor is, without a warning."""
    value = np.asarray(ARRAYS[kind]())
    made = remote("identity")(ARRAYS[kind]()).numpy()
    assert (
        made.dtype == value.dtype
        and made.shape == value.shape
        and (made == value).all()
    )
