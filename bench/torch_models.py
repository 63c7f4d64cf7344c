"""The torch models for calls from JAX, hosted by a worker and run in one process.

Never imports jax.
"""

import torch
from torch import Tensor, nn

from bench import LAYERS, WIDTH


def sine(x: Tensor) -> Tensor:
    """Equals models.sine."""
    return torch.sin(x) * 2


def mlp() -> nn.Sequential:
    """Return the network of models.mlp with other weights."""
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
