"""Selects the device of this process's torch models."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from bridge_server.jax_runtime.meshes import Layout
from bridge_wire.errors import TargetError


def torch_device_of(targets: Iterable[Any]) -> str:
    """Return the device of the models' tensors; without tensors, JAX's default device.

    Raises:
      TargetError: the tensors are on several devices, one of which is a GPU.
    """
    devices = sorted(
        {str(tensor.device) for target in targets for tensor in _tensors_of(target)}
    )
    if not any(device.startswith("cuda") for device in devices):
        ordinal = (
            Layout({}).ordinal if not devices and torch.cuda.is_available() else None
        )
        return "cpu" if ordinal is None else f"cuda:{ordinal}"
    if len(devices) > 1:
        raise TargetError(
            f"the models' tensors are on {' and '.join(devices)}; put them on one device, or host"
            " each model in its own session"
        )
    return devices[0]


def _tensors_of(target: Any) -> Iterator[Tensor]:
    if isinstance(target, nn.Module):
        yield from target.parameters()
        yield from target.buffers()
    elif isinstance(target, tuple):
        for part in target:
            yield from _tensors_of(part)
    elif isinstance(target, Mapping):
        yield from (
            leaf for leaf in pytree.tree_leaves(target) if isinstance(leaf, Tensor)
        )
