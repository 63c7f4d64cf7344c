"""Torch models for workers whose GPU is none: they run on the host, whose memory is the GPU's.

Run in .venv-torch.
"""

import torch
from torch import Tensor, nn

from bridge_server.torch_runtime import TorchRuntime
from tests.gpu import posing_torch

posing_torch.pose(setattr, TorchRuntime)


def scaled(x: Tensor, y: Tensor, *, by: float = 1.0) -> Tensor:
    """A product that needs all of its inputs, also the number."""
    return (x * y).sin() * by


def picked(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of these numbers, and where each has its largest element: integers of 64 bits
    both ways."""
    chosen = x[rows]
    return chosen * 2, chosen.argmax(-1)


def large(x: Tensor) -> Tensor:
    """An integer of more than 32 bits."""
    return (x.sum() * 0).long() + 2**40


class Network(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


network = Network()
