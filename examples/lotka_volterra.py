"""Example: fits the Lotka-Volterra equations with a torch optimizer and a diffrax ODE solver.

Run the example after `make setup`: .venv-torch/bin/python examples/lotka_volterra.py

Data: the pelts of snowshoe hares and Canadian lynxes that the Hudson's Bay Company traded from 1900
to 1920, in thousands, after C. G. Hewitt, The Conservation of the Wild Life of Canada, 1921. The
error is multiplicative, as in B. Carpenter (2018, mc-stan.org, case study "Predator-Prey Population
Dynamics: the Lotka-Volterra model in Stan"). The fit therefore minimises the mean square of the
difference of the logarithms.
"""

import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from bridge_client import spawn
from bridge_client.torch import RemoteJaxFunction

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
PLOT = ROOT / "out" / "lotka_volterra.png"

YEARS = torch.arange(1900.0, 1921.0, dtype=torch.float64)
HARES = [30, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22, 25.4, 27.1, 40.3, 57, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]  # fmt: skip  # noqa: E501
LYNXES = [
    4,
    6.1,
    9.8,
    35.2,
    59.4,
    41.7,
    19,
    13,
    8.3,
    9.1,
    7.4,
    8,
    12.3,
    19.5,
    45.7,
    51.1,
    29.7,
    15.8,
    9.7,
    10.1,
    8.6,
]
DATA = torch.tensor([HARES, LYNXES], dtype=torch.float64).T

# Carpenter's posterior means, with the digits of the case study.
NAMES = ("alpha", "beta", "gamma", "delta", "hares in 1900", "lynxes in 1900")
LITERATURE = ("0.55", "0.028", "0.80", "0.024", "34.0", "5.9")


def main() -> None:
    with spawn(
        jax_model="examples.lotka_volterra_ode:populations",
        python=ROOT / ".venv-jax/bin/python",
        cwd=ROOT,
        args=["--x64"],
    ) as session:
        populations = RemoteJaxFunction(session)
        logs, evaluations = fit(populations)
        values = logs.exp()
        print_fit(values, loss_of(populations, logs), evaluations)
        fine = torch.linspace(1900, 1920, 401, dtype=torch.float64)
        plot(fine, populations(values[:4], values[4:], fine))


def first_guess() -> Tensor:
    """Return the logarithms of a guess from a period of ten years and the means of both series."""
    frequency = 2 * math.pi / 10  # the square root of alpha gamma
    # The equilibrium: gamma / delta hares, alpha / beta lynxes.
    hares, lynxes = DATA.mean(0)
    rates = torch.tensor(
        [frequency, frequency / lynxes, frequency, frequency / hares],
        dtype=torch.float64,
    )
    return torch.cat([rates, DATA[0]]).log()


def loss_of(populations: RemoteJaxFunction, logs: Tensor) -> Tensor:
    values = logs.exp()
    predicted: Tensor = populations(values[:4], values[4:], YEARS)
    return (predicted.log() - DATA.log()).square().mean()


def fit(populations: RemoteJaxFunction) -> tuple[Tensor, int]:
    """Return the logarithms of the fitted values, and the number of solver evaluations."""
    logs = first_guess().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logs], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = loss_of(populations, logs)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logs.detach(), evaluations


def print_fit(values: Tensor, loss: Tensor, evaluations: int) -> None:
    print(f"{'':16}{'fitted':>10}{'Carpenter 2018':>18}")
    for name, value, known in zip(NAMES, values.tolist(), LITERATURE, strict=True):
        print(f"{name:16}{value:10.3g}{known:>18}")
    print(
        f"root mean square error of the logarithms: {math.sqrt(loss):.3f}, after {evaluations}"
        " evaluations"
    )
    print(f"plot: {PLOT.relative_to(ROOT)}")


def plot(years: Tensor, fitted: Tensor) -> None:
    """Draw the fit as lines and the data as points."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (name, color) in enumerate((("hares", "tab:brown"), ("lynxes", "tab:blue"))):
        axes.plot(years, fitted[:, i], color=color, label=f"{name}: fit")
        axes.plot(
            YEARS,
            DATA[:, i],
            "o",
            color=color,
            markersize=5,
            label=f"{name}: pelts traded",
        )
    axes.set(
        xlabel="year",
        ylabel="thousands",
        title="Lotka-Volterra equations, fitted by torch through diffrax",
    )
    axes.set_xticks(range(1900, 1921, 5))
    axes.set_ylim(0, 95)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=2, loc="upper right")
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=150)


if __name__ == "__main__":
    main()
