"""Tasks with remote functions beyond single gradients: batches, second derivatives, compiled code.

Imports torch.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from bridge_client import Session
from bridge_client.torch import RemoteJaxFunction

ROWS, WIDTH = 1000, 64
_AGREEMENT = 1e-4


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978846 * (x + 0.044715 * x**3)))


class _Chain(nn.Module):
    """Pointwise torch work around another function, written out so that torch.compile has work."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return (_gelu(self.middle(_gelu(x))) * x).sum()


def tasks(session: Session) -> Mapping[str, Callable[[], object]]:
    """Return each task by its name in `report.TASKS`.

    Raises:
      RuntimeError: two equivalent tasks disagree.
    """
    # Inductor's compile processes would remain.
    torch._inductor.config.compile_threads = 1
    sine = RemoteJaxFunction(session, name="sine")
    rows, x, direction = torch.randn(ROWS, WIDTH), torch.randn(256), torch.randn(256)
    made: dict[str, Callable[[], Tensor]] = {
        "vmap": lambda: vmap(sine)(rows),
        "loop": lambda: torch.stack([sine(row) for row in rows]),
        "hvp": lambda: _hvp(sine, x, direction),
        "native hvp": lambda: _hvp(lambda x: torch.sin(x) * 2, x, direction),
        "func.grad": lambda: grad(lambda x: sine(x).sum())(x),
        "autograd": _slope(sine, x),
    }
    for name in ("", "_tuple"):
        reset, step = (
            RemoteJaxFunction(session, name=each + name) for each in ("reset", "step")
        )
        made[f"state{name}"] = _loop(reset, step, x)
    for name, middle in (("with", sine), ("without", nn.Identity())):
        chain = _Chain(middle)
        made[f"eager {name}"] = _step(chain, x)
        made[f"compiled {name}"] = _step(torch.compile(chain, fullgraph=True), x)
    for one, other in (
        ("vmap", "loop"),
        ("hvp", "native hvp"),
        ("func.grad", "autograd"),
        ("compiled with", "eager with"),
        ("state", "state_tuple"),
    ):
        if not torch.allclose(
            made[one](), made[other](), rtol=_AGREEMENT, atol=_AGREEMENT
        ):
            raise RuntimeError(f"{one} disagrees with {other}")
    return made


def _loop(
    reset: Callable[[Tensor], Any], step: Callable[[Any], Any], x: Tensor
) -> Callable[[], Tensor]:
    """Return an episode of one step; its result is an array of the last state."""

    def episode() -> Tensor:
        state = step(reset(x))
        arrays = getattr(state, "arrays", state)
        return cast(Tensor, arrays[-1])

    return episode


def _hvp(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    def total(x: Tensor) -> Tensor:
        return f(x).sum()

    return jvp(grad(total), (x,), (direction,))[1]


def _slope(f: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(f(x).sum(), x)[0]


def _step(module: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    x = x.clone().requires_grad_()

    def step() -> Tensor:
        x.grad = None
        module(x).backward()
        return cast(Tensor, x.grad)

    return step
