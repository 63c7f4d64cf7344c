"""Demo: trains a network of a PyTorch encoder in this process and a Flax head in a worker.

Run the demo with `make demo`. This process runs in .venv-torch, which has no JAX. The worker runs
digits_head.py in .venv-jax, which has no PyTorch. One torch optimizer trains the parameters of both
halves.
"""

import argparse
import copy
import importlib.util
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from bridge_client import Session, spawn
from bridge_client.torch import RemoteJaxFunction

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
PLOT = ROOT / "out" / "digits.png"
BATCH = 64
WANTED_ACCURACY = 0.97
TIMED_PAIRS = 100
REFRESH_EVERY = 20


def main() -> int:
    options = parse_options()
    torch.manual_seed(0)
    train, test = digits(options.device)
    models = {
        "model": "examples.digits_head:model",
        "environment": "examples.digits_head:environment",
    }
    worker = {"python": options.worker_python, "args": ["--device", options.device]}
    with spawn(jax_model=models, cwd=ROOT, lane=options.lane, **worker) as session:
        print_environments(RemoteJaxFunction(session, name="environment")())
        network = nn.Sequential(encoder(), RemoteJaxFunction(session, name="model")).to(
            options.device
        )
        losses, bytes_per_step = fit(
            network, batches(train, options.steps), options.steps, session
        )
        accuracy = accuracy_of(network, *test)
        save_losses(losses, options.losses)
        plot(losses, accuracy)
        print_summary(
            session, accuracy, bytes_per_step, *compare_with_torch(network, train)
        )
    return 0 if accuracy >= WANTED_ACCURACY else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a torch encoder and a Flax head on handwritten digits."
    )
    parser.add_argument(
        "--lane",
        choices=("local", "grpc"),
        help="transport to the worker (default: the fastest)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="device of both halves (default: %(default)s)",
    )
    parser.add_argument(
        "--worker-python",
        type=Path,
        default=ROOT / ".venv-jax/bin/python",
        help="the worker's interpreter (default: the one of .venv-jax)",
    )
    parser.add_argument(
        "--steps", type=int, default=800, help="training steps (default: %(default)s)"
    )
    parser.add_argument(
        "--losses",
        type=Path,
        metavar="FILE",
        help="write the loss of each step, one per line",
    )
    return parser.parse_args()


# The task -----------------------------------------------------------------------------------------


def digits(device: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return 1437 training images of 8x8 pixels and 360 test images, both with labels."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )
    train_x, test_x = (
        torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        for part in split[:2]
    )
    train_y, test_y = (torch.tensor(part, device=device) for part in split[2:])
    return (train_x.to(device), train_y), (test_x.to(device), test_y)


def batches(data: tuple[Tensor, Tensor], steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random batches, the same in every run."""
    images, labels = data
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        yield images[chosen], labels[chosen]


def encoder() -> nn.Module:
    """Return the torch half: image -> 1024 features."""
    first, second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
    return nn.Sequential(
        first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    )


def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), lr=1e-3)


def step(
    network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Take one training step; return the batch's loss and accuracy."""
    scores = network(images)
    loss = nn.functional.cross_entropy(scores, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), (scores.argmax(1) == labels).float().mean().item()


def fit(
    network: nn.Module,
    data: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    session: Session,
) -> tuple[list[float], float]:
    """Train; return the loss of each step and the copied bytes per step."""
    optimizer = optimizer_of(network)
    losses: list[float] = []
    recent: deque[float] = deque(maxlen=REFRESH_EVERY)
    before = session.stats()
    started = time.perf_counter()
    with tqdm(data, "training", total=steps, unit="step") as bar:
        for images, labels in bar:
            loss, accuracy = step(network, optimizer, images, labels)
            losses.append(loss)
            recent.append(accuracy)
            if len(losses) % REFRESH_EVERY == 0:
                calls = session.stats()["calls"] - before["calls"]
                speed = calls / (time.perf_counter() - started)
                shown = f"{sum(recent) / len(recent):.1%}"
                bar.set_postfix(
                    {
                        "loss": f"{loss:.3f}",
                        "accuracy": shown,
                        "calls/s": f"{speed:.0f}",
                    }
                )
    return losses, (session.stats()["bytes_copied"] - before["bytes_copied"]) / steps


@torch.no_grad()
def accuracy_of(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    hits: Tensor = network(images).argmax(1) == labels
    return float(hits.float().mean())


# The comparison -----------------------------------------------------------------------------------


def torch_twin_of(network: nn.Sequential) -> nn.Sequential:
    """Return a network with the same weights, entirely in torch."""
    weights, layers = dict(network[1].named_parameters()), []
    for name in ("params.Dense_0", "params.Dense_1"):
        kernel, bias = weights[f"{name}.kernel"], weights[f"{name}.bias"]
        layer = nn.Linear(*kernel.shape)
        layer.load_state_dict({"weight": kernel.detach().T, "bias": bias.detach()})
        layers.append(layer)
    twin = nn.Sequential(
        copy.deepcopy(network[0]), nn.Sequential(layers[0], nn.ReLU(), layers[1])
    )
    return twin.to(weights["params.Dense_0.bias"].device)


def compare_with_torch(
    network: nn.Sequential, data: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Continue training, alternating with a twin in torch; return both median seconds per step."""
    twin = torch_twin_of(network)
    torch.testing.assert_close(
        network(data[0][:BATCH]), twin(data[0][:BATCH]), rtol=1e-4, atol=1e-5
    )
    trained = [(model, optimizer_of(model)) for model in (network, twin)]
    seconds: list[list[float]] = [[], []]
    for batch in batches(data, TIMED_PAIRS):
        for (model, optimizer), times in zip(trained, seconds, strict=True):
            started = time.perf_counter()
            step(model, optimizer, *batch)
            times.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


# Output -------------------------------------------------------------------------------------------


def print_environments(worker: dict[str, Tensor]) -> None:
    """Print the frameworks that each process can import."""
    here = {
        name: importlib.util.find_spec(name) is not None for name in ("torch", "jax")
    }
    there = {name: bool(worker[name]) for name in ("torch", "jax")}
    sides = [("this process", os.getpid(), here), ("worker", int(worker["pid"]), there)]
    shown = [
        f"{side} {pid}: "
        + ", ".join(
            f"{name} {'yes' if has else 'no'}" for name, has in frameworks.items()
        )
        for side, pid, frameworks in sides
    ]
    print(" | ".join(shown), flush=True)


def print_summary(
    session: Session,
    accuracy: float,
    bytes_per_step: float,
    bridged_s: float,
    native_s: float,
) -> None:
    print(f"loss curve:       {PLOT.relative_to(ROOT)}")
    print(f"test accuracy:    {accuracy:.1%} (at least {WANTED_ACCURACY:.0%} expected)")
    print(f"lane and memory:  {session.lane}, {session.memory}")
    print(f"copied per step:  {bytes_per_step / 1024:.0f} KiB")
    if session.memory == "cuda_ipc":
        print(
            f"through the host: {session.stats()['bytes_through_host']} bytes of tensors on the GPU"
        )
    print(
        f"time per step:    {bridged_s * 1e3:.2f} ms; the same model entirely in torch"
        f" {native_s * 1e3:.2f} ms (ratio {bridged_s / native_s:.2f})"
    )


def save_losses(losses: Sequence[float], file: Path | None) -> None:
    """Write the losses so that two runs can be compared bit by bit."""
    if file is not None:
        file.write_text("".join(f"{loss!r}\n" for loss in losses))


def plot(losses: Sequence[float], accuracy: float) -> None:
    """Draw the loss and its moving average on a logarithmic scale."""
    window = max(1, min(25, len(losses) // 4))
    smooth = [
        sum(losses[i - window : i]) / window for i in range(window, len(losses) + 1)
    ]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.semilogy(losses, color="tab:blue", alpha=0.3, linewidth=1, label="each batch")
    axes.semilogy(
        range(window - 1, len(losses)),
        smooth,
        color="tab:blue",
        label=f"mean of {window} batches",
    )
    axes.set(
        xlabel="step",
        ylabel="cross-entropy",
        title=f"torch encoder + Flax head: {accuracy:.1%} on the test set",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
