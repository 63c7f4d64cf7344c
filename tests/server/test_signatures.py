"""Signatures as a worker describes them: the parameters that a caller passes, as source."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
import torch

from bridge_client.inproc import host
from bridge_server.signatures import signature_of


def plain(
    x: int, /, y: Any, n: int = 1, *r: Any, k: str = "a", f: Any = jnp.sin, **o: Any
) -> None:
    """A function with parameters of every kind."""


def _any(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, key=0, **kwargs)

    return wrapper


@_any
def decorated(x: Any, key: Any) -> None:
    """A function that gets an argument from its decorator."""


def test_a_signature_is_source_without_annotations() -> None:
    """Defaults that are no literals are dots; the first parameter may be left out."""
    text = "(x, /, y, n=1, *r, k='a', f=..., **o)"
    assert signature_of(plain) == text
    assert signature_of(plain, skipped=1) == text.replace("x, /, ", "")


def test_unknown_signatures_are_empty() -> None:
    """A builtin may have no signature, and a decorator may pass other arguments on."""
    assert signature_of(max) == ""
    assert signature_of(decorated) == ""
    assert signature_of(jax.jit(decorated)) == ""


@pytest.mark.parametrize(
    "wrap", [jax.jit, jax.vmap, jax.checkpoint, eqx.filter_jit, torch.no_grad()]
)
def test_decorators_of_frameworks_keep_the_signature(wrap: Any) -> None:
    """The transformations of JAX, equinox and torch pass the arguments on as they are."""
    assert signature_of(wrap(lambda x, n=2: x)) == "(x, n=2)"


def test_arguments_from_the_bridge_are_left_out() -> None:
    """Parameters, state and keys are not the caller's; names after them must be passed by name."""

    def call(x: Any, state: Any, n: Any, *, key: Any = None) -> None: ...

    assert signature_of(call, supplied=("state",)) == "(x, *, n, key=None)"


def test_models_describe_their_signatures() -> None:
    """The names of a haiku model's arguments are those of its function."""
    haiku_model: Any = hk.transform(lambda x, n=1: x), {}
    with host(
        jax_model={
            "haiku": haiku_model,
            "linear": eqx.nn.Linear(2, 2, key=jax.random.key(0)),
        }
    ) as session:
        models = session.models
        assert models["haiku"].signature == "(x, n=1)"
        assert models["haiku"].arguments == ("x", "n")
        assert models["linear"].signature == "(x, *, key=None)"


def test_a_torch_module_with_hooks_has_no_known_signature() -> None:
    """A hook before the forward, or a `__call__`, may add arguments."""

    class Called(torch.nn.Linear):
        def __call__(self, *args: Any) -> Any:
            return super().__call__(args[0])

    hooked = torch.nn.Linear(2, 2)
    hooked.register_forward_pre_hook(lambda module, args: args)
    models = {"plain": torch.nn.Linear(2, 2), "hooked": hooked, "called": Called(2, 2)}
    with host(torch_model=models) as session:
        seen = {name: model.signature for name, model in session.models.items()}
    assert seen == {"plain": "(input)", "hooked": "", "called": ""}
