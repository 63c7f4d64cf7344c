"""Autocast, GradScaler and training in 16 bits.

Autocast does not reach into a remote function: it computes in the dtypes that it is given, forward
and backward, as a torch.library.custom_op does; cast_inputs= asks for what
torch.amp.custom_fwd(cast_inputs=) does.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import CallerError
from tests.client.torch_client.conftest import Remote

HALVES = [torch.bfloat16, torch.float16]


def rows() -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.float().square().sum(), list(model.parameters())))


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_changes_nothing(remote: Remote, dtype: torch.dtype) -> None:
    """Under autocast values and gradients are, to the last bit, what they are without it."""
    model = remote("affine")
    expected = model(rows())
    with torch.autocast("cpu", dtype):
        y = model(rows())
        under_autocast = gradients(model, y)
    assert y.dtype is torch.float32 and torch.equal(y, expected)
    for seen, wanted in zip(under_autocast, gradients(model, expected), strict=True):
        assert torch.equal(seen, wanted)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_autocast_made_arrives_as_it_is(
    remote: Remote, dtype: torch.dtype
) -> None:
    """What a layer before it made in 16 bits arrives in 16 bits, and its gradient goes back in
    them."""
    before, identity = nn.Linear(3, 3), remote("identity")
    with torch.autocast("cpu", dtype):
        hidden = before(rows())
        y = identity(hidden)
    assert y.dtype is hidden.dtype is dtype
    (gradient,) = torch.autograd.grad(y.float().sum(), hidden)
    assert gradient.dtype is dtype and gradient.eq(1).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_cast_inputs_casts_under_autocast_only(
    remote: Remote, dtype: torch.dtype
) -> None:
    """With cast_inputs, floats and parameters are cast while autocast is on; gradients have the
    parameters' dtype."""
    model = remote("affine", cast_inputs=dtype)
    assert model(rows()).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y = model(rows())
        assert torch.equal(model.submit(rows()).result(timeout=60), y)
    assert y.dtype is dtype
    twin = rows().to(dtype) @ model.weight.to(dtype) + model.bias.to(dtype)
    torch.testing.assert_close(y, twin, rtol=0.02, atol=0.02)
    for seen, wanted in zip(gradients(model, y), gradients(model, twin), strict=True):
        assert seen.dtype is torch.float32
        torch.testing.assert_close(seen, wanted, rtol=0.05, atol=0.05)


def test_cast_inputs_leaves_other_types(x64_remote: Remote) -> None:
    """float64, integers, booleans and Python numbers pass as they are, as under
    torch.amp.custom_fwd."""
    echo = x64_remote("echo", cast_inputs=torch.bfloat16)
    sent = {
        "wide": rows().double(),
        "float": rows(),
        "int": torch.arange(3),
        "bool": torch.tensor([True]),
        "n": 2.5,
    }
    with torch.autocast("cpu"):
        made = echo(sent)["args"][0]
    assert {name: made[name].dtype for name in ("wide", "float", "int", "bool")} == {
        "wide": torch.float64,
        "float": torch.bfloat16,
        "int": torch.int64,
        "bool": torch.bool,
    }
    assert made["n"].item() == 2.5


def test_the_backward_pass_does_as_the_forward_pass_did(remote: Remote) -> None:
    """Whether autocast is on during backward does not matter: the gradient is that of what was
    computed."""
    model = remote("affine", cast_inputs=torch.bfloat16)
    with torch.autocast("cpu"):
        y = model(rows())
        inside = torch.autograd.grad(
            y.float().square().sum(), model.weight, retain_graph=True
        )[0]
        double = torch.autograd.grad(
            y.float().square().sum(), model.weight, create_graph=True
        )[0]
    outside = torch.autograd.grad(y.float().square().sum(), model.weight)[0]
    assert torch.equal(inside, outside) and torch.equal(inside, double)


def test_cast_inputs_must_be_a_float_dtype(remote: Remote) -> None:
    """Anything else is refused when the function is made."""
    with pytest.raises(CallerError, match=r"cast_inputs=torch\.int32"):
        remote("affine", cast_inputs=torch.int32)


def network(remote: Remote, **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 3),
        nn.Tanh(),
        remote("affine", **options),
        nn.Tanh(),
        nn.Linear(2, 1),
    )


def test_a_gradient_scaler_scales_and_unscales(remote: Remote) -> None:
    """With GradScaler the gradients after unscale_ are those without it, and the optimizer
    steps."""
    x = rows()
    model, twin = network(remote), network(remote)
    twin(x).square().mean().backward()
    optimizer, scaler = (
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.amp.GradScaler("cpu", init_scale=2.0**10),
    )
    scaler.scale(model(x).square().mean()).backward()
    scaler.unscale_(optimizer)
    for seen, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(seen.grad, wanted.grad)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert not torch.equal(model[2].weight, twin[2].weight)


def test_a_gradient_scaler_skips_a_step_that_overflowed(remote: Remote) -> None:
    """A scale at which float16 overflows in the remote gradient skips the step and is halved."""
    model = network(remote, cast_inputs=torch.float16)
    optimizer, scaler = (
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.amp.GradScaler("cpu", init_scale=2.0**40),
    )
    before = model[2].weight.detach().clone()
    with torch.autocast("cpu", torch.float16):
        loss = model(rows()).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model[2].weight, before)
    assert scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("dtype", HALVES)
def test_training_under_autocast(remote: Remote, dtype: torch.dtype) -> None:
    """A network with a remote layer in 16 bits learns under autocast with a GradScaler."""
    model = network(remote, cast_inputs=dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler(
        "cpu", enabled=dtype is torch.float16, init_scale=2.0**8
    )
    target = rows().sum(1, keepdim=True).sin()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = nn.functional.mse_loss(model(rows()), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert math.isfinite(losses[-1]) and losses[-1] < losses[0] / 4
    assert all(p.dtype is torch.float32 for p in model.parameters())


@pytest.mark.parametrize("dtype", HALVES)
def test_training_with_parameters_of_16_bits(
    remote: Remote, dtype: torch.dtype
) -> None:
    """A model cast to 16 bits trains in them: parameters, gradients and outputs."""
    model: RemoteJaxFunction = remote("affine").to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(rows().to(dtype)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert (
        {p.dtype for p in model.parameters()}
        == {p.grad.dtype for p in model.parameters()}
        == {dtype}
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_weights_pass_through(remote: Remote, dtype: torch.dtype) -> None:
    """A model reads float8 inputs beside others, and the gradients of the others are right."""
    weights = torch.tensor([0.5, -1.5, 2.0]).to(dtype)
    x = rows().requires_grad_()
    y = remote("product")(x, remote("cast")(weights, "float32"))
    y.sum().backward()
    torch.testing.assert_close(x.grad, weights.float().expand(4, 3))
