"""Hides the modes of the caller's thread from models, as a worker process does.

A worker has threads of its own, and so has compiled code. Only a call in the caller's process and
thread could see inference mode, which would make all gradients zero, or autocast, which would
change types.
"""

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch

_NOTHING: AbstractContextManager[None] = nullcontext()
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
