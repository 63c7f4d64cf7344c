"""Texts of models' errors: remedies, and tracebacks without the frames of frameworks."""

import logging
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx

from bridge_client.jax import RemoteTorchFunction
from bridge_client.torch import RemoteJaxFunction
from bridge_server.model_errors import FULL_TRACEBACKS
from bridge_wire.errors import RemoteModelError


class Normed(linen.Module):
    @linen.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        return linen.BatchNorm(use_running_average=not train)(x)


class Dropped(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.Dropout(0.5, deterministic=False)(x)


def _noisy(x: Any) -> Any:
    return x + jax.random.normal(hk.next_rng_key())


def _with_key(x: Any, key: Any = None) -> Any:
    return x + jax.random.normal(key, x.shape)


X = torch.ones(2, 3)

# A model, the options that mend its call, and the text that names them.
REMEDIES: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "an immutable collection": (
        lambda: (Normed(), Normed().init(jax.random.key(0), jnp.ones((2, 3)))),
        {"mutable": True},
        "`batch_stats`: pass mutable=True",
    ),
    "flax's dropout": (lambda: (Dropped(), {}), {"rngs": "dropout"}, "rngs='dropout'"),
    "haiku": (
        lambda: (hk.transform(_noisy), {}),
        {"rngs": "default"},
        "rngs='default'",
    ),
    "equinox's dropout": (lambda: eqx.nn.Dropout(0.5), {"rngs": "key"}, "rngs='key'"),
    "a key that is None": (lambda: _with_key, {"rngs": "key"}, "rngs='key'"),
}


@pytest.mark.parametrize("what", REMEDIES)
def test_a_missing_option_is_named(what: str) -> None:
    """The error of the framework is followed by the option with which the call works."""
    make, options, text = REMEDIES[what]
    model = make()
    with pytest.raises(RemoteModelError, match=text):
        RemoteJaxFunction(model)(X)
    RemoteJaxFunction(model, **options)(X)


def test_an_nnx_dropout_without_streams_is_told_how_to_get_them() -> None:
    """The module lacks its nnx.Rngs, so that rngs= alone does not help."""
    with pytest.raises(RemoteModelError, match=r"rngs=nnx\.Rngs\(\.\.\.\)"):
        RemoteJaxFunction(nnx.Dropout(0.5))(X)


# Errors of callbacks ------------------------------------------------------------------------------


def _erring(x: Any) -> Any:
    return eqx.error_if(x, x.sum() > 0, "x must be negative")


def _solving(x: Any) -> Any:
    term = diffrax.ODETerm(lambda t, y, args: -y)
    solver = diffrax.Tsit5()
    return diffrax.diffeqsolve(term, solver, 0.0, 100.0, 0.1, x, max_steps=4).ys


def _refuse(_: Any) -> Any:
    raise ArithmeticError("dislikes\nall numbers")


def _calling_back(x: Any) -> Any:
    return jax.pure_callback(_refuse, x, x)


FROM_CALLBACKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "error_if": (_erring, "x must be negative\n(in model"),
    "diffrax": (_solving, "The maximum number of solver steps was reached. Try"),
    "a callback": (_calling_back, "ArithmeticError: dislikes\nall numbers\n(in model"),
}


@pytest.mark.parametrize("source", FROM_CALLBACKS)
def test_the_text_of_a_callback_s_error_comes_first(source: str) -> None:
    """The model's own text begins the error, without XLA's words and traceback around it."""
    model, text = FROM_CALLBACKS[source]
    with pytest.raises(RemoteModelError) as raised:
        RemoteJaxFunction(model)(X)
    seen = str(raised.value)
    assert seen.startswith(text)
    assert "CpuCallback" not in seen and "filter_jit" not in seen
    assert "threading.py" not in seen and "bridge_server" not in seen


def test_the_frames_of_a_callback_are_shown() -> None:
    """The traceback of a callback's error has the callback's line."""
    with pytest.raises(RemoteModelError) as raised:
        RemoteJaxFunction(_calling_back)(X)
    lines = raised.value.remote_traceback.splitlines()
    assert lines[1].endswith("in _refuse")
    assert lines[2].strip() == r'raise ArithmeticError("dislikes\nall numbers")'


# Tracebacks ---------------------------------------------------------------------------------------


def _inner(f: Any, x: Any) -> Any:
    return f(x)


def _deep(x: Any) -> Any:
    return jax.vmap(lambda row: _inner(jax.jit(_product), row))(x)


def _product(row: Any) -> Any:
    return row @ jnp.ones(9)


def test_frames_of_the_model_stay_and_others_go() -> None:
    """All of the model's frames are there with their lines, also between those of JAX."""
    with pytest.raises(RemoteModelError) as raised:
        RemoteJaxFunction(_deep)(X)
    text = raised.value.remote_traceback
    names = [
        line.rpartition(" in ")[2] for line in text.splitlines() if "  File " in line
    ]
    assert names == ["_deep", "<lambda>", "_inner", "_product"]
    assert "row @ jnp.ones(9)" in text
    assert "site-packages" not in text and "bridge_server" not in text
    assert "JAX has removed" not in str(raised.value)


def test_notes_of_the_model_stay() -> None:
    """A note that the model has added to its error is there, on a line of its own."""

    def noted(x: Any) -> Any:
        try:
            return jax.jit(_product)(x)
        except TypeError as error:
            error.add_note("in the second layer")
            raise

    with pytest.raises(RemoteModelError) as raised:
        RemoteJaxFunction(noted)(X)
    assert raised.value.remote_traceback.splitlines()[-1] == "in the second layer"
    assert "JAX has removed" not in raised.value.remote_traceback


def test_all_frames_are_shown_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With BRIDGE_FULL_TRACEBACKS the frames of the bridge and of the framework are there."""
    monkeypatch.setenv(FULL_TRACEBACKS, "1")
    with pytest.raises(RemoteModelError) as raised:
        RemoteJaxFunction(_deep)(X)
    assert "bridge_server" in raised.value.remote_traceback
    assert "_product" in raised.value.remote_traceback


def test_a_directory_whose_name_begins_like_a_framework_s_is_the_model_s() -> None:
    """Frames of packages such as jaxopt or torchvision are not taken for those of jax or torch."""
    import jaxtyping

    from bridge_server.model_errors import machinery

    assert not jaxtyping.__file__.startswith(machinery())
    assert jax.__file__.startswith(machinery())


class Mismatched(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.second = torch.nn.Linear(5, 2)

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x))


def test_a_wrong_shape_in_torch_is_one_error(caplog: pytest.LogCaptureFixture) -> None:
    """A torch model with a wrong shape raises torch's text with its own frame, and logs nothing."""
    log = logging.getLogger("torch._subclasses.fake_tensor")  # propagates nothing
    log.addHandler(caplog.handler)
    with pytest.raises(RemoteModelError) as raised:
        RemoteTorchFunction(Mismatched())(jnp.ones((2, 3)))
    log.removeHandler(caplog.handler)
    assert str(raised.value).startswith("RuntimeError: mat1 and mat2 shapes cannot be")
    frames = [
        line for line in raised.value.remote_traceback.splitlines() if "  File " in line
    ]
    assert [line.rpartition(" in ")[2] for line in frames] == ["forward"]
    assert "fake" not in str(raised.value).lower() and not caplog.records


def test_parameters_are_a_count() -> None:
    """An error describes the arguments, and counts the parameters."""
    model = torch.nn.Sequential(Mismatched(), torch.nn.Linear(2, 2))
    function = RemoteTorchFunction(model, parameters="client")
    with pytest.raises(RemoteModelError) as raised:
        function(jnp.ones((2, 3)))
    assert "called with (args[0]: float32[2,3]) and 6 parameters)" in str(raised.value)
