"""Torch models in a worker without jax, called from here and compared with themselves called here."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from tests.torch_server import models
from tests.torch_server.conftest import Remote


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the same numbers each time, away from zero."""
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0)) + 0.2


def assert_same(seen: object, expected: object) -> None:
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-10)


def summed(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x).sum()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], object]]] = {
    "forward": lambda f: f,
    "grad": lambda f: grad(summed(f)),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "vmap": lambda f: vmap(f, in_dims=1, out_dims=1),
    "hessian": lambda f: hessian(summed(f)),
    "vmap of grad": lambda f: lambda x: vmap(grad(summed(f)))(torch.stack([x, 2 * x])),
    "hessian of vmap": lambda f: lambda x: hessian(summed(vmap(f)))(torch.stack([x, 2 * x])),
    "third derivative": lambda f: jacfwd(jacrev(grad(summed(f)))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_torchs(remote: Remote, transform: str) -> None:
    """Each derivative and batch of a remote function is that of the same function here."""
    x = rand(3, 2) if transform == "vmap" else rand(3)
    made = TRANSFORMS[transform]
    assert_same(made(remote("smooth"))(x), made(models.smooth)(x))
