"""Torch models for workers whose GPU is none: they run on the host, whose memory is the GPU's. Run in .venv-torch."""

from typing import Any

import torch
from torch import Tensor, nn

from bridge_server.torch_runtime import TorchRuntime
from bridge_wire.cuda import gpus

_view, _write = TorchRuntime.view, TorchRuntime.write


def _view_in_turn(self: TorchRuntime, pointer: int, spec: Any, owner: Any, turn: Any = None) -> Any:
    if turn is not None:
        turn.wait(None)
    return _view(self, pointer, spec, owner)


def _write_in_turn(self: TorchRuntime, array: Any, pointer: int, nbytes: int, turn: Any = None) -> None:
    if turn is None:
        _write(self, array, pointer, nbytes)
    else:
        source = array.detach().contiguous()
        turn.copy(pointer, source.data_ptr(), nbytes, source)


TorchRuntime.gpu = lambda self: gpus()[0]  # type: ignore[method-assign]
TorchRuntime.view = _view_in_turn  # type: ignore[method-assign]
TorchRuntime.write = _write_in_turn  # type: ignore[method-assign]


def scaled(x: Tensor, y: Tensor, *, by: float = 1.0) -> Tensor:
    """A product that needs all of its inputs, also the number."""
    return (x * y).sin() * by


def picked(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of these numbers, and where each has its largest element: integers of 64 bits both ways."""
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
