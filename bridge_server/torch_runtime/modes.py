"""What the caller has set for a thread of its process, and no model may notice: elsewhere it would
not, either.

A worker has threads of its own, and so does compiled code. Only a call in the caller's process and
thread could see inference mode, which would make all of its gradients zero, or autocast, which
would change its types.
"""

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch

_NOTHING: AbstractContextManager[None] = nullcontext()
_DEVICES = ("cpu", "cuda")


def without_callers_modes() -> AbstractContextManager[object]:
    """Return the context of code that must not see what its caller has set."""
    cast = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
    if not cast and not torch.is_inference_mode_enabled():
        return _NOTHING
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    for device in cast:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack
