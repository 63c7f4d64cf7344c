"""Second and third derivatives, and batches of derivatives, are JAX's own: of ten functions, in
float64, to 1e-10."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from bridge_client import Session
from tests.client.torch_client.conftest import Remote
from tests.client.torch_client.gradient_cases import SCALARS

Function = Callable[[Any], Any]

ROWS = 5
# What torch makes of the remote function, and what jax makes of the function: the same words, in
# either language.
TRANSFORMS: dict[
    str,
    tuple[
        Callable[[Function], Function], Callable[[Function], Function], tuple[int, ...]
    ],
] = {
    "hessian": (hessian, jax.hessian, (3,)),
    "jacfwd(jacrev)": (
        lambda f: jacfwd(jacrev(f)),
        lambda f: jax.jacfwd(jax.jacrev(f)),
        (3,),
    ),
    "third derivative": (
        lambda f: jacfwd(hessian(f)),
        lambda f: jax.jacfwd(jax.hessian(f)),
        (3,),
    ),
    "vmap(hessian)": (
        lambda f: vmap(hessian(f)),
        lambda f: jax.vmap(jax.hessian(f)),
        (ROWS, 3),
    ),
    "vmap(vmap(grad))": (
        lambda f: vmap(vmap(grad(f))),
        lambda f: jax.vmap(jax.vmap(jax.grad(f))),
        (2, ROWS, 3),
    ),
}


@pytest.fixture(autouse=True)
def nothing_is_held(x64_session: Session) -> Iterator[None]:
    """After each test there are no residuals and no leased blocks, as before it."""
    yield
    stats = x64_session.stats()
    assert (stats["residuals"], stats["blocks"]) == (0, 0)


def points(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(0.3, 1.2, shape)


def in_jax(name: str) -> dict[str, np.ndarray]:
    """Return what jax makes of a function, compiled as one."""
    with jax.enable_x64(True):
        made = jax.jit(
            lambda points: {
                t: of_jax(SCALARS[name])(points[t])
                for t, (_, of_jax, _) in TRANSFORMS.items()
            }
        )({t: points(*shape) for t, (_, _, shape) in TRANSFORMS.items()})
        return jax.tree.map(np.asarray, made)


@pytest.mark.parametrize("name", SCALARS)
def test_derivatives_are_those_of_jax(
    x64_session: Session, x64_remote: Remote, name: str
) -> None:
    """Each derivative agrees to 1e-10, and a batch of Hessians takes no more calls than one
    Hessian."""
    remote, expected = x64_remote("scalar_case"), in_jax(name)

    def function(x: Tensor) -> Tensor:
        return remote(name, x)

    calls: dict[str, int] = {}
    for transform, (of_torch, _, shape) in TRANSFORMS.items():
        before = x64_session.stats()["calls"]
        made = of_torch(function)(torch.from_numpy(points(*shape)))
        calls[transform] = x64_session.stats()["calls"] - before
        np.testing.assert_allclose(
            made.numpy(), expected[transform], rtol=1e-10, atol=1e-10, err_msg=transform
        )
        assert np.abs(expected[transform]).max() > 1e-3
    assert calls["vmap(hessian)"] == calls["hessian"] == calls["jacfwd(jacrev)"]
    # The value, and one gradient for both batches.
    assert calls["vmap(vmap(grad))"] == 2
