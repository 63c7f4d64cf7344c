"""Callables with arrays inside are served as functions, and the log says that nothing in them
can be trained."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

from bridge_client.inproc import host

W = jnp.ones(3)


class Holder:
    def __init__(self, array: Any) -> None:
        self.inner = {"w": [array]}

    def __call__(self, x: Any) -> Any:
        return x * self.inner["w"][0]

    def method(self, x: Any) -> Any:
        return self(x)


def closing_over(array: Any) -> Callable[[Any], Any]:
    return lambda x: x * array


JAX = {
    "closure": (closing_over(W), "array"),
    "jitted closure": (jax.jit(closing_over(W)), "array"),
    "object": (Holder(W), r"inner\['w'\]\[0\]"),
    "method": (Holder(W).method, r"__self__\.inner"),
    "partial": (functools.partial(jnp.multiply, W), r"args\[0\]"),
}
TORCH = {
    "closure": (closing_over(torch.ones(3)), "array"),
    "object": (Holder(torch.ones(3)), r"inner\['w'\]\[0\]"),
    "method": (Holder(torch.ones(3)).method, r"__self__\.inner"),
    "closure over a module": (
        closing_over(nn.Linear(3, 3)),
        r"array\._parameters\['weight'\]",
    ),
    "partial": (functools.partial(torch.mul, torch.ones(3)), r"args\[0\]"),
}


def logged(caplog: pytest.LogCaptureFixture, **models: Any) -> list[str]:
    with caplog.at_level("WARNING"):
        host(**models).close()
    return [
        record.getMessage()
        for record in caplog.records
        if "model 'm'" in record.getMessage()
    ]


@pytest.mark.parametrize("kind", JAX)
def test_arrays_in_a_jax_callable_are_named(
    caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """One line says how many arrays a callable holds, where, and what to serve to train them."""
    target, path = JAX[kind]
    (line,) = logged(caplog, jax_model={"m": target})
    assert "(apply, params)" in line
    assert re.search(path, line)


@pytest.mark.parametrize("kind", TORCH)
def test_tensors_in_a_torch_callable_are_named(
    caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Likewise of torch callables."""
    target, path = TORCH[kind]
    (line,) = logged(caplog, torch_model={"m": target})
    assert "serve the nn.Module itself" in line
    assert re.search(path, line)


def test_methods_of_modules_are_served_with_their_parameters(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A bound method of a module is a model with the module's parameters, and draws no warning."""
    linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    module = nn.Linear(3, 3)
    for in_jax in (linear, linear.__call__):
        assert not logged(caplog, jax_model={"m": in_jax})
    for in_torch in (module, module.forward, module.__call__):
        assert not logged(caplog, torch_model={"m": in_torch})
    with host(jax_model=linear.__call__) as session:
        paths = [each.path for each in session.model(None).parameters]
    assert paths == ["bias", "kernel"]
    with host(torch_model=module.forward) as session:
        paths = [each.path for each in session.model(None).parameters]
    assert paths == ["weight", "bias"]


@pytest.mark.parametrize(
    "target", [jnp.sin, jax.jit(lambda x: x), lambda x, n=3: x * n, closing_over(2.0)]
)
def test_functions_without_arrays_are_served_without_a_word(
    caplog: pytest.LogCaptureFixture, target: Any
) -> None:
    """A function that holds no array draws no warning."""
    assert not logged(caplog, jax_model={"m": target})


def test_statistics_of_a_pair_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """A pair (apply, variables) with other collections than `params` draws a warning that names
    them."""
    variables = {"params": {"w": W}, "batch_stats": {"mean": W}}
    (line,) = logged(caplog, jax_model={"m": (lambda v, x: x, variables)})
    assert "collections ['batch_stats'] like parameters" in line
    caplog.clear()
    assert not logged(caplog, jax_model={"m": (lambda v, x: x, {"params": {"w": W}})})
    assert not logged(caplog, jax_model={"m": (lambda v, x: x, {"w": W, "b": W})})
