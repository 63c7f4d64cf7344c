"""Torch models that a worker runs through XLA."""

import torch
from torch import nn

from tests.inproc.networks import ViT, made

torch.manual_seed(0)
normed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
vit = made(ViT)[0]


def sine(x, *, scale=1.0):
    """The sine, scaled."""
    return torch.sin(x) * scale
