"""TorchScript in torch models called from JAX: modules that were scripted, traced or loaded."""

import io
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bridge_client.inproc import to_jax, trace_torch
from bridge_client.jax import RemoteTorchFunction
from tests.inproc.test_tracing import assert_same, loss_of, reference

Made = Callable[[nn.Module], Any]
Transform = Callable[[Callable[..., Any]], Callable[..., Any]]


class Inner(nn.Module):
    """A linear layer with a buffer, which keeps its last input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("scale", torch.full((3,), 2.0))
        self.last = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return torch.tanh(self.linear(x)) * self.scale


class Recurrent(nn.Module):
    """An LSTM, which keeps its weights in a list too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Outer(nn.Module):
    """Layers around another module; `also` refers to that module, or to a part of it, again."""

    def __init__(self, inner: nn.Module, also: nn.Module | None = None) -> None:
        super().__init__()
        self.before = nn.Linear(3, 3)
        self.inner = inner
        self.also = also

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.before(x))
        return y if self.also is None else y + self.also(x)


def scripted(module: nn.Module) -> Any:
    return torch.jit.script(module)


def loaded(module: nn.Module) -> Any:
    stored = io.BytesIO()
    torch.jit.save(scripted(module), stored)
    stored.seek(0)
    return torch.jit.load(stored)


def traced(module: nn.Module) -> Any:
    return torch.jit.trace(module, torch.ones(4, 3), check_trace=False)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 3)


def with_a_part_again(made: Made) -> nn.Module:
    inner = made(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    return Outer(inner, getattr(inner, "2"))


def with_its_source(made: Made) -> nn.Module:
    source = nn.Linear(3, 3)
    return Outer(made(source), source)


MODELS: dict[str, Callable[[Made], nn.Module]] = {
    "submodule": lambda made: Outer(made(Inner())),
    "recurrent": lambda made: Outer(made(Recurrent())),
    "whole": lambda made: made(Outer(Recurrent())),
    "part again": with_a_part_again,
    "source beside it": with_its_source,
}
CASES = [
    pytest.param(kind, made, id=f"{made.__name__} {kind}")
    for made in (scripted, loaded, traced)
    for kind in MODELS
    # torch calls no parts of a traced module.
    if (kind, made) != ("part again", traced)
]


@pytest.mark.parametrize(("kind", "made"), CASES)
def test_gradients_are_torchs(kind: str, made: Made, x: Tensor) -> None:
    """Values and gradients of a model with TorchScript inside are torch's, with its own parameters
    and with the caller's."""
    model = MODELS[kind](made)
    f = RemoteTorchFunction(model)
    doubled = {name: 2 * value for name, value in f.params.items()}
    seen = [
        jax.value_and_grad(loss_of(f.apply))(params, to_jax(x))
        for params in (f.params, doubled, f.params)
    ]
    expected = [reference(model, x)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    expected += [reference(model, x), expected[0]]
    for (value, gradients), (torchs, by_name) in zip(seen, expected, strict=True):
        assert_same(value, torchs, 1e-4)
        assert gradients.keys() == by_name.keys()
        for name, gradient in by_name.items():
            assert_same(gradients[name], gradient, 1e-4)


def test_calls_leave_scripted_modules_as_they_were(x: Tensor) -> None:
    """A scripted submodule's attributes and parameters are the model's own after a call, and the
    new statistics of its BatchNorm are returned."""
    inner = scripted(nn.Sequential(nn.BatchNorm1d(3), Inner()))
    model = Outer(inner)
    f = RemoteTorchFunction(model)
    _, buffers = f.apply(f.params, to_jax(x), buffers=f.buffers, mutable=True)
    f.apply({name: 0 * value for name, value in f.params.items()}, to_jax(x))
    assert getattr(inner, "1").last.shape == (1,)
    assert not getattr(inner, "0").num_batches_tracked.item()
    expected = model(x)
    assert_same(f(to_jax(x)), expected.detach(), 1e-5)
    for name, buffer in model.named_buffers():
        np.testing.assert_allclose(buffers[name], buffer.numpy(), rtol=1e-6)


def smooth(x: Tensor) -> Tensor:
    return torch.tanh(x * 2) * x


TRANSFORMS: dict[str, Transform] = {
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(f)),
    "hessian": jax.hessian,
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f)),
    "vmap of hessian": lambda f: jax.vmap(jax.hessian(f)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives_of_optimized_functions_are_their_sources(
    name: str, x: Tensor
) -> None:
    """Derivatives of a scripted function equal those of its source, also after TorchScript has
    optimized it: then torch.func alone computes others."""
    compiled = torch.jit.script(smooth)
    for _ in range(3):  # then TorchScript has optimized it
        compiled(x.clone().requires_grad_()).sum().backward()
    f, g = (
        RemoteTorchFunction(lambda x, function=function: function(x).square().sum())
        for function in (compiled, smooth)
    )
    transform = TRANSFORMS[name]
    expected = np.asarray(transform(g)(to_jax(x)))
    for _ in range(3):
        seen = np.asarray(transform(f)(to_jax(x)))
        np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-5)


def test_tracing_reads_the_callers_parameters(x: Tensor) -> None:
    """trace_torch replaces the parameters of scripted submodules too."""
    model = Outer(scripted(Inner()))
    h = trace_torch(model)
    value, gradients = jax.jit(jax.value_and_grad(loss_of(h)))(h.params, to_jax(x))
    torchs, by_name = reference(model, x)
    assert_same(value, torchs, 1e-4)
    for name, gradient in by_name.items():
        assert_same(gradients[name], gradient, 1e-4)
