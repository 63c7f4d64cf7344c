"""Every dtype of the wire's table, there and back over both lanes, and the dtypes of results and
gradients."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bridge_client import Session, connect
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.dtypes import BY_NAME
from tests.client.torch_client.conftest import Remote

FLOATS = [name for name, dtype in BY_NAME.items() if dtype.is_inexact]
NARROW = {"int64": torch.int32, "uint64": torch.uint32}


@pytest.fixture
def x64_on(x64_worker: Session, lane: str) -> Iterator[Remote]:
    """Makes functions of a session with x64 on each of the lanes in turn."""
    with connect(x64_worker.address, lane=lane) as session:
        yield lambda name: RemoteJaxFunction(session, name=name)


def patterns(name: str) -> Tensor:
    """Return many bit patterns of a type: all of the one-byte types', and random ones of the
    others'."""
    dtype = getattr(torch, name)
    if dtype is torch.bool:
        return torch.tensor([True, False, True])
    if dtype.itemsize == 1:
        return torch.arange(256).to(torch.uint8).view(dtype)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        256, (64 * dtype.itemsize,), dtype=torch.uint8, generator=generator
    ).view(dtype)


def bits(tensor: Tensor) -> list[int]:
    return tensor.flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize("name", BY_NAME)
def test_every_dtype_comes_back_bit_by_bit(x64_on: Remote, name: str) -> None:
    """The identity returns each dtype with every bit as it was: NaNs, infinities, subnormal and
    extreme numbers."""
    for value in (patterns(name), patterns(name)[:0], patterns(name)[1]):
        made = x64_on("identity")(value)
        assert (made.dtype, made.shape) == (value.dtype, value.shape)
        assert bits(made) == bits(value)


def test_all_dtypes_travel_in_one_call(any_lane: Remote) -> None:
    """Tensors of all dtypes that a worker without x64 has come back together."""
    sent = {
        name: patterns(name)
        for name in BY_NAME
        if name not in ("int64", "uint64", "float64", "complex128")
    }
    made = any_lane("identity")(sent)
    for name, value in sent.items():
        assert made[name].dtype is value.dtype and bits(made[name]) == bits(value)


@pytest.mark.parametrize("name", NARROW)
def test_a_narrowed_integer_keeps_its_value(any_lane: Remote, name: str) -> None:
    """Without x64 an int64 or uint64 in range arrives as the 32-bit type, and that comes back."""
    value = torch.tensor([0, 7, 2**31 - 1]).to(getattr(torch, name))
    made = any_lane("identity")(value)
    assert made.dtype is NARROW[name] and made.tolist() == value.tolist()


@pytest.mark.parametrize("name", BY_NAME)
def test_outputs_keep_the_models_dtype(x64_remote: Remote, name: str) -> None:
    """What the model returns arrives in the dtype that the model chose, whatever the inputs
    were."""
    made = x64_remote("cast")(torch.tensor([1.0, 0.5, 2.0]), name)
    assert made.dtype is getattr(torch, name)
    expected = torch.tensor([1.0, 0.5, 2.0]).to(made.dtype)
    assert made.to(torch.complex64).tolist() == expected.to(torch.complex64).tolist()


@pytest.mark.parametrize("through", ["float32", "complex64"])
@pytest.mark.parametrize("name", FLOATS)
def test_a_gradient_has_its_inputs_dtype(
    x64_remote: Remote, name: str, through: str
) -> None:
    """Though the model computes in another type, the gradient has the dtype of the input."""
    x = torch.tensor([1.0, 0.5]).to(getattr(torch, name)).requires_grad_()
    y = x64_remote("cast")(x, through)
    y.backward(torch.tensor([2.0, 4.0]).to(y.dtype))
    assert x.grad is not None and x.grad.dtype is x.dtype
    assert x.grad.to(torch.complex64).tolist() == [2, 4]
