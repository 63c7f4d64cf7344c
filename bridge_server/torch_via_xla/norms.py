"""Batch and instance norm of traced torch code; torchax's own do not update the running statistics.

Imports torch only.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_PER_CHANNEL = [1, -1]


class _Statistics(NamedTuple):
    mean: Tensor
    var: Tensor


class _Affine(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute torch.nn.functional.batch_norm."""
    affine = _Affine(weight, bias)
    if not training and running_mean is not None and running_var is not None:
        running = _Statistics(running_mean, running_var)
        return _normalized(x, running, _PER_CHANNEL, affine, eps)
    count = math.prod(x.shape) // x.shape[1]
    if training and count == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {list(x.shape)}"
        )
    batch = _statistics(x, [0, *range(2, x.ndim)])
    _update(running_mean, batch.mean, momentum)
    _update(running_var, _unbiased(batch.var, count), momentum)
    return _normalized(x, batch, _PER_CHANNEL, affine, eps)


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute torch.nn.functional.instance_norm."""
    affine = _Affine(weight, bias)
    if not use_input_stats and running_mean is not None and running_var is not None:
        running = _Statistics(running_mean, running_var)
        return _normalized(x, running, _PER_CHANNEL, affine, eps)
    count = math.prod(x.shape[2:])
    instance = _statistics(x, list(range(2, x.ndim)))
    _update(running_mean, instance.mean.mean(0), momentum)
    _update(running_var, _unbiased(instance.var, count).mean(0), momentum)
    return _normalized(x, instance, list(x.shape[:2]), affine, eps)


def _statistics(x: Tensor, axes: list[int]) -> _Statistics:
    return _Statistics(x.mean(axes), x.var(axes, correction=0))


def _unbiased(var: Tensor, count: int) -> Tensor:
    return var * (count / max(count - 1, 1))


def _update(running: Tensor | None, new: Tensor, momentum: float) -> None:
    if running is not None:
        mixed = (1 - momentum) * running + momentum * new
        running.copy_(mixed.detach())


def _normalized(
    x: Tensor, statistics: _Statistics, lead: list[int], affine: _Affine, eps: float
) -> Tensor:
    """Normalize by statistics of the leading shape `lead`, then scale and shift each channel."""
    ones = [1] * (x.ndim - 2)
    mean = statistics.mean.reshape(lead + ones)
    var = statistics.var.reshape(lead + ones)
    channels = [*_PER_CHANNEL, *ones]
    y = (x - mean) * torch.rsqrt(var + eps)
    if affine.weight is not None:
        y = y * affine.weight.reshape(channels)
    if affine.bias is not None:
        y = y + affine.bias.reshape(channels)
    return y.to(x.dtype)
