"""Functions with what JAX has of its own: donation, custom derivatives, control flow, callbacks,
remat."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

from bridge_client import Session, connect, spawn
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import RemoteModelError
from tests.client.torch_client import special_models
from tests.client.torch_client.conftest import Remote
from tests.client.torch_client.reference import assert_within
from tests.conftest import ROOT, eventually, python_of

MODELS = [
    "donating",
    "clipped",
    "softened",
    "scanned",
    "looped",
    "bounded",
    "remembered",
    "called_back",
    "printing",
]


def hosting(*args: str) -> Session:
    targets = {
        name: f"tests.client.torch_client.special_models:{name}" for name in MODELS
    }
    return spawn(jax_model=targets, python=python_of(".venv-jax"), cwd=ROOT, args=args)


@pytest.fixture(scope="module")
def special_worker() -> Iterator[Session]:
    """A worker that hosts special_models.py."""
    with hosting() as session:
        yield session


@pytest.fixture
def session(special_worker: Session) -> Iterator[Session]:
    """A new session with that worker."""
    with connect(special_worker.address, lane="local") as session:
        yield session


def batch() -> Tensor:
    return torch.from_numpy(
        np.random.default_rng(7).normal(size=(4, 3)).astype(np.float32)
    )


def result(y: Any) -> Any:
    return y[1] if isinstance(y, tuple) else y


@pytest.mark.parametrize(
    "name", ["clipped", "softened", "scanned", "bounded", "remembered", "called_back"]
)
def test_values_and_gradients_are_those_of_jax(remote: Remote, name: str) -> None:
    """The value, the gradient and a batch are what JAX makes of such a function itself."""
    f, g = remote(name), getattr(special_models, name)
    x = batch().requires_grad_()
    y = result(f(x))
    y.sum().backward()
    assert_within(y.detach(), np.asarray(result(g(x.detach().numpy()))), 1e-6)
    expected = jax.grad(lambda x: result(g(x)).sum())(jnp.asarray(x.detach().numpy()))
    assert_within(x.grad, np.asarray(expected), 1e-6)
    x = torch.stack([batch(), batch() + 1])
    expected = jax.vmap(g)(x.numpy())
    assert_within(result(vmap(f)(x)), np.asarray(result(expected)), 1e-6)


@pytest.mark.parametrize("name", ["softened", "scanned", "looped", "called_back"])
def test_forward_mode_is_that_of_jax(remote: Remote, name: str) -> None:
    """So are forward-mode derivatives, custom ones and that of a while loop."""
    f, g = remote(name), getattr(special_models, name)
    rest = [3] if name == "looped" else []
    x = batch()
    _, tangent = jvp(lambda x: result(f(x, *rest)), (x,), (x,))
    _, expected = jax.jvp(lambda x: result(g(x, *rest)), (x.numpy(),), (x.numpy(),))
    assert_within(tangent, np.asarray(expected), 1e-6)


def test_derivatives_that_jax_refuses_say_what_to_do(remote: Remote) -> None:
    """Forward mode of a custom_vjp, and reverse mode of a while loop, raise JAX's error with
    advice."""
    x = batch()
    with pytest.raises(
        RemoteModelError, match=r"custom_vjp function\.[\s\S]*reverse mode works"
    ):
        jvp(remote("clipped"), (x,), (x,))
    with pytest.raises(RemoteModelError, match=r"Try using lax\.scan"):
        remote("looped")(x.requires_grad_(), 3).sum().backward()


@pytest.fixture(params=[[], ["--no-jit"]], ids=["compiled", "--no-jit"])
def donating(
    request: pytest.FixtureRequest, special_worker: Session
) -> Iterator[Callable[..., RemoteJaxFunction]]:
    """Makes functions of a worker that compiles, and of one that does not."""
    with (
        hosting(*request.param)
        if request.param
        else connect(special_worker.address, lane="local") as session
    ):
        yield RemoteJaxFunction(session, name="donating")


def test_donated_arguments_stay_as_they_are(donating: Callable[..., Tensor]) -> None:
    """A function that was compiled with donate_argnums leaves its inputs intact, which may lie in
    the slab and be the same one twice, and warns of nothing.
    """
    x, y = batch(), batch() + 1
    first = donating(x, y)  # in the slab from now on
    copies = [t.clone() for t in (x, y, first)]
    for _ in range(2):
        assert_within(donating(first, y), (copies[2].sin() * copies[1]).numpy(), 1e-6)
        assert_within(
            donating(first, first), (copies[2].sin() * copies[2]).numpy(), 1e-6
        )
    leaf = first.clone().requires_grad_()
    donating(leaf, first).sum().backward()
    assert_within(leaf.grad, (copies[2].cos() * copies[2]).numpy(), 1e-6)
    for seen, copy in zip((x, y, first), copies, strict=True):
        assert torch.equal(seen, copy)


def test_what_a_model_prints_is_logged(
    special_worker: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """The output of jax.debug.print goes where the worker's log goes."""
    with (
        connect(special_worker.address, lane="local") as session,
        caplog.at_level(logging.INFO),
    ):
        y = RemoteJaxFunction(session, name="printing")(torch.ones(3))
        assert torch.equal(y, torch.full((3,), 2.0))
        assert eventually(lambda: "the sum is 3.0" in caplog.text)
