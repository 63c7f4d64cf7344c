"""Forward-mode derivatives by torch.func, of functions of tensors to tensors."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Function = Callable[[Sequence[Tensor]], list[Tensor]]

# torch has one level of forward mode for all threads: another thread's jvp would end it in the
# middle of this one's.
_pushing = threading.RLock()


class _NoGradStopsBoth(TorchFunctionMode):
    """Has `torch.no_grad()` stop forward-mode derivatives as it does reverse-mode ones; torch has
    them pass through.

    Else the two would differ, and a second derivative would depend on which of them come first.
    """

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(*args)
        return function(*args, **(kwargs or {}))


def pushed_forward(
    f: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> list[Tensor]:
    """Return the tangents of the outputs."""
    if not primals:
        return [torch.zeros_like(y) for y in f(primals)]
    with (
        _pushing,
        torch.enable_grad(),
        _NoGradStopsBoth(),
    ):  # enabled, for the mode to see where it is not
        return list(torch.func.jvp(lambda *xs: tuple(f(xs)), tuple(primals), tuple(tangents))[1])


def pushed_again(
    f: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> list[Tensor]:
    """Return the tangents of the outputs of what is a forward-mode derivative itself, or made of
    one.

    By the pullback of the pullback, which is linear. Of an autograd.Function that has a `jvp`, a
    second derivative in forward mode is zero in torch 2.13, without a word.
    """
    if not primals:
        return [torch.zeros_like(y) for y in f(primals)]
    outputs, pull = torch.func.vjp(lambda *xs: tuple(f(xs)), *primals)[:2]
    push = torch.func.vjp(pull, tuple(map(torch.zeros_like, outputs)))[1]
    (pushed,) = push(tuple(tangents))
    return list(pushed)
