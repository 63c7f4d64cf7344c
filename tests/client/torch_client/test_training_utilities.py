"""What torch offers around training: optimizers, parametrizations, averages, accumulation,
checkpoints, files."""

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.prune import l1_unstructured
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from bridge_client import Session
from bridge_client.torch import RemoteJaxFunction
from tests.client.torch_client.conftest import Remote


class Affine(nn.Module):
    """The remote model "affine" in torch."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in weights.items():
            setattr(self, name, nn.Parameter(value.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def rows(n: int = 4) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :2].sin()).square().mean()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4
) -> list[float]:
    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, rows())
        loss.backward()
        return loss.item()

    return [optimizer.step(closure) for _ in range(steps)]


def assert_same_weights(seen: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(
        seen.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5
    )


@pytest.fixture
def pair(remote: Remote) -> tuple[RemoteJaxFunction, Affine]:
    """A remote model, and the same in torch."""
    model = remote("affine")
    return model, Affine(dict(model.named_parameters()))


# Optimizers ---------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    **{
        f"{name}, {kind}": partial(getattr(torch.optim, name), lr=0.05, **{kind: True})
        for name in ("SGD", "Adam", "AdamW", "Adagrad")
        for kind in ("foreach", "fused")
    },
    "RMSprop": partial(torch.optim.RMSprop, lr=0.05),
    "LBFGS": partial(torch.optim.LBFGS, lr=0.5, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_train_it_as_a_torch_module(
    session: Session, pair: tuple[RemoteJaxFunction, Affine], name: str
) -> None:
    """Each optimizer, foreach and fused ones too, takes the steps that it takes with the same model
    in torch, and leaves the parameters where they are.
    """
    model, twin = pair
    places = [p.data_ptr() for p in model.parameters()]
    losses, expected = (
        train(m, OPTIMIZERS[name](m.parameters())) for m in (model, twin)
    )
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
    assert_same_weights(model, twin)
    assert [p.data_ptr() for p in model.parameters()] == places


def test_an_optimizer_resumes_from_its_state(remote: Remote) -> None:
    """The states of model and optimizer, saved and loaded by torch with weights_only, continue
    the same training."""
    model, resumed = remote("affine"), remote("affine")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    train(model, optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = torch.optim.Adam(resumed.parameters(), lr=0.05)
    resumed.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    assert train(resumed, again) == train(model, optimizer)


# Batches ------------------------------------------------------------------------------------------


def test_gradients_of_parts_add_up_to_the_batch_s(remote: Remote) -> None:
    """Losses of four parts of a batch, each divided by four, leave the gradients of the whole;
    clipped, they agree."""
    model, whole = remote("affine"), remote("affine")
    loss_of(whole, rows(8)).backward()
    for part in rows(8).chunk(4):
        (loss_of(model, part) / 4).backward()
    for by_value in (False, True):
        for seen, wanted in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(seen.grad, wanted.grad)
        if not by_value:
            norms = [
                nn.utils.clip_grad_norm_(m.parameters(), 0.1, foreach=True)
                for m in (model, whole)
            ]
            torch.testing.assert_close(*norms)
    nn.utils.clip_grad_value_(model.parameters(), 0.01)
    assert all(p.grad.abs().max() <= 0.01 for p in model.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_parts_of_a_sequential(
    session: Session, remote: Remote, use_reentrant: bool
) -> None:
    """checkpoint_sequential over remote and local layers gives the gradients of the layers, and
    keeps no residual."""
    model = nn.Sequential(
        nn.Linear(3, 3), remote("sine"), nn.Linear(3, 3), remote("affine")
    )
    x = rows().requires_grad_()
    y = checkpoint_sequential(model, 2, x, use_reentrant=use_reentrant).square().mean()
    assert session.stats()["residuals"] == 1  # the last part runs plainly
    y.backward()
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().mean(), leaves)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))
    del y
    assert session.stats()["residuals"] == 0


def test_submitted_calls_can_be_checkpointed(session: Session, remote: Remote) -> None:
    """Under torch.utils.checkpoint a submitted call is made at once, so that it is recomputed
    too."""
    sine, x = remote("sine"), rows().requires_grad_()
    y = checkpoint(lambda x: sine.submit(sine(x)).result(), x, use_reentrant=False)
    assert session.stats()["residuals"] == 0
    y.sum().backward()
    torch.testing.assert_close(
        x.grad, 4 * (2 * x.detach().sin()).cos() * x.detach().cos()
    )


# Parametrizations ---------------------------------------------------------------------------------

PARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": weight_norm,
    "weight_norm of an axis": partial(weight_norm, dim=1),
    "orthogonal": orthogonal,
    "spectral_norm": lambda module: spectral_norm(module.eval()),
    "pruning": lambda module: l1_unstructured(module, "weight", 2),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrized_weights_train(
    pair: tuple[RemoteJaxFunction, Affine], name: str
) -> None:
    """A parametrized weight trains as in torch: weight_norm, orthogonal, spectral_norm, and what
    pruning does."""
    for module in pair:
        torch.manual_seed(0)
        PARAMETRIZED[name](module)
    model, twin = pair
    torch.testing.assert_close(model(rows()), twin(rows()))
    losses, expected = (train(m, torch.optim.SGD(m.parameters(), lr=0.1)) for m in pair)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert_same_weights(model, twin)


def test_a_list_of_parametrizations(remote: Remote) -> None:
    """Several parametrizations of one's own on one tensor, deep in a model, apply in order;
    removed, they are kept."""

    class Scaled(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.tensor(by))

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.by

    model, plain = remote("perceptron"), remote("perceptron")
    dense = model.params.Dense_1
    for by in (2.0, 3.0):
        parametrize.register_parametrization(dense, "kernel", Scaled(by))
    assert isinstance(dense.parametrizations.kernel, parametrize.ParametrizationList)
    with torch.no_grad():
        plain.params.Dense_1.kernel.mul_(6)
    torch.testing.assert_close(model(rows()), plain(rows()))
    model(rows()).sum().backward()
    assert all(p.grad is not None for p in dense.parametrizations.kernel.parameters())
    with parametrize.cached():
        torch.testing.assert_close(model(rows()), plain(rows()))
    parametrize.remove_parametrizations(dense, "kernel")
    torch.testing.assert_close(model(rows()), plain(rows()))
    assert isinstance(dense.kernel, nn.Parameter)


def test_a_parametrized_model_can_be_copied(remote: Remote) -> None:
    """deepcopy of a model whose weight is parametrized gives an independent one, as
    AveragedModel needs."""
    model = weight_norm(remote("affine"))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(
        copied(rows()), (model(rows()) - model.bias) * 2 + 2 * model.bias
    )
    assert AveragedModel(model)(rows()).shape == (4, 2)


# Averages -----------------------------------------------------------------------------------------


def test_moving_averages_of_the_weights(pair: tuple[RemoteJaxFunction, Affine]) -> None:
    """AveragedModel keeps an exponential moving average of the parameters, which calls the
    worker on its own."""
    averages = []
    for model in pair:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            train(model, optimizer, steps=1)
            average.update_parameters(model)
        averages.append(average)
    assert_same_weights(*averages)
    torch.testing.assert_close(averages[0](rows()), averages[1](rows()))
    assert not torch.equal(averages[0](rows()), pair[0](rows()))
    update_bn([rows()], averages[0])  # has nothing to update, and no complaint


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["normed", "perceptron"])
def test_weights_go_through_safetensors(
    remote: Remote, tmp_path: Path, name: str
) -> None:
    """safetensors saves and loads a model's parameters and buffers, as a state dict and as a
    model."""
    source, first, second = (remote(name) for _ in range(3))
    with torch.no_grad():
        for x in (*source.parameters(), *source.buffers()):
            x.add_(0.25)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "dict.safetensors")
    safetensors.torch.save_model(source, str(tmp_path / "model.safetensors"))
    first.load_state_dict(safetensors.torch.load_file(tmp_path / "dict.safetensors"))
    assert safetensors.torch.load_model(
        second, str(tmp_path / "model.safetensors")
    ) == (set(), [])  # type: ignore[comparison-overlap]
    for loaded in (first, second):
        torch.testing.assert_close(
            dict(loaded.state_dict()), dict(source.state_dict()), rtol=0, atol=0
        )
        assert torch.equal(loaded(rows()), source(rows()))


def test_weights_are_vectors_too(remote: Remote) -> None:
    """parameters_to_vector and back leave a model that works."""
    model = remote("affine")
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 2, model.parameters())
    torch.testing.assert_close(model(rows()), rows() @ model.weight + model.bias)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), vector * 2)


def test_a_profiler_shows_the_calls_by_name(remote: Remote) -> None:
    """The forward and the backward of a call, and a batched call."""
    f = remote("sine")
    x = torch.ones(3, requires_grad=True)
    f(x).sum().backward()
    with torch.profiler.profile() as profile:
        f(x).sum().backward()
        torch.vmap(f)(torch.ones(2, 3))
    names = {event.key for event in profile.key_averages()}
    assert {"bridge:sine.forward", "bridge:sine.vjp", "bridge:sine.vmap"} <= names
