"""Modules that differentiate inside forward, or compute parts again, have torch's derivatives."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from bridge_client import Session, connect, spawn
from bridge_client.inproc import host
from bridge_client.jax import RemoteTorchFunction
from tests.client.jax_client import inner_models
from tests.client.jax_client.conftest import Remote
from tests.conftest import ROOT, python_of

_REFERENCES = {
    "maml": inner_models.Maml(),
    "first_order": inner_models.Maml(create_graph=False),
    "penalty": inner_models.Penalty(),
    # torch.autograd.grad refuses reentrant checkpoints.
    "reentrant": inner_models.NotReentrant(),
    "not_reentrant": inner_models.NotReentrant(),
}
_NAMES = list(_REFERENCES)
_X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


@pytest.fixture(scope="module", params=["worker", "in process"])
def served(request: pytest.FixtureRequest) -> Iterator[Session]:
    """A session with the models: in a worker, and in this process."""
    if request.param == "worker":
        models = {name: f"{inner_models.__name__}:{name}" for name in _NAMES}
        python = python_of(".venv-torch")
        made: Session = spawn(torch_model=models, python=python, cwd=ROOT)
    else:
        made = host(torch_model={name: getattr(inner_models, name) for name in _NAMES})
    with made as session:
        yield session


@pytest.fixture
def remote(served: Session) -> Iterator[Remote]:
    """Makes functions of a session of this test's own."""
    if served.lane == "inproc":
        yield lambda name, **options: RemoteTorchFunction(served, name=name, **options)
        return
    with connect(served.address) as session:
        yield lambda name, **options: RemoteTorchFunction(session, name=name, **options)


def reference(name: str) -> tuple[nn.Module, torch.Tensor, list[torch.Tensor]]:
    """Return torch's own module, input, and trainable tensors."""
    module, x = _REFERENCES[name], torch.tensor(_X, requires_grad=True)
    return module, x, list(module.parameters())


def split(params: dict[str, Any], module: nn.Module) -> tuple[Any, Any]:
    """Return the trainable parameters, and the buffers."""
    names = {name for name, _ in module.named_parameters()}
    trained = {name: each for name, each in params.items() if name in names}
    return trained, {name: params[name] for name in params.keys() - names}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["at once", "jit"])
@pytest.mark.parametrize("name", _NAMES)
def test_gradients_are_torchs(remote: Remote, name: str, wrap: Any) -> None:
    """By the parameters and the input, together and alone, and with weights on the worker."""
    module, x, parameters = reference(name)
    value = module(x)
    expected = torch.autograd.grad(value, [*parameters, x])
    f = remote(name)
    trained, buffers = split(f.params, module)

    def loss(trained: Any, x: Any) -> jax.Array:
        return f.apply({**trained, **buffers}, x)

    found, gradients = wrap(jax.value_and_grad(loss, (0, 1)))(trained, jnp.asarray(_X))
    np.testing.assert_allclose(found, value.detach(), rtol=1e-6)
    alone = wrap(jax.grad(loss))(trained, _X)
    for (label, _), each in zip(module.named_parameters(), expected, strict=False):
        for one in (gradients[0], alone):
            np.testing.assert_allclose(one[label], each, rtol=1e-5, atol=1e-6)
    bound = wrap(jax.grad(remote(name)))(jnp.asarray(_X))
    for one in (gradients[1], bound):
        np.testing.assert_allclose(one, expected[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", _NAMES)
def test_other_transforms_are_torchs(remote: Remote, name: str) -> None:
    """Forward mode, a batch, and a second derivative."""
    module, x, _ = reference(name)
    value = module(x)
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad((gradient**2).sum(), x)
    f = remote(name)
    at = jnp.asarray(_X)
    _, tangent = jax.jvp(f, (at,), (jnp.ones_like(at),))
    np.testing.assert_allclose(tangent, gradient.detach().sum(), rtol=1e-5, atol=1e-5)
    rows = jax.vmap(f)(jnp.stack([at, at]))
    np.testing.assert_allclose(rows, 2 * [value.item()], rtol=1e-6)
    found = jax.grad(lambda x: (jax.grad(f)(x) ** 2).sum())(at)
    np.testing.assert_allclose(found, second, rtol=1e-4, atol=1e-5)


def test_the_process_keeps_its_checkpoints() -> None:
    """After calls in this process, a reentrant checkpoint of the caller is torch's own."""
    f = RemoteTorchFunction(inner_models.reentrant)
    jax.grad(f)(jnp.asarray(_X))
    assert "apply" not in vars(CheckpointFunction)
    x = torch.ones(2, requires_grad=True)
    y = checkpoint(torch.sin, x, use_reentrant=True)
    assert type(y.grad_fn).__name__ == "CheckpointFunctionBackward"
