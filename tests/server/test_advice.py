"""Errors of JAX models that lack a value: the text names `static_argnames` where a Python number is
the reason, and another remedy where an array is."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridge_client.torch import RemoteJaxFunction
from bridge_server.runtime import Options
from bridge_server.torch_via_xla import XlaRuntime
from bridge_wire.errors import CallerError, RemoteModelError
from tests.runtimes import Hosted


def _length(x: Any, n: Any) -> Any:
    return jax.lax.scan(lambda c, _: (c * 2, None), x, None, length=n)[0]


def _loop(x: Any, n: Any) -> Any:
    for _ in range(n):
        x = x * 2
    return x


@functools.partial(jax.jit, static_argnums=1)
def _jitted(x: Any, n: Any) -> Any:
    return x * n


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scaled(x: Any, n: Any) -> Any:
    return x * n


_scaled.defvjp(lambda x, n: (x * n, None), lambda n, _, ct: (ct * n,))


def _checked(x: Any, n: Any) -> Any:
    if not isinstance(n, int):
        raise ValueError("n must be an int")
    return x * n


# Models that need the value of `n`; all of them work with n = 1.
NEEDS_VALUE: dict[str, Callable[[Any, Any], Any]] = {
    "the length of a scan": _length,
    "a shape": lambda x, n: x + jnp.zeros(n).sum(),
    "a reshape": lambda x, n: x.reshape(n, -1),
    "an arange": lambda x, n: x + jnp.arange(n).sum(),
    "random keys": lambda x, n: x + jax.random.split(jax.random.key(0), n).shape[0],
    "a Python loop": _loop,
    "a branch": lambda x, n: x if n > 0 else -x,
    "an index of a list": lambda x, n: [x, -x][n],
    "a key of a dict": lambda x, n: {1: x}[n],
    "a repeated list": lambda x, n: sum([x] * n),
    "NumPy": lambda x, n: x + np.zeros(n).sum(),
    "a static argument of jit": _jitted,
    "eqx.filter_jit": eqx.filter_jit(lambda x, n: x if n > 0 else -x),
    "a nondifferentiable argument": lambda x, n: _scaled(x, n),
    "a check of the type": _checked,
    "a text": lambda x, n: {"1": x}[f"{n}"],
    "a slice": lambda x, n: x[:n],
    "int()": lambda x, n: x * int(n),
    "an axis": lambda x, n: x[None].sum(n),
    "top_k": lambda x, n: jax.lax.top_k(x, n)[0],
}


@pytest.mark.parametrize("way", NEEDS_VALUE)
def test_a_number_that_must_be_static_is_named(way: str) -> None:
    """The error names the argument, with whose name in static_argnames the call works."""
    x = torch.ones(4)
    for call in (lambda f: f(x, 1), lambda f: f(x, n=1)):
        with pytest.raises(RemoteModelError, match=r"static_argnames='n'"):
            call(RemoteJaxFunction(NEEDS_VALUE[way]))
        call(RemoteJaxFunction(NEEDS_VALUE[way], static_argnames="n"))


def test_a_number_is_named_though_the_trial_s_value_fails() -> None:
    """The bridge tries the value 1, with which this model fails as it does with a traced number."""
    function = RemoteJaxFunction(lambda x, shape: x.reshape(shape))
    with pytest.raises(RemoteModelError, match="static_argnames='shape'"):
        function(torch.ones(6), (2, 3))


def test_a_number_is_named_for_a_derivative_too() -> None:
    """A call whose inputs require a gradient gets the same advice as one without."""
    x = torch.ones(4, requires_grad=True)
    with pytest.raises(RemoteModelError, match=r"static_argnames='n'"):
        RemoteJaxFunction(_loop)(x, 1)


def test_only_the_numbers_at_fault_are_named() -> None:
    """Two numbers are named together, and a number that may be traced is not named."""

    def f(x: Any, n: Any, scale: Any, *, p: Any) -> Any:
        x = x * scale if n > 0 else x
        return x if p == 0.0 else x * p

    with pytest.raises(RemoteModelError, match=r"static_argnames=\('n', 'p'\)"):
        RemoteJaxFunction(f)(torch.ones(2), 1, 2.0, p=0.5)


def test_a_number_without_a_name_of_its_own_is_explained() -> None:
    """A number in *args, or beside arrays, must first become an argument with a name."""

    def varied(*args: Any) -> Any:
        return args[0] if args[1] > 0 else -args[0]

    def nested(x: Any, options: Any) -> Any:
        return x if options["n"] > 0 else options["w"]

    x = torch.ones(2)
    with pytest.raises(RemoteModelError, match=r"`args\[1\]`.*name it in the model's"):
        RemoteJaxFunction(varied)(x, 1)
    with pytest.raises(RemoteModelError, match=r"`options`.*without arrays"):
        RemoteJaxFunction(nested)(x, {"n": 1, "w": x})


def test_torch_code_under_xla_gets_the_advice_too() -> None:
    """A torch model that JAX traces needs static numbers too; an array gets no advice of JAX."""

    def branch(x: Any, n: Any) -> Any:
        return x if n > 0 else -x

    def of_data(x: Any) -> Any:
        return x if x.sum() > 0 else -x

    runtime, x = XlaRuntime(Options(embedded=True)), np.ones(2, np.float32)
    with pytest.raises(CallerError, match="static_argnames='n'"):
        Hosted(runtime, branch).call(x, 1)
    with pytest.raises(CallerError) as raised:
        Hosted(runtime, of_data).call(x)
    assert "static_argnames" not in str(raised.value)
    assert "jax.lax" not in str(raised.value)


# Models that read the value of an array, whatever the number.
READS_DATA: dict[str, Callable[[Any, Any], Any]] = {
    "a branch": lambda x, n: x if x.sum() > n else -x,
    "a mask": lambda x, n: x[x > n],
    "NumPy": lambda x, n: jnp.asarray(np.sin(x)) * n,
    "float()": lambda x, n: x * float(x.sum()) * n,
}


@pytest.mark.parametrize("way", READS_DATA)
def test_a_value_of_data_gets_other_advice(way: str) -> None:
    """Where an array's value is read, the number beside it is not at fault."""
    with pytest.raises(RemoteModelError, match=r"jax\.lax\.cond") as raised:
        RemoteJaxFunction(READS_DATA[way])(torch.ones(4), 1)
    assert "static_argnames" not in str(raised.value)


def test_a_tensor_with_one_element_is_data() -> None:
    """A tensor that a shape needs is not a Python number, so static_argnames is no remedy."""
    with pytest.raises(RemoteModelError, match=r"jax\.numpy") as raised:
        RemoteJaxFunction(_loop)(torch.ones(4), torch.tensor(1))
    assert "static_argnames" not in str(raised.value)


@pytest.mark.parametrize("way", ["of a shape", "of the model"])
def test_another_error_gets_no_advice(way: str) -> None:
    """A number that is beside the point is not blamed, even if it is used."""

    def wrong(x: Any, n: Any) -> Any:
        if way == "of the model":
            raise KeyError("no such layer")
        return x @ jnp.ones((7, 7)) * n

    with pytest.raises(RemoteModelError) as raised:
        RemoteJaxFunction(wrong)(torch.ones(4), 1)
    assert "static_argnames" not in str(raised.value)
    assert "jax.lax" not in str(raised.value)


def test_jax_s_texts_name_the_caller_s_arguments() -> None:
    """JAX's own text names the model and its argument, instead of a function of the bridge."""
    with pytest.raises(RemoteModelError) as raised:
        RemoteJaxFunction(_loop)(torch.ones(4), 1)
    text = str(raised.value)
    assert "while tracing the model" in text and "the argument args[1]" in text
    assert "bridge_server" not in text


def test_a_leaked_tracer_is_called_so() -> None:
    """A custom_vjp that closes over an argument, and a cache of a traced value, are leaks."""

    def closing(x: Any, scale: Any) -> Any:
        @jax.custom_vjp
        def g(s: Any) -> Any:
            return (x * s).sum()

        g.defvjp(lambda s: (g(s), None), lambda _, ct: (ct * x.sum(),))
        return g(scale)

    cache: dict[str, Any] = {}

    def caching(x: Any) -> Any:
        return x + cache.setdefault("sum", jnp.sin(x).sum())

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RemoteModelError, match="value of an earlier trace") as raised:
        RemoteJaxFunction(closing)(x, torch.tensor(2.0, requires_grad=True))
    assert "model 'closing' called with" in str(raised.value)
    assert raised.value.remote_type == "jax.errors.UnexpectedTracerError"
    function = RemoteJaxFunction(caching)
    function(torch.ones(3))
    with pytest.raises(RemoteModelError, match="value of an earlier trace"):
        function(torch.ones(4))
