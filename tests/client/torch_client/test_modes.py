"""Training and inference mode of flax.nnx and equinox models: `train` and `eval` of a
RemoteJaxFunction reach them."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch import Tensor, nn

from bridge_client import Session, connect, spawn
from bridge_client.inproc import host
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import CallerError, ProtocolError
from bridge_wire.pb import bridge_pb2 as pb
from tests.client.torch_client import stateful_models
from tests.client.torch_client.conftest import Remote
from tests.conftest import ROOT, python_of

_FACTORIES = ["regular", "regular_in_eval", "repeated", "inferring", "inferring_normed"]
_TARGETS = {
    name: f"tests.client.torch_client.stateful_models:{name}" for name in _FACTORIES
}


@pytest.fixture(scope="module", params=["worker", "worker with x64", "in process"])
def served(request: pytest.FixtureRequest) -> Iterator[Session]:
    """A session with models that have modes: in a worker, in one with 64-bit types, and in this
    process."""
    if request.param == "in process":
        models: Session = host(
            jax_model={name: getattr(stateful_models, name)() for name in _FACTORIES}
        )
    else:
        args = ("--factory", *(("--x64",) if "x64" in request.param else ()))
        models = spawn(
            jax_model=_TARGETS, python=python_of(".venv-jax"), cwd=ROOT, args=args
        )
    with models as session:
        yield session


@pytest.fixture
def session(served: Session) -> Iterator[Session]:
    """A session of this test's own with the worker, or that with the models of this process."""
    if served.lane == "inproc":
        yield served
        return
    with connect(served.address) as session:
        yield session


@pytest.fixture
def remote(session: Session) -> Remote:
    """Makes functions of that session."""
    return lambda name, **options: RemoteJaxFunction(session, name=name, **options)


@pytest.fixture
def batch(session: Session) -> Tensor:
    """Twelve numbers, of 64 bits where the models have them."""
    dtype = torch.float64 if session.x64 else torch.float32
    return torch.arange(12, dtype=dtype).reshape(4, 3)


def in_inference(x: Tensor) -> Tensor:
    """What BatchNorm makes of a batch with the statistics that it begins with, mean 0 and
    variance 1."""
    return x / (1 + 1e-5) ** 0.5


def test_eval_reaches_nnx(remote: Remote, batch: Tensor) -> None:
    """After `eval`, BatchNorm uses its running statistics and dropout drops nothing; after
    `train`, both train."""
    model = remote("regular", rngs="default", mutable=True)
    model.eval()
    torch.testing.assert_close(model(batch), in_inference(batch), rtol=1e-5, atol=1e-6)
    model.train()
    trained = model(batch)
    kept = trained != 0
    normed = (batch - batch.mean(0)) / (batch.var(0, correction=0) + 1e-5) ** 0.5
    assert kept.any() and not kept.all()
    torch.testing.assert_close(trained[kept], 2 * normed[kept], rtol=1e-4, atol=1e-4)


def test_a_module_around_it_sets_the_mode(remote: Remote, batch: Tensor) -> None:
    """The mode comes from `eval` of the torch module that contains the function, too."""
    model = nn.Sequential(remote("regular", rngs="default"))
    model.eval()
    torch.testing.assert_close(model(batch), in_inference(batch), rtol=1e-5, atol=1e-6)


def test_without_a_word_a_model_keeps_its_own_mode(
    remote: Remote, batch: Tensor
) -> None:
    """A model that was loaded in inference mode stays there until `train` is called."""
    model = remote("regular_in_eval")
    assert model.training
    torch.testing.assert_close(model(batch), in_inference(batch), rtol=1e-5, atol=1e-6)
    with pytest.raises(CallerError, match="rngs="):
        model.train()(batch)


def test_nnx_with_its_own_keys_is_not_trained_with_one_mask(
    remote: Remote, batch: Tensor
) -> None:
    """A model in training mode that would draw the same at each call is refused, and the error
    names `rngs`."""
    for parameters in ("client", "worker"):
        with pytest.raises(
            CallerError, match=r"\['default'\].*rngs=.*mutable=True.*\.eval\(\)"
        ):
            remote("regular", parameters=parameters)(batch)
    model = remote("regular")
    grad = torch.func.grad(lambda x: model(x).sum())
    with pytest.raises(CallerError, match="rngs="):
        grad(batch)


@pytest.mark.parametrize(
    "options", [{"rngs": "default"}, {"mutable": True}], ids=["rngs", "mutable"]
)
def test_each_call_has_its_own_mask(
    remote: Remote, batch: Tensor, options: dict[str, Any]
) -> None:
    """With `rngs`, or with `mutable` by nnx's own counts, calls in training mode draw anew."""
    model = remote("regular", **options)
    masks = torch.stack([model(batch) == 0 for _ in range(4)])
    assert not (masks == masks[0]).all()


def test_a_transform_that_draws_nothing_is_served(
    remote: Remote, batch: Tensor
) -> None:
    """Variables that nnx.scan has replaced are no draw: a model that drops nothing needs no
    keys."""
    assert torch.equal(remote("repeated")(batch), 4 * batch)
    with pytest.raises(CallerError, match="rngs="):
        remote("repeated").train()(batch)
    assert (remote("repeated", rngs="default").train()(batch) == 0).any()


def test_eval_reaches_equinox(remote: Remote, batch: Tensor) -> None:
    """After `eval`, equinox's dropout needs no key and drops nothing; in training mode it draws."""
    model = remote("inferring", rngs="key")
    assert (torch.cat([model(batch) for _ in range(4)]) == 0).any()
    assert torch.equal(model.eval()(batch), batch)
    assert (torch.cat([model.train()(batch) for _ in range(4)]) == 0).any()


def test_eval_reaches_equinox_with_state(remote: Remote, batch: Tensor) -> None:
    """After `eval`, equinox's BatchNorm leaves its statistics alone, and uses them."""
    model = remote("inferring_normed", mutable=True)
    model.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    alone, beside = model(batch[:1]), model(batch)[:1]
    torch.testing.assert_close(alone, beside)
    assert all(
        torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()
    )
    model.train()(batch + 1)
    assert not all(
        torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()
    )


def test_compiled_code_follows_the_mode(
    remote: Remote, batch: Tensor, fresh_compiler: None
) -> None:
    """torch.compile compiles anew when the mode changes."""
    model = remote("regular", rngs="default")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert (torch.cat([compiled(batch) for _ in range(4)]) == 0).any()
    model.eval()
    torch.testing.assert_close(
        compiled(batch), in_inference(batch), rtol=1e-5, atol=1e-6
    )


def test_a_model_without_modes_is_not_prepared_again() -> None:
    """What has no mode is one program in training and in inference."""
    preparations = []

    def counted(x: jax.Array) -> jax.Array:
        preparations.append(x)
        return jnp.sin(x)

    model = RemoteJaxFunction(counted)
    for each in (model, model.eval(), model.train()):
        each(torch.ones(3))
    assert len(preparations) == 1


def test_a_mode_that_there_is_not_is_refused(session: Session) -> None:
    """A call that names no known mode is a ProtocolError."""
    leaf, none = pb.Tree(leaf=pb.Tree.Leaf()), pb.Tree(dict=pb.Tree.Mapping())
    arguments = pb.Tree(
        tuple=pb.Tree.Sequence(
            items=[pb.Tree(tuple=pb.Tree.Sequence(items=[leaf])), none]
        )
    )
    spec = pb.Spec(dtype=pb.DTYPE_FLOAT32, shape=[4, 3])
    with pytest.raises(ProtocolError, match="mode 7"):
        session.prepare_call(
            pb.Call(model="regular", arguments=arguments, inputs=[spec], mode=7)
        )
