"""A worker whose models span several devices: `--mesh`."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, hessian, vmap

from bridge_client import Session, connect, spawn
from bridge_client.torch import RemoteJaxFunction
from tests.client.torch_client.conftest import Remote
from tests.client.torch_client.mesh_models import dense
from tests.conftest import ROOT, eventually, python_of
from tests.workers import Worker

FOUR_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
MODELS = ["dense", "where", "constrained"]


@pytest.fixture(scope="module")
def mesh_worker() -> Iterator[Session]:
    """A worker with four devices, in two rows of two."""
    targets = {name: f"tests.client.torch_client.mesh_models:{name}" for name in MODELS}
    args = ["--mesh", "data=2,model=2"]
    with spawn(
        jax_model=targets,
        python=python_of(".venv-jax"),
        cwd=ROOT,
        args=args,
        env=FOUR_DEVICES,
    ) as session:
        yield session


@pytest.fixture(params=["local", "grpc"])
def session(request: pytest.FixtureRequest, mesh_worker: Session) -> Iterator[Session]:
    """A new session with that worker, on each lane in turn."""
    with connect(mesh_worker.address, lane=request.param) as session:
        yield session


def batch() -> Tensor:
    return torch.from_numpy(
        np.random.default_rng(41).normal(size=(8, 4)).astype(np.float32)
    )


def in_torch(model: RemoteJaxFunction, x: Tensor) -> Tensor:
    return torch.tanh(x @ model.kernel + model.bias)


def test_a_mesh_changes_no_result(remote: Remote) -> None:
    """Values, gradients of inputs and parameters, and other derivatives are as on one device."""
    model, x = remote("dense"), batch().requires_grad_()
    torch.testing.assert_close(model(x), in_torch(model, x))
    leaves = [x, *model.parameters()]
    seen, expected = (
        torch.autograd.grad(f(x).square().sum(), leaves)
        for f in (model, lambda x: in_torch(model, x))
    )
    torch.testing.assert_close(seen, expected)
    kernel = model.kernel.detach()

    def loss(call: Callable[[Any, Any], Tensor], kernel: Tensor) -> Tensor:
        return call({"kernel": kernel}, (x.detach(),)).sum()

    seen = hessian(
        lambda k: loss(lambda own, args: functional_call(model, own, args), k)
    )(kernel)
    bias = model.bias.detach()
    torch.testing.assert_close(
        seen, hessian(lambda k: torch.tanh(x.detach() @ k + bias).sum())(kernel)
    )
    many = torch.stack([batch(), batch() + 1])
    torch.testing.assert_close(vmap(model)(many), in_torch(model, many))


def test_programs_are_spread_over_the_devices(remote: Remote) -> None:
    """Each device computes its part of the rows and columns."""
    seen = remote("where")(torch.zeros(4, 4))
    quarters = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    assert torch.equal(seen, quarters.repeat_interleave(2, 0).repeat_interleave(2, 1))
    x = batch()
    torch.testing.assert_close(remote("constrained")(x, 3), 3 * x.sin())


@pytest.mark.parametrize("parameters", ["client", "worker"])
def test_arrays_lie_as_the_module_says(
    mesh_worker: Session, caplog: pytest.LogCaptureFixture, parameters: str
) -> None:
    """XLA itself reports that a device holds half of the input's rows and half of the kernel's
    columns."""
    x = batch().repeat(2, 1)
    with (
        connect(mesh_worker.address, lane="local") as session,
        caplog.at_level(logging.INFO),
    ):
        model = RemoteJaxFunction(session, name="dense", parameters=parameters)
        kernel, bias = (torch.from_numpy(dense[1][name]) for name in ("kernel", "bias"))
        torch.testing.assert_close(model(x).detach(), torch.tanh(x @ kernel + bias))
        assert eventually(
            lambda: "kernel: (4, 3)" in caplog.text and "x: (8, 4)" in caplog.text
        )


def test_sizes_that_the_mesh_does_not_divide(remote: Remote) -> None:
    """Rows that cannot be halved are computed all the same."""
    x = batch()[:7].requires_grad_()
    y = remote("constrained")(x, 2)
    torch.testing.assert_close(y, 2 * x.sin())
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().cos())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["dense", "--mesh=data=2,model=2"], "needs 4 devices, and this worker has 1"),
        (["dense", "--mesh=data=two"], "is not a mesh; expected data=2,model=2"),
        (["dense"], "name the axes they are about with --mesh"),
        (
            ["misspelt", "--mesh=model=1"],
            "has a sharding of 'krenel', but its parameters are",
        ),
        (["where", "--mesh=data=1", "--no-jit"], "leave out one"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(
    tmp_path: Path, args: list[str], message: str
) -> None:
    """Too few devices, no mesh at all, a mesh that is none and shardings of nothing end the
    worker, saying so."""
    model, *options = args
    with Worker(
        tmp_path, f"--jax-model=tests.client.torch_client.mesh_models:{model}", *options
    ) as worker:
        assert worker.wait() == 2
    assert message in worker.stderr
