"""The state of torch: compiling, tracing, transforming, in forward mode, or watched.

The only module that asks torch for it, since each mode is asked for in another way:

  compiling      torch.compile or torch.export traces this code
  jit tracing    torch.jit.trace records operators, and sizes are tensors
  transforms     torch.func's grad, vmap and jvp, which stack
  forward mode   dual tensors of torch.autograd.forward_ad
  legacy vmap    the vmap before torch.func, of is_grads_batched and vectorize=True
  dispatch       a mode or a tensor class watches the operators: FakeTensor, make_fx

torch passes on none of them to other threads; `thread_state` passes on grad mode, inference mode
and autocast.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import CGradInterpreterPtr, TransformType
from torch._guards import TracingContext
from torch.autograd import forward_ad

from bridge_client.arguments import NUMBERS, Values

# Types whose values have their memory in this process.
PLAIN = {
    Tensor,
    nn.Parameter,
    *NUMBERS,
}
_AUTOCAST_DEVICES = ("cpu", "cuda")

# The functions themselves: Dynamo knows them, and calls cost nothing more.
is_compiling = torch.compiler.is_compiling
is_exporting = torch.compiler.is_exporting
# The state of torch.jit.trace, None outside of it.
jit_trace = torch._C._get_tracing_state
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_are_transforms_active = torch._C._are_functorch_transforms_active
_transforms = torch._C._functorch.get_interpreter_stack


def is_in_graph() -> bool:
    """Whether torch.compile makes code of the operators that run now."""
    return TracingContext.try_get() is not None and not is_exporting()


def is_transforming() -> bool:
    """Whether tensors may be those of a torch.func transform, or dual ones: more than memory."""
    return _are_transforms_active() or forward_ad._current_level >= 0


def is_traced(inputs: Values) -> bool:
    """Whether an input has no memory in this process, or a mode watches the operators."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    return not PLAIN.issuperset(map(type, inputs)) and not all(map(_has_memory, inputs))


def is_cloned_by_operator(tensor: Tensor) -> bool:
    """Whether a copy of this tensor must be an operator that torch sees."""
    return is_compiling() or _are_transforms_active() or is_traced([tensor])


def is_autocast_on() -> bool:
    """Whether torch.autocast is on for any device."""
    return any(torch.is_autocast_enabled(device) for device in _AUTOCAST_DEVICES)


def is_bound_to_this_thread() -> bool:
    """Whether a call is part of a trace, a transform, or hooks for saved tensors: torch keeps all
    of them in this thread only."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or is_transforming()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    )


def unrecorded_level() -> int | None:
    """Return the level of torch.func's transforms from which downwards torch.no_grad forbids
    recording; None if there is no such level."""
    is_enabled = torch.is_grad_enabled()
    for transform in reversed(_transforms() or ()):
        if not is_enabled:
            return int(transform.level())
        # Grad mode as it was around this transform.
        if transform.key() == TransformType.Grad:
            is_enabled = CGradInterpreterPtr(transform).prevGradMode()
    return None if is_enabled else 0


def sole_grad_level() -> int | None:
    """Return the level of torch.func's grad or vjp where it is the only mode and records; None
    elsewhere."""
    transforms = _transforms() or ()
    if len(transforms) != 1 or transforms[0].key() != TransformType.Grad:
        return None
    is_watched = jit_trace() is not None or forward_ad._current_level >= 0
    if is_watched or not torch.is_grad_enabled():
        return None
    return int(transforms[0].level())


def legacy_vmap_level() -> int:
    """Return the innermost level of the vmap before torch.func."""
    level: int = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def thread_state() -> Callable[[], AbstractContextManager[None]]:
    """Return a context manager that gives another thread this one's grad mode, inference mode and
    autocast."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    enabled = filter(torch.is_autocast_enabled, _AUTOCAST_DEVICES)
    autocast = [(device, torch.get_autocast_dtype(device)) for device in enabled]

    @contextlib.contextmanager
    def inherited() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for device, dtype in autocast:
                stack.enter_context(torch.autocast(device, dtype))
            yield

    return inherited


def _has_memory(value: Any) -> bool:
    """Whether a value's memory is that of its class in C++, as of numbers and of most tensor
    classes that users write."""
    return (
        type(value) in PLAIN
        or type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
    )
