"""Ranges of torch.profiler around the runs of programs, such as `bridge:model.forward`."""

import contextlib
from typing import Any

import torch

_is_on = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
_NOTHING = contextlib.nullcontext()


def profiled(program: Any) -> contextlib.AbstractContextManager[object]:
    """Return the range of a run: named if a profiler records, else none."""
    return (
        torch.profiler.record_function(f"bridge:{program.title}")
        if _is_on()
        else _NOTHING
    )
