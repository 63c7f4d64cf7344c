"""A Flax network with BatchNorm and dropout, trained from torch as it is in JAX alone."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bridge_client import Session, connect, spawn
from bridge_client.torch import RemoteJaxFunction
from tests.conftest import ROOT, python_of

TRAINED, BATCH, STEPS, LEARNING_RATE, SEED = 1200, 100, 60, 4e-3, 0


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, shuffled."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return (found.images[order] / 16).astype(np.float32), found.target[order].astype(
        np.int32
    )


@pytest.fixture(scope="module")
def batches() -> np.ndarray:
    """Which images each step sees."""
    rng = np.random.default_rng(1)
    epochs = [rng.permutation(TRAINED) for _ in range(STEPS * BATCH // TRAINED)]
    return np.concatenate(epochs).reshape(STEPS, BATCH)


@pytest.fixture(scope="module")
def in_jax(
    digits: tuple[np.ndarray, np.ndarray],
    batches: np.ndarray,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The training in JAX alone, in the worker's environment and beside the other one, and its
    result's file."""
    folder = tmp_path_factory.mktemp("resnet")
    images, labels = digits
    torch.manual_seed(SEED)
    keys = [torch.randint(0, 2**32, (2,), dtype=torch.uint32).numpy() for _ in batches]
    tested = images[TRAINED:]
    np.savez(
        folder / "data.npz",
        images=images,
        labels=labels,
        batches=batches,
        keys=keys,
        tested=tested,
    )
    command = [
        python_of(".venv-jax"),
        "-m",
        "tests.client.torch_client.resnet",
        folder / "data.npz",
        folder / "result.npz",
    ]
    with subprocess.Popen(command, cwd=ROOT) as process:
        yield process, folder / "result.npz"
        process.kill()


@pytest.fixture(scope="module")
def worker(in_jax: object) -> Iterator[Session]:
    """A worker that hosts the network."""
    target, python = "tests.client.torch_client.resnet:resnet", python_of(".venv-jax")
    with spawn(
        jax_model=target, python=python, cwd=ROOT, args=["--factory"]
    ) as session:
        yield session


@pytest.fixture
def session(worker: Session) -> Iterator[Session]:
    """A new session with that worker."""
    with connect(worker.address, lane="local") as session:
        yield session


def train(
    model: nn.Module, images: Tensor, labels: Tensor, batches: np.ndarray
) -> list[float]:
    """Return the losses."""
    torch.manual_seed(SEED)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=LEARNING_RATE)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            model(images[batch], train=True), labels[batch]
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_residual_network_trains_as_in_jax(
    session: Session,
    in_jax: tuple[subprocess.Popen[bytes], Path],
    digits: tuple[np.ndarray, np.ndarray],
    batches: np.ndarray,
) -> None:
    """From torch it classifies as many digits as after its training in JAX, within a point; the
    same seed gives the same losses.
    """
    images, labels = torch.from_numpy(digits[0]), torch.from_numpy(digits[1]).long()
    model, again = (
        RemoteJaxFunction(session, rngs="dropout", mutable=True) for _ in range(2)
    )
    losses = train(model, images, labels, batches)
    assert train(again, images, labels, batches[:20]) == losses[:20]
    with torch.no_grad():
        classes = model.eval()(images[TRAINED:], train=False).argmax(1)

    process, result = in_jax
    assert process.wait(60) == 0
    with np.load(result) as saved:
        expected = dict(saved)
    np.testing.assert_allclose(losses[:5], expected["losses"][:5], rtol=1e-3)
    accuracy, wanted = (
        float((seen == digits[1][TRAINED:]).mean())
        for seen in (classes.numpy(), expected["classes"])
    )
    assert wanted > 0.95
    assert abs(accuracy - wanted) <= 0.01
