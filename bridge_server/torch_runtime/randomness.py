"""Random numbers. torch draws from one generator per device for the whole process, whatever the thread.

So calls that draw run one after the other: then a call with a key of its own has its numbers to itself, and leaves the
others' as they were.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch

_drawing = threading.RLock()  # the backward pass of a checkpoint draws again, inside of a call that draws


@contextlib.contextmanager
def drawing(*, is_seeded: bool) -> Iterator[None]:
    """Let one call at a time draw; what a seeded one does to the generators ends with it."""
    with _drawing:
        if not is_seeded:
            yield
            return
        before = [(generator, generator.get_state()) for generator in _generators()]
        try:
            yield
        finally:
            for generator, state in before:
                generator.set_state(state)


def seed(key: torch.Tensor) -> None:
    """Begin the stream of random numbers that a key, uint32[2], names. Only while `drawing`."""
    high, low = key.tolist()
    number = _mixed(high << 32 | low)
    for generator in _generators():
        generator.manual_seed(number)


def _mixed(number: int) -> int:
    """Return 64 bits of which each depends on all of the number's: a CPU's generator looks at the last 32 only.

    The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def _generators() -> list[torch.Generator]:
    # Those of CUDA devices are there once CUDA is in use, as it is where models run on one.
    return [torch.default_generator, *torch.cuda.default_generators]
