"""Instances of a torch worker's classes keep their class, and outlive the worker."""

import pickle
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge_client import Session, connect, spawn
from bridge_client.inproc import host
from bridge_client.jax import RemoteTorchFunction
from tests.client.jax_client import state_models
from tests.client.jax_client.conftest import Remote
from tests.conftest import ROOT, python_of

_NAMES = ["cache", "read", "output", "logits", "mixed", "unmixed"]
_NAMES += ["settings", "stepped"]


def worker() -> Session:
    models = {name: f"tests.client.jax_client.state_models:{name}" for name in _NAMES}
    return spawn(torch_model=models, python=python_of(".venv-torch"), cwd=ROOT)


@pytest.fixture(scope="module", params=["worker", "in process"])
def served(request: pytest.FixtureRequest) -> Iterator[Session]:
    """A session with the models: in a worker, and in this process."""
    if request.param == "worker":
        made: Session = worker()
    else:
        made = host(torch_model={name: getattr(state_models, name) for name in _NAMES})
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


X = jnp.arange(3.0)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["at once", "jit"])
def test_a_registered_class_comes_back(remote: Remote, wrap: Any) -> None:
    """A class that the model's code has registered with torch's pytrees is itself there, with its
    context, and gradients go through it."""
    cache, read = remote("cache"), remote("read")
    np.testing.assert_array_equal(wrap(lambda x: read(cache(x)))(X), 3 * X)
    gradient = wrap(jax.grad(lambda x: read(cache(x)).sum()))(X)
    np.testing.assert_array_equal(gradient, 3 * np.ones(3))


def test_an_output_is_a_mapping_with_attributes(remote: Remote) -> None:
    """As transformers' ModelOutput: by key, by attribute, and as its own class there."""
    made = remote("output")(X)
    assert list(made) == ["logits", "hidden"] and made["logits"] is made.logits
    np.testing.assert_array_equal(remote("logits")(made), 2 * X)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, made)
    np.testing.assert_array_equal(remote("logits")(doubled), 4 * X)


def test_numbers_and_constants_of_a_result(remote: Remote) -> None:
    """They are part of the result's structure, readable here, and themselves there."""
    made = remote("mixed")(X)
    assert (made["size"], made["shape"], made["ratio"]) == (3, (3,), 0.5)
    assert (made["mode"].value, made["dtype"].name) == ("eval", "torch.float32")
    np.testing.assert_array_equal(remote("unmixed")(made), X)


def test_a_state_survives_a_restart_and_a_pickle() -> None:
    """The worker's successor makes the class again, also for a state from a file."""
    with worker() as session:
        cache, read = (RemoteTorchFunction(session, name=n) for n in ("cache", "read"))
        state = cache(X)
        restored = pickle.loads(pickle.dumps(state))
        session._host._process.kill()
        session._host._process.wait()
        for each in (restored, state):
            np.testing.assert_array_equal(read(each), 3 * X)
        assert type(cache(X)) is type(state) is type(restored)


def test_numbers_and_texts_of_a_state_are_static(remote: Remote) -> None:
    """They go back as what they are, and transforms and loops see the arrays only."""
    settings, step = remote("settings", static_argnames="n"), remote("stepped")
    state = settings(X, n=3)
    for _ in range(2):
        state = step(state)
    assert (type(state.n), state.n, state.how) == (int, 3, "add")
    np.testing.assert_array_equal(state.x, X + 6)
    looped, _ = jax.lax.scan(lambda s, _: (step(s), None), settings(X, n=3), None, 2)
    np.testing.assert_array_equal(looped.x, X + 6)
    gradient = jax.grad(lambda x: step(settings(x, n=3)).x.sum())(X)
    np.testing.assert_array_equal(gradient, np.ones(3))
    rows = jnp.stack([X, X + 1])
    batched = jax.vmap(lambda x: step(settings(x, n=3)))(rows)
    np.testing.assert_array_equal(batched.x, rows + 3)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(3,)]
