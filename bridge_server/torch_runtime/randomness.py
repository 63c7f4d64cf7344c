"""Random numbers. torch draws from one generator per device for the whole process, whatever the
thread.

So calls that draw run one after the other: then a call with a key of its own has its numbers to
itself, and leaves the others' as they were.

torch draws in the order of memory, and a derivative or a batch of a call may lay a tensor out in
another way than the call itself. Where that can be, numbers are drawn in row-major order, so that
one key drops the same elements in all.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_drawing = (
    threading.RLock()
)  # the backward pass of a checkpoint draws again, inside of a call that draws


@contextlib.contextmanager
def drawing(*, is_seeded: bool, in_row_major_order: bool = False) -> Iterator[None]:
    """Let one call at a time draw; what a seeded one does to the generators ends with it."""
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
    """A stream of random numbers of its own: it begins as torch's stands now, and torch's goes
    on as if unused."""

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
    """Has operators that draw see row-major tensors only, whatever the layout of those that they
    are given."""

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
        drawn_args, drawn_kwargs = pytree.tree_map_only(Tensor, _row_major, (args, kwargs))
        outputs = operator(*drawn_args, **drawn_kwargs)
        for i, argument in enumerate(operator._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given, drawn = (
                    (args[i], drawn_args[i])
                    if i < len(args)
                    else (kwargs[argument.name], drawn_kwargs[argument.name])
                )
                if drawn is not given:
                    given.copy_(drawn)
                    outputs = given if outputs is drawn else outputs
        return outputs


def is_random(operator: Any) -> bool:
    """Whether an operator draws numbers. Attention bears torch's tag with and without dropout."""
    return torch.Tag.nondeterministic_seeded in operator.tags


def _row_major(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if tensor.layout is torch.strided else tensor


def seed(key: torch.Tensor) -> None:
    """Begin the stream of random numbers that a key, uint32[2], names. Only while `drawing`."""
    high, low = key.tolist()
    number = _mixed(high << 32 | low)
    for generator in _generators():
        generator.manual_seed(number)


def _mixed(number: int) -> int:
    """Return 64 bits of which each depends on all of the number's: a CPU's generator looks at the
    last 32 only.

    The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def _generators() -> list[torch.Generator]:
    # Those of CUDA devices are there once CUDA is in use, as it is where models run on one.
    return [torch.default_generator, *torch.cuda.default_generators]
