"""RemoteTorchFunction with a torch model of the same process.

What holds of every session is in tests/contract/test_session_contract.py.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import Tensor, nn

from bridge_client.inproc import host, to_jax, to_torch
from bridge_client.jax import RemoteTorchFunction
from bridge_wire.errors import CallerError, TargetError
from tests.inproc.networks import ResNet, Transformer, ViT, made
from tests.inproc.test_tracing import TOLERANCE, assert_same, loss_of, reference
from tests.workers import run_program


def sine(x: Tensor) -> Tensor:
    """Twice the sine."""
    return torch.sin(x) * 2


def test_transforms_are_jaxs() -> None:
    """A torch function of this process goes through jit, grad, hessian, vmap and scan, without a
    worker."""
    f = RemoteTorchFunction(sine)
    x = jnp.arange(3.0)
    assert (f.session.lane, f.session.memory, f.session.framework) == (
        "inproc",
        "dlpack",
        "torch",
    )
    np.testing.assert_allclose(
        jax.jit(jax.grad(lambda x: f(x).sum()))(x), 2 * jnp.cos(x), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        jax.hessian(lambda x: f(x).sum())(x), jnp.diag(-2 * jnp.sin(x)), atol=1e-6
    )
    np.testing.assert_allclose(
        jax.vmap(f)(jnp.ones((4, 3))),
        2 * jnp.sin(jnp.ones((4, 3))),
        rtol=1e-6,
        atol=1e-6,
    )
    scanned = jax.lax.scan(lambda c, x: (c + f(x), None), 0.0, x)[0]
    np.testing.assert_allclose(scanned, (2 * jnp.sin(x)).sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", [ResNet, ViT, Transformer])
def test_networks_agree_with_torch(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """The value and the gradients of a network of this process, seen from JAX, are torch's own."""
    network, x = made(kind, dtype)
    with jax.enable_x64(dtype is torch.float64):
        g = RemoteTorchFunction(network)
        value, gradients = jax.jit(jax.value_and_grad(loss_of(g.apply)))(
            g.params, to_jax(x)
        )
    expected_value, expected = reference(network, x)
    assert_same(value, expected_value, TOLERANCE[dtype])
    for name, gradient in expected.items():
        assert_same(gradients[name], gradient, TOLERANCE[dtype])


def test_second_derivatives_agree_with_torch() -> None:
    """The Hessian of a smooth network, times a vector, is torch's own."""
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    with jax.enable_x64(True):
        g = RemoteTorchFunction(network)
        f = lambda x: (g(x) ** 2).sum()  # noqa: E731
        seen = jax.jvp(jax.grad(f), (to_jax(x.detach()),), (to_jax(x.detach()),))[1]
    (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    assert_same(seen, torch.autograd.grad((gradient * x.detach()).sum(), x)[0], 1e-8)


def test_training_with_optax_equals_torch() -> None:
    """100 steps of Adam from JAX, with the statistics of a BatchNorm, end where torch's end."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)
    ).double()
    x = torch.randn(16, 3, dtype=torch.float64)
    y = x.square().sum(1, keepdim=True)
    with jax.enable_x64(True):
        g = RemoteTorchFunction(network)
        optimizer = optax.adam(1e-2)

        def loss(params: Any, buffers: Any) -> tuple[jax.Array, Any]:
            seen, buffers = g.apply(params, to_jax(x), buffers=buffers, mutable=True)
            return ((seen - to_jax(y)) ** 2).mean(), buffers

        @jax.jit
        def step(params: Any, buffers: Any, state: Any) -> Any:
            gradients, buffers = jax.grad(loss, has_aux=True)(params, buffers)
            updates, state = optimizer.update(gradients, state)
            return optax.apply_updates(params, updates), buffers, state

        trained = g.params, g.buffers, optimizer.init(g.params)
        for _ in range(100):
            trained = step(*trained)
    reference_optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(100):
        reference_optimizer.zero_grad()
        ((network(x) - y) ** 2).mean().backward()
        reference_optimizer.step()
    state = network.state_dict()
    for name, array in {**trained[0], **trained[1]}.items():
        assert_same(array, state[name], 1e-8)


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x,
        lambda x: x.view(-1),
        lambda x: (x, x[:2]),
        lambda x: x.add_(1),
        lambda x: (y := x * 2, y),
    ],
    ids=["identity", "view", "slice", "in place", "twice"],
)
def test_outputs_share_memory_with_nothing(model: Callable[[Tensor], Any]) -> None:
    """An array that a model returned stays what it is, whatever the next call does; so do the
    arrays it was given."""
    x = jnp.zeros(64)
    f = RemoteTorchFunction(model)
    outputs = jax.tree.leaves(f(x))
    before = [np.array(y) for y in outputs]
    for y in outputs:
        to_torch(y).add_(1)
    f(x)
    assert not np.asarray(x).any()
    pointers = {y.unsafe_buffer_pointer() for y in (x, *outputs)}
    assert len(pointers) == 1 + len(outputs)
    for y, then in zip(outputs, before, strict=True):
        np.testing.assert_array_equal(y, then + 1)


def test_a_models_own_state_is_not_handed_out() -> None:
    """A model that returns its parameter returns a copy of it."""
    weight = torch.zeros(64)
    made = RemoteTorchFunction(lambda x: weight)(jnp.zeros(1))
    to_torch(made).add_(1)
    assert not weight.any()


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")]
)
def test_modes_of_torch_around_a_call_change_nothing(mode: Callable[[], Any]) -> None:
    """A call within no_grad, inference mode or autocast has the value, type and gradients that
    it has elsewhere."""
    model = nn.Linear(3, 2)
    x = jnp.ones((4, 3))
    inside, outside = RemoteTorchFunction(model), RemoteTorchFunction(model)
    with mode():
        seen = jax.value_and_grad(lambda x: inside(x).sum())(x)
    expected = jax.value_and_grad(lambda x: outside(x).sum())(x)
    for f in (inside, outside):
        with mode():
            assert f(x).dtype == jnp.float32
    assert seen[0] == expected[0]
    assert (
        seen[1].tolist()
        == expected[1].tolist()
        == jax.grad(lambda x: inside(x).sum())(x).tolist()
    )


def test_both_directions_in_one_program() -> None:
    """A JAX function calls a torch one that calls a JAX one, and gradients go through all three."""
    from bridge_client.torch import RemoteJaxFunction

    inner = RemoteJaxFunction(lambda x: jnp.sin(x))
    outer = RemoteTorchFunction(lambda x: inner(x) * 2)
    x = jnp.arange(3.0)
    gradient = jax.grad(lambda x: outer(x).sum())
    for transformed in (gradient, jax.jit(gradient)):
        np.testing.assert_allclose(transformed(x), 2 * jnp.cos(x), rtol=1e-6, atol=1e-6)


def test_a_torch_model_may_compute_with_jax() -> None:
    """A model that hands its tensors to JAX cannot be traced, so it is run, and works in
    compiled code too."""
    f = RemoteTorchFunction(lambda x: to_torch(jnp.sin(to_jax(x))))
    x = jnp.arange(3.0)
    for call in (f, jax.jit(f)):
        np.testing.assert_allclose(call(x), jnp.sin(x), rtol=1e-6, atol=1e-6)


def test_what_is_no_model_is_refused() -> None:
    """A target that is neither an address, a session nor a model is refused with what was
    expected."""
    with pytest.raises(TargetError, match=r"nn\.Module"):
        RemoteTorchFunction(3)
    with pytest.raises(CallerError, match="one session per framework"):
        host()


def test_without_torch_the_error_says_what_is_missing() -> None:
    """In an environment without torch, a function as the target raises CallerError that names
    the remedy."""
    program = """
        from bridge_client.jax import RemoteTorchFunction
        from bridge_wire.errors import CallerError
        try:
            RemoteTorchFunction(abs)
        except CallerError as error:
            print(error)
    """
    assert "install torch" in run_program(program, venv=".venv-jax").stdout
