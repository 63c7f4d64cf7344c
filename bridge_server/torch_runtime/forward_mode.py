"""Forward-mode derivatives by torch.func, of functions from tensors to tensors."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Function = Callable[[Sequence[Tensor]], list[Tensor]]

# torch has one level of forward mode for all threads: another thread's jvp would end this thread's.
_pushing = threading.RLock()


class _NoGradStopsBoth(TorchFunctionMode):
    """Makes `torch.no_grad()` stop forward-mode derivatives too; in torch they pass through.

    Otherwise the two modes would differ, and a second derivative would depend on their order.
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
    # Grad mode is enabled so that the function mode sees where the code disables it.
    with _pushing, torch.enable_grad(), _NoGradStopsBoth():
        pushed = torch.func.jvp(
            lambda *xs: tuple(f(xs)), tuple(primals), tuple(tangents)
        )[1]
        return list(pushed)


def pushed_again(
    f: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> list[Tensor]:
    """Return the tangents of the outputs of a function that contains a forward-mode derivative.

    Computed as the pullback of the pullback, which is linear. In torch 2.13, the second derivative
    in forward mode of an autograd.Function with a `jvp` is silently zero.
    """
    if not primals:
        return [torch.zeros_like(y) for y in f(primals)]
    outputs, pull = torch.func.vjp(lambda *xs: tuple(f(xs)), *primals)[:2]
    zeros = tuple(map(torch.zeros_like, outputs))
    push = torch.func.vjp(pull, zeros)[1]
    (pushed,) = push(tuple(tangents))
    return list(pushed)
