"""A model's parameters as parameters of an nn.Module: names, memory, state dicts, copies and
casts."""

import copy
import io
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bridge_client import Session, connect
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import DTypeError, SpecError
from tests.client.torch_client.conftest import Remote
from tests.client.torch_client.equinox_models import stack
from tests.client.torch_client.flax_models import Gate, normed, perceptron
from tests.client.torch_client.functions import affine, tied
from tests.client.torch_client.reference import assert_within, vjp


def batch(n: int = 4) -> Tensor:
    return torch.from_numpy(
        np.random.default_rng(7).normal(size=(n, 3)).astype(np.float32)
    )


def states(model: RemoteJaxFunction) -> dict[str, tuple[Any, ...]]:
    """Return what identifies each parameter's memory and value."""
    return {
        name: (x.data_ptr(), x.sum().item()) for name, x in model.state_dict().items()
    }


def is_in_slab(session: Session, tensor: Tensor) -> bool:
    return session.pool.address_of(tensor.data_ptr(), tensor.nbytes) is not None


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


# Names and kinds ----------------------------------------------------------------------------------

DENSE = ["Dense_0.bias", "Dense_0.kernel"]
NAMES = {
    "perceptron": (
        [f"params.{n}" for n in (*DENSE, "Dense_1.bias", "Dense_1.kernel")],
        [],
    ),
    "normed": (
        [
            f"params.{name}"
            for name in ("BatchNorm_0.bias", "BatchNorm_0.scale", *DENSE)
        ],
        ["batch_stats.BatchNorm_0.mean", "batch_stats.BatchNorm_0.var"],
    ),
    "gate": (["gain", "inner.bias", "inner.kernel"], ["offset"]),
    "stack": (["layers.0", "layers.1", "layers.2"], []),
    "affine": (["bias", "weight"], []),
}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_named_by_tree_path(
    session: Session, remote: Remote, name: str
) -> None:
    """What is trainable is a parameter and the rest a buffer, under the names and in the order
    of Describe."""
    model = remote(name)
    parameters, buffers = NAMES[name]
    assert [n for n, _ in model.named_parameters()] == parameters
    assert [n for n, _ in model.named_buffers()] == buffers
    described = session.models[name].parameters
    assert [info.path for info in described if info.trainable] == parameters
    assert [info.path for info in described if not info.trainable] == buffers
    assert all(
        isinstance(x, nn.Parameter) and x.requires_grad and x.is_leaf
        for x in model.parameters()
    )
    assert not any(x.requires_grad for x in model.buffers())
    assert all(is_in_slab(session, x) for x in (*model.parameters(), *model.buffers()))


def reference(name: str, x: np.ndarray) -> Any:
    """Return a model's result as jax computes it here."""
    if name in ("perceptron", "normed"):
        module, variables = {"perceptron": perceptron, "normed": normed}[name]
        return module.apply(variables, x)
    return {
        "gate": Gate(),
        "stack": stack,
        "affine": lambda x: affine[0](affine[1], x),
    }[name](x)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_computes_what_it_does_in_jax(any_lane: Remote, name: str) -> None:
    """With its parameters as they came, or left on the worker, the model returns what it returns
    in jax."""
    x = batch()
    expected = np.asarray(reference(name, x.numpy()))
    assert_within(any_lane(name)(x), expected, 1e-6)
    left = any_lane(name, parameters="worker")
    assert_within(left(x), expected, 1e-6)
    assert not list(left.parameters()) and not list(left.buffers())


@pytest.mark.parametrize("model", [affine, tied], ids=["affine", "tied"])
def test_gradients_are_those_of_jax(any_lane: Remote, model: Any) -> None:
    """Gradients of parameters, one of them used twice, and of the input are those of jax.vjp."""
    apply, weights = model
    remote = any_lane(apply.__name__.removeprefix("_"))
    x = batch().requires_grad_()
    y = remote(x)
    y.square().sum().backward()
    made = gradients(remote)
    _, expected = vjp(
        apply, (weights, x.detach().numpy()), [2 * y.detach().numpy()], x64=False
    )
    for seen, wanted in zip(
        [made["bias"], made["weight"], x.grad], expected, strict=True
    ):
        assert_within(seen, wanted, 1e-6)


def test_parameters_left_on_the_worker_pass_gradients_through(remote: Remote) -> None:
    """With parameters="worker" they are frozen, and the input still gets its gradient."""
    x = batch().requires_grad_()
    remote("affine", parameters="worker")(x).sum().backward()
    assert_within(x.grad, np.broadcast_to(affine[1]["weight"].sum(1), x.shape), 1e-6)


def test_a_module_used_twice_adds_its_gradients(remote: Remote) -> None:
    """A module called twice in one graph gets the sum of both gradients."""
    model, x = remote("affine"), batch()
    (model(x) + 2 * model(x + 1)).sum().backward()
    torch.testing.assert_close(model.bias.grad, torch.full((2,), 12.0))
    torch.testing.assert_close(
        model.weight.grad, (3 * x + 2).sum(0)[:, None].expand(3, 2)
    )


# Frozen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["bias", "weight"])
def test_nothing_is_computed_for_a_frozen_parameter(
    remote: Remote, frozen: str
) -> None:
    """A parameter with requires_grad_(False) gets no gradient, and the worker computes none; nor
    for a buffer."""
    model, tally = remote("counted_affine"), remote("tally")
    other = {"bias": "weight", "weight": "bias"}[frozen]
    before = {key: int(tally(key, 0.0)) for key in (frozen, other)}
    getattr(model, frozen).requires_grad_(False)
    model(batch()).sum().backward()
    assert {key: int(tally(key, 0.0)) - before[key] for key in before} == {
        frozen: 0,
        other: 1,
    }
    assert set(gradients(model)) == {other}


def test_a_module_without_trainable_parameters_keeps_nothing(
    session: Session, remote: Remote
) -> None:
    """requires_grad_(False) on the whole module makes its calls cheap ones."""
    model = remote("perceptron").requires_grad_(False)
    y = model(batch())
    assert not y.requires_grad and session.stats()["residuals"] == 0


# State dicts, copies and casts --------------------------------------------------------------------


def test_a_state_dict_round_trips(remote: Remote) -> None:
    """torch.save and torch.load(weights_only=True) carry the parameters and buffers of one
    module to another."""
    source, target = remote("normed"), remote("normed")
    with torch.no_grad():
        for x in (*source.parameters(), *source.buffers()):
            x.add_(0.25)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    before = states(target)
    assert (
        str(target.load_state_dict(torch.load(file, weights_only=True)))
        == "<All keys matched successfully>"
    )
    torch.testing.assert_close(target(batch()), source(batch()), rtol=0, atol=0)
    # Still in place.
    assert {n: p for n, (p, _) in states(target).items()} == {
        n: p for n, (p, _) in before.items()
    }


def test_load_state_dict_can_assign(session: Session, remote: Remote) -> None:
    """With assign=True the loaded tensors become the parameters; they move into the slab when
    nobody else has them."""
    model = remote("affine")
    loaded = {name: torch.ones_like(x) for name, x in model.state_dict().items()}
    model.load_state_dict(loaded, assign=True)
    torch.testing.assert_close(
        model(batch()), batch().sum(1, keepdim=True).expand(-1, 2) + 1
    )
    assert loaded["bias"].data_ptr() == model.bias.data_ptr()
    del loaded
    model(batch()).sum().backward()
    assert model.bias.grad is not None and is_in_slab(session, model.bias)


def test_load_state_dict_is_strict(remote: Remote) -> None:
    """Missing and unexpected names, and wrong shapes, are torch's own errors."""
    model = remote("affine")
    with pytest.raises(
        RuntimeError, match=r'(?s)Missing key.*"weight".*Unexpected key.*"wait"'
    ):
        model.load_state_dict({"bias": torch.zeros(2), "wait": torch.zeros(3, 2)})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        model.load_state_dict({"bias": torch.zeros(2), "weight": torch.zeros(2, 3)})
    missing, unexpected = model.load_state_dict({"bias": torch.zeros(2)}, strict=False)
    assert (missing, unexpected) == (["weight"], [])


def test_a_copy_is_independent(session: Session, remote: Remote) -> None:
    """deepcopy gives a module with values of its own, which works and trains on its own."""
    model = remote("perceptron")
    expected = model(batch())
    copied = copy.deepcopy(model)
    assert states(copied).keys() == states(model).keys()
    with torch.no_grad():
        for x in copied.parameters():
            x.zero_()
    torch.testing.assert_close(copied(batch()), torch.zeros(4, 2))
    torch.testing.assert_close(model(batch()), expected)
    copied(batch()).sum().backward()
    assert gradients(copied) and not gradients(model)
    assert all(is_in_slab(session, x) for x in copied.parameters())


@pytest.mark.parametrize(
    "made_anew", [copy.deepcopy, lambda model: model.bfloat16().float()]
)
def test_a_state_dict_shows_later_steps(
    remote: Remote, made_anew: Callable[[nn.Module], nn.Module]
) -> None:
    """What state_dict() gave before the first call are views of the parameters, as of any
    module, after it too."""
    model = made_anew(remote("affine"))
    held = model.state_dict()
    model(torch.ones(1, 3))
    with torch.no_grad():
        model.bias.fill_(7)
    assert held["bias"].tolist() == [7, 7]


def test_parameters_in_torchs_shared_memory_stay_there(
    session: Session, remote: Remote
) -> None:
    """After share_memory() other processes see what an optimizer does here, also once the model
    has been called."""
    model = remote("affine").share_memory()
    seen_elsewhere = model.bias.detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert model.bias.is_shared() and seen_elsewhere.data_ptr() == model.bias.data_ptr()
    torch.testing.assert_close(model(torch.zeros(1, 3))[0], model.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_can_be_cast(
    session: Session, remote: Remote, dtype: torch.dtype
) -> None:
    """to(dtype) casts the parameters, and the model then computes and is differentiated in that
    type."""
    model, x = remote("affine"), batch()
    expected = model(x)
    assert model.to(dtype) is model
    y = model(x.to(dtype))
    y.sum().backward()
    assert {
        y.dtype,
        *(x.dtype for x in model.parameters()),
        *(g.dtype for g in gradients(model).values()),
    } == {dtype}
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    assert all(is_in_slab(session, x) for x in model.parameters())
    torch.testing.assert_close(model.float()(x), expected, rtol=0.05, atol=0.05)


def test_a_module_can_be_cast_to_float64(
    x64_session: Session, x64_remote: Remote
) -> None:
    """double() makes a float64 model of it where the worker has x64."""
    model, x = x64_remote("perceptron").double(), batch().double()
    y = model(x)
    y.sum().backward()
    assert {y.dtype, *(g.dtype for g in gradients(model).values())} == {torch.float64}
    module, variables = perceptron
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
        assert_within(y, np.asarray(module.apply(wide, x.numpy())), 1e-12)


def test_float64_parameters_without_x64_are_an_error_naming_the_first(
    remote: Remote,
) -> None:
    """double() on a worker without x64 is refused at the call, by the parameter's path."""
    with pytest.raises(DTypeError, match=r"`params\.Dense_0\.bias`.*float64.*--x64"):
        remote("perceptron").double()(batch())


def test_a_parameter_of_another_shape_is_an_error_naming_it(any_lane: Remote) -> None:
    """A parameter whose shape was changed is refused before any data moves, with its path and
    both shapes."""
    model = any_lane("perceptron")
    model.params.Dense_1.kernel = nn.Parameter(torch.zeros(4, 2))
    with pytest.raises(
        SpecError, match=r"`params\.Dense_1\.kernel` has shape \[4, 2\].*\[5, 2\]"
    ):
        model(batch())


def test_functional_call_uses_other_parameters(remote: Remote) -> None:
    """torch.func.functional_call computes with the given tensors and is differentiable in them."""
    model = remote("affine")
    weights = {
        "weight": torch.ones(3, 2, requires_grad=True),
        "bias": torch.zeros(2, requires_grad=True),
    }
    y = torch.func.functional_call(model, weights, (batch(),))
    torch.testing.assert_close(y.detach(), batch().sum(1, keepdim=True).expand(-1, 2))
    y.sum().backward()
    assert weights["bias"].grad.eq(4).all() and not gradients(model)
    assert_within(
        model(batch()), np.asarray(reference("affine", batch().numpy())), 1e-6
    )


def test_a_pruned_or_normalised_weight_is_used(remote: Remote) -> None:
    """torch.nn.utils.parametrize works on its parameters."""
    model = remote("affine")
    nn.utils.parametrize.register_parametrization(model, "weight", _Doubled())
    expected = batch() @ (2 * torch.from_numpy(affine[1]["weight"])) + torch.from_numpy(
        affine[1]["bias"]
    )
    torch.testing.assert_close(model(batch()), expected)


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_parameters_outlive_their_session(jax_worker: Session) -> None:
    """After close() the model can still be read, saved, copied, cast and printed."""
    with connect(jax_worker.address) as session:
        model = RemoteJaxFunction(session, name="affine")
    torch.testing.assert_close(model.weight.detach().numpy(), affine[1]["weight"])
    assert torch.isfinite(model.state_dict()["bias"]).all()
    assert copy.deepcopy(model).bfloat16().bias.dtype is torch.bfloat16
    assert "affine" in repr(model)
