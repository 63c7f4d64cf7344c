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
    for generator in _generators():
        generator.manual_seed(high << 32 | low)


def _generators() -> list[torch.Generator]:
    # Those of CUDA devices are there once CUDA is in use.
    return [torch.default_generator, *torch.cuda.default_generators]
