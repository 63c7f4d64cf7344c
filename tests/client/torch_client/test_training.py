"""Training: against optax in this process, and what a step moves through the bridge."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import Tensor, nn

from bridge_client import Session
from tests.client.torch_client.conftest import Remote
from tests.client.torch_client.flax_models import perceptron

_STEPS = 20


def data() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(16, 3)).astype(np.float32)
    return torch.from_numpy(x), torch.from_numpy(
        np.stack([x.sum(1), np.sin(x[:, 0])], 1)
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    x, target = data()
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), target)
    loss.backward()
    optimizer.step()
    return loss.item()


def test_twenty_steps_are_those_of_optax(any_lane: Remote) -> None:
    """SGD with momentum in torch goes where optax's goes in jax, to 1e-5."""
    model = any_lane("perceptron")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = [step(model, optimizer) for _ in range(_STEPS)]

    module, variables = perceptron
    x, target = (t.numpy() for t in data())
    update_rule = optax.sgd(0.05, momentum=0.9)

    @jax.jit
    def step_in_jax(variables, state):
        loss, gradient = jax.value_and_grad(
            lambda v: jnp.mean((module.apply(v, x) - target) ** 2)
        )(variables)
        updates, state = update_rule.update(gradient, state)
        return optax.apply_updates(variables, updates), state, loss

    state, expected = update_rule.init(variables), []
    for _ in range(_STEPS):
        variables, state, loss = step_in_jax(variables, state)
        expected.append(float(loss))
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, parameter in model.named_parameters():
        wanted = variables
        for part in name.split("."):
            wanted = wanted[part]
        np.testing.assert_allclose(
            parameter.detach().numpy(), wanted, rtol=1e-5, atol=1e-5
        )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.05),
    "Adam": partial(torch.optim.Adam, lr=0.05, foreach=False),
    "AdamW": partial(torch.optim.AdamW, lr=0.05, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_copies_no_parameter(
    session: Session, remote: Remote, name: str
) -> None:
    """A step moves the inputs, the outputs, the cotangent and the gradients; parameters stay
    where they were born."""
    model = remote("perceptron")
    optimizer = OPTIMIZERS[name](model.parameters())
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    losses = [step(model, optimizer)]
    x, target = data()
    # Inputs are copied once, the output is written once, its cotangent is copied, each gradient is
    # written once.
    expected = (
        x.nbytes
        + target.nbytes
        + target.nbytes
        + sum(p.nbytes for p in model.parameters())
    )
    for _ in range(5):
        before = session.stats()["bytes_copied"]
        losses.append(step(model, optimizer))
        assert session.stats()["bytes_copied"] - before == expected
    assert losses[-1] < losses[0]
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places
    assert all(
        session.pool.address_of(place, 4) is not None for place in places.values()
    )


def test_gradients_of_parameters_do_not_pile_up(
    session: Session, remote: Remote
) -> None:
    """After each step as many blocks are leased as after the first one, and no residual is kept."""
    model = remote("perceptron")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    held = []
    for _ in range(5):
        step(model, optimizer)
        stats = session.stats()
        assert stats["residuals"] == 0
        held.append(stats["blocks"])
    assert held == held[:1] * 5


def test_it_trains_inside_of_a_torch_module(any_lane: Remote) -> None:
    """In an nn.Sequential between torch layers all parameters train together."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 3), nn.Tanh(), any_lane("perceptron"), nn.Linear(2, 2)
    )
    assert "2.params.Dense_0.kernel" in dict(model.named_parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [step(model, optimizer) for _ in range(30)]
    assert losses[-1] < losses[0] / 2
    assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_gradient_clipping_and_schedules_work(remote: Remote) -> None:
    """torch's utilities work on its parameters and gradients."""
    model = remote("perceptron")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step(model, optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm > 0.1
    assert torch.cat(
        [p.grad.flatten() for p in model.parameters()]
    ).norm().item() == pytest.approx(0.1, rel=1e-3)
    schedule.step()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad.eq(0).all() for p in model.parameters())
