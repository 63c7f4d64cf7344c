"""torch.func's grad and vjp alone, and create_graph: they keep residuals, as autograd does.

What they make of a remote function is compared in float64 with what they make of the same function
in torch.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, jacrev, jvp, vjp, vmap

from bridge_client import Session
from tests.client.torch_client.conftest import Remote

Function = Callable[..., Tensor]


def product(x: Tensor, y: Tensor) -> Tensor:
    return x.sin() * y.exp()


def _case(remote: Remote) -> Function:
    return functools.partial(remote("gradient_case"), "sine")


def _rand(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, dtype=torch.float64, generator=generator) + 0.2


def _total(f: Function, y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x, y).sum()


def _pulled_twice(f: Function, x: Tensor, y: Tensor) -> Any:
    _, pull = vjp(f, x, y)
    return pull(y), pull(x)


def _pulled_in_vmap(f: Function, x: Tensor, y: Tensor) -> Any:
    _, pull = vjp(f, x, y)
    return vmap(pull)(torch.eye(4, dtype=x.dtype))


def _pulled_for_a_graph(f: Function, x: Tensor, y: Tensor) -> Any:
    """The pullback is linear in its cotangent."""
    _, pull = vjp(f, x, y)
    cotangent = y.clone().requires_grad_()
    pulled = sum(each.sum() for each in pull(cotangent))
    return pulled, torch.autograd.grad(pulled, cotangent)


def _pulled_within_another(f: Function, x: Tensor, y: Tensor) -> Any:
    """The level of a transform that is over is that of the next one."""
    _, pull = vjp(f, x, y)
    return grad(lambda c: sum(each.sum() for each in pull(c * c)))(x)


def _with_a_value_of_another(f: Function, x: Tensor, y: Tensor) -> Any:
    held = []

    def hold(x: Tensor) -> Tensor:
        held.append(2 * x)
        return x.sum()

    grad(hold)(x)
    return grad(lambda y: f(y, held[0]).sum())(y), f(y, held[0])


def _within_autograd(f: Function, x: Tensor, y: Tensor) -> Any:
    x, y = (each.clone().requires_grad_() for each in (x, y))
    gradient = grad(_total(f, y))(x)
    return gradient, torch.autograd.grad(gradient.sum(), (x, y))


def _cotangent_within_autograd(f: Function, x: Tensor, y: Tensor) -> Any:
    weight = y.clone().requires_grad_()
    gradient = grad(lambda x: (f(x, y) * weight).sum())(x)
    return gradient, torch.autograd.grad((gradient**2).sum(), weight)


def _around_autograd(f: Function, x: Tensor, y: Tensor) -> Any:
    def squared_slope(x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(f(x, y).sum(), x, create_graph=True)
        return (slope**2).sum()

    return grad(squared_slope)(x)


def _around_autograd_without_graph(f: Function, x: Tensor, y: Tensor) -> Any:
    def with_slope(x: Tensor) -> Tensor:
        z = f(x, y)
        (slope,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
        return (z * slope).sum()

    return grad(with_slope)(x)


def _with_a_constant_part(f: Function, x: Tensor, y: Tensor) -> Any:
    def partly(x: Tensor) -> Tensor:
        with torch.no_grad():
            factor = f(x, y)
        return (factor * f(x, y) + f(x.detach(), y)).sum()

    return grad_and_value(partly)(x)


def _in_forward_mode(f: Function, x: Tensor, y: Tensor) -> Any:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, y)
        return tuple(forward_ad.unpack_dual(grad(_total(f, y))(dual)))


def _thrice(f: Function, x: Tensor, y: Tensor) -> Any:
    x = x.clone().requires_grad_()
    total = f(x, y).sum()
    derivatives = []
    for _ in range(3):
        (derivative,) = torch.autograd.grad(total, x, create_graph=True)
        derivatives.append(derivative.detach())
        total = (derivative * y).sum()
    return derivatives


WAYS: dict[str, Callable[[Function, Tensor, Tensor], Any]] = {
    "both arguments": lambda f, x, y: grad(lambda *z: f(*z).sum(), (0, 1))(x, y),
    "one tensor twice": lambda f, x, y: grad(lambda x: f(x, x).sum())(x),
    "aux": lambda f, x, y: grad(lambda x: (f(x, y).sum(), f(y, x)), has_aux=True)(x),
    "views": lambda f, x, y: grad(lambda x: f(x[1:], y[1:])[:2].sum())(x),
    "vjp": _pulled_twice,
    "vmap of a pullback": _pulled_in_vmap,
    "a graph of a pullback": _pulled_for_a_graph,
    "a pullback within another grad": _pulled_within_another,
    "a value of another grad": _with_a_value_of_another,
    "jacrev": lambda f, x, y: jacrev(f, (0, 1))(x, y),
    "grad of grad": lambda f, x, y: grad(lambda x: grad(_total(f, y))(x).sum())(x),
    "jvp of grad": lambda f, x, y: jvp(grad(_total(f, y)), (x,), (y,)),
    "vmap of grad": lambda f, x, y: vmap(grad(_total(f, y[0])))(x),
    "grad of vmap": lambda f, x, y: grad(lambda x: vmap(f)(x, y).sum())(x),
    "within autograd": _within_autograd,
    "a cotangent within autograd": _cotangent_within_autograd,
    "around autograd": _around_autograd,
    "around autograd without a graph": _around_autograd_without_graph,
    "no_grad": _with_a_constant_part,
    "forward mode": _in_forward_mode,
    "create_graph": _thrice,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_derivatives_are_those_of_the_function_in_torch(
    x64_session: Session, x64_remote: Remote, way: Callable[..., Any]
) -> None:
    f, x, y = _case(x64_remote), _rand(), _rand(1)
    torch.testing.assert_close(way(f, x, y), way(product, x, y), rtol=1e-12, atol=1e-12)
    assert x64_session.stats()["residuals"] == 0


def test_complex_gradients_have_torchs_convention(x64_remote: Remote) -> None:
    f, x = _case(x64_remote), torch.complex(_rand(), _rand(1))

    def slope(f: Function) -> Callable[[Tensor], Tensor]:
        return lambda x: grad(lambda x: f(x, x).abs().sum())(x)

    torch.testing.assert_close(slope(f)(x), slope(product)(x))


@pytest.mark.parametrize("is_func", [True, False], ids=["grad", "create_graph"])
def test_a_gradient_is_that_of_autograd(
    session: Session, remote: Remote, is_func: bool
) -> None:
    """To the bit, in as many calls, with one residual in between."""
    f, x = _case(remote), torch.rand(4)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf, x).sum(), leaf)
    kept = []

    def total(z: Tensor) -> Tensor:
        result = f(z, x).sum()
        kept.append(session.stats()["residuals"])
        return result

    def gradient() -> Tensor:
        if is_func:
            return grad(total)(x)
        return torch.autograd.grad(total(leaf), leaf, create_graph=True)[0].detach()

    before = session.stats()["calls"]
    assert torch.equal(gradient(), expected)
    assert session.stats()["calls"] == before + 2
    assert kept == [1]
    assert session.stats()["residuals"] == 0
