"""A worker in another Python with another jax: .venv-jax-next, which `make setup` makes where it
finds one."""

import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from bridge_client import Session, spawn
from bridge_client.torch import RemoteJaxFunction
from tests.client.torch_client.flax_models import perceptron
from tests.client.torch_client.functions import affine
from tests.client.torch_client.reference import assert_within, vjp
from tests.conftest import ROOT, python_of

NEXT = ".venv-jax-next"
VERSIONS = (
    "import json, sys, jax; print(json.dumps([*sys.version_info[:2], jax.__version__]))"
)


@pytest.fixture(scope="module")
def next_worker() -> Iterator[Session]:
    """A worker of the other Python."""
    if not (ROOT / NEXT).exists():
        pytest.skip(
            f"`make setup` found no Python newer than {sys.version_info[0]}.{sys.version_info[1]}:"
            f" no {NEXT}"
        )
    names = {
        "sine": "tests.models",
        "identity": "tests.client.torch_client.functions",
        "affine": "tests.client.torch_client.functions",
    }
    names |= {
        "perceptron": "tests.client.torch_client.flax_models",
        "raises_at_trace": "tests.client.torch_client.functions",
    }
    models = {name: f"{module}:{name}" for name, module in names.items()}
    with spawn(jax_model=models, python=python_of(NEXT), cwd=ROOT) as session:
        # The first call creates the memory that later tests find.
        RemoteJaxFunction(session, name="sine")(torch.ones(1))
        yield session


def test_the_worker_has_another_python_and_jax(next_worker: Session) -> None:
    """The environment is what it is for: neither its Python nor its jax is this process's."""
    made = subprocess.run(
        [python_of(NEXT), "-c", VERSIONS], capture_output=True, text=True, check=True
    )
    major, minor, jax_version = json.loads(made.stdout)
    assert (major, minor) > sys.version_info[:2]
    here = subprocess.run(
        [sys.executable, "-c", VERSIONS], capture_output=True, text=True, check=True
    )
    assert jax_version != json.loads(here.stdout)[2]


def test_a_forward_and_its_gradient(next_worker: Session) -> None:
    """Values and gradients, of structures too, are right across Python versions, and nothing is
    kept."""
    x = torch.rand(3, 4).requires_grad_()
    sine, identity = (
        RemoteJaxFunction(next_worker, name=name) for name in ("sine", "identity")
    )
    y = identity({"a": (sine(x), None), "b": [torch.arange(3)]})
    assert y["b"][0].tolist() == [0, 1, 2] and y["a"][1] is None
    (y["a"][0] ** 2).sum().backward()
    torch.testing.assert_close(x.grad, (8 * x.sin() * x.cos()).detach())
    del y
    assert next_worker.stats()["residuals"] == 0


def test_several_outputs_and_passes(next_worker: Session) -> None:
    """Unused outputs, retained graphs and second derivatives work there as well."""
    identity = RemoteJaxFunction(next_worker, name="identity")
    x, y = (torch.rand(3).requires_grad_() for _ in range(2))
    first, _ = identity((x, y))
    first.sum().backward(retain_graph=True)
    first.sum().backward()
    assert x.grad is not None and x.grad.eq(2).all()
    sine = RemoteJaxFunction(next_worker, name="sine")
    (gradient,) = torch.autograd.grad(sine(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, -2 * x.detach().sin())


@pytest.mark.parametrize("name", ["affine", "perceptron"])
def test_parameters_and_their_gradients(next_worker: Session, name: str) -> None:
    """Parameters arrive under their names, and their gradients are those of jax."""
    model = RemoteJaxFunction(next_worker, name=name)
    apply, weights = (
        affine if name == "affine" else (perceptron[0].apply, perceptron[1])
    )
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    y = model(torch.from_numpy(x))
    y.sum().backward()
    outputs, expected = vjp(
        apply, (weights, x), [np.ones(tuple(y.shape), np.float32)], x64=False
    )
    assert_within(y, outputs[0], 1e-6)
    parameters = list(model.parameters())
    assert len(parameters) == len(expected) - 1
    for parameter, wanted in zip(parameters, expected, strict=False):
        assert parameter.grad is not None
        assert_within(parameter.grad, wanted, 1e-6)
