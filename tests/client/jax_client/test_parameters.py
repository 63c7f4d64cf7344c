"""Modules: their parameters, buffers and random numbers, training, and Flax models that they are
a part of."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch.nn.attention import SDPBackend, sdpa_kernel

from bridge_client import Session
from bridge_client.jax.flax import LinenModule, NnxModule
from bridge_wire.errors import DTypeError, SpecError, StructureError
from tests.client.jax_client import torch_models
from tests.client.jax_client.conftest import Remote
from tests.server.torch_server import models

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(5, 4))


def in_torch(
    module: torch.nn.Module, *inputs: np.ndarray
) -> tuple[dict[str, Any], list[Any]]:
    """Return torch's own gradients of the sum of squares: by parameter, and by float input."""
    module.zero_grad()
    tensors = [torch.tensor(x, requires_grad=x.dtype.kind == "f") for x in inputs]
    (module(*tensors) ** 2).sum().backward()
    return {name: p.grad.numpy() for name, p in module.named_parameters()}, [
        t.grad.numpy() for t in tensors if t.requires_grad
    ]


IMAGES = RNG.normal(size=(2, 3, 8, 8))
TOKENS = RNG.integers(0, 11, (2, 5))
MODULES = {
    "resnet": (models.resnet, (IMAGES,)),
    "vit": (models.vit, (IMAGES,)),
    "transformer": (torch_models.transformer, (TOKENS, TOKENS[:, ::-1].copy())),
    "perceptron": (torch_models.perceptron, (ROWS,)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)]
)
@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_modules_are_torchs(
    remote: Remote, session: Session, name: str, dtype: str, tolerance: float
) -> None:
    """By each parameter and each input, as torch has them in float64; by one forward and one
    backward."""
    module, inputs = MODULES[name]
    f = remote(name)
    cast = lambda x: jnp.asarray(x, dtype if x.dtype.kind == "f" else None)  # noqa: E731
    params, buffers = (
        {name: cast(value) for name, value in own.items()}
        for own in (f.params, f.buffers)
    )
    arrays = list(map(cast, inputs))
    assert list(params) == [n for n, _ in module.named_parameters()]
    assert list(f.buffers) == [n for n, _ in module.named_buffers()]
    floats = tuple(i for i, x in enumerate(inputs) if x.dtype.kind == "f")
    before = session.stats()["calls"]
    loss = lambda params, *xs: (f.apply(params, *xs, buffers=buffers) ** 2).sum()  # noqa: E731
    by_params, *by_inputs = jax.block_until_ready(
        jax.jit(jax.grad(loss, (0, *(1 + i for i in floats))))(params, *arrays)
    )
    assert session.stats()["calls"] - before == 2
    expected_params, expected_inputs = in_torch(module, *inputs)
    assert by_params.keys() == expected_params.keys()
    for key, expected in expected_params.items():
        np.testing.assert_allclose(
            by_params[key], expected, rtol=tolerance, atol=tolerance
        )
    for seen, expected in zip(by_inputs, expected_inputs, strict=True):
        np.testing.assert_allclose(seen, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("x64")
def test_second_derivatives_of_a_module(remote: Remote) -> None:
    """Hessian-vector products by the parameters of a vision transformer are torch's, to 1e-8."""
    f, module = remote("vit"), models.vit
    params = f.params
    direction = {
        name: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape)
        for name, p in params.items()
    }
    loss = lambda p: (f.apply(p, jnp.asarray(IMAGES)) ** 2).sum()  # noqa: E731
    seen = jax.jit(lambda p, d: jax.jvp(jax.grad(loss), (p,), (d,))[1])(
        params, direction
    )
    own = list(module.parameters())
    vectors = [torch.tensor(np.asarray(d)) for d in direction.values()]
    # Torch's faster attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        made = torch.autograd.grad(
            (module(torch.tensor(IMAGES)) ** 2).sum(), own, create_graph=True
        )
        expected = torch.autograd.grad(made, own, vectors)
    for name, value in zip(params, expected, strict=True):
        np.testing.assert_allclose(seen[name], value.numpy(), rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_training_with_optax_is_training_in_torch(
    remote: Remote, session: Session
) -> None:
    """100 steps of Adam, in a scan, end where torch's end, to 1e-8."""
    f, module = (
        remote("perceptron"),
        torch_models._made(lambda: torch_models._perceptron().double()),
    )
    x, y = jnp.asarray(ROWS), jnp.asarray(RNG.normal(size=(5, 3)))
    optimizer = optax.adam(1e-2)

    def step(state: Any, _: None) -> tuple[Any, jax.Array]:
        params, moments = state
        loss, gradients = jax.value_and_grad(
            lambda p: ((f.apply(p, x) - y) ** 2).mean()
        )(params)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments), loss

    params = f.params
    (trained, _), losses = jax.jit(lambda s: jax.lax.scan(step, s, None, length=100))(
        (params, optimizer.init(params))
    )
    in_torch = torch.optim.Adam(module.parameters(), 1e-2)
    for loss in losses:
        in_torch.zero_grad()
        expected = (
            (module(torch.tensor(np.asarray(x))) - torch.tensor(np.asarray(y))) ** 2
        ).mean()
        expected.backward()
        in_torch.step()
        np.testing.assert_allclose(loss, expected.item(), rtol=1e-8)
    assert losses[-1] < losses[0] / 2
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(
            trained[name], parameter.detach().numpy(), rtol=1e-8, atol=1e-8
        )
    stats = session.stats()
    assert (stats["residuals"], stats["calls"]) == (0, 201)


def test_whose_parameters_a_call_uses(remote: Remote, session: Session) -> None:
    """A plain call uses the worker's own, `apply` those that it is given, parameters="client"
    those of the object."""
    f, x = remote("single"), jnp.asarray(ROWS, jnp.float32)
    twice = {name: 2 * value for name, value in f.params.items()}
    np.testing.assert_array_equal(f(x), f.apply(f.params, x))
    assert not np.allclose(f(x), f.apply(twice, x))
    g = remote("single", parameters="client")
    np.testing.assert_array_equal(g(x), f(x))
    for each in (g, remote("single")):
        each.params = twice
        np.testing.assert_array_equal(each(x), f.apply(twice, x))
    # They lie in the session's memory, and are passed as they lie.
    call = jax.jit(f.apply)
    call(f.params, x).block_until_ready()
    before = session.stats()["bytes_copied"]
    made = call(f.params, x).block_until_ready()
    assert session.stats()["bytes_copied"] - before == x.nbytes + made.nbytes


def test_parameters_are_checked(remote: Remote, session: Session) -> None:
    """Names that are missing or unknown, shapes that differ, and 64-bit floats without x64, by
    name."""
    f, x = remote("single"), jnp.ones((1, 4))
    params = f.params
    with pytest.raises(
        StructureError, match=r"params lacks \['0.bias'\] and has \['bias'\]"
    ):
        f.apply({**{k: v for k, v in params.items() if k != "0.bias"}, "bias": x}, x)
    with pytest.raises(StructureError, match=r"params lacks \['0.bias'\]$"):
        f.apply({k: v for k, v in params.items() if k != "0.bias"}, x)
    with pytest.raises(
        StructureError, match="params is a list; expected a dict of arrays by name"
    ):
        f.apply([x], x)
    with pytest.raises(
        SpecError, match=r"parameter `0.bias` has shape \[7\]; the model's has \[8\]"
    ):
        jax.eval_shape(f.apply, {**params, "0.bias": jnp.ones(7)}, x)
    with pytest.raises(
        SpecError, match=r"parameter `0.bias` has shape \[\]; the model's has \[8\]"
    ):
        f.apply({**params, "0.bias": 0.0}, x)
    with pytest.raises(
        DTypeError,
        match=r"parameter `0.weight` has dtype float64, .*set jax_enable_x64",
    ):
        _ = remote("perceptron").params
    with pytest.raises(
        StructureError, match=r"rng has dtype float32 and shape \[2\]; expected one key"
    ):
        f.apply(params, x, rng=jnp.ones(2))


def test_buffers_and_random_numbers(remote: Remote) -> None:
    """BatchNorm returns its new statistics, and dropout follows the key: in jit, at once, and
    for each kind of key."""
    f, x = remote("batch_norm"), jnp.asarray(ROWS, jnp.float32)
    params, buffers = f.params, f.buffers

    def call(buffers: Any, key: Any) -> Any:
        return f.apply(params, x, buffers=buffers, mutable=True, rng=key)

    key = jax.random.key(1)
    made, changed = call(buffers, key)
    assert (
        call({**buffers, "1.num_batches_tracked": 3}, key)[1]["1.num_batches_tracked"]
        == 4
    )
    module = torch_models._made(
        lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    )
    module(torch.tensor(np.asarray(x)))
    for name, value in module.named_buffers():
        np.testing.assert_allclose(changed[name], value.numpy(), rtol=1e-5, atol=1e-7)
    assert changed["1.num_batches_tracked"].dtype == jnp.int32
    assert float(buffers["1.running_mean"].sum()) == 0.0
    for same in (
        jax.random.PRNGKey(1),
        jax.random.wrap_key_data(jax.random.key_data(key)),
    ):
        np.testing.assert_allclose(
            jax.jit(call)(buffers, same)[0], made, rtol=1e-5, atol=1e-6
        )
    assert not np.allclose(call(buffers, jax.random.key(2))[0], made)
    assert (call(buffers, jax.random.key(1, impl="rbg"))[0] == 0).any()
    twice = call(call(buffers, key)[1], key)[1]
    assert int(twice["1.num_batches_tracked"]) == 2
    # One key for each member of a batch; the gradient has the same mask as the value.
    batch = jax.vmap(lambda key: f.apply(params, x, rng=key))(jax.random.split(key, 3))
    assert len({np.asarray(row).tobytes() for row in batch}) == 3
    dropped = lambda scale: f.apply({**params, "1.weight": scale}, x, rng=key)  # noqa: E731
    value, gradient = (
        dropped(params["1.weight"]),
        jax.jacrev(dropped)(params["1.weight"]),
    )
    np.testing.assert_array_equal(
        (np.asarray(gradient) != 0).any(-1), np.asarray(value) != 0
    )


class LinenNet(linen.Module):
    first: LinenModule

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(2)(self.first(x))


def test_a_layer_of_a_linen_model(remote: Remote, session: Session) -> None:
    """Its parameters begin as the worker's, are trained with the others, and its statistics
    follow."""
    f, x = remote("batch_norm"), jnp.asarray(ROWS, jnp.float32)
    net = LinenNet(LinenModule(f))
    variables = jax.jit(net.init)(jax.random.key(0), x)
    np.testing.assert_array_equal(
        variables["params"]["first"]["0.weight"], f.params["0.weight"]
    )
    assert set(variables["batch_stats"]["first"]) == set(f.buffers)
    optimizer = optax.sgd(1e-1)

    @jax.jit
    def step(variables: Any, state: Any, key: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            made, changed = net.apply(
                {**variables, "params": params},
                x,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return (made**2).mean(), changed

        (value, changed), gradients = jax.value_and_grad(loss, has_aux=True)(
            variables["params"]
        )
        updates, state = optimizer.update(gradients, state)
        return (
            {"params": optax.apply_updates(variables["params"], updates), **changed},
            state,
            value,
        )

    state = optimizer.init(variables["params"])
    losses = []
    for key in jax.random.split(jax.random.key(1), 30):
        variables, state, value = step(variables, state, key)
        losses.append(float(value))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) / 2
    assert int(variables["batch_stats"]["first"]["1.num_batches_tracked"]) == 30
    np.testing.assert_array_equal(net.apply(variables, x).shape, (5, 2))
    assert session.stats()["residuals"] == 0


def test_a_layer_of_an_nnx_model(remote: Remote) -> None:
    """The same for nnx: its state is split, jitted and trained like any other."""
    f, x = remote("batch_norm"), jnp.asarray(ROWS, jnp.float32)

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = NnxModule(f, rngs=rngs)
            self.second = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(self.first(x))

    net = Net(nnx.Rngs(0, dropout=1))
    optimizer = nnx.Optimizer(net, optax.sgd(1e-1), wrt=nnx.Param)

    @nnx.jit
    def step(net: Net, optimizer: nnx.Optimizer[Net]) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda net: (net(x) ** 2).mean())(net)
        optimizer.update(net, gradients)
        return loss

    losses = [float(step(net, optimizer)) for _ in range(30)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) / 2
    assert int(net.first.buffers["1.num_batches_tracked"][...]) == 30
    net.eval()
    net(x)
    assert int(net.first.buffers["1.num_batches_tracked"][...]) == 30
