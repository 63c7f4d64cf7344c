"""Torch models that a worker runs through XLA."""

import torch
from torch import nn

torch.manual_seed(0)
normed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
network = nn.Sequential(
    nn.Conv2d(2, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(27, 2)
).double()


def sine(x, *, scale=1.0):
    """The sine, scaled."""
    return torch.sin(x) * scale


class Coder(nn.Module):
    """A module with two methods."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2).double()

    def forward(self, x):
        return self.encode(x) * 2

    def encode(self, x):
        return self.linear(x)


coder = Coder()
