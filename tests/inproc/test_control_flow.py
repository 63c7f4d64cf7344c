"""Operators of torch that take functions, such as torch.cond, in models called from JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention

from bridge_client.inproc import to_jax
from bridge_client.jax import RemoteTorchFunction
from bridge_server.runtime import Options
from bridge_server.torch_runtime import TorchRuntime
from bridge_wire.errors import RemoteModelError
from tests.inproc.test_tracing import assert_same, loss_of, reference
from tests.runtimes import Hosted

Model = Callable[[Tensor], Tensor]


class Branches(nn.Module):
    """Two branches that share weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return torch.cond(
            x.sum() > 0,
            lambda x: torch.sin(self.layer(x)),
            lambda x: torch.cos(self.layer(x)),
            (x,),
        )


def looped(x: Tensor) -> Tensor:
    more = lambda i, x: i < 3  # noqa: E731
    step = lambda i, x: (i + 1, torch.sin(x) * 1.5)  # noqa: E731
    return while_loop(more, step, (torch.tensor(0), x))[1]


def grown(x: Tensor) -> Tensor:
    return while_loop(lambda x: x.sum() < 50, lambda x: (x * 1.5 + 1,), (x,))[0]


def scanned(x: Tensor) -> Any:
    step = lambda total, y: (total + torch.sin(y), total * y)  # noqa: E731
    return scan(step, torch.zeros(3), x)[1]


def mapped(x: Tensor) -> Any:
    return torch_map(lambda row: torch.sin(row) * 2, x)


def sines(x: Tensor) -> Tensor:
    for _ in range(3):
        x = torch.sin(x) * 1.5
    return x


def growth(x: Tensor) -> Tensor:
    while x.sum() < 50:
        x = x * 1.5 + 1
    return x


def scan_by_hand(x: Tensor) -> Tensor:
    totals = torch.cat([torch.zeros(1, 3), x.sin().cumsum(0)[:-1]])
    return totals * x


# Each with the same function in plain operators.
MODELS: dict[str, tuple[Model, Model]] = {
    "while_loop": (looped, sines),
    "while_loop by values": (grown, growth),
    "scan": (scanned, scan_by_hand),
    "map": (mapped, lambda x: torch.sin(x) * 2),
}


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(4, 3) + 0.1


@pytest.mark.parametrize("sign", [1, -1])
def test_both_branches_of_cond_have_torchs_gradients(sign: int, x: Tensor) -> None:
    """Values and gradients of torch.cond are torch's in each branch, with parameters of the
    caller, call after call."""
    model = Branches()
    f = RemoteTorchFunction(model)
    for _ in range(2):
        value, gradients = jax.jit(jax.value_and_grad(loss_of(f.apply)))(
            f.params, to_jax(sign * x)
        )
        expected, by_name = reference(model, sign * x)
        assert_same(value, expected, 1e-5)
        for name, gradient in by_name.items():
            assert_same(gradients[name], gradient, 1e-5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(1.5)
                f.params = {**f.params, name: to_jax(parameter.detach().clone())}
    rows = jnp.stack([to_jax(x), to_jax(-x)])
    seen = jax.vmap(f)(rows)
    for row, side in zip(seen, (x, -x), strict=True):
        assert_same(row, model(side).detach(), 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_loops_have_the_derivatives_of_their_steps(name: str, x: Tensor) -> None:
    """Values, gradients, tangents and batches of a loop are those of its steps in plain torch.
    Second derivatives, which torch computes without some terms, are refused."""
    loop, plain = MODELS[name]
    f, g = (RemoteTorchFunction(each) for each in (loop, plain))
    a = to_jax(x)
    total = lambda h: lambda a: (h(a) ** 2).sum()  # noqa: E731
    transforms: list[Callable[..., Any]] = [
        lambda h: h(a),
        lambda h: jax.grad(total(h))(a),
        lambda h: jax.jit(jax.grad(total(h)))(a),
        lambda h: jax.jvp(h, (a,), (a,))[1],
        lambda h: jax.vmap(h)(jnp.stack([a, 2 * a])),
    ]
    for transform in transforms:
        np.testing.assert_allclose(transform(f), transform(g), rtol=1e-4, atol=1e-5)
    with pytest.raises(RemoteModelError, match="of which torch computes first ones"):
        jax.jvp(jax.grad(total(f)), (a,), (a,))
    with pytest.raises(RemoteModelError, match="of which torch computes first ones"):
        jax.jacrev(jax.grad(total(f)))(a)


def test_torch_still_compiles_cond_after_a_trace(x: Tensor) -> None:
    """A trace leaves torch.cond as it was: Dynamo compiles its functions afterwards too."""
    model = Branches()
    expected = model(x).detach()
    assert_same(RemoteTorchFunction(model)(to_jax(x)), expected, 1e-6)
    fresh = Branches()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), expected)


def test_draws_in_a_branch_are_seen(x: Tensor) -> None:
    """A key decides about the draws within a branch."""
    model = lambda x: torch.cond(  # noqa: E731
        x.sum() > 0, lambda x: x * torch.rand_like(x), lambda x: x + 1, (x,)
    )
    f = RemoteTorchFunction(model)
    seen = [
        np.asarray(f.apply({}, to_jax(x), rng=jax.random.key(i))) for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(seen[0], seen[1])
    assert (seen[0] != seen[2]).any()


def test_fingerprints_cover_branches(x: Tensor) -> None:
    """The model's fingerprint changes with a constant in a branch, and with nothing else."""

    def model(factor: float) -> Any:
        return lambda x: torch.cond(
            x.sum() > 0, lambda x: x * factor, lambda x: x + 1, (x,)
        )

    runtime = TorchRuntime(Options())
    digests = []
    for factor in (2.0, 2.0, 3.0):
        hosted = Hosted(runtime, model(factor))
        call = hosted.described(x.numpy())
        hosted.prepared(call)
        digests.append(runtime._call(hosted.model, call).operators)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_runs(x: Tensor) -> None:
    """flex_attention has torch's values. Its gradient, which torch lacks on CPU, is torch's
    error."""
    causal = lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf"))  # noqa: E731
    model = lambda q: flex_attention(q, q, q, score_mod=causal)  # noqa: E731
    q = torch.randn(1, 2, 8, 8)
    f = RemoteTorchFunction(model)
    assert_same(f(to_jax(q)), model(q), 1e-6)
    with pytest.raises(RemoteModelError, match="does not support backward on CPU"):
        jax.grad(lambda q: f(q).sum())(to_jax(q))
