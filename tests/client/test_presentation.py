"""What editors, notebooks and help see of remote functions and sessions."""

import copy
import inspect
from pathlib import Path

import jax.numpy as jnp
import pytest
import torch

import bridge_client
from bridge_client import connect
from bridge_client.arguments import signature_from
from bridge_client.jax import RemoteTorchFunction
from bridge_client.torch import RemoteJaxFunction
from tests.workers import models, serving


def wave(t, /, rate=0.5, *more, mode="a", of=None, **others):
    """A wave that is damped."""
    return jnp.exp(-rate * t)


class Net(torch.nn.Module):
    """A net with two ways in."""

    def forward(self, x, scale=2):
        return x * scale

    def encode(self, x, *, depth):
        return x + depth


@pytest.mark.parametrize(
    "source",
    [
        "()",
        "(x, y=1, /, z='a', *rest, flag=True, need, **others)",
        "(x=-1.5, y=(1, [2, {'a': None}]))",
    ],
)
def test_signature_is_parsed_with_its_defaults(source: str) -> None:
    """The text of a signature and the signature are the same."""
    assert str(signature_from(source)) == source


def test_default_that_is_no_literal_is_an_ellipsis() -> None:
    """No expression of a worker is evaluated."""
    signature = signature_from("(x=open('f'), y=...)")
    assert signature is not None
    assert [each.default for each in signature.parameters.values()] == [..., ...]


def test_function_has_the_models_signature_and_docstring() -> None:
    """A torch module that stands for a JAX function is inspected like that function."""
    function = RemoteJaxFunction(wave)
    assert str(inspect.signature(function)) == str(inspect.signature(wave))
    assert inspect.getdoc(function) == "A wave that is damped."
    for other in (copy.deepcopy(function), RemoteJaxFunction(lambda x: x)):
        assert inspect.signature(other)
    assert inspect.getdoc(RemoteJaxFunction).startswith("A JAX function, or a model")
    assert str(inspect.signature(RemoteJaxFunction)).startswith("(target: ")


def test_method_has_its_own_signature() -> None:
    """Each method of a torch model has its signature; the class has its own."""
    function = RemoteTorchFunction(Net())
    assert str(inspect.signature(function)) == "(x, scale=2)"
    assert str(inspect.signature(function.method("encode"))) == "(x, *, depth)"
    assert str(inspect.signature(function)) == "(x, scale=2)"
    assert inspect.getdoc(function) == "A net with two ways in."
    assert str(inspect.signature(RemoteTorchFunction)).startswith("(target: ")


def test_compiled_function_has_the_models_signature() -> None:
    """torch.compile and export take a function with a signature as one without."""
    function = RemoteJaxFunction(lambda x: 2 * x)
    assert torch.compile(function, fullgraph=True, backend="eager")(
        torch.ones(2)
    ).tolist() == [2, 2]


def test_session_shows_its_worker(tmp_path: Path) -> None:
    """The repr names the address, the models, the lane and the memory, and needs no call."""
    address = f"unix:{tmp_path}/w.sock"
    with serving(tmp_path, *models("square"), "--listen", address):
        with connect(address) as session:
            assert repr(session) == (
                f"RemoteSession({address!r}, framework='jax', models=['square'],"
                " lane='local', memory='memfd')"
            )
            function = RemoteJaxFunction(session)
            assert str(inspect.signature(function)) == "(x)"
        assert repr(session) == "<RemoteSession, closed>"


def test_version_is_public() -> None:
    """bridge_client.__version__ is the packages' version."""
    assert bridge_client.__version__ == bridge_client.remote.link.__version__
    assert "__version__" in bridge_client.__all__
