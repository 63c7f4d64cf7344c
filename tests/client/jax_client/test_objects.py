"""Results of classes that no pytree knows, such as caches and distributions."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridge_client import Session, connect, spawn
from bridge_client.inproc import host
from bridge_client.jax import RemoteTorchFunction
from bridge_wire.errors import StructureError
from tests.client.jax_client import object_models
from tests.client.jax_client.conftest import Remote
from tests.conftest import ROOT, python_of

_NAMES = ["cached", "gaussian", "logarithm", "categorical", "keys_of", "counting"]
_NAMES += ["pickled", "stacked", "ordered", "locked", "cyclic", "slotted", "unusual"]
_NAMES += ["local"]
X = jnp.arange(3.0)


def worker() -> Session:
    models = {name: f"tests.client.jax_client.object_models:{name}" for name in _NAMES}
    return spawn(torch_model=models, python=python_of(".venv-torch"), cwd=ROOT)


@pytest.fixture(scope="module", params=["worker", "in process"])
def served(request: pytest.FixtureRequest) -> Iterator[Session]:
    """A session with the models: in a worker, and in this process."""
    if request.param == "worker":
        made: Session = worker()
    else:
        made = host(torch_model={name: getattr(object_models, name) for name in _NAMES})
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


def test_a_cache_is_passed_back(remote: Remote) -> None:
    """It can be read here, is of its own class there, and grows there without changing the one
    that was passed."""
    cached = remote("cached")
    _, first = cached(X)
    total, second = cached(X + 1, first)
    again, _ = cached(X + 1, cache=first)
    np.testing.assert_array_equal(total, 2 * (2 * X + 1))
    np.testing.assert_array_equal(again, total)
    assert (type(first).__name__, len(first.layers), len(second.layers)) == (
        "Cache",
        1,
        2,
    )
    layer = second.layers[1]
    np.testing.assert_array_equal(layer.keys, X + 1)
    assert (layer.count, layer.is_full, layer.dtype.name) == (3, False, "torch.float32")
    assert second.updated == {0: False, 1: True, 2: True}


def test_transforms_of_a_cache(remote: Remote) -> None:
    """Gradients go through a cache from call to call, and rows are batched."""
    cached = remote("cached")

    def loss(x: jax.Array) -> jax.Array:
        _, cache = cached(x**2)
        total, cache = cached(x, cache)
        return (total**2).sum() + (cache.layers[0].keys ** 3).sum()

    expected = jax.grad(lambda x: 4 * ((x**2 + x) ** 2).sum() + (x**6).sum())(X)
    np.testing.assert_allclose(jax.grad(loss)(X), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(X), expected, rtol=1e-6)
    rows = jax.vmap(lambda x: cached(x)[1].layers[0].keys)(jnp.stack([X, X + 1]))
    np.testing.assert_array_equal(rows, jnp.stack([X, X + 1]))


def test_a_distribution_is_passed_back(remote: Remote) -> None:
    """Its tensors are data with gradients by the parameters, and its sizes are themselves."""
    gaussian, logarithm = remote("gaussian"), remote("logarithm")

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        made = gaussian.apply(params, X)
        return logarithm(made, X + 1) + made.base_dist.scale.sum()

    scale = torch.full((3,), 2.0, requires_grad=True)
    x = torch.arange(3.0)
    made = torch.distributions.Normal(x, scale.exp())
    (made.log_prob(x + 1).sum() + made.scale.sum()).backward()
    gradient = jax.grad(loss)(gaussian.params)["scale"]
    np.testing.assert_allclose(gradient, scale.grad, rtol=1e-6)
    logits = remote("categorical")(X).logits
    np.testing.assert_allclose(logits, jax.nn.log_softmax(X), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pickled", "its class has a __getstate__ of its own"),
        ("stacked", "a list, tuple or dict of another class"),
        ("ordered", "a list, tuple or dict of another class"),
    ],
)
def test_some_instances_can_only_be_read(
    remote: Remote, name: str, reason: str
) -> None:
    """The error when one is passed back says why the worker cannot make it again."""
    made = remote(name)(X)
    np.testing.assert_array_equal(jax.tree.leaves(made.keys)[0], X)
    with pytest.raises(StructureError, match=reason):
        remote("keys_of")(made)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("locked", "result.lock of model 'locked' is a _thread.lock"),
        ("cyclic", "lead back to it"),
        ("slotted", "is a tests.client.jax_client.object_models.Slotted"),
        ("unusual", "is a tests.client.jax_client.object_models.Layer"),
    ],
)
def test_instances_with_other_parts_are_refused(
    remote: Remote, name: str, words: str
) -> None:
    """Slots, locks, cycles and names that are no identifiers have no counterpart here."""
    with pytest.raises(StructureError, match=words):
        remote(name)(X)


@pytest.mark.parametrize("name", ["counting", "local"])
def test_attributes_that_change_are_refused(remote: Remote, name: str) -> None:
    """A number or a class that differs from call to call is an error, not the first one."""
    with pytest.raises(StructureError, match="another structure, or other numbers"):
        for _ in range(2):
            remote(name)(X)


def test_a_cache_survives_a_restart() -> None:
    """The worker's successor knows the class again."""
    with worker() as session:
        cached = RemoteTorchFunction(session, name="cached")
        _, cache = cached(X)
        session._host._process.kill()
        session._host._process.wait()
        total, _ = cached(X, cache)
        np.testing.assert_array_equal(total, 4 * X)
