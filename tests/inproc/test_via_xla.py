"""A worker that runs torch models through XLA: bridge_server --torch-model mod:m --via-xla."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridge_client import Session, connect, spawn
from bridge_client.inproc import to_torch
from bridge_client.jax import RemoteTorchFunction
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import WorkerCrashed
from tests.conftest import ROOT, python_of
from tests.inproc import served


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where a worker listens that runs in the environment with both frameworks."""
    targets = {
        name: f"tests.inproc.served:{name}"
        for name in ("sine", "normed", "network", "coder")
    }
    targets["encode"] = "tests.inproc.served:coder.encode"
    with spawn(
        torch_model=targets,
        python=python_of(".venv-both"),
        cwd=ROOT,
        args=["--via-xla", "--x64"],
    ) as session:
        yield session.address


@pytest.fixture
def worker(address: str) -> Iterator[Session]:
    """A session of its own for each test."""
    with connect(address, lane="local") as session:
        yield session


def test_torch_models_run_in_xla(worker: Session) -> None:
    """The worker's framework is JAX, and its models have torch's names and signatures."""
    assert worker.framework == "jax"
    assert worker.models["sine"].doc == "The sine, scaled."
    assert worker.models["network"].arguments == ("input",)
    names = {p.path: p.trainable for p in worker.models["normed"].parameters}
    expected = {"0.weight": True, "0.bias": True, "1.weight": True, "1.bias": True}
    buffers = dict.fromkeys(
        ("1.running_mean", "1.running_var", "1.num_batches_tracked"), False
    )
    assert names == expected | buffers


def test_methods_run_in_xla(worker: Session) -> None:
    """A module's methods share its parameters, also where one of them is the target."""
    f, x = RemoteJaxFunction(worker, name="coder"), torch.randn(4, 3).double()
    single = RemoteJaxFunction(worker, name="encode")
    assert worker.models["coder"].methods == ("__call__", "encode")
    assert worker.models["encode"].methods == ("__call__",)
    expected = served.coder.encode(x)
    for encode in (f.method("encode"), single):
        torch.testing.assert_close(encode(x), expected)
        assert encode.state_dict().keys() == f.state_dict().keys()
    torch.testing.assert_close(f(x), 2 * expected)


def test_a_network_agrees_with_torch(worker: Session) -> None:
    """The value and the gradients, seen from torch, are those of the network run by torch
    itself."""
    network, x = served.network, torch.randn(2, 2, 5, 5, dtype=torch.float64)
    remote = RemoteJaxFunction(worker, name="network")
    seen, expected = remote(x), network(x)
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-10)
    named = dict(remote.named_parameters())
    assert named.keys() == dict(network.named_parameters()).keys()
    gradients = torch.autograd.grad(seen.sum(), list(named.values()))
    for name, gradient in zip(named, gradients, strict=True):
        (reference,) = torch.autograd.grad(
            expected.sum(), network.get_parameter(name), retain_graph=True
        )
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


def test_state_and_randomness_follow_the_caller(worker: Session) -> None:
    """From JAX, the statistics come back as new buffers, and dropout follows the key."""
    with jax.enable_x64(True):
        g = RemoteTorchFunction(worker, name="normed")
        x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)))

        def call(key: Any) -> Any:
            return g.apply(g.params, x, buffers=g.buffers, mutable=True, rng=key)

        (first, buffers), (again, _), (other, _) = (
            call(jax.random.key(seed)) for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)
        hidden = x @ g.params["0.weight"].T + g.params["0.bias"]
        np.testing.assert_allclose(
            buffers["1.running_mean"], 0.1 * hidden.mean(0), rtol=1e-10
        )
        np.testing.assert_allclose(
            buffers["1.running_var"], 0.9 + 0.1 * hidden.var(0, ddof=1), rtol=1e-10
        )
        assert to_torch(buffers["1.num_batches_tracked"]).item() == 1


def test_transforms_and_numbers_pass(worker: Session) -> None:
    """A torch function has JAX's derivatives, to any order, and takes Python numbers."""
    f = RemoteJaxFunction(worker, name="sine")
    x = torch.linspace(0, 1, 3, dtype=torch.float64)
    hessian = torch.func.hessian(lambda x: f(x, scale=2.0).sum())(x)
    torch.testing.assert_close(hessian, torch.diag(-2 * x.sin()))


def test_via_xla_needs_both_frameworks() -> None:
    """In an environment without jax the worker says what is missing, and exits."""
    with pytest.raises(WorkerCrashed, match="needs jax and torchax"):
        spawn(
            torch_model="tests.inproc.served:sine",
            python=python_of(".venv-torch"),
            cwd=ROOT,
            args=["--via-xla"],
        )
