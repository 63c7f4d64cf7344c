"""Several methods of one model, and its modes, over shared memory and within one process."""

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from bridge_client import Session, connect, spawn
from bridge_client.inproc import host
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import (
    ArgumentError,
    CallerError,
    RemoteModelError,
    SpecError,
)
from tests.client.torch_client import method_models
from tests.client.torch_client.conftest import Remote
from tests.client.torch_client.reference import assert_within
from tests.conftest import ROOT, python_of

CODERS = ("linen_coder", "nnx_coder", "equinox_coder")
MODELS = [
    *CODERS,
    "trial",
    "linen_modes",
    "haiku_modes",
    "stateful_haiku_modes",
    "running",
    "forgetful",
]
MODULE = "tests.client.torch_client.method_models"


@pytest.fixture(scope="module")
def worker() -> Iterator[Session]:
    """A worker that hosts these models, and single methods of them."""
    targets = {name: f"{MODULE}:{name}" for name in MODELS}
    targets |= {f"{name}.encode": f"{MODULE}:{name}.encode" for name in CODERS}
    with spawn(jax_model=targets, python=python_of(".venv-jax"), cwd=ROOT) as session:
        yield session


@pytest.fixture
def session(worker: Session) -> Iterator[Session]:
    """A new session with that worker."""
    with connect(worker.address, lane="local") as session:
        yield session


@pytest.fixture(params=["local", "grpc", "inproc"])
def coder(request: pytest.FixtureRequest, worker: Session) -> Iterator[Remote]:
    """Makes functions of a session on each lane."""
    if request.param == "inproc":
        hosted = {name: getattr(method_models, name) for name in MODELS}
        made: Session = host(jax_model=hosted)
    else:
        made = connect(worker.address, lane=request.param)
    with made as session:
        yield lambda name, **options: RemoteJaxFunction(session, name=name, **options)


def batch(*, requires_grad: bool = False) -> Tensor:
    values = np.random.default_rng(7).normal(size=(4, 3)).astype(np.float32)
    return torch.from_numpy(values).requires_grad_(requires_grad)


def reference(name: str) -> Callable[[Any, str], Any]:
    """Return the model's methods on arrays."""
    model = getattr(method_models, name)
    if name == "linen_coder":
        return lambda x, method: model[0].apply(model[1], x, method=method)
    # A call of a flax.nnx module changes its variables.
    return lambda x, method: getattr(copy.deepcopy(model), method)(x)


# Methods ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODERS)
def test_methods_are_those_of_the_framework(coder: Remote, name: str) -> None:
    """Each method of a module has the values and gradients that the framework computes."""
    f, x = coder(name), batch(requires_grad=True)
    encode, decode = f.method("encode"), f.method("decode")
    call = reference(name)
    z = encode(x)
    assert_within(z, call(x.detach().numpy(), "encode"), 1e-6)
    assert_within(decode(z), call(np.asarray(z.detach()), "decode"), 1e-6)
    assert_within(f(x), decode(z).detach().numpy(), 1e-6)
    (gradient,) = torch.autograd.grad(z.sum(), x)
    expected = jax.grad(lambda x: call(x, "encode").sum())(x.detach().numpy())
    assert_within(gradient, expected, 1e-5)


@pytest.mark.parametrize("name", CODERS)
def test_methods_share_the_parameters(coder: Remote, name: str) -> None:
    """The parameters and buffers of a method are the very tensors of its model, and their
    gradients add up."""
    f, x = coder(name), batch()
    encode, decode = f.method("encode"), f.method("decode")
    own = dict(f.named_parameters())
    assert own and all(encode.get_parameter(key) is own[key] for key in own)
    assert encode.state_dict().keys() == f.state_dict().keys()
    decode(encode(x)).sum().backward()
    gradients = {key: value.grad.clone() for key, value in own.items()}
    f.zero_grad()
    f(x).sum().backward()
    for key, value in own.items():
        assert_within(value.grad, gradients[key].numpy(), 1e-5)
    before = encode(x)
    with torch.no_grad():
        for value in f.parameters():
            value.mul_(2)
    assert not torch.allclose(encode(x), before)


def test_methods_are_made_once(coder: Remote) -> None:
    """The same method is the same object, from every method of the model."""
    f = coder("linen_coder")
    encode = f.method("encode")
    assert f.method("encode") is encode is encode.method("encode")
    assert encode.method("__call__") is f is f.method("__call__")
    assert "linen_coder.encode" in repr(encode)


def test_constructor_takes_a_method(coder: Remote) -> None:
    """`method=` is the method that the function calls, and others follow from it."""
    f, x = coder("linen_coder"), batch()
    encode = coder("linen_coder", method="encode")
    assert torch.equal(encode(x), f.method("encode")(x))
    assert torch.equal(encode.method("__call__")(x), f(x))
    assert torch.equal(coder("linen_coder", method="__call__")(x), f(x))


def test_methods_are_listed(coder: Remote) -> None:
    """A session tells the methods of each model: public ones of the user's classes."""
    models = coder("linen_coder").session.models
    for name in CODERS:
        assert models[name].methods == ("__call__", "decode", "encode")
        assert models[name].arguments_of("encode") == ("x", "power")
        assert models[name].arguments == ("x",)
    assert models["trial"].methods == ("reset", "step")


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize(
    "method",
    [
        "init",
        "apply",
        "eval",
        "setup",
        "bind",
        "_secret",
        "__class__",
        "activation",
        "power",
        "encoder",
        "encode.__func__",
        "weight",
        "split",
        "tree_flatten",
    ],
)
def test_other_attributes_are_refused(session: Session, name: str, method: str) -> None:
    """Methods of the framework's own classes, fields and private names are CallerErrors."""
    f = RemoteJaxFunction(session, name=name)
    with pytest.raises(CallerError, match=r"\['__call__', 'decode', 'encode'\]"):
        f.method(method)
    with pytest.raises(CallerError, match="no public method"):
        RemoteJaxFunction(session, name=name, method=method)


@pytest.mark.parametrize("method", ["", 3, ["encode"]])
def test_a_method_is_a_name(session: Session, method: Any) -> None:
    """Something else than a name is a CallerError that shows it."""
    with pytest.raises(CallerError, match="method="):
        RemoteJaxFunction(session, name="trial", method=method)


@pytest.mark.parametrize(
    "option", ["method", "mutable", "rngs", "capture_intermediates"]
)
def test_linen_options_cannot_be_passed(session: Session, option: str) -> None:
    """A keyword argument goes to the model, never to flax's `apply`, which would reach every
    method."""
    f = RemoteJaxFunction(session, name="linen_coder")
    with pytest.raises(ArgumentError, match=f"unexpected keyword.*{option}"):
        f(batch(), **{option: "_secret"})
    unknown = ("",) * len(f._model.methods)
    f._model = dataclasses.replace(f._model, method_signatures=unknown)
    with pytest.raises(RemoteModelError, match=f"unexpected keyword.*{option}"):
        f(batch(), **{option: "_secret"})


def test_environment_needs_no_call(coder: Remote) -> None:
    """A plain object's methods are called by name; the object itself cannot be called."""
    f, x = coder("trial"), batch(requires_grad=True)
    state = f.method("reset")(x)
    for _ in range(3):
        state, reward = f.method("step")(state, x)
    assert_within(state, 3 * x.detach().numpy(), 1e-6)
    reward.backward()
    assert_within(x.grad, 4 * x.detach().numpy(), 1e-5)
    with pytest.raises(CallerError, match=r"itself cannot be called.*'reset', 'step'"):
        f(x)


def test_static_names_are_those_of_the_method(coder: Remote) -> None:
    """`static_argnames` names arguments of each method, also where they are positional."""
    f, x = coder("linen_coder", static_argnames="power"), batch()
    encode = f.method("encode")
    assert torch.equal(encode(x, 2), encode(x, power=2))
    assert not torch.allclose(encode(x, 2), encode(x))
    with pytest.raises(RemoteModelError):
        coder("linen_coder", method="encode")(x, 2)  # data: Python cannot count with it


@pytest.mark.parametrize("name", CODERS)
def test_methods_are_transformed(session: Session, name: str) -> None:
    """vmap, jvp, second derivatives and torch.compile work as for the model itself."""
    encode, x = RemoteJaxFunction(session, name=name, method="encode"), batch()
    y = encode(x)
    assert_within(torch.vmap(encode)(x), y.detach().numpy(), 1e-6)
    _, tangent = torch.func.jvp(encode, (x,), (torch.ones_like(x),))
    _, pullback = torch.func.vjp(encode, x)
    (cotangent,) = pullback(torch.ones_like(y))
    assert_within(tangent.sum(), cotangent.sum().detach().numpy(), 1e-4)
    hessian = torch.func.hessian(lambda x: encode(x[None]).sum())(x[0])
    assert hessian.shape == (3, 3)


def test_methods_are_compiled(session: Session, fresh_compiler: None) -> None:
    """A compiled program may call several methods, by name."""
    f, x = RemoteJaxFunction(session, name="linen_coder"), batch()
    f.method("encode"), f.method("decode")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x: Tensor) -> Tensor:
        return f.method("decode")(f.method("encode")(x) * 2)

    expected = f.method("decode")(f.method("encode")(x) * 2)
    assert_within(both(x), expected.detach().numpy(), 1e-6)


def test_methods_change_the_buffers(coder: Remote) -> None:
    """A mutable call of a method changes the buffers of the model."""
    f = coder("nnx_coder", mutable=True)
    encode = f.method("encode")
    encode(batch())
    encode(batch())
    assert f.get_buffer("count") is encode.get_buffer("count")
    assert f.get_buffer("count") == 2


@pytest.mark.parametrize("name", CODERS)
def test_single_method_has_the_models_parameters(session: Session, name: str) -> None:
    """`module:object.method` is a model with the object's parameters, and no other method."""
    f, x = RemoteJaxFunction(session, name=name), batch()
    encode = RemoteJaxFunction(session, name=f"{name}.encode")
    assert encode.state_dict().keys() == f.state_dict().keys()
    assert torch.equal(encode(x), f.method("encode")(x))
    assert session.models[f"{name}.encode"].methods == ("__call__",)
    with pytest.raises(CallerError, match=r"\['__call__'\]"):
        encode.method("decode")


# A method as a torch module -----------------------------------------------------------------------


def test_methods_have_one_mode(session: Session) -> None:
    """train() and eval() of one method are those of all, and of a module that has them."""
    f = RemoteJaxFunction(session, name="linen_modes")
    inverted, x = f.method("inverted"), torch.zeros(2)
    parent = nn.ModuleList([inverted])
    assert parent.eval() is parent and not f.training
    assert (f(x)[0], inverted(x)[0]) == (0, 0)
    assert f.train() is f and inverted.training
    assert (f(x)[0], inverted(x)[0]) == (1, 1)
    assert not f.eval().method("both").training


def test_methods_move_together(session: Session) -> None:
    """Conversions and loaded values of one are those of the other."""
    f = RemoteJaxFunction(session, name="linen_coder")
    encode, x = f.method("encode"), batch()
    encode.to(torch.float16)
    assert {value.dtype for value in f.parameters()} == {torch.float16}
    f.float()
    zeros = {key: torch.zeros_like(value) for key, value in f.state_dict().items()}
    encode.load_state_dict(zeros)
    assert f(x).abs().max() == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, "pickled"])
def test_copies_share_as_the_originals_do(session: Session, copied: Any) -> None:
    """A copy of a network with two methods has one set of parameters of its own."""
    f, x = RemoteJaxFunction(session, name="linen_coder"), batch()
    network = nn.ModuleDict(
        {"encode": f.method("encode"), "decode": f.method("decode")}
    )
    if copied == "pickled":
        copied = lambda value: pickle.loads(pickle.dumps(value))  # noqa: E731
    twin = copied(network)
    encode, decode = twin["encode"], twin["decode"]
    assert encode.method("decode") is decode
    own = next(encode.parameters())
    assert own is next(decode.parameters()) and own is not next(f.parameters())
    assert torch.equal(decode(encode(x)), f(x))
    encode.eval()
    assert not decode.training and f.training


def test_hooks_are_those_of_one_method(session: Session) -> None:
    """A hook of the model does not see calls of its methods, as in torch."""
    f, seen = RemoteJaxFunction(session, name="linen_coder"), list[nn.Module]()
    f.register_forward_hook(lambda module, *_: seen.append(module))
    f.method("encode")(batch())
    assert not seen
    f(batch())
    assert seen == [f]


def test_changed_parametrizations_reach_methods(session: Session) -> None:
    """Pruning and parametrizations of the model's parameters count for its methods, also where
    the parameters are the model's direct ones."""
    for name in ("nnx_coder", "linen_coder"):
        f, x = RemoteJaxFunction(session, name=name), batch()
        encode = f.method("encode")
        owner = f if name == "nnx_coder" else f.get_submodule("params.encoder")
        key = "weight" if name == "nnx_coder" else "kernel"
        prune.random_unstructured(owner, key, amount=3)
        f(x).sum().backward()  # a graph that is gone when the method is called
        with torch.no_grad():
            owner.get_parameter(f"{key}_orig").mul_(0)
        assert torch.equal(encode(x), encode(torch.zeros_like(x)))
        prune.remove(owner, key)
        parametrize.register_parametrization(owner, key, _Ones())
        encode(x).sum().backward()
        assert torch.equal(encode(x), f.method("encode")(x))
        assert not torch.equal(encode(x), encode(torch.zeros_like(x)))


class _Ones(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


# Modes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "training"),
    [("__call__", 1), ("inverted", 1), ("both", 3), ("without", 0)],
)
def test_linen_model_gets_its_mode(coder: Remote, method: str, training: int) -> None:
    """train() and eval() are passed by the arguments that the method has for them."""
    f, x = coder("linen_modes", method=method), torch.zeros(2)
    assert f.train()(x).tolist() == [training] * 2
    assert f.eval()(x).tolist() == [0, 0]


def test_passed_mode_is_the_callers(coder: Remote) -> None:
    """An argument that the call passes wins, positional or not; before train() and eval() the
    model has its default."""
    f, x = coder("linen_modes"), torch.zeros(2)
    assert f(x)[0] == 0
    both = f.method("both")
    f.train()
    assert f(x, False)[0] == 0
    assert f(x, train=False)[0] == 0
    assert both(x, True)[0] == 0  # the other flag has its default
    f.eval()
    assert f(x, True)[0] == 1
    assert both(x, is_training=True)[0] == 1


def test_data_of_such_a_name_is_no_mode(coder: Remote) -> None:
    """An argument that is passed, or whose default is no flag, is left alone."""
    data = coder("linen_modes", method="data").train()
    assert data(torch.ones(2)).tolist() == [2, 2]
    assert data(train=torch.ones(2)).tolist() == [2, 2]


@pytest.mark.parametrize("name", ["haiku_modes", "stateful_haiku_modes"])
def test_haiku_model_gets_its_mode(coder: Remote, name: str) -> None:
    """The transformed function's argument is the mode; without one the model refuses the call."""
    f, x = coder(name), torch.zeros(1, 3)
    assert f.session.models[name].arguments == ("x", "is_training")
    with pytest.raises(RemoteModelError, match="is_training"):
        f(x)
    assert f.train()(x)[0, 0] == 1
    assert f.eval()(x)[0, 0] == 0
    assert f(x, True)[0, 0] == 1


# Triples ------------------------------------------------------------------------------------------


def test_triple_has_parameters_and_buffers(coder: Remote) -> None:
    """In (apply, params, state) the params are parameters and the state buffers, which a mutable
    call changes."""
    f, x = coder("running", mutable=True), torch.full((2,), 3.0)
    assert [key for key, _ in f.named_parameters()] == ["params.scale"]
    assert [key for key, _ in f.named_buffers()] == ["state.count", "state.mean"]
    assert f.session.models["running"].arguments == ("x",)
    f.train()
    y = f(x)
    assert y.tolist() == [2.0, 2.0] and f.get_buffer("state.mean") == 2
    assert f.get_buffer("state.count") == 1
    y.sum().backward()
    assert f.get_parameter("params.scale").grad == 2
    assert f.eval()(x).tolist() == [2.0, 2.0] and f.get_buffer("state.mean") == 2


def test_triple_without_new_state_is_refused(session: Session) -> None:
    """An apply that does not return a pair is a SpecError that says what is expected."""
    with pytest.raises(SpecError, match="expected a pair"):
        RemoteJaxFunction(session, name="forgetful")(torch.ones(2))
