"""Models of the torch workers on the GPU."""

import torch
from torch import nn

from tests.gpu.on_gpu.machine import REHEARSED

_SIDE, _STEPS = (64, 3) if REHEARSED else (4096, 400)


def sine(x):
    return torch.sin(x) * 2


def unchanged(x):
    return x


def largest(x, rows):
    """Where each of these rows has its largest element."""
    return x[rows].argmax(-1)


def far(x):
    """An integer of more than 32 bits."""
    return (x.sum() * 0).long() + 2**40


def outer(x):
    """A large output from a small input."""
    return x[:, None] * x[None, :]


def late(x):
    """The input plus one, when the GPU has worked for a second or so."""
    work = torch.full((_SIDE, _SIDE), 1e-3, device=x.device)
    value = work
    for _ in range(_STEPS):
        value = torch.tanh(value @ work)
    return x + 1 + 0 * value[0, 0].to(x.dtype)


def broken(x):
    """Breaks the process's CUDA context: an assertion fails on the device."""
    return x[torch.full((1,), 1 << 30, device=x.device)]


class _Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x)


torch.manual_seed(0)
linear = _Linear()
