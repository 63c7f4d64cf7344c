"""What torch keeps for each thread, for calls that another thread makes."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch.autograd import forward_ad

_AUTOCAST_DEVICES = ("cpu", "cuda")


def autocast_is_on() -> bool:
    """Whether torch.autocast is, for any device."""
    return any(torch.is_autocast_enabled(device) for device in _AUTOCAST_DEVICES)


def is_bound_to_this_thread() -> bool:
    """Whether a call takes part in what only this thread knows of: a trace, a transform, hooks
    for saved tensors."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    )


def thread_state() -> Callable[[], AbstractContextManager[None]]:
    """Return what gives another thread the grad mode, inference mode and autocast that this one
    has now."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = [
        (device, torch.get_autocast_dtype(device))
        for device in _AUTOCAST_DEVICES
        if torch.is_autocast_enabled(device)
    ]

    @contextlib.contextmanager
    def inherited() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for device, dtype in autocast:
                stack.enter_context(torch.autocast(device, dtype))
            yield

    return inherited
