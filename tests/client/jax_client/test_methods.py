"""Several methods of one torch module, on every lane."""

import copy
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridge_client.jax.flax import LinenModule
from bridge_wire.errors import CallerError, RemoteModelError
from tests.client.jax_client import torch_models
from tests.client.jax_client.conftest import Remote

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
METHODS = ("__call__", "decode", "encode", "noisy")


def in_torch(method: str, x: Any) -> np.ndarray:
    """Return the value of a method as torch computes it."""
    module = copy.deepcopy(torch_models.coder)
    function = getattr(module, method)
    return np.asarray(function(torch.from_numpy(np.array(x))).detach())


def test_methods_are_those_of_torch(any_lane: Remote) -> None:
    """Each method has torch's value, within jit and outside."""
    g = any_lane("coder")
    encode, decode = g.method("encode"), g.method("decode")
    assert g.session.models["coder"].methods == METHODS
    z = encode(X)
    np.testing.assert_allclose(z, in_torch("encode", X), rtol=1e-5)
    np.testing.assert_allclose(decode(z), in_torch("decode", z), rtol=1e-5)
    chained = jax.jit(lambda x: decode(encode(x)))
    np.testing.assert_allclose(chained(X), g(X), rtol=1e-5)


def test_methods_share_parameters_and_buffers(any_lane: Remote) -> None:
    """Values assigned to one function are those of all methods; gradients add up."""
    g = any_lane("coder")
    encode, decode = g.method("encode"), g.method("decode")
    assert encode.params.keys() == g.params.keys()

    def through_methods(params: Any) -> Any:
        return (decode.apply(params, encode.apply(params, X)) ** 2).sum()

    def at_once(params: Any) -> Any:
        return (g.apply(params, X) ** 2).sum()

    expected, seen = jax.grad(at_once)(g.params), jax.grad(through_methods)(g.params)
    for name in expected:
        np.testing.assert_allclose(seen[name], expected[name], rtol=1e-4)
    decode.params = jax.tree.map(jnp.zeros_like, g.params)
    assert not np.any(encode(X)) and not np.any(g(X))
    _, buffers = encode.apply(g.params, X, mutable=True)
    assert buffers["count"] == 1
    encode.buffers = buffers
    assert g.buffers["count"] == 1


def test_methods_are_made_once(any_lane: Remote) -> None:
    """The same method is the same object; a copy's methods share the copy's parameters."""
    g = any_lane("coder")
    encode = g.method("encode")
    assert g.method("encode") is encode and encode.method("__call__") is g
    assert "coder.encode" in repr(encode) and encode.__name__ == "coder.encode"
    twin = copy.deepcopy(g)
    twin.params = jax.tree.map(jnp.zeros_like, g.params)
    assert not np.any(twin.method("encode")(X)) and np.all(encode(X))


def test_constructor_takes_a_method(any_lane: Remote) -> None:
    """`method=` is the method that the function calls; `module:object.method` is such a model."""
    g = any_lane("coder")
    expected = g.method("encode")(X)
    np.testing.assert_array_equal(any_lane("coder", method="encode")(X), expected)
    single = any_lane("encode")
    np.testing.assert_array_equal(single(X), expected)
    assert single.params.keys() == g.params.keys()
    assert single.session.models["encode"].methods == ("__call__",)
    static = any_lane("coder", method="encode", static_argnames="power")
    np.testing.assert_array_equal(static(X, 2), static(X, power=2))


@pytest.mark.parametrize(
    "method",
    [
        *("forward", "to", "half", "train", "load_state_dict", "register_buffer"),
        *("_secret", "_call_impl", "__class__", "encoder", "encoder.forward", "last"),
    ],
)
def test_other_attributes_are_refused(remote: Remote, method: str) -> None:
    """nn.Module's methods, overridden or not, submodules and private names are CallerErrors."""
    g = remote("coder")
    listed = r"\['__call__', 'decode', 'encode', 'noisy'\]"
    with pytest.raises(CallerError, match=listed):
        g.method(method)


def test_methods_are_transformed(any_lane: Remote) -> None:
    """vmap, jvp and second derivatives work as for the module itself."""
    encode = any_lane("coder", method="encode")
    np.testing.assert_allclose(jax.vmap(encode)(X), encode(X), rtol=1e-5)
    _, pushed = jax.jvp(encode, (X,), (np.ones_like(X),))
    y, pull = jax.vjp(encode, X)
    (pulled,) = pull(jnp.ones_like(y))
    np.testing.assert_allclose(pushed.sum(), pulled.sum(), rtol=1e-4)
    hessian = jax.hessian(lambda x: (encode(x) ** 2).sum())(X[0])
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-4, atol=1e-6)


def test_methods_draw_by_key(any_lane: Remote) -> None:
    """A key decides the random numbers of a method."""
    g = any_lane("coder")

    def draw(seed: int) -> Any:
        return g.method("noisy").apply(g.params, X, rng=jax.random.key(seed))

    np.testing.assert_array_equal(draw(0), draw(0))
    assert np.any(draw(0) != draw(1))


def test_calls_of_methods_leave_nothing_behind(any_lane: Remote) -> None:
    """Attributes and buffers that a method sets are those of the module again, also after an
    error."""
    g = any_lane("coder")
    encode = g.method("encode")
    first = encode(X)
    with pytest.raises(RemoteModelError):
        encode(X[:, :3])
    np.testing.assert_array_equal(encode(X), first)
    assert g.buffers["count"] == 0


def test_method_is_a_flax_layer(remote: Remote) -> None:
    """A method within a Flax model has the module's parameters."""
    encode = remote("coder", method="encode")
    layer = linen.Sequential([LinenModule(encode), linen.Dense(1)])
    variables = layer.init(jax.random.key(0), X)
    assert layer.apply(variables, X).shape == (5, 1)
