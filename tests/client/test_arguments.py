"""A call's arguments are checked against the model's signature before it is sent."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

from bridge_client.arguments import check_arguments
from bridge_client.jax import RemoteTorchFunction
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import ArgumentError, CallerError

SIGNATURE = "(a, /, b, c=1, *, d, e=...)"

# Arguments that fit the signature above, and those that do not, with the text that says why.
FITTING: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((1, 2), {"d": 3}),
    ((1,), {"b": 2, "d": 3, "e": 4}),
    ((1, 2, 3), {"d": 3}),
]
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "missing a required argument: 'b'": ((1,), {"d": 3}),
    "missing a required argument: 'd'": ((1, 2), {}),
    "too many positional arguments": ((1, 2, 3, 4), {"d": 3}),
    "got an unexpected keyword argument 'z'": ((1, 2), {"d": 3, "z": 4}),
    "multiple values for argument 'b'": ((1, 2), {"b": 2, "d": 3}),
}


def check(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    signature: str = SIGNATURE,
    rngs: Sequence[str] = (),
) -> None:
    check_arguments("f", signature, (args, kwargs), rngs)


def test_fitting_arguments_pass() -> None:
    """Every way to pass an argument that Python has is accepted."""
    for args, kwargs in FITTING:
        check(args, kwargs)
    check((1, 2, 3), {"z": 4}, "(a, *args, **kwargs)")


@pytest.mark.parametrize("text", WRONG)
def test_wrong_arguments_are_a_type_error_with_the_signature(text: str) -> None:
    """The error is both a CallerError and a TypeError, and shows the whole signature."""
    with pytest.raises(ArgumentError) as raised:
        check(*WRONG[text])
    assert isinstance(raised.value, TypeError) and isinstance(raised.value, CallerError)
    assert str(raised.value) == f"model 'f': {text}; its arguments are {SIGNATURE}"


def test_a_key_from_the_worker_need_not_be_passed() -> None:
    """An argument named in rngs may be missing; without rngs, the error names that option."""
    check((1,), {}, "(x, key)", rngs=("key",))
    with pytest.raises(ArgumentError, match="as in rngs='key'"):
        check((1,), {}, "(x, key)")


@pytest.mark.parametrize(
    "source",
    ["", "(", "x", "(x): ...\nimport os\ndef g(y)", "(x)" + " " * (1 << 15), "(\0)"],
)
def test_a_peer_s_text_that_is_no_signature_checks_nothing(source: str) -> None:
    """A worker's text is parsed and never run; without a signature, the worker checks the call."""
    check((1, 2, 3), {"z": 4}, source)


def test_defaults_are_never_evaluated() -> None:
    """A default is only known to exist, however it is written."""
    check((1,), {}, "(x, n=print(1 / 0))")


def _jax_model(x: Any, n: Any = 2) -> Any:
    return x * n


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, x: Any, n: Any = 2) -> Any:
        return self.linear(x) * n


# Calls of a model `f(x, n=2)` that lack an argument or have an unexpected one.
MISTAKES: dict[str, Callable[[Any, Any], Any]] = {
    "missing a required argument: 'x'": lambda f, x: f(),
    "too many positional arguments": lambda f, x: f(x, 1, 2),
    "got an unexpected keyword argument 'm'": lambda f, x: f(x, m=1),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_refused_in_both_directions(text: str) -> None:
    """A call of a JAX model from torch, and of a torch model from JAX, compiled or not."""
    to_jax, to_torch = RemoteJaxFunction(_jax_model), RemoteTorchFunction(Scaled())
    params, call = to_torch.params, MISTAKES[text]
    calls: list[Callable[[], Any]] = [
        lambda: call(to_jax, torch.ones(3)),
        lambda: call(to_jax, torch.ones(3, requires_grad=True)),
        lambda: call(to_torch, jnp.ones(3)),
        lambda: jax.jit(lambda x: call(to_torch, x))(jnp.ones(3)),
        lambda: call(lambda *a, **k: to_torch.apply(params, *a, **k), jnp.ones(3)),
    ]
    sessions = to_jax.session, to_torch.session
    before = [session.stats()["calls"] for session in sessions]
    for each in calls:
        with pytest.raises(ArgumentError, match=text) as raised:
            each()
        assert str(raised.value).endswith("its arguments are (x, n=2)")
    assert [session.stats()["calls"] for session in sessions] == before
    to_jax(torch.ones(3), n=3)
    to_torch(jnp.ones(3), n=3)
