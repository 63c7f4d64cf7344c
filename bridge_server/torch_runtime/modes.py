"""Contexts of models' code: without the caller's modes, or without torch's log of a trace.

A worker has threads of its own, and so has compiled code. Only a call in the caller's process and
thread could see inference mode, which would make all gradients zero, or autocast, which would
change types.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch

_NOTHING: AbstractContextManager[None] = nullcontext()
_FAKE_TENSORS = logging.getLogger("torch._subclasses.fake_tensor")
_DEVICES = ("cpu", "cuda")


def without_callers_modes() -> AbstractContextManager[object]:
    """Return the context of code that must not see its caller's modes."""
    cast = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
    if not cast and not torch.is_inference_mode_enabled():
        return _NOTHING
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    for device in cast:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


@contextlib.contextmanager
def without_fake_errors_logged() -> Iterator[None]:
    """Keep torch from logging this thread's errors of fake tensors.

    A model that fails on fake tensors runs on real ones, whose errors its caller gets.
    """
    thread = threading.get_ident()

    def is_logged(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or record.thread != thread

    _FAKE_TENSORS.addFilter(is_logged)
    try:
        yield
    finally:
        _FAKE_TENSORS.removeFilter(is_logged)
