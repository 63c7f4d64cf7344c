"""The torch models of these tests; the worker imports them from this file."""

import torch
from torch import nn


def rosenbrock(x, a=1.0, b=100.0):
    """A scalar with a curved valley."""
    return (b * (x[1:] - x[:-1] ** 2) ** 2 + (a - x[:-1]) ** 2).sum()


def damped(x, w):
    """Two results of different types."""
    y = torch.exp(-x) * w
    return {"y": y, "count": (x > 0).sum()}


def guarded(x):
    """Raises on all values that the worker makes up."""
    total = float(x.sum())
    if not 10 < total < 11:
        raise ValueError(f"the sum is {total}")
    return (x**2).sum()


def echo(tree):
    return tree


class Scored(nn.Module):
    """A scalar, with parameters and a buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64))
        self.register_buffer("shift", torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return ((x * self.weight + self.shift) ** 2).sum()


scored = Scored()
