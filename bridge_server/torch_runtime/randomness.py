"""Random streams of calls. torch has one generator per device for all threads of a process.

So calls that draw run one at a time: a call with a key has its generator to itself, and restores
its state afterwards.

torch draws in the order of memory, and a derivative or a batch may use another layout than the call
itself. In such cases the bridge draws in row-major order, so that one key drops the same elements
in all programs of a call.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Reentrant: the backward pass of a checkpoint draws again, inside a call that draws.
_drawing = threading.RLock()


@contextlib.contextmanager
def drawing(*, is_seeded: bool, in_row_major_order: bool = False) -> Iterator[None]:
    """Let one call at a time draw; after a seeded call, restore the generators."""
    with _drawing, RowMajorDraws() if in_row_major_order else contextlib.nullcontext():
        if not is_seeded:
            yield
            return
        before = [(generator, generator.get_state()) for generator in _generators()]
        try:
            yield
        finally:
            for generator, state in before:
                generator.set_state(state)


class StreamAside:
    """A random stream beside torch's: it starts from torch's state, which stays unchanged."""

    def __init__(self) -> None:
        self._states: list[Tensor] = []

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        with drawing(is_seeded=True):
            generators = _generators()
            for generator, state in zip(generators, self._states, strict=False):
                generator.set_state(state)
            yield
            self._states = [generator.get_state() for generator in generators]


class RowMajorDraws(TorchDispatchMode):
    """Gives operators that draw row-major copies of their arguments."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not is_random(operator):
            return operator(*args, **kwargs)
        drawn_args, drawn_kwargs = pytree.tree_map_only(
            Tensor, _row_major, (args, kwargs)
        )
        outputs = operator(*drawn_args, **drawn_kwargs)
        for i, argument in enumerate(operator._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            if i < len(args):
                target = args[i]
                drawn = drawn_args[i]
            else:
                target = kwargs[argument.name]
                drawn = drawn_kwargs[argument.name]
            if drawn is not target:
                target.copy_(drawn)
                outputs = target if outputs is drawn else outputs
        return outputs


def is_random(operator: Any) -> bool:
    """Return whether an operator may draw; attention has the tag with and without dropout."""
    tags: Sequence[Any] = getattr(operator, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def _row_major(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if tensor.layout is torch.strided else tensor


def seed(key: torch.Tensor) -> None:
    """Seed the generators with a key, uint32[2]. Only while `drawing`."""
    high, low = key.tolist()
    number = _mixed(high << 32 | low)
    for generator in _generators():
        generator.manual_seed(number)


def _mixed(number: int) -> int:
    """Return 64 bits, each dependent on all bits of the number.

    A CPU's generator uses the last 32 bits only. The finalizer of SplitMix64 (Steele, Lea and
    Flood, 2014).
    """
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def _generators() -> list[torch.Generator]:
    # CUDA's generators exist once CUDA is in use, as it is if models run on a GPU.
    return [torch.default_generator, *torch.cuda.default_generators]
