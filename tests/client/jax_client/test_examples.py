"""Examples: values on which the worker traces a model that cannot be traced without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge_client.jax import RemoteTorchFunction
from bridge_wire.errors import RemoteModelError, StructureError
from tests.client.jax_client.conftest import Remote

X = jnp.asarray([5.0, 5.5])
NAME = "between_ten_and_eleven"


def gradient_of(f: RemoteTorchFunction) -> jax.Array:
    return jax.jit(jax.grad(lambda x: f(x).sum()))(X)


def test_made_up_values_are_named_in_the_error(remote: Remote) -> None:
    """In compiled code the first call of a model that raises on all made-up values says so, and
    names the remedy."""
    with pytest.raises(
        RemoteModelError,
        match=r"(?s)ValueError: the sum is 0\.0\n.*\(zeros, ones, .*\bexample_args=",
    ):
        gradient_of(remote(NAME))


def test_example_args_trace_a_model_in_compiled_code(any_lane: Remote) -> None:
    """With an example of its arguments the model has values, gradients and batches in compiled
    code."""
    f = any_lane(NAME, example_args=(X,))
    np.testing.assert_allclose(gradient_of(f), jnp.cos(X), rtol=1e-6)
    batch = jnp.stack([X, X[::-1]])
    np.testing.assert_allclose(jax.jit(jax.vmap(f))(batch), jnp.sin(batch), rtol=1e-6)


def test_examples_have_numbers_and_keywords(remote: Remote) -> None:
    """Numbers and keyword arguments of an example have their values too; each structure has its
    own example."""
    f = remote(NAME).trace_on(X / 2, 2.0).trace_on(X / 4, scale=4.0)
    seen = jax.jit(lambda x: (f(x / 2, 2.0), f(x / 4, scale=4.0)))(X)
    for value, scale in zip(seen, (2.0, 4.0), strict=True):
        np.testing.assert_allclose(value, scale * jnp.sin(X / scale), rtol=1e-6)


def test_a_call_outside_of_jit_is_its_own_example(remote: Remote) -> None:
    """The first call with values is traced on them, and then compiled code works too."""
    f = remote(NAME)
    np.testing.assert_allclose(f(X), jnp.sin(X), rtol=1e-6)
    np.testing.assert_allclose(gradient_of(f), jnp.cos(X), rtol=1e-6)
    with pytest.raises(RemoteModelError, match=r"the sum is 31\.5\n\(in"):
        remote(NAME)(3 * X)


def test_an_example_on_which_the_model_raises_is_its_error(remote: Remote) -> None:
    """The values of an example are not made up, so the error names no further remedy."""
    f = remote(NAME, example_args=(3 * X,))
    with pytest.raises(RemoteModelError, match=r"the sum is 31\.5\n\(in"):
        f(X)


def test_examples_need_values(remote: Remote) -> None:
    """A traced array, and one that no message carries, are no examples."""
    f = remote(NAME)
    with pytest.raises(StructureError, match=r"`args\[0\]` is traced"):
        jax.jit(f.trace_on)(X)
    with pytest.raises(StructureError, match=r"8000000 bytes, the limit is 4194304"):
        f.trace_on(jnp.zeros(2_000_000))


def test_increasing_numbers_are_made_up_too(remote: Remote) -> None:
    """A solver that wants increasing times is traced without an example."""
    t = jnp.linspace(0.0, 1.0, 4)
    f = remote("along")
    gradient = jax.jit(jax.grad(lambda y: f(y, t)[-1].sum()))(X)

    def expected(y: jax.Array) -> jax.Array:
        for dt in t[1:] - t[:-1]:
            y = y + dt * jnp.sin(y)
        return y.sum()

    np.testing.assert_allclose(gradient, jax.grad(expected)(X), rtol=1e-5)
