"""Ranges of torch.profiler around the runs of programs, such as `bridge:model.forward`."""

import contextlib
from typing import Any

import torch

from bridge_client.programs import Program

_is_on = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
_NOTHING = contextlib.nullcontext()


def profiled(program: Any) -> contextlib.AbstractContextManager[object]:
    """Return the range of a run: named if a profiler records, else none."""
    return torch.profiler.record_function(title_of(program)) if _is_on() else _NOTHING


def title_of(program: Program) -> str:
    """Return "bridge:MODEL.forward", "bridge:MODEL.vjp" and so on."""
    named: Program | None = program
    while named is not None and not named.request.call.model:
        named = named.origin
    model = "parameters" if named is None else named.request.call.model
    if program.is_pullback:
        return f"bridge:{model}.vjp"
    kinds = [str(t.WhichOneof("kind")) for t in program.request.call.transforms]
    return f"bridge:{model}.{'.'.join(kinds) or 'forward'}"
